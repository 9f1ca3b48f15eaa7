"""Regret of the methods of kspec_guidance.selection on synthetic arms whose truth is known, in seconds on a CPU.

Each function runs one experiment with one seed and returns a figure for each method: an excess loss or a regret, smaller
is better, unless its name says otherwise.
"""

import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.selection import (
    DAKUCB,
    FDUCB,
    PAKUCB,
    RFFUCB,
    Greedy,
    MixtureGreedy,
    MixtureUCB,
    OneArm,
    Oracle,
    PromptWise,
    Selector,
    Uniform,
)
from kspec_guidance.selection.quadratic import minimise_quadratic

Draw = Callable[[int, torch.Generator], Tensor]
Figures = dict[str, float]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Modes:
    """Arms that draw one of several modes; a sample is a unit vector of its mode."""

    def __init__(self, shares: Tensor):
        self.shares = shares / shares.sum(1, keepdim=True)
        self.eye = torch.eye(shares.shape[1], dtype=torch.float64)

    def draw(self, arm: int, g: torch.Generator) -> Tensor:
        return self.eye[int(torch.multinomial(self.shares[arm], 1, generator=g))]

    def collision(self, w: Tensor) -> float:
        """Probability that two samples of the mixture are of one mode: one over its RKE score."""
        return float((w @ self.shares).square().sum())

    def log_vendi(self, w: Tensor) -> float:
        p = w @ self.shares
        return float(-torch.special.xlogy(p, p).sum())

    def best(self) -> Tensor:
        return minimise_quadratic(self.shares @ self.shares.mT, torch.zeros(len(self.shares)))


DISJOINT = Modes(torch.block_diag(*[torch.ones(1, m) for m in (2, 3, 5)]).double())


def overlapping() -> Modes:
    """Four arms over twelve modes, with overlaps; the last one has nothing of its own."""
    rows = torch.zeros(4, 12, dtype=torch.float64)
    rows[0, :4] = 1
    rows[1, 4:9] = 1
    rows[2, 9:] = 1
    rows[3, [0, 4, 5]] = 1
    return Modes(rows)


def pull(s: Selector, draw: Draw, rounds: int, g: torch.Generator, batch: int = 1) -> list[int]:
    """Choose and tell, ``rounds`` times in all; the arms."""
    arms: list[int] = []
    while len(arms) < rounds:
        found = s.choose(batch)
        for arm in found:
            s.tell(arm, features=draw(arm, g))
        arms += found
    return arms


def shares_of(arms: Sequence[int], number: int) -> Tensor:
    return torch.bincount(torch.tensor(arms), minlength=number).double() / len(arms)


def mixture(modes: Modes, seed: int, rounds: int = 1000, objective: str = "rke", batch: int = 1) -> Figures:
    """Excess of the loss of all pulls over the best mixture (1, 2): one over RKE, or minus log Vendi."""

    def loss(w: Tensor) -> float:
        return modes.collision(w) if objective == "rke" else -modes.log_vendi(w)

    k = len(modes.shares)
    best = modes.best()
    if objective == "vendi":
        best = torch.tensor([0.2, 0.3, 0.5]).double()
    single = min(range(k), key=lambda i: loss(torch.eye(k).double()[i]))
    methods: dict[str, Selector] = {
        "oracle": Oracle(k, best.tolist(), seed=seed),
        "greedy": MixtureGreedy(k, objective, seed),
        "UCB": MixtureUCB(k, objective, seed),
        "OGD": MixtureUCB(k, objective, seed, variant="ogd"),
        "uniform": Uniform(k, seed=seed),
        "one arm": OneArm(k, single, seed=seed),
    }
    return {
        name: loss(shares_of(pull(s, modes.draw, rounds, generator(seed), batch), k)) - loss(best)
        for name, s in methods.items()
    }


def learning_curve(seed: int, rounds: Sequence[int] = (100, 300, 1000)) -> Figures:
    """Excess of Mixture-Greedy's weights after so many pulls, and the slope of its logarithm (1)."""
    s, g, found, done, best = MixtureGreedy(3, seed=seed), generator(seed), {}, 0, DISJOINT.collision(DISJOINT.best())
    for n in rounds:
        pull(s, DISJOINT.draw, n - done, g)
        done = n
        found[f"excess at {n}"] = DISJOINT.collision(s.weights()) - best
    return found


def redundant_weight(seed: int, rounds: int = 1000) -> Figures:
    """Weight of the arm that has nothing of its own (2)."""
    modes, found = overlapping(), {}
    for name, s in {"greedy": MixtureGreedy(4, seed=seed), "UCB": MixtureUCB(4, seed=seed)}.items():
        found[name] = float(shares_of(pull(s, modes.draw, rounds, generator(seed)), 4)[3])
    return found


TARGET = (0.2, 0.3, 0.5)


def target(objective: str, seed: int, rounds: int = 1500) -> Figures:
    """Largest error of the weights where the reference is a known mixture of the arms (3)."""
    g = generator(1000 + seed)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)

    def draw(arm: int, g: torch.Generator) -> Tensor:
        return centres[arm] + 0.7 * torch.randn(2, generator=g).double()

    of = torch.multinomial(torch.tensor(TARGET), 4000, replacement=True, generator=g)
    reference = torch.stack([draw(int(i), g) for i in of])
    kernel = GaussianKernel(1.0) if objective == "kid" else None
    found = {}
    for name, s in {
        "greedy": MixtureGreedy(3, objective, seed, kernel=kernel, reference=reference, num_features=256),
        "UCB": MixtureUCB(3, objective, seed, kernel=kernel, reference=reference, num_features=256),
    }.items():
        arms = pull(s, draw, rounds, generator(seed))
        w = s.weights() if name == "greedy" else shares_of(arms, 3)
        found[name] = float((w - torch.tensor(TARGET)).abs().max())
    return found


def linear(seed: int, rounds: int = 400) -> Figures:
    """Regret where the reward alone counts: Bernoulli arms of 0.5 and 0.6, one pull of each first (4)."""
    means = (0.5, 0.6)
    found = {}
    for name, s in {
        "oracle": OneArm(2, 1, seed=seed),
        "greedy without a floor": MixtureGreedy(2, "reward", seed, floor=0.0, start=1),
        "greedy, floor t^-1/3": MixtureGreedy(2, "reward", seed, start=1),
        "UCB": MixtureUCB(2, "reward", seed, start=1),
        "uniform": Uniform(2, seed=seed),
    }.items():
        g = generator(seed)
        regret = 0.0
        for _ in range(rounds):
            arm = s.choose()
            s.tell(arm, reward=float(torch.rand(1, generator=g) < means[arm]))
            regret += means[1] - means[arm]
        found[name] = regret
    return found


def circle(
    seed: int,
    rounds: int = 384,
    batch: int = 1,
    methods: dict[str, Selector] | None = None,
    names: Sequence[str] | None = None,
) -> Figures:
    """Regret where each of three arms is best on a third of a circle of contexts, noise 0.15 (5, 8); of ``names`` only."""

    def mean(arm: int, c: Tensor) -> float:
        return 0.5 + 0.5 * math.cos(math.atan2(float(c[1]), float(c[0])) - 2 * math.pi * arm / 3)

    kernel = GaussianKernel(0.5)
    if methods is None:
        methods = {
            "oracle": Oracle(3, lambda c: max(range(3), key=lambda i: mean(i, c)), seed=seed),
            "PAK-UCB": PAKUCB(3, seed, kernel=kernel),
            "PAK-UCB, as published": PAKUCB(3, seed, kernel=kernel, exploration=None, centred=False),
            "greedy": PAKUCB(3, seed, kernel=kernel, exploration=0.0),
            "greedy, not centred": PAKUCB(3, seed, kernel=kernel, exploration=0.0, centred=False),
            "RFF-UCB": RFFUCB(3, seed, kernel=kernel),
            "best single": Greedy(3, seed=seed),
            "uniform": Uniform(3, seed=seed),
        }
    found = {}
    for name, s in methods.items():
        if names is not None and name not in names:
            continue
        g, regret = generator(seed), 0.0
        for _ in range(rounds // batch):
            angles = 2 * math.pi * torch.rand(batch, generator=g).double()
            contexts = torch.stack([angles.cos(), angles.sin()], dim=1)
            noise = 0.15 * torch.randn(batch, generator=g).double()
            arms = s.choose(batch, contexts=contexts)
            for arm, c, e in zip(arms, contexts, noise.tolist(), strict=True):
                s.tell(arm, reward=mean(arm, c) + e, context=c)
                regret += max(mean(i, c) for i in range(3)) - mean(arm, c)
        found[name] = regret
    return found


def bad_start(seed: int, rounds: int = 300) -> Figures:
    """Regret where the best arm's first reward is low: rewards of 0.9 with probability 0.7, else 0, beside 0.5 (5)."""
    found = {}
    kernel = GaussianKernel(1.0)
    for name, s in {
        "greedy": PAKUCB(2, seed, kernel=kernel, exploration=0.0),
        "PAK-UCB": PAKUCB(2, seed, kernel=kernel),
        "PAK-UCB, as published": PAKUCB(2, seed, kernel=kernel, exploration=None, centred=False),
    }.items():
        g, regret = generator(seed), 0.0
        s.tell(0, reward=0.0, context=[1.0, 0.0])
        s.tell(1, reward=0.5, context=[1.0, 0.0])
        for _ in range(rounds):
            arm = s.choose(contexts=[1.0, 0.0])
            reward = 0.5 if arm else 0.9 * float(torch.rand(1, generator=g) < 0.7)
            s.tell(arm, reward=reward, context=[1.0, 0.0])
            regret += 0.63 - (0.5 if arm else 0.63)
        found[name] = regret
    return found


def same_choices(seed: int, rounds: int = 384, num_features: int = 500) -> float:
    """Share of rounds in which RFF-UCB and PAK-UCB, told the same, choose the same arm (5)."""
    kernel = GaussianKernel(0.5)
    exact, random, g = (
        PAKUCB(3, seed, kernel=kernel),
        RFFUCB(3, seed, kernel=kernel, num_features=num_features),
        generator(seed),
    )
    same = 0
    for _ in range(rounds):
        angle = 2 * math.pi * float(torch.rand(1, generator=g))
        c = torch.tensor([math.cos(angle), math.sin(angle)]).double()
        arm = exact.choose(contexts=c)
        same += arm == random.choose(contexts=c)
        reward = 0.5 + 0.5 * math.cos(angle - 2 * math.pi * arm / 3) + 0.15 * float(torch.randn(1, generator=g))
        exact.tell(arm, reward=reward, context=c)
        random.waiting = [[] for _ in range(3)]  # its own choice is not made
        random.pending.zero_()
        random.tell(arm, reward=reward, context=c)
    return same / rounds


def diverse(seed: int, rounds: int = 200) -> Figures:
    """Share of the pulls of the diverse arm, of equal reward: one arm draws cats, one dogs, one both in all breeds (6)."""
    modes = Modes(torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 1.0, 0, 0], [1.0, 1, 1, 1, 1, 1]]).double())
    return {
        "DAK-UCB": conditional(DAKUCB(3, seed, kernel=GaussianKernel(1.0)), modes, seed, rounds)[2],
        "PAK-UCB": conditional(PAKUCB(3, seed, kernel=GaussianKernel(1.0)), modes, seed, rounds)[2],
    }


def conditional(
    s: Selector, modes: Modes, seed: int, rounds: int, rewards: Sequence[Sequence[float]] | None = None
) -> list[float]:
    """Shares of the arms, with contexts of two kinds of prompt; rewards by kind and arm."""
    g, counts = generator(seed), [0] * s.arms
    for _ in range(rounds):
        kind = int(torch.randint(2, (1,), generator=g))
        c = torch.eye(2, dtype=torch.float64)[kind]
        arm = s.choose(contexts=c)
        mean = 0.3 if rewards is None else rewards[kind][arm]
        s.tell(arm, features=modes.draw(arm, g), reward=mean + 0.02 * float(torch.randn(1, generator=g)), context=c)
        counts[arm] += 1
    return [n / rounds for n in counts]


def experts(seed: int, rounds: int = 200) -> Figures:
    """Share of an arm that is diverse but off the prompt, beside an expert of each kind of prompt (6)."""
    modes = Modes(
        torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1.0, 1, 1, 1]]).double()
    )
    rewards = [[1.0, 0.3, 0.1], [0.3, 1.0, 0.1]]
    s = DAKUCB(3, seed, kernel=GaussianKernel(0.5), diversity=0.5)
    shares = conditional(s, modes, seed, rounds, rewards)
    return {"off the prompt": shares[2]}


def complementary(seed: int, rounds: int = 200) -> Figures:
    """RKE of what the mixture draws from two arms that have each collapsed to half of the modes (6)."""
    modes = Modes(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1.0, 1]]).double())
    found = {}
    for name, mix in (("mixture", True), ("one arm a prompt", False)):
        s = DAKUCB(2, seed, kernel=GaussianKernel(1.0), mixture=mix)
        shares = torch.tensor(conditional(s, modes, seed, rounds)).double()
        found[name] = 1 / modes.collision(shares)
    found["best arm"] = 2.0
    return found


SUCCESS = torch.tensor([[0.9, 0.95, 0.99], [0.05, 0.6, 0.9], [0.05, 0.05, 0.6]]).double()
COSTS = (1.0, 3.0, 10.0)


def prompt_wise(seed: int, prompts: int = 500, cost_weight: float = 0.03, budget: int = 5) -> dict[str, Figures]:
    """Regret, cost and successes where prompts of three kinds are asked up to five times of arms of three prices (7)."""

    def best_value(q: Tensor, left: int) -> float:
        found, c = 0.0, cost_weight * torch.tensor(COSTS).double()
        for _ in range(left):
            found = max(0.0, float((q - c + (1 - q) * found).max()))
        return found

    def oracle(q: Tensor, left: int) -> int | None:
        c = cost_weight * torch.tensor(COSTS).double()
        values = q - c + (1 - q) * best_value(q, left - 1)
        return int(values.argmax()) if float(values.max()) > 0 else None

    def make(**kwargs) -> PromptWise:
        return PromptWise(3, COSTS, seed, cost_weight=cost_weight, budget=budget, **kwargs)

    methods: dict[str, PromptWise | str] = {
        "oracle": "oracle",
        "recursion": make(),
        "greedy recursion": make(exploration=0.0),
        "index of the paper": make(rule="index"),
        "index, exploration 2": make(rule="index", exploration=2.0),
        "uniform": "uniform",
        "always the dearest": "dear",
    }
    out: dict[str, Figures] = {}
    for name, s in methods.items():
        g, regret, cost, successes = generator(seed), 0.0, 0.0, 0
        for _ in range(prompts):
            kind = int(torch.randint(3, (1,), generator=g))
            luck = torch.rand(budget, generator=g)
            q, c, worth = SUCCESS[kind], torch.eye(3, dtype=torch.float64)[kind], 0.0
            for k in range(budget):
                if isinstance(s, PromptWise):
                    arm = s.choose(contexts=c, left=budget - k)
                else:
                    arm = {"oracle": oracle(q, budget - k), "dear": 2}.get(s, int(3 * float(torch.rand(1, generator=g))))
                if arm is None:
                    break
                success = float(luck[k] < q[arm])
                worth += success - cost_weight * COSTS[arm]
                cost += COSTS[arm]
                if isinstance(s, PromptWise):
                    s.tell(arm, reward=success, context=c)
                if success:
                    successes += 1
                    break
            regret += best_value(q, budget) - worth
        out[name] = {"regret": regret, "cost": cost, "success": successes / prompts}
    return out


def batches(seed: int, rounds: int = 384) -> dict[str, Figures]:
    """Regret on the circle with batches, with and without pending pulls in the deviations (8)."""

    class Blind(PAKUCB):
        """Without pending pulls."""

        def _wait(self, arm: int, row: Tensor) -> None:
            pass

    kernel, methods = GaussianKernel(0.5), {"pending": PAKUCB, "not pending": Blind}
    return {
        f"batches of {b}": circle(seed, rounds, b, {name: make(3, seed, kernel=kernel) for name, make in methods.items()})
        for b in (1, 8, 32, 96)
    }


def resumed(seed: int, rounds: int = 60, crash: int = 37) -> bool:
    """Whether a selector that is saved and loaded after ``crash`` rounds chooses as one that never stopped (8)."""
    results = []
    for crashes in (False, True):
        s: Selector = MixtureGreedy(3, seed=seed)
        g, arms = generator(seed), []
        for t in range(rounds):
            if crashes and t == crash:
                s = MixtureGreedy.load(json.loads(json.dumps(s.state())))
            arms += pull(s, DISJOINT.draw, 4, g, 4)
        results.append(arms)
    return results[0] == results[1]


def processes(seed: int, rounds: int = 300, number: int = 4) -> Figures:
    """Excess loss of one selector, and of as many with a part of the events each, merged every eighth pull (8)."""
    best = DISJOINT.collision(DISJOINT.best())
    one = MixtureGreedy(3, seed=seed)
    pull(one, DISJOINT.draw, rounds, generator(seed))
    g, common = generator(seed), MixtureGreedy(3, seed=seed)
    for start in range(0, rounds, 8 * number):
        parts = []
        for rank in range(number):
            known = MixtureGreedy.load(json.loads(json.dumps(common.state())))
            known.seed = 1000 * seed + number * start + rank
            part = MixtureGreedy(3, seed=seed)
            for _ in range(8):
                arm = known.choose()
                x = DISJOINT.draw(arm, g)
                known.tell(arm, features=x)
                part.tell(arm, features=x)
            parts.append(part)
        for part in parts:
            common.merge(part)
    return {
        "one process": DISJOINT.collision(one.weights()) - best,
        "four processes": DISJOINT.collision(common.weights()) - best,
    }


def change(seed: int, rounds: int = 1200, half_life: float = 100.0) -> Figures:
    """Excess loss two half-lives after the arm of five modes has collapsed to one, at mid-run (9)."""
    later = Modes(torch.cat([DISJOINT.shares[:2], torch.eye(10, dtype=torch.float64)[5:6]]))
    best = later.collision(later.best())
    found = {}
    for name, h in (("discounted", half_life), ("all events alike", None)):
        s, g = MixtureGreedy(3, seed=seed, half_life=h), generator(seed)
        pull(s, DISJOINT.draw, rounds // 2, g)
        pull(s, later.draw, int(2 * half_life), g)
        found[name] = later.collision(s.weights()) - best
    return found


def new_arm(seed: int, rounds: int = 300) -> Figures:
    """Share of the later pulls of an arm that comes at mid-run, and its first pulls (10)."""
    s, g = MixtureGreedy(2, seed=seed), generator(seed)
    pull(s, DISJOINT.draw, rounds, g)
    arm = s.add_arm()
    first = pull(s, DISJOINT.draw, s.start, g)
    later = pull(s, DISJOINT.draw, rounds, g)
    return {"first pulls": float(first.count(arm)), "later share": later.count(arm) / len(later)}


def frechet(seed: int, rounds: int = 300, d: int = 4) -> Figures:
    """Regret of a pull in search of the smallest Frechet distance: Gaussians 0.5, 0.8 and 1.2 away in each dimension."""
    g = generator(100 + seed)
    reference = torch.randn(2000, d, generator=g).double()
    shifts = (0.5, 0.8, 1.2)
    truth = [d * s * s for s in shifts]
    found = {}
    for name, s in {
        "FD-UCB, bound of the paper": FDUCB(3, reference, seed, exploration=1.0),
        "FD-UCB, a tenth": FDUCB(3, reference, seed, exploration=0.1),
        "greedy": FDUCB(3, reference, seed, exploration=0.0),
        "uniform": Uniform(3, seed=seed),
    }.items():
        h = generator(seed)
        arms = pull(s, lambda arm, h: shifts[arm] + torch.randn(d, generator=h).double(), rounds, h)
        found[name] = sum(truth[a] - truth[0] for a in arms) / rounds
    return found
