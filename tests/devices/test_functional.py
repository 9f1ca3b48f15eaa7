"""Scores of samples on a device without float64, such as Apple's MPS, equal those of samples on the host."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import metrics
from kspec_guidance.evaluation import ImageSet, compare_sets, evaluate_set
from kspec_guidance.evaluation.embedders import ImageEmbedder, TextEmbedder
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.statistics import compare, convergence_curve, jackknife, kid_interval
from kspec_guidance.synthesis.schedule import Target, prompt_score
from kspec_guidance.synthesis.sharding import shard
from kspec_guidance.tuning import tune
from tests.devices.simulated import SimulatedDevice
from tests.samples import rows

X, Y, T = (z.float() for z in (rows(24, 6), 0.5 + rows(20, 6, 1), rows(24, 3, 2)))
K = GaussianKernel(2.0)
PHI = RandomFourierFeatures(K, 6, 16)
SCORES = {
    "vendi": lambda x, y, t: F.vendi_score(x),
    "vendi gaussian": lambda x, y, t: F.vendi_score(x, GaussianKernel(), 0.5),
    "vendi map": lambda x, y, t: F.vendi_score(x, feature_map=PHI),
    "vendi function": lambda x, y, t: F.vendi_score(x, lambda a, b: K(a, b)),
    "rke": lambda x, y, t: F.rke_score(x, K),
    "conditional vendi": lambda x, y, t: F.conditional_vendi_score(x, t, K, K),
    "information vendi": lambda x, y, t: F.information_vendi_score(x, t),
    "conditional rke map": lambda x, y, t: F.conditional_rke_score(x, t, feature_map=(PHI, lambda z: z)),
    "scendi": lambda x, y, t: F.scendi_score(x, t),
    "prompt vendi": lambda x, y, t: F.prompt_vendi_score(x, t, feature_map=(PHI, lambda z: z)),
    "remove prompt": lambda x, y, t: F.remove_prompt(x, t).cpu(),
    "ken": lambda x, y, t: F.ken_score(x, y),
    "ken gaussian": lambda x, y, t: F.ken_score(x, y, K),
    "ken map": lambda x, y, t: F.ken_score(x, y, feature_map=PHI),
    "mmd": lambda x, y, t: F.mmd(x, y),
    "mmd map": lambda x, y, t: F.mmd(x, y, feature_map=PHI),
    "kid": lambda x, y, t: F.kid(x, y, subsets=3)[0],
    "fidelity": lambda x, y, t: torch.tensor(list(vars(F.fidelity_scores(x, y, 3)).values())),
    "precision": lambda x, y, t: torch.tensor(F.precision_score(x, y, 3)),
    "modes": lambda x, y, t: torch.tensor([m.share for m in F.top_modes(x, K)]),
    "novel modes": lambda x, y, t: torch.tensor([m.share for m in F.novel_modes(x, y, K)]),
    "jackknife": lambda x, y, t: torch.tensor(jackknife(F.vendi_score, x).standard_error),
    "kid interval": lambda x, y, t: torch.tensor(kid_interval(x, y, subsets=3).high),
    "compare": lambda x, y, t: torch.tensor(compare(x, y, matched=True, permutations=3).difference),
    "curve": lambda x, y, t: torch.tensor(convergence_curve(x, K, repeats=1).mean["Vendi"]),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_on_a_device_without_float64_equal_those_on_the_host(name):
    with SimulatedDevice("mps") as device:
        found = SCORES[name](*(z.to(device.device) for z in (X, Y, T)))
        assert found.device.type == "cpu"
    torch.testing.assert_close(found.double(), SCORES[name](X, Y, T).double(), rtol=1e-5, atol=1e-6)


def fed(metric, *batches):
    for batch, arguments in batches:
        metric.update(*batch, **arguments)
    return metric.compute()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (metrics.VendiScore, "set"),
        (lambda: metrics.RKEScore(K, num_features=16), "set"),
        (lambda: metrics.ConditionalVendiScore(num_features=16), "pairs"),
        (lambda: metrics.InformationVendiScore(num_features=16), "pairs"),
        (metrics.ScendiScore, "pairs"),
        (metrics.KENScore, "two sets"),
        (metrics.MMDScore, "two sets"),
        (lambda: metrics.MMDScore(K, num_features=16), "two sets"),
    ],
)
def test_metrics_on_the_host_take_batches_from_a_device_without_float64(make, kind):
    def batches(x, y, t):
        if kind == "set":
            return [((x,), {})]
        return [((x, t), {})] if kind == "pairs" else [((x,), {}), ((y,), {"real": True})]

    with SimulatedDevice("mps") as device:
        found = fed(make(), *batches(*(z.to(device.device) for z in (X, Y, T))))
    torch.testing.assert_close(found, fed(make(), *batches(X, Y, T)), rtol=1e-5, atol=1e-6)


def test_metric_sums_stay_in_float64():
    metric = metrics.VendiScore()
    metric.update(X)
    assert metric.to(torch.float16).moment.dtype == torch.float64
    assert metric.half().moment.dtype == torch.float64
    assert metric._apply(lambda z: torch.empty_like(z, device="meta")).moment.device.type == "meta"


def test_metric_moved_to_mps_stays_on_the_host():
    metric = metrics.VendiScore()
    metric.update(X)
    with SimulatedDevice("mps") as device:
        assert metric.to(device.device) is metric
        assert metric.moment.device.type == "cpu"
        metric.update(X.to(device.device))
    assert metric.compute().item() == pytest.approx(F.vendi_score(X).item())


EMBEDDER = ImageEmbedder(lambda x: x, 8, "e", fingerprint="e")
TEXTS = TextEmbedder(lambda texts: torch.eye(3)[: len(texts)], "t", "t")


def image_set(x):
    names = [f"{k}.png" for k in range(len(x))]
    return ImageSet(Path("set"), names, [f"prompt {k % 3}" for k in range(len(x))], features=x)


def tuned(x):
    """Diversity of images whose features are these, in a search with a pipeline that returns seeds."""

    class Seeds:
        def __call__(self, prompt, generator, num_images_per_prompt=1, output_type="pil"):
            return SimpleNamespace(images=[g.initial_seed() for g in generator])

    guide = SimpleNamespace(attach=nullcontext)
    found = tune(Seeds(), ["a"], lambda scale: guide, [1.0], 4, 1, embed=lambda seeds: x[[s % len(x) for s in seeds]])
    return [found.plain_diversity, found.plain_fidelity]


FEATURES = {
    "evaluate": lambda x, y, t: [r.value for r in evaluate_set(image_set(x), EMBEDDER, TEXTS, image_set(y)).scores],
    "compare": lambda x, y, t: [r.value for r in compare_sets(image_set(x), image_set(y), EMBEDDER, TEXTS).scores],
    "tune": lambda x, y, t: tuned(x),
    "prompt score": lambda x, y, t: [prompt_score(x)],
    "target": lambda x, y, t: [Target("vendi", 1.0).reached(x, 4) == "target reached"],
    "shards": lambda x, y, t: shard(t, [1] * len(t), 2),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_an_embedder_may_be_on_a_device_without_float64(name):
    with SimulatedDevice("mps") as device:
        found = FEATURES[name](*(z.to(device.device) for z in (X, Y, T)))
    assert found == pytest.approx(FEATURES[name](X, Y, T))
