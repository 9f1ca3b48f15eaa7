"""The nodes against the interface of ComfyUI and Forge, with stand-ins for both."""

import asyncio
import functools
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from kspec_guidance.objectives import Witness

NODES = Path(__file__).parents[2] / "integrations" / "comfyui"
SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])


class Any_:
    """An input or output of any kind: what it was made with."""

    def __init__(self, *args, **kwargs):
        self.id, self.options = args[0] if args else None, kwargs


class Kind:
    Input = Output = Any_


class ComfyNode:
    @classmethod
    def GET_SCHEMA(cls):
        return cls.define_schema()


class NodeOutput(types.SimpleNamespace):
    def __init__(self, *args, ui=None):
        super().__init__(args=args, ui=ui)


class Schema(types.SimpleNamespace):
    pass


def stand_ins(tmp_path):
    io = types.SimpleNamespace(
        ComfyNode=ComfyNode, NodeOutput=NodeOutput, Schema=Schema, Custom=lambda name: Kind,
        **dict.fromkeys(
            [
                "Model", "Float", "Int", "String", "Boolean", "Combo", "Conditioning", "Vae", "Image", "Latent", "Clip",
                "ClipVision",
            ],
            Kind,
        ),
    )  # fmt: skip
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ui = io, types.SimpleNamespace(PreviewText=lambda text: text)
    latest.ComfyExtension = type("ComfyExtension", (), {})
    samplers = types.ModuleType("comfy.samplers")
    samplers.KSampler = types.SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["simple"])
    paths = types.ModuleType("folder_paths")
    paths.get_output_directory = lambda: str(tmp_path)
    nodes = types.ModuleType("nodes")
    nodes.common_ksampler = common_ksampler
    return {
        "comfy_api": types.ModuleType("comfy_api"), "comfy_api.latest": latest, "comfy": types.ModuleType("comfy"),
        "comfy.samplers": samplers, "folder_paths": paths, "nodes": nodes,
    }  # fmt: skip


class Sampling:
    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * sigma + latent_image


class Model:
    """A model patcher: ``clone`` copies the functions, as in ComfyUI and Forge."""

    wrapped = True  # whether it announces runs, as ComfyUI does

    def __init__(self):
        self.functions, self.wrappers = [], []
        self.model = types.SimpleNamespace(model_sampling=Sampling(), process_latent_in=lambda x: x * 0.5)

    def clone(self):
        copied = type(self)()
        copied.functions, copied.wrappers = list(self.functions), list(self.wrappers)
        return copied

    def set_model_sampler_post_cfg_function(self, function, disable_cfg1_optimization=False):
        assert not disable_cfg1_optimization  # at CFG 1 the negative prompt is still skipped
        self.functions.append(function)

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        assert wrapper_type == "sampler_sample"
        self.wrappers.append(wrapper)


class ForgeModel(Model):
    add_wrapper_with_key = property()

    def __init__(self):
        super().__init__()
        self.model = types.SimpleNamespace(predictor=Sampling())


def sample(model, x, cond=None, sigmas=SIGMAS, said=True):
    """Euler's method, with the calls that a sampler of ComfyUI makes."""
    options = {"transformer_options": {"sample_sigmas": sigmas} if said else {}}

    def loop(guider, sigmas, x):
        for k in range(len(sigmas) - 1):
            x0 = torch.tanh(x)
            for function in model.functions:
                x0 = function({
                    "denoised": x0, "cond": cond, "uncond": None, "cond_scale": 1.0, "model": model.model,
                    "uncond_denoised": None, "cond_denoised": x0, "sigma": sigmas[k].expand(len(x)),
                    "model_options": options, "input": x,
                })  # fmt: skip
            x = x0 + sigmas[k + 1] / sigmas[k] * (x - x0)
        return x

    run = loop
    for wrapper in model.wrappers:
        run = functools.partial(wrapper, run)
    return run(None, sigmas, x)


def common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=1.0):
    shape = latent["samples"].shape
    x = 8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ({"samples": sample(model, x, positive)},)


class Vae:
    def encode(self, pixels):
        assert pixels.shape[0] == 1  # autoencoders of clips take a batch as a clip
        return torch.nn.functional.interpolate(pixels.movedim(-1, 1), size=(8, 8))[:, [0, 1, 2, 0]] * 2 - 1

    def decode(self, samples):
        return torch.nn.functional.interpolate(samples[:, :3], scale_factor=4).movedim(1, -1) * 0.5 + 0.5


def noise(n=4, shape=(4, 6, 6), seed=0):
    return 8 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def prompt(k):
    return [{"cross_attn": torch.ones(1, 3, 4), "pooled_output": torch.nn.functional.one_hot(torch.tensor([k]), 5).float()}]


@pytest.fixture
def kspec(tmp_path, monkeypatch):
    for name, module in stand_ins(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location(
        "kspec_of_test", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kspec_of_test", module)
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.startswith("kspec_of_test")]:
        del sys.modules[name]


def run(kspec, node, **inputs):
    return kspec.NODE_CLASS_MAPPINGS[f"KSpec{node}"].execute(**inputs).args


def test_both_ways_to_register_give_the_same_nodes(kspec):
    extension = asyncio.run(kspec.comfy_entrypoint())
    assert asyncio.run(extension.get_node_list()) == list(kspec.NODE_CLASS_MAPPINGS.values())
    assert set(kspec.NODE_DISPLAY_NAME_MAPPINGS) == set(kspec.NODE_CLASS_MAPPINGS)
    assert all(name.startswith("KSpec") for name in kspec.NODE_CLASS_MAPPINGS)


def test_arguments_of_execute_are_the_inputs_of_the_schema(kspec):
    for node in kspec.NODE_CLASS_MAPPINGS.values():
        code = node.execute.__func__.__code__
        assert list(code.co_varnames[1 : code.co_argcount]) == [i.id for i in node.GET_SCHEMA().inputs]


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 3, 6, 6), (9, 8), (1, 90)])
def test_diversity(kspec, shape):
    model = Model()
    plain = sample(model, noise(shape=shape))
    (idle,) = run(kspec, "Diversity", model=model, variety=0.0, seed=0)
    (guided,) = run(kspec, "Diversity", model=model, variety=60.0, seed=0)
    assert torch.equal(sample(idle, noise(shape=shape)), plain)
    moved = sample(guided, noise(shape=shape))
    assert not torch.equal(moved, plain)
    assert torch.equal(sample(guided, noise(shape=shape)), moved)  # without a memory nothing is kept from run to run
    assert not model.functions
    assert not model.wrappers


def test_memory_and_prompts(kspec):
    (memory,) = run(kspec, "LoadMemory", name="m", from_file=False)
    (guided,) = run(kspec, "Diversity", model=Model(), variety=60.0, seed=0, memory=memory)
    plain = sample(Model(), noise(1, seed=1))
    sample(guided, noise(1), prompt(0))
    torch.testing.assert_close(sample(guided, noise(1, seed=1), prompt(1)), plain)
    assert not torch.allclose(sample(guided, noise(1, seed=1), prompt(0)), plain)
    grouped = [[torch.ones(1, 3, 4), {"pooled_output": prompt(3)[0]["pooled_output"]}]]
    (other,) = run(kspec, "Diversity", model=Model(), variety=60.0, seed=0, memory=memory, conditioning=grouped)
    torch.testing.assert_close(sample(other, noise(1, seed=1), prompt(0)), plain)
    assert len(memory) == 4


def test_memory_is_saved_loaded_and_cleared(kspec, tmp_path):
    node = kspec.NODE_CLASS_MAPPINGS["KSpecLoadMemory"]
    (memory,) = run(kspec, "LoadMemory", name="m", from_file=False)
    before = node.fingerprint_inputs("m", False)
    assert before == node.fingerprint_inputs("m", False)
    (guided,) = run(kspec, "Diversity", model=Model(), variety=60.0, seed=0, memory=memory)
    sample(guided, noise())
    assert node.fingerprint_inputs("m", False) != before  # so the workflow runs again
    images = torch.rand(4, 8, 8, 3)
    assert run(kspec, "SaveMemory", memory=memory, images=images, name="m")[0] is images
    assert [p.name for p in (tmp_path / "kspec" / "m").iterdir()] == ["4x6x6.safetensors"]
    run(kspec, "ClearMemory", memory=memory)
    assert len(memory) == 0
    assert len(run(kspec, "LoadMemory", name="m", from_file=True)[0]) == 4
    for name in ("../m", "", "a/b", "C:\\x", "/m"):
        with pytest.raises(ValueError, match="memory's name"):
            run(kspec, "SaveMemory", memory=memory, images=images, name=name)


def test_match_reference(kspec):
    model, images = Model(), torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    for shape in ((4, 6, 6), (4, 3, 6, 6)):
        plain = sample(model, noise(shape=shape))
        found = [
            run(kspec, "MatchReference", model=model, vae=Vae(), images=images, scale=s, stop=0.6)[0] for s in (0.0, 0.7)
        ]
        assert torch.equal(sample(found[0], noise(shape=shape)), plain)
        assert not torch.equal(sample(found[1], noise(shape=shape)), plain)
    with pytest.raises(ValueError, match="connect the VAE of the model"):
        sample(found[1], noise(shape=(1, 90)))


class Clip:
    """Encodes a prompt by its length."""

    def tokenize(self, text):
        return len(text)

    def encode_from_tokens_scheduled(self, tokens):
        return prompt(tokens % 5)


def test_match_reference_with_a_baseline(kspec):
    """A single image moves along the witness of both sets, which are in the space of the sampler."""
    model, images = Model(), torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    settings = {
        "model": model, "clip": Clip(), "latent": {"samples": torch.zeros(2, 4, 8, 8)}, "seed": 3, "steps": 4, "cfg": 1.0,
        "sampler_name": "euler", "scheduler": "simple",
    }  # fmt: skip
    baseline, again = (run(kspec, "Baseline", images=12, prompts="", **settings)[0] for _ in range(2))
    assert baseline["samples"].shape == (12, 4, 8, 8)
    assert len(torch.unique(baseline["samples"], dim=0)) == 12
    assert torch.equal(baseline["samples"], again["samples"])
    few = run(kspec, "Baseline", images=8, prompts=" a\n\nfour\nb ", **settings)[0]["samples"]
    assert few.shape == (8, 4, 8, 8)
    matched = {"model": model, "vae": Vae(), "images": images, "stop": 0.6}
    x = noise(1, (4, 8, 8))
    toward, alone = (
        sample(run(kspec, "MatchReference", scale=1.0, **matched, **more)[0], x) for more in ({"baseline": baseline}, {})
    )
    assert not torch.equal(toward, alone)
    idle = run(kspec, "MatchReference", scale=0.0, baseline=baseline, **matched)[0]
    assert torch.equal(sample(idle, x), sample(model, x))
    latents = torch.cat([Vae().encode(images[k : k + 1]) for k in range(3)])
    witness = Witness(0.5 * latents, 0.5 * baseline["samples"])  # as the model's process_latent_in has them
    value = {name: witness.value(s.flatten(1)) for name, s in {"toward": toward, "plain": sample(model, x)}.items()}
    assert value["toward"] > value["plain"]


def test_score(kspec):
    copies, images = torch.rand(1, 64, 64, 3).repeat(4, 1, 1, 1), torch.rand(4, 64, 64, 3)
    one, text, plot = run(kspec, "Score", images=copies)
    assert abs(one - 1) < 1e-4
    assert text == "1.00 different images of 4 (pixels)"
    assert plot.shape == (1, 512, 512, 3)
    assert plot.max() == 0
    several, _, _ = run(kspec, "Score", images=torch.cat([images, images.flip(1)]))
    assert 1 < several <= 8
    clip = types.SimpleNamespace(encode_image=lambda x: {"image_embeds": torch.eye(4)})
    assert run(kspec, "Score", images=images, clip_vision=clip)[0] > 3
    assert run(kspec, "Score", images=images[:1])[0] == pytest.approx(1)


def test_grid(kspec):
    node = kspec.NODE_CLASS_MAPPINGS["KSpecGrid"]
    grid, images = run(
        kspec, "Grid", model=Model(), positive=prompt(0), negative=None, latent={"samples": torch.zeros(1, 4, 6, 6)},
        vae=Vae(), varieties="0, 80", images=3, seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple",
        denoise=1.0,
    )  # fmt: skip
    assert images.shape == (6, 24, 24, 3)
    assert grid.ndim == 4
    assert not torch.equal(images[:3], images[3:])
    assert node.validate_inputs("0, 50") is True
    for text in ("", "0, lots", "101", "-1", "nan"):
        assert "varieties must be numbers from 0 to 100" in node.validate_inputs(text)


def test_sampler_that_does_not_say_its_noise_levels_is_named(kspec):
    (guided,) = run(kspec, "Diversity", model=Model(), variety=60.0, seed=0)
    with pytest.raises(RuntimeError, match="sample_sigmas"):
        sample(guided, noise(), said=False)


def test_two_nodes_in_a_row(kspec):
    (first,) = run(kspec, "Diversity", model=Model(), variety=60.0, seed=0)
    (both,) = run(kspec, "MatchReference", model=first, vae=Vae(), images=torch.rand(3, 32, 32, 3), scale=0.7, stop=0.6)
    assert len(both.functions) == len(both.wrappers) == 2
    assert not torch.equal(sample(both, noise()), sample(first, noise()))


@pytest.mark.parametrize("name", ["diversity", "memory", "match_reference", "toward_style", "grid"])
def test_example_workflows_use_inputs_that_exist(kspec, name):
    flow = json.loads((NODES / "example_workflows" / f"{name}.json").read_text())
    for node in flow.values():
        if node["class_type"].startswith("KSpec"):
            schema = kspec.NODE_CLASS_MAPPINGS[node["class_type"]].GET_SCHEMA()
            required = {i.id for i in schema.inputs if not i.options.get("optional")}
            assert required <= set(node["inputs"]) <= {i.id for i in schema.inputs}
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in flow


def test_forge_script(monkeypatch):
    widget = types.SimpleNamespace(click=lambda f: None)
    gradio = types.SimpleNamespace(Checkbox=lambda **_: widget, Slider=lambda **_: widget, Button=lambda _: widget)
    modules = types.ModuleType("modules")
    modules.scripts = types.SimpleNamespace(Script=object, AlwaysVisible=True)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("kspec_forge", NODES / "scripts" / "kspec_forge.py")
    forge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forge)
    monkeypatch.delitem(sys.modules, "guide_model")
    model = ForgeModel()
    p = types.SimpleNamespace(
        sampler=types.SimpleNamespace(get_sigmas=lambda p, steps: SIGMAS), steps=4, extra_generation_params={},
        sd_model=types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=model)),
    )  # fmt: skip
    script = forge.KSpecForge()
    script.process_before_every_sampling(p, False, 60, True)
    assert p.sd_model.forge_objects.unet is model
    script.process_before_every_sampling(p, True, 60, True)
    guided = p.sd_model.forge_objects.unet
    assert not torch.equal(sample(guided, noise(), said=False), sample(model, noise()))
    assert len(forge.MEMORY) == 4
    sample(guided, noise(2, seed=5), said=False)
    assert len(forge.MEMORY) == 6
    assert p.extra_generation_params == {"kspec variety": 60, "kspec memory": True}
