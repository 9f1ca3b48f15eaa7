"""Gradients through offloaded, cast, checkpointed and compiled networks on a CUDA device equal those without."""

import pytest
import torch

from kspec_guidance import SPARKE, encode_reference
from kspec_guidance.guidance.spaces import Activations, Pixels, Pooled
from kspec_guidance.loop.context import CallContext, DenoiserCall
from tests import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
OFFLOADS = ["model", "sequential", "blocks", "leaves", "stream"]


def offload(pipe, kind):
    if kind in ("model", "sequential"):
        getattr(pipe, f"enable_{kind}_cpu_offload")()
        return
    level = "block_level" if kind == "blocks" else "leaf_level"
    pipe.enable_group_offload(torch.device("cuda"), offload_type=level, num_blocks_per_group=1, use_stream=kind == "stream")


def flux_call(pipe):
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    pipe(**tiny.call_kwargs(pipe, num_inference_steps=1))
    handle.remove()
    return DenoiserCall(pipe.transformer, calls[0])


def result(space, x, call, denoiser_call=None):
    rows, pullback = space.features(x, call, denoiser_call)
    w = torch.linspace(-1, 1, rows.numel(), device=x.device).view(rows.shape)
    return torch.cat([rows.flatten(), pullback(w).flatten()]).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.filterwarnings("ignore:space=")
def test_gradients_with_offloading(kind, inference, dtype):
    for name, space in (("FluxPipeline", Activations()), ("StableDiffusionXLPipeline", Pixels(size=4))):
        if name == "StableDiffusionXLPipeline" and kind == "stream" and dtype == torch.float16:
            continue  # diffusers cannot upcast weights that are kept in pinned memory either
        plain, offloaded = (tiny.build(name) for _ in range(2))
        for pipe in (plain, offloaded):
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    torch.nn.Module.to(part, dtype=dtype)
        plain.to("cuda")
        offload(offloaded, kind)
        found = []
        for pipe in (plain, offloaded):
            with torch.inference_mode(inference):
                if name == "FluxPipeline":
                    call = flux_call(pipe)
                    found.append(result(space, call.arguments["hidden_states"].float(), CallContext(pipe), call))
                else:
                    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
                    found.append(result(space, x, CallContext(pipe)))
        scale = float(found[0].abs().max())
        torch.testing.assert_close(
            found[1] / scale, found[0] / scale, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0
        )
        if name == "FluxPipeline" and kind not in ("model", "stream"):
            assert not any(p.is_cuda for p in offloaded.transformer.parameters())
        torch.cuda.synchronize()


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.filterwarnings("ignore:space=")
def test_guided_runs_with_offloading(kind):
    for space in ("pixels", "activations"):
        pipe = tiny.build("FluxPipeline")
        offload(pipe, kind)
        guide = SPARKE(0.5, space=space, stop=1.0)
        with guide.attach(pipe):
            pipe(**tiny.call_kwargs(pipe))
        assert guide.report().steps_guided == 4
        found = encode_reference(pipe, torch.rand(2, 3, 32, 32) * 2 - 1)
        assert found.is_cuda
        if kind != "stream":
            assert not any(p.is_cuda for part in (pipe.transformer, pipe.vae) for p in part.parameters())


@pytest.mark.parametrize("change", ["checkpointing", "compiled", "compiled in place", "autocast", "deterministic"])
def test_gradients_with_changed_decoder(change, monkeypatch):
    pipe, x = tiny.build("StableDiffusionPipeline").to("cuda"), torch.randn(2, 4, 8, 8).cuda()
    expected = result(Pixels(size=5), x, CallContext(pipe))
    if change == "checkpointing":
        pipe.vae.enable_gradient_checkpointing()
        pipe.vae.train()
    elif change == "compiled":
        pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)
    elif change == "compiled in place":
        pipe.vae.decoder.compile(fullgraph=True)
    elif change == "deterministic":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=change == "autocast"):
            found = result(Pixels(size=5), x, CallContext(pipe))
            result(Pooled(project=7), x, CallContext(pipe))
    finally:
        torch.use_deterministic_algorithms(False)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, atol=0.05 if change == "autocast" else 1e-4, rtol=0)
