"""The authors' code of the methods that compare and choose, beside ours, on the same inputs: values and processor time.

    python -m benchmarks.peer_methods --peers FOLDER

FOLDER holds checkouts under the names of their repositories: embedding-comparison, PromptSplit, KrossFuse, KUEA,
dgm-online-select, dgm-online-eval, Mixture-UCB, Mixture-Greedy, DAK-UCB. A row says what is compared, the author's value,
ours, and the seconds of both; or why the code does not run. Prints a table in Markdown, as in docs/how-to/migration.md.
"""

import argparse
import contextlib
import importlib
import io
import math
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.selection.experiments import circle
from kspec_guidance import functional as F
from kspec_guidance.comparison import product_embedder, prompt_split, spec
from kspec_guidance.kernels import CosineKernel, GaussianKernel, l2_normalize
from kspec_guidance.selection import FDUCB, ISUCB, PAKUCB, RFFUCB

SIGMA = 0.5
ROUNDS = 200
Row = tuple[str, str, str, str, str]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the processor time in seconds."""
    began = time.process_time()
    found = call()
    return found, time.process_time() - began


@contextlib.contextmanager
def importing(folder: Path, **stubs: Any) -> Iterator[None]:
    """The folder first on the path, with modules of these names put in place; forgotten afterwards."""
    before = set(sys.modules)
    for name, attributes in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")) or name in stubs:
                del sys.modules[name]


def row(name: str, what: str, theirs: tuple[Any, float], ours: tuple[Any, float], value: Callable[[Any], float]) -> Row:
    """A row of the table."""
    return name, what, f"{value(theirs[0]):.6g}", f"{value(ours[0]):.6g}", f"{theirs[1]:.2g}, {ours[1]:.2g}"


def spec_rows(peers: Path) -> list[Row]:
    """SPEC by its kernel matrix and by its features."""
    with importing(peers / "embedding-comparison" / "spec", log={"make_logger": lambda *args: None}):
        method = importlib.import_module("spec_core").SPEC(sigma=SIGMA)
        x, y, kernel = l2_normalize(normal(300, 16)), l2_normalize(normal(300, 12, seed=1)), GaussianKernel(SIGMA)
        theirs = timed(lambda: method.compute_by_eigendecomposition(x, y, kernel, 1.0)[0])
        ours = timed(lambda: spec(x, y, modes=1, kernel_a=kernel, kernel_b=kernel).distance)
        rows = x.float(), y.float()  # it mixes in float32
        largest = timed(lambda: method.compute_by_covariance_matrix(*rows, phi_x=rows[0], phi_y=rows[1])[0])
        features = timed(lambda: spec(x, y, modes=1, kernel_a=CosineKernel(), kernel_b=CosineKernel()).distance)
    size = lambda z: float(z if isinstance(z, float) else z.abs().max())  # noqa: E731
    return [
        row("SPEC", "largest absolute eigenvalue, Gaussian, n = 300", theirs, ours, size),
        row("SPEC", "the same, features", largest, features, size),
    ]


def prompt_split_rows(peers: Path) -> list[Row]:
    """PromptSplit where models differ on one of five prompts: the largest value is 1/5."""
    t = torch.eye(5).repeat_interleave(20, 0).double()
    x, y = torch.eye(3)[[0] * 100].double(), torch.eye(3)[[0] * 80 + [1] * 20].double()
    with importing(peers / "PromptSplit" / "algorithms"):
        method = importlib.import_module("kernel_method").KernelMethod(0.1, 0.1)
        arrays = [z.numpy() for z in (x, y, t, t)]
        theirs = timed(lambda: method.top_eigen_analysis(*arrays, top_k=1)[0][0])
    kernels = {"kernel": GaussianKernel(0.1), "prompt_kernel": GaussianKernel(0.1)}
    ours = timed(lambda: prompt_split(x, t, y, t, modes=1, **kernels).values[0])
    return [row("PromptSplit", "one of five prompts, truth 0.2", theirs, ours, float)]


def krossfuse_rows(peers: Path) -> list[Row]:
    """RP-KrossFuse: error of its inner products as a kernel, as they are and times the number of features."""
    x, y, l = l2_normalize(normal(200, 64)).float(), l2_normalize(normal(200, 48, seed=1)).float(), 3000
    exact = (x @ x.T) * (y @ y.T)
    with importing(peers / "KrossFuse"):
        kind = importlib.import_module("main").KrossFuse
        method = object.__new__(kind)  # its models are not needed
        method.device = "cpu"
        theirs, seconds = timed(lambda: method.hadamard_product_fusion(x, y, n_components=l))
    both = torch.cat([x, y], 1)
    fused = product_embedder(lambda z: z[:, :64], lambda z: z[:, 64:], features=l)
    ours = timed(lambda: fused(both))
    error = lambda z: float(((z @ z.T) - exact).square().mean().sqrt())  # noqa: E731
    return [
        row("RP-KrossFuse", "RMSE of the product kernel, l = 3,000", (theirs, seconds), ours, error),
        row("RP-KrossFuse", "the same, theirs times sqrt(l)", (theirs * l**0.5, seconds), ours, error),
    ]


class Published:
    """A selector of the authors behind our protocol, for the experiment on the circle."""

    def __init__(self, method: Any):
        self.method = method

    def choose(self, n: int, contexts: Tensor) -> list[int]:
        return [int(self.method.select_arm(c.numpy()[None])) for c in contexts]

    def tell(self, arm: int, reward: float, context: Tensor) -> None:
        self.method.update_stats(arm, context.numpy()[None], reward)


def contextual_rows(peers: Path, module: str) -> list[Row]:
    """PAK-UCB or RFF-UCB: regret on the circle, mean of five seeds."""
    name, kernel, seeds = module.upper().replace("_", "-"), GaussianKernel(SIGMA), range(5)
    own: dict[str, Any] = {"kernel": kernel, "centred": False}
    with importing(peers / "dgm-online-select"):
        kind = getattr(importlib.import_module(f"algorithms.{module}"), module)

        def theirs(seed: int) -> Any:
            np.random.seed(seed)  # noqa: NPY002 (what their code draws from)
            settings = {"kernel_method": "rbf", "kernel_para_gamma": SIGMA, "num_rff_dim": 200}
            return Published(kind(G=3, T=ROUNDS, num_dim=2, **settings))

        def ours(seed: int) -> Any:
            if module == "rff_ucb":
                return RFFUCB(3, seed, exploration=None, **own)
            return PAKUCB(3, seed, exploration=math.sqrt(2 * math.log(2 * ROUNDS * 3 / 0.05)), **own)

        found = [timed(lambda m=make: [circle(s, ROUNDS, 1, {"": m(s)})[""] for s in seeds]) for make in (theirs, ours)]
    return [row(name, f"regret on the circle, {ROUNDS} rounds", *found, lambda z: sum(z) / len(z))]


def best_arm_rows(peers: Path) -> list[Row]:
    """FD-UCB and IS-UCB: how often the best of three arms is pulled, in rounds of five samples."""
    reference, rounds, batch = normal(500, 8), 60, 5
    covariance, mean = torch.cov(reference.T).numpy(), reference.mean(0).numpy()
    scales, peaks = (1.0, 1.3, 1.8), (4.0, 2.0, 1.0)

    def sample(arm: int, k: int, probabilities: bool) -> Tensor:
        z = normal(batch, 8, seed=1000 * arm + k)
        return torch.softmax(peaks[arm] * z, 1) if probabilities else scales[arm] * z

    rows = []
    with importing(peers / "dgm-online-eval"):
        fd = importlib.import_module("algorithms.fd_ucb").fd_ucb
        inception = importlib.import_module("algorithms.is_ucb").is_ucb
        for name, probabilities in (("FD-UCB", False), ("IS-UCB", True)):

            def theirs(probabilities: bool = probabilities) -> float:
                np.random.seed(0)  # noqa: NPY002 (what their code draws from)
                if probabilities:
                    method = inception(3, batch, rounds * batch, num_cls=8)
                else:
                    method = fd(3, 8, batch, mean, covariance, 0, M=0.0)
                pulls = []
                for k in range(rounds):
                    arm = int(method.select_arm())
                    method.update_stats(arm, sample(arm, k, probabilities).numpy())
                    pulls.append(arm)
                return pulls.count(0) / rounds

            def ours(probabilities: bool = probabilities) -> float:
                method = ISUCB(3) if probabilities else FDUCB(3, reference, exploration=1.0)
                pulls = []
                for k in range(rounds):
                    arm = method.choose()
                    for z in sample(arm, k, probabilities):
                        method.tell(arm, features=z)
                    pulls.append(arm)
                return pulls.count(0) / rounds

            rows.append(row(name, f"share of the best arm, {rounds} rounds of 5", timed(theirs), timed(ours), float))
        estimate = importlib.import_module("metrics.fd").compute_FD_with_stats
        x = 1.5 * normal(400, 8, seed=3)
        moments = x.mean(0).numpy(), mean, torch.cov(x.T).numpy(), covariance
        distances = timed(lambda: estimate(*moments)), timed(lambda: F.frechet_distance(x, reference))
        rows.append(row("FD-UCB", "its Frechet distance", *distances, float))
    return rows


def alone(peers: Path, folder: str, module: str, **stubs: Any) -> list[Row]:
    """Import a module whose functions cannot be called on given inputs; ``stubs`` stand for packages that it needs.

    Raises:
        RuntimeError: if it can be imported.
    """
    with importing(peers / folder, **stubs):
        importlib.import_module(module)
    raise RuntimeError("it can be imported, and has no function of given features")


METHODS: dict[str, Callable[[Path], list[Row]]] = {
    "SPEC": spec_rows,
    "PromptSplit": prompt_split_rows,
    "RP-KrossFuse": krossfuse_rows,
    "PAK-UCB": lambda peers: contextual_rows(peers, "pak_ucb"),
    "RFF-UCB": lambda peers: contextual_rows(peers, "rff_ucb"),
    "FD-UCB, IS-UCB": best_arm_rows,
    "Mixture-UCB": lambda peers: alone(peers, "Mixture-UCB", "offline_mixture", cvxpy={}),
    "Mixture-Greedy": lambda peers: alone(peers, "Mixture-Greedy", "mixture_greedy"),
    "KUEA": lambda peers: alone(peers, "KUEA", "train.align_training_clip"),
    "DAK-UCB": lambda peers: alone(peers, "DAK-UCB", "Mixture-DAK-UCB"),
}


def main() -> None:
    """Run what runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    peers = parser.parse_args().peers
    print("| code | what | its value | ours | processor seconds, its and ours |\n|---|---|---|---|---|")
    for name, method in METHODS.items():
        try:
            for found in method(peers):
                print("| " + " | ".join(found) + " |", flush=True)
        except Exception as error:  # of their code
            print(
                f"| {name} | does not run: {type(error).__name__}: {' '.join(str(error).split())} | - | - | - |", flush=True
            )


if __name__ == "__main__":
    main()
