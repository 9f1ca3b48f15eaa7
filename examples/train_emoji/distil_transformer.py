"""Distil the transformer to four steps without classifier-free guidance.  python distil_transformer.py --help

The student starts from the teacher's weights, and learns to go in one step where the teacher goes in several with guidance,
along the teacher's own trajectories from noise (progressive distillation, Salimans and Ho, arXiv 2202.00512, all at once).
Each target is determined by its input, so nothing is averaged and images stay sharp; no second network is needed.
"""

from pathlib import Path

import data
import latents
import torch
from batches import Batch, Batches
from loop import Run, averaged, training_parser
from muon import MuonAdamW
from torch import Tensor
from train_transformer import ENDS, TextStates, shifted

from benchmarks.arena.networks import emoji_transformer, emoji_transformer_pipeline

STEPS = 4  # of the student


@torch.no_grad()
def trajectory(
    teacher: torch.nn.Module, noise: Tensor, text: dict, empty: dict, each: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Go from noise ``[n, c, h, w]`` to images in ``4 * each`` Euler steps with classifier-free guidance of ``scale``.

    Returns:
        Noise levels ``[5]`` and samples ``[5, n, c, h, w]`` where the student's steps begin and end.
    """
    levels = shifted(torch.linspace(1, 0, STEPS * each + 1))
    both = {k: torch.cat([text[k], empty[k]]) for k in text}
    x, visited = noise, [noise]
    for k in range(STEPS * each):
        t = 1000 * levels[k].expand(2 * len(x))
        cond, uncond = teacher(torch.cat([x, x]), timestep=t, return_dict=False, **both)[0].float().chunk(2)
        x = x + (levels[k + 1] - levels[k]) * (uncond + scale * (cond - uncond))
        if (k + 1) % each == 0:
            visited.append(x)
    return levels[::each], torch.stack(visited)


def step_loss(student: torch.nn.Module, levels: Tensor, visited: Tensor, text: dict[str, Tensor]) -> Tensor:
    """Return the mean squared error of the velocities that lead from each visited sample to the next."""
    n = visited.shape[1]
    velocities = visited.diff(dim=0) / levels.diff().view(-1, 1, 1, 1, 1)
    text = {k: v.repeat(STEPS, *[1] * (v.ndim - 1)) for k, v in text.items()}
    t = 1000 * levels[:-1].repeat_interleave(n)
    predicted = student(visited[:-1].flatten(0, 1), timestep=t, return_dict=False, **text)[0].float()
    return (predicted - velocities.flatten(0, 1)).square().mean()


def main() -> None:
    parser = training_parser(__doc__, "runs/distilled", steps=900, batch=32, rate=5e-4)
    parser.add_argument("--teacher", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--scale", type=float, default=4.0, help="of classifier-free guidance, which the student learns")
    parser.add_argument("--each", type=int, default=2, help="steps of the teacher for one of the student")
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors with bfloat16 matrix products")
    args = parser.parse_args()

    data.download(args.data)
    images, entries = data.load(args.data)
    teacher, student = emoji_transformer().eval(), emoji_transformer()
    for network in (teacher, student):
        network.load_state_dict(averaged(args.teacher))
    pipe = emoji_transformer_pipeline(teacher)
    text, clean = TextStates(pipe), latents.cached_posteriors(args.teacher / "latents.safetensors", pipe.vae, images)
    optimizer = MuonAdamW(student, lr=args.rate, ends=ENDS)
    run = Run(student, args.run, args.steps, args.rate, decay=0.995, seed=args.seed, falling=0.4, optimizer=optimizer)

    def loss(batch: Batch) -> Tensor:
        states, empty = text(batch.captions), text([""] * len(batch.captions))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            return step_loss(student, *trajectory(teacher, batch.noise, states, empty, args.each, args.scale), states)

    run.train(loss, Batches(clean, entries, args.batch, args.seed + 1), save_every=50)


if __name__ == "__main__":
    main()
