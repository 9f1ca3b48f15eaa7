"""Guidance with a transformer whose tokens are split over two processes, on the CPU."""

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from tests import tiny

pytestmark = pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="diffusers without it")
SPACES = ["x0", "pooled", "latents"]


def guided(pipe, space):
    with SPARKE(0.5, space=space, stop=1.0).attach(pipe):
        return pipe(**tiny.call_kwargs(pipe)).images


def run(rank, store):
    """One of two processes: the images of each space, and the number of tokens that a block gets."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and it is 0 on a CPU
    torch.distributed.init_process_group("gloo", f"file://{store}/group", rank=rank, world_size=2)
    pipe, tokens = tiny.build("FluxPipeline"), []
    pipe.transformer.set_attention_backend("native")
    pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    found = {space: torch.as_tensor(guided(pipe, space)) for space in SPACES}
    with pytest.raises(ValueError, match=r"space='activations' .* enable_parallelism"):
        guided(pipe, "activations")
    torch.save((found, tokens[0]), store / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_both_processes_make_the_images_of_one(tmp_path):
    torch.multiprocessing.spawn(run, (tmp_path,), nprocs=2)
    pipe = tiny.build("FluxPipeline")
    (first, tokens), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for space in SPACES:
        expected = torch.as_tensor(guided(pipe, space))
        assert 2 * tokens == expected.shape[1]
        assert torch.equal(first[space], second[space])
        torch.testing.assert_close(first[space], expected, atol=1e-4, rtol=1e-4)
