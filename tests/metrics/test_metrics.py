"""Streams give what the functional scores give, in any batching, order, and number of processes."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from kspec_guidance import functional as F
from kspec_guidance import metrics
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from tests.samples import rows

GAUSS = GaussianKernel(2.0)


X, T, Y = (rows(*size, dtype=torch.float32) for size in ((97, 6), (97, 4, 1), (61, 6, 2)))
Y += 0.5
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")
PROMPTED = (metrics.ConditionalVendiScore, metrics.InformationVendiScore, metrics.ConditionalRKEScore, metrics.ScendiScore)
TWO_SETS = (metrics.KENScore, metrics.MMDScore)
MAKERS = {
    "vendi": lambda **k: metrics.VendiScore(**k),
    "vendi gaussian": lambda **k: metrics.VendiScore(GAUSS, 1.5, num_features=64, **k),
    "vendi laplacian": lambda **k: metrics.VendiScore(LaplacianKernel(6.0), math.inf, num_features=64, **k),
    "truncated": lambda **k: metrics.VendiScore(truncation=3, **k),
    "rke": lambda **k: metrics.RKEScore(**k),
    "conditional": lambda **k: metrics.ConditionalVendiScore(num_features=64, **k),
    "conditional rke": lambda **k: metrics.ConditionalRKEScore(num_features=64, **k),
    "information": lambda **k: metrics.InformationVendiScore(num_features=64, **k),
    "scendi": lambda **k: metrics.ScendiScore(**k),
    "scendi prompts": lambda **k: metrics.ScendiScore(GAUSS, "prompts", num_features=32, **k),
    "ken": lambda **k: metrics.KENScore(**k),
    "ken gaussian": lambda **k: metrics.KENScore(GAUSS, eta=0.5, num_features=64, **k),
    "mmd": lambda **k: metrics.MMDScore(GAUSS, num_features=64, **k),
    "mmd cubic": lambda **k: metrics.MMDScore(**k),
}


def feed(metric, part=slice(None), size=97):
    """The rows ``part`` of each set, in batches."""
    sets = [(X, T)] if isinstance(metric, PROMPTED) else [(X,), (Y, True)] if isinstance(metric, TWO_SETS) else [(X,)]
    for x, *more in sets:
        x = x[part]
        for start in range(0, len(x), size):
            here = slice(start, start + size)
            metric.update(x[here], *[m[part][here] if isinstance(m, torch.Tensor) else m for m in more])
    return metric


UNIT = [torch.nn.functional.normalize(z) for z in (X, T)]
EXPECTED = {
    "vendi": lambda: F.vendi_score(X),
    "vendi gaussian": lambda: F.vendi_score(X, order=1.5, feature_map=RandomFourierFeatures(GAUSS, 6, 64)),
    "truncated": lambda: F.vendi_score(X, truncation=3),
    "rke": lambda: F.rke_score(X),
    "scendi": lambda: F.scendi_score(X, T),
    "ken": lambda: F.ken_score(X, Y),
    "mmd": lambda: F.mmd(X, Y, feature_map=RandomFourierFeatures(GAUSS, 6, 64)),
    "mmd cubic": lambda: F.mmd(X, Y, PolynomialKernel()),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_stream_gives_the_functional_score(name):
    assert feed(MAKERS[name](), size=10).compute().item() == pytest.approx(EXPECTED[name]().item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", MAKERS)
def test_batching_order_and_merging_change_nothing(name):
    whole = feed(MAKERS[name]()).compute().item()
    assert feed(MAKERS[name](), size=13).compute().item() == pytest.approx(whole, rel=1e-6)
    a, b = feed(MAKERS[name](), slice(0, 40)), feed(MAKERS[name](), slice(40, None), 9)
    a.merge_state(b)
    assert a.compute().item() == pytest.approx(whole, rel=1e-6)
    fresh = MAKERS[name]()
    fresh.merge_state(a)
    assert fresh.compute().item() == pytest.approx(whole, rel=1e-6)
    fresh.reset()
    with pytest.raises(ValueError, match=r"no samples|too few"):
        fresh.compute()


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_round_trip_and_record(name):
    metric = feed(MAKERS[name]())
    again = MAKERS[name]()
    again.load_state_dict(metric.state_dict())
    assert again.compute().item() == metric.compute().item()
    record = metric.record()
    assert record["count"] == 97
    assert {"score", "kernel", "features"} <= set(record)


def test_conditional_streams_approach_the_exact_scores():
    k, kt = GaussianKernel(0.9), GaussianKernel(0.8)
    exact = F.conditional_vendi_score(*UNIT, k, kt).item()
    metric = metrics.ConditionalVendiScore(k, kt, num_features=4096)
    metric.update(X, T)
    assert metric.compute().item() == pytest.approx(exact, rel=0.05)
    information = metrics.InformationVendiScore(k, kt, num_features=4096)
    information.update(X, T)
    vendi = metrics.VendiScore(k, num_features=4096)
    vendi.update(UNIT[0])
    chain = metric.compute() * information.compute()
    assert chain.item() == pytest.approx(vendi.compute().item(), rel=0.02)


def test_forward_gives_the_batch_and_keeps_the_total():
    metric = metrics.VendiScore()
    first = metric(X[:20])
    assert first.item() == pytest.approx(F.vendi_score(X[:20]).item(), rel=1e-6)
    metric(X[20:])
    assert metric.compute().item() == pytest.approx(F.vendi_score(X).item(), rel=1e-6)


def test_a_collection_shares_nothing_it_should_not():
    both = MetricCollection(
        {"vendi": metrics.VendiScore(), "rke": metrics.RKEScore(), "max": metrics.VendiScore(order=math.inf)}
    )
    both.update(X[:50])
    both.update(X[50:])
    found = both.compute()
    assert found["vendi"].item() == pytest.approx(F.vendi_score(X).item(), rel=1e-6)
    assert found["rke"].item() == pytest.approx(F.rke_score(X).item(), rel=1e-6)
    assert found["max"].item() == pytest.approx(F.vendi_score(X, order=math.inf).item(), rel=1e-6)


def test_defaults_work_without_arguments():
    for name in metrics.__all__:
        assert torch.isfinite(feed(getattr(metrics, name)()).compute())


def test_plot_draws():
    import matplotlib

    matplotlib.use("Agg")
    metric = feed(metrics.VendiScore())
    figure, axes = metric.plot()
    assert axes.get_ylabel() or axes.get_title() or axes.collections or axes.lines
    matplotlib.pyplot.close(figure)


def test_the_interval_covers_and_needs_groups():
    metric = feed(metrics.VendiScore(groups=10), size=7)
    assert metric.compute().item() == pytest.approx(F.vendi_score(X).item(), rel=1e-6)
    found = metric.interval()
    assert found.low < found.value < found.high
    assert found.standard_error > 0
    with pytest.raises(ValueError, match="groups=4 or more"):
        metrics.VendiScore().interval()


def test_ken_keeps_the_reference_if_asked():
    metric = feed(metrics.KENScore(reset_real_features=False))
    before = metric.compute().item()
    metric.reset()
    metric.update(X)
    assert metric.compute().item() == pytest.approx(before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.VendiScore(PolynomialKernel()), "cannot stream"),
        (lambda: metrics.VendiScore(GaussianKernel()), "needs a bandwidth"),
        (lambda: metrics.VendiScore(order=0), r"\(0, inf\]"),
        (lambda: metrics.VendiScore().compute(), "call update first"),
        (lambda: feed(metrics.VendiScore()).update(rows(3, 9)), "one embedder for all batches"),
        (lambda: metrics.VendiScore().update(torch.full((2, 2), float("nan"))), "NaN"),
        (lambda: metrics.VendiScore().update(torch.ones(2, 3, 4)), r"shape \[n, d\]"),
        (lambda: metrics.ConditionalVendiScore(CosineKernel()), "must be a GaussianKernel"),
        (lambda: metrics.ConditionalVendiScore().update(X, T[:5]), "one prompt row per sample"),
        (lambda: metrics.ScendiScore(part="both"), "part must be"),
        (lambda: metrics.KENScore(eta=-1), "at least 0"),
        (lambda: metrics.MMDScore(groups=4), "keeps rows"),
        (lambda: metrics.VendiScore(groups=0), "groups"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _process(rank, world, folder, names):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    cuts = [0, 0, 17, 60, 97] if world == 4 else [0, 90, 97] if world == 2 else [0, 97]  # one of four sees no sample at all
    found = {}
    for name in names:
        metric = feed(MAKERS[name](), slice(cuts[rank], cuts[rank + 1]), 11)
        value = metric.compute().item()
        with metric.sync_context():
            found[name] = (value, {c: getattr(metric, c).tolist() for c in metric.counts})
    if rank == world - 1:
        torch.save(found, f"{folder}/found{world}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_two_and_four_processes_agree(tmp_path):
    names = [n for n in MAKERS if n != "mmd cubic"]
    for world in (1, 2, 4):
        mp.spawn(_process, (world, str(tmp_path), names), nprocs=world)
    one, two, four = (torch.load(tmp_path / f"found{w}") for w in (1, 2, 4))
    for name in names:
        for other in (two, four):
            assert other[name][1] == one[name][1]
            assert other[name][0] == pytest.approx(one[name][0], rel=1e-6)
