import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.loop.layouts import Layout

LAYOUTS = {
    "vector": ((4, 32), None, "vector", (4, 32)),
    "packed tokens": ((4, 64, 16), 4, "sequence", (4, 64, 16)),
    "audio": ((4, 8, 256), 4, "sequence", (4, 8, 256)),
    "image": ((4, 4, 8, 8), 4, "image", (4, 4, 8, 8)),
    "spectrogram": ((4, 8, 25, 16), 4, "image", (4, 8, 25, 16)),
    "clip": ((2, 4, 5, 8, 8), 2, "video", (2, 4, 5, 8, 8)),
    "frames in the batch": ((10, 4, 8, 8), 2, "frames", (2, 5, 4, 8, 8)),
    "six-dimensional": ((2, 1, 2, 3, 4, 5), 2, "other", (2, 1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_pack_unpack_round_trip(name, g):
    shape, count, kind, packed = LAYOUTS[name]
    x = torch.randn(shape, generator=g)
    layout = Layout.of(x, count)
    assert layout.kind == kind
    assert layout.pack(x).shape == packed
    assert layout.count(x) == packed[0]
    assert torch.equal(layout.unpack(layout.pack(x)), x)


def test_multi_tensor_state_packs_to_one_row_per_sample(g):
    state = [torch.randn(2, 4, 5, 3, 3, generator=g), torch.randn(2, 16, 8, generator=g)]
    layout = Layout.of(state)
    assert layout.pack(state).shape == (2, 4 * 45 + 128)
    assert all(torch.equal(a, b) for a, b in zip(layout.unpack(layout.pack(state)), state, strict=True))
    with pytest.raises(ValueError, match="with equal n"):
        Layout.of([torch.zeros(2, 3), torch.zeros(3, 3)])
    with pytest.raises(ValueError, match=r"tensor \[n, ...\], got \[3\]"):
        Layout.of(torch.zeros(3))


def test_multi_tensor_state_is_guided(g):
    from diffusers import FlowMatchEulerDiscreteScheduler

    class MultiTensorScheduler(FlowMatchEulerDiscreteScheduler):  # steps an image and its audio together
        def step(self, model_output, timestep, sample, return_dict=True):
            self._init_step_index(timestep) if self.step_index is None else None
            dt = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
            self._step_index += 1
            return ([x + dt * m for x, m in zip(sample, model_output, strict=True)],)

    start = [torch.randn(3, 4, 4, 4, generator=g), torch.randn(3, 16, 8, generator=g)]

    def run(guide):
        scheduler, x = MultiTensorScheduler(), start
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


def test_frames_layout_groups_frames_by_clip(g):
    frames = torch.randn(2, 5, 4, 8, 8, generator=g)
    assert torch.equal(Layout.of(frames.flatten(0, 1), 2).pack(frames.flatten(0, 1))[1], frames[1])
