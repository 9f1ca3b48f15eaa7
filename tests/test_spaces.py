"""Layouts and feature spaces: what is compared, and how a gradient comes back from it."""

import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MemoryBank
from kspec_guidance.layouts import Layout
from kspec_guidance.objectives import RKE
from kspec_guidance.spaces import (
    SPACES,
    X0,
    Activations,
    Embedder,
    Latents,
    Pixels,
    Pooled,
    Scene,
    make_space,
    middle_of,
    wanted_rows,
)
from tests.emoji import draw
from tests.tiny import making

# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "vector": ((4, 32), None, "vector", (4, 32)),
    "packed tokens": ((4, 64, 16), 4, "sequence", (4, 64, 16)),
    "sound": ((4, 8, 256), 4, "sequence", (4, 8, 256)),
    "image": ((4, 4, 8, 8), 4, "image", (4, 4, 8, 8)),
    "spectrogram": ((4, 8, 25, 16), 4, "image", (4, 8, 25, 16)),
    "clip": ((2, 4, 5, 8, 8), 2, "video", (2, 4, 5, 8, 8)),
    "frames in the batch": ((10, 4, 8, 8), 2, "frames", (2, 5, 4, 8, 8)),
    "six dimensions": ((2, 1, 2, 3, 4, 5), 2, "other", (2, 1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_packs_into_samples_and_back(name, g):
    shape, count, kind, packed = LAYOUTS[name]
    x = torch.randn(shape, generator=g)
    layout = Layout.of(x, count)
    assert layout.kind == kind
    assert layout.pack(x).shape == packed
    assert layout.count(x) == packed[0]
    assert torch.equal(layout.unpack(layout.pack(x)), x)


def test_a_state_of_several_tensors_is_one_row_a_sample(g):
    state = [torch.randn(2, 4, 5, 3, 3, generator=g), torch.randn(2, 16, 8, generator=g)]
    layout = Layout.of(state)
    assert layout.pack(state).shape == (2, 4 * 45 + 128)
    assert all(torch.equal(a, b) for a, b in zip(layout.unpack(layout.pack(state)), state, strict=True))
    with pytest.raises(ValueError, match="of one n"):
        Layout.of([torch.zeros(2, 3), torch.zeros(3, 3)])
    with pytest.raises(ValueError, match=r"tensor \[n, ...\], got \[3\]"):
        Layout.of(torch.zeros(3))


def test_a_state_of_several_tensors_is_guided_as_one(g):
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Both(FlowMatchEulerDiscreteScheduler):  # a picture and its sound, stepped together
        def step(self, model_output, timestep, sample, return_dict=True):
            self._init_step_index(timestep) if self.step_index is None else None
            dt = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
            self._step_index += 1
            return ([x + dt * m for x, m in zip(sample, model_output, strict=True)],)

    start = [torch.randn(3, 4, 4, 4, generator=g), torch.randn(3, 16, 8, generator=g)]

    def run(guide):
        scheduler, x = Both(), start
        scheduler.set_timesteps(5)
        with guide.attach(scheduler):
            for t in scheduler.timesteps:
                (x,) = scheduler.step([(v * 0.3).tanh() for v in x], t, x)
        return x

    plain, guide = run(SPARKE(0.0)), SPARKE(1.0, stop=1.0)
    moved = run(guide)
    assert all(torch.isfinite(a).all() and not torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
    assert guide.report().layout == "several"
    assert guide.memory.x.shape == (3, 64 + 128)


def test_frames_of_one_clip_belong_together(g):
    frames = torch.randn(2, 5, 4, 8, 8, generator=g)
    assert torch.equal(Layout.of(frames.flatten(0, 1), 2).pack(frames.flatten(0, 1))[1], frames[1])


# -- spaces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [X0(), Latents(), Pooled(2), Pooled(3), Pooled(project=7)], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 12), (3, 40, 6), (3, 6, 40), (3, 4, 8, 8), (3, 4, 5, 6, 6), (2, 1, 2, 3, 4, 5)], ids=str
)
def test_the_pull_back_is_the_adjoint_of_the_features(space, shape, g):
    x, v = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    rows, pull = space.features(x, Scene())
    assert rows.shape[0] == shape[0]
    if space.shape(x) is not None:
        assert rows.shape[1] == torch.Size(space.shape(x)).numel()
    w = torch.randn(rows.shape, generator=g, dtype=torch.float64)
    ahead = space.features(x + v, Scene())[0] - rows  # these spaces are linear
    assert float((ahead * w).sum()) == pytest.approx(float((v * pull(w).view(v.shape)).sum()), rel=1e-4, abs=1e-6)


def test_pooled_features_are_block_means(g):
    x = torch.randn(2, 3, 8, 8, generator=g)
    expected = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(Pooled(2).features(x, Scene())[0], expected)
    clip = x[:, :, None].expand(-1, -1, 6, -1, -1)
    torch.testing.assert_close(Pooled(2).features(clip, Scene())[0].unflatten(1, (3, 2, 4))[:, :, 0].flatten(1), expected)


def tiny_embedder():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(256, 8))


MADE = {
    "x0": lambda: "x0",
    "latents": lambda: "latents",
    "pooled": lambda: "pooled",
    "projected": lambda: Pooled(project=64),
    "pixels": lambda: "pixels",
    "embedder": lambda: Embedder(embedder=tiny_embedder(), size=64),
    "activations": lambda: "activations",
    "activations of a named block": lambda: Activations("down_blocks.1"),
}


@pytest.mark.parametrize("name", MADE)
def test_every_space_guides_fills_its_memory_and_meets_it_again(pipe, name):
    plain = draw(pipe)
    assert torch.equal(draw(pipe, guide=SPARKE(0.0, space=MADE[name]())), plain)
    guide = SPARKE(0.6, space=MADE[name]())
    moved = draw(pipe, guide=guide)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3
    assert not torch.equal(draw(pipe, guide=guide), moved)  # the first images keep the second ones away
    assert len(guide.memory) == 6
    assert guide.memory.space == guide.terms[0].space.name
    assert not any(p.grad is not None for m in (pipe.unet, pipe.vae) for p in m.parameters())
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("name", ["pooled", "pixels", "embedder", "activations"])
def test_guidance_in_a_space_spreads_that_space(pipe, name):
    from kspec_guidance import functional as F
    from kspec_guidance.kernels import GaussianKernel, median_bandwidth

    idle, guide = (SPARKE(s, space=MADE[name](), stop=1.0) for s in (1e-9, 1.0))  # the first too weak to be seen
    draw(pipe, n=6, guide=idle)
    draw(pipe, n=6, guide=guide)
    rows = [m.memory.x for m in (idle, guide)]
    if name == "activations":
        rows = [r.unflatten(1, (6, -1))[:, -1] for r in rows]
    unit = [r / r.norm(dim=1, keepdim=True) for r in rows]
    kernel = GaussianKernel(median_bandwidth(unit[0]))
    assert F.vendi_score(unit[1], kernel) > F.vendi_score(unit[0], kernel)


def test_pixel_gradients_agree_with_autograd_through_the_decoder(pipe):
    x = draw(pipe)
    rows, pull = Pixels(size=8, chunk=2).features(x, Scene(pipe))
    w = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        shown = pipe.vae.decode(leaf / pipe.vae.config.scaling_factor).sample
        y = torch.nn.functional.adaptive_avg_pool2d(shown, 8).flatten(1)
        (expected,) = torch.autograd.grad(y, leaf, w)
    torch.testing.assert_close(rows, y.detach())
    torch.testing.assert_close(pull(w), expected)


def test_activation_gradients_agree_with_autograd_through_the_denoiser(pipe):
    unet, g = pipe.unet, torch.Generator().manual_seed(0)
    h = torch.randn(4, 9, 8, 8, generator=g)  # with classifier-free guidance: the wanted half comes last
    states = torch.randn(4, 16, unet.config.cross_attention_dim, generator=g)
    call = {"sample": h, "timestep": torch.tensor(500), "encoder_hidden_states": states, "return_dict": False}
    rows, pull = Activations().features(h[2:], Scene(pipe, (unet, call)))
    seen = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, o: seen.append(o))
    leaf = h[2:].clone().requires_grad_()
    with torch.enable_grad():
        unet(leaf, 500, states[2:])
        y = seen[0].flatten(2).mean(2)
        w = torch.randn(rows.shape, generator=g)
        (expected,) = torch.autograd.grad(y, leaf, w)
    handle.remove()
    torch.testing.assert_close(rows, y.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pull(w), expected, atol=1e-6, rtol=1e-3)


def test_a_tiny_decoder_stands_in_for_the_pipelines_own(pipe):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    small = AutoencoderTiny(
        latent_channels=9, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).eval()
    moved = draw(pipe, guide=SPARKE(0.6, space=Pixels(vae=small)))
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, draw(pipe, guide=SPARKE(0.6, space="pixels")))


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline",
"LTXPipeline", "StableAudioPipeline"])  # fmt: skip
@pytest.mark.parametrize("space", ["pooled", "activations"])
def test_spaces_work_on_sequences_clips_and_sound(name, space):
    pipe = making.build(name)
    guide = SPARKE(1.0, space=space, stop=1.0)
    with guide.attach(pipe):
        pipe(**making.call(pipe))
    assert guide.report().steps_guided == 4
    assert len(guide.memory) in (2, 4)


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusionXLPipeline", "WanPipeline"])
def test_pixels_are_decoded_from_each_familys_own_latents(name):
    pipe = making.build(name)
    more = {"height": 32, "width": 48}  # packed latents do not say which side is which
    shown = pipe(**making.call(pipe, output_type="pt", **more))
    shown = (shown.frames if hasattr(shown, "frames") else shown.images).float()
    guide = SPARKE(1e-9, space=Pixels(size=None), stop=1.0)
    with guide.attach(pipe):
        pipe(**making.call(pipe, **more))
    kept = guide.memory.x.view(len(shown), -1)
    expected = shown.transpose(1, 2) if shown.ndim == 5 else shown  # clips: channels first in the decoder
    torch.testing.assert_close((kept / 2 + 0.5).clamp(0, 1), expected.flatten(1), atol=2e-3, rtol=0)


def test_packed_latents_of_another_kind_are_refused_with_the_cure():
    pipe = making.build("LTXPipeline")
    with (
        pytest.raises(ValueError, match="cannot be unpacked here; choose space='x0' or 'pooled'"),
        SPARKE(0.3, space="pixels").attach(pipe),
    ):
        pipe(**making.call(pipe))


def test_memories_of_different_spaces_are_kept_apart(pipe):
    bank = MemoryBank()
    draw(pipe, guide=SPARKE(0.3, memory=bank))
    with pytest.raises(ValueError, match=r"features of shape \(9, 8, 8\), this pipeline makes \(144,\)"):
        draw(pipe, guide=SPARKE(0.3, space="pooled", memory=bank))
    both = SPARKE(0.3) + SPARKE(0.3, space="pooled")
    assert len(both.memories) == 2
    draw(pipe, guide=both)
    assert [m.space for m in both.memories] == ["x0", "pooled"]


def test_errors_say_what_a_space_needs(pipe):
    with pytest.raises(ValueError, match="unknown space 'pixel'"):
        make_space("pixel")
    with pytest.raises(ValueError, match="needs a network"):
        make_space("embedder")
    with pytest.raises(ValueError, match="differentiable callable"):
        Embedder()
    with pytest.raises(ValueError, match="grid must be a whole number"):
        Pooled(0)
    with pytest.raises(ValueError, match="has no vae"):
        Pixels().features(torch.zeros(1, 3, 4, 4), Scene())
    with pytest.raises(ValueError, match="needs a pipeline to attach to"):
        Activations().features(torch.zeros(1, 3, 4, 4), Scene())
    with pytest.raises(ValueError, match="no middle block"):
        middle_of(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="give start= and stop= instead of sigma_interval="):
        KernelGuidance(RKE(), space="activations", sigma_interval=(0.1, 1.0))
    assert set(SPACES) == {"x0", "latents", "pooled", "pixels", "embedder", "activations"}


def test_the_wanted_rows_of_a_call_are_its_last(g):
    x = torch.randn(4, 3, generator=g)
    cut = wanted_rows({"sample": x, "timestep": torch.tensor(3), "more": {"text_embeds": x}, "parts": (x, x)}, 2)
    assert torch.equal(cut["sample"], x[2:])
    assert torch.equal(cut["more"]["text_embeds"], x[2:])
    assert torch.equal(cut["parts"][1], x[2:])
    assert cut["timestep"].ndim == 0
    assert torch.equal(wanted_rows({"sample": x}, 4)["sample"], x)


def test_random_features_work_in_pooled_space(pipe):
    from kspec_guidance.features import RandomFourierFeatures
    from kspec_guidance.kernels import GaussianKernel

    phi = RandomFourierFeatures(GaussianKernel(1.3), 144, 2048)
    guide = KernelGuidance(RKE(GaussianKernel(1.3), phi), 0.6, space="pooled", stop=0.6)
    moved = draw(pipe, guide=guide)
    exact = draw(pipe, guide=KernelGuidance(RKE(GaussianKernel(1.3)), 0.6, space="pooled", stop=0.6))
    plain = draw(pipe)
    assert (moved - exact).norm() < 0.5 * (exact - plain).norm()
    assert guide.memory.total.numel() == 2048
