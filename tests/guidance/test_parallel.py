"""Guidance with a transformer whose tokens, or whose weights, are split over two processes, on the CPU."""

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from tests import tiny
from tests.processes import FORKS

pytestmark = pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="diffusers without it")
SPACES = ["x0", "pooled", "latents"]


def guided(pipe, space):
    with SPARKE(0.5, space=space, stop=1.0).attach(pipe):
        return pipe(**tiny.call_kwargs(pipe)).images


def connect(rank, store):
    """Begin one of two processes."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and it is 0 on a CPU
    torch.distributed.init_process_group("gloo", f"file://{store}/group", rank=rank, world_size=2)
    pipe = tiny.build("FluxPipeline")
    pipe.transformer.set_attention_backend("native")
    return pipe


def split_tokens(rank, store):
    """The images of each space, and the number of tokens that a block gets."""
    pipe, tokens = connect(rank, store), []
    pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    found = {space: torch.as_tensor(guided(pipe, space)) for space in SPACES}
    with pytest.raises(ValueError, match=r"space='activations' .* enable_parallelism"):
        guided(pipe, "activations")
    torch.save((found, tokens[0]), store / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def split_weights(rank, store):
    """The images of each space, and the part of the weights of a layer that this process has."""
    from diffusers.hooks import tensor_parallel

    tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    pipe = connect(rank, store)
    pipe.transformer.enable_parallelism(
        config=diffusers.TensorParallelConfig(mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    )
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    found = {space: torch.as_tensor(guided(pipe, space)) for space in SPACES}
    torch.save((found, len(local)), store / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("run", [split_tokens, split_weights])
def test_both_processes_make_the_images_of_one(tmp_path, run):
    if run is split_weights and not hasattr(diffusers, "TensorParallelConfig"):
        pytest.skip("diffusers without it")
    torch.multiprocessing.start_processes(run, (tmp_path,), 2, start_method=FORKS.get_start_method())
    pipe = tiny.build("FluxPipeline")
    (first, part), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    query = pipe.transformer.transformer_blocks[0].attn.to_q
    for space in SPACES:
        expected = torch.as_tensor(guided(pipe, space))
        assert 2 * part == (expected.shape[1] if run is split_tokens else len(query.weight))
        assert torch.equal(first[space], second[space])
        torch.testing.assert_close(first[space], expected, atol=1e-4, rtol=1e-4)
