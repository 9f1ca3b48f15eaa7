import copy

import pytest
import torch

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.utils.hashing import fingerprint, has_adapters, same_network, state_fingerprint
from tests.emoji import sample_latents


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.LayerNorm(50), torch.nn.Linear(50, 30)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_are_the_same_network(dtype):
    assert all(same_network(fingerprint(network(k)), fingerprint(network(k, dtype))) for k in range(300))


def test_networks_of_other_weights_or_shapes_differ():
    prints = [fingerprint(network(k)) for k in range(100)]
    assert not any(same_network(prints[0], other) for other in prints[1:])
    assert not same_network(fingerprint(torch.nn.Linear(3, 4)), fingerprint(torch.nn.Linear(4, 3)))
    assert not same_network("CLIPTextModel-0123456789ab", "T5EncoderModel-0123456789ab")
    assert not same_network(prints[0], prints[0] + ", with padding")


def test_network_with_infinite_values_has_a_fingerprint():
    broken = network()
    broken[0].weight.data[0, :2] = torch.tensor([float("nan"), float("inf")])
    assert same_network(fingerprint(broken), fingerprint(copy.deepcopy(broken)))


def test_a_compiled_network_is_the_same():
    compiled = torch.compile(network(), backend="eager")
    assert fingerprint(compiled) == fingerprint(network())
    assert state_fingerprint(compiled) == state_fingerprint(network())


def test_network_without_values_may_be_any_of_its_architecture():
    meta = fingerprint(copy.deepcopy(network()).to("meta"))
    assert "(" not in meta
    assert same_network(meta, fingerprint(network()))
    assert not same_network(meta, fingerprint(torch.nn.Linear(3, 4)))


def test_fingerprint_of_a_class_alone_is_any_network_of_this_class():
    known = fingerprint(network())
    assert same_network("Sequential", known)
    assert not same_network("Linear", known)
    assert not same_network("Sequential", known + ", with padding")
    assert not same_network("my-encoder", "my")


def test_state_is_that_of_all_weights_and_of_plain_settings_of_parts():
    prints = {state_fingerprint(network())}
    for change in (
        lambda n: n[1].bias.data.add_(1e-3),  # a part that the projections do not read
        lambda n: n[2].weight.data.mul_(1.0001),
        lambda n: setattr(n[0], "scaling", {"style": 0.5}),
        lambda n: setattr(n[1], "eps", 1e-4),
        lambda n: n.half(),
    ):
        changed = network()
        change(changed)
        prints.add(state_fingerprint(changed))
    assert len(prints) == 6


def test_state_is_read_through_compilation_and_offloading(pipe):
    plain = network()
    assert state_fingerprint(torch.compile(plain)) == state_fingerprint(plain)
    known = state_fingerprint(pipe.unet)
    moved = load_demo_pipeline()
    moved.enable_sequential_cpu_offload(device="cpu")
    assert state_fingerprint(moved.unet) == known


def test_state_of_weights_that_cannot_be_read_is_unknown():
    assert state_fingerprint(network().to("meta")) is None


def test_adapters_are_seen_until_they_are_deleted():
    peft = pytest.importorskip("peft")
    unet = load_demo_pipeline().unet
    assert not has_adapters(unet)
    assert not has_adapters(None)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    assert has_adapters(unet)
    unet.disable_adapters()
    assert has_adapters(unet)
    unet.delete_adapters("style")
    assert not has_adapters(unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_is_shared_between_precisions(pipe, dtype):
    guide = SPARKE(1.0)
    sample_latents(pipe, guide=guide, steps=2)
    half = load_demo_pipeline(dtype)
    again = SPARKE(1.0, memory=guide.memory)
    sample_latents(half, guide=again, steps=2)
    assert len(guide.memory) == 6


def test_memory_is_shared_with_sequential_offloading(pipe):
    from accelerate import cpu_offload

    guide, offloaded = SPARKE(1.0), load_demo_pipeline()
    sample_latents(pipe, guide=guide, steps=2)
    for module in (offloaded.unet, offloaded.vae, offloaded.text_encoder):
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    sample_latents(offloaded, guide=SPARKE(1.0, memory=guide.memory), steps=2)
    assert len(guide.memory) == 6


def test_encoder_is_read_once(monkeypatch):
    from kspec_guidance.loop import observer

    pipe, calls = load_demo_pipeline(), []
    monkeypatch.setattr(observer, "fingerprint", lambda m: calls.append(m) or "encoder")
    guide = SPARKE(1.0)
    for _ in range(3):
        sample_latents(pipe, guide=guide, steps=2)
    assert len(calls) == 1
