"""Metrics match the functional scores for any batch size, order of batches and number of processes."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from kspec_guidance import functional as F
from kspec_guidance import metrics
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from kspec_guidance.statistics import jackknife_interval
from tests.processes import FORKS
from tests.samples import rows

GAUSSIAN = GaussianKernel(2.0)
X, T, Y = (rows(*shape, dtype=torch.float32) for shape in ((97, 6), (97, 4, 1), (61, 6, 2)))
Y += 0.5
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")
PROMPT_METRICS = (
    metrics.ConditionalVendiScore,
    metrics.InformationVendiScore,
    metrics.ConditionalRKEScore,
    metrics.ScendiScore,
)
REFERENCE_METRICS = (metrics.KENScore, metrics.MMDScore)
FACTORIES = {
    "vendi": lambda **k: metrics.VendiScore(**k),
    "vendi gaussian": lambda **k: metrics.VendiScore(GAUSSIAN, 1.5, num_features=64, **k),
    "vendi laplacian": lambda **k: metrics.VendiScore(LaplacianKernel(6.0), math.inf, num_features=64, **k),
    "truncated": lambda **k: metrics.VendiScore(truncation=3, **k),
    "rke": lambda **k: metrics.RKEScore(**k),
    "conditional": lambda **k: metrics.ConditionalVendiScore(num_features=64, **k),
    "conditional rke": lambda **k: metrics.ConditionalRKEScore(num_features=64, **k),
    "information": lambda **k: metrics.InformationVendiScore(num_features=64, **k),
    "scendi": lambda **k: metrics.ScendiScore(**k),
    "scendi prompts": lambda **k: metrics.ScendiScore(GAUSSIAN, "prompts", num_features=32, **k),
    "ken": lambda **k: metrics.KENScore(**k),
    "ken gaussian": lambda **k: metrics.KENScore(GAUSSIAN, eta=0.5, num_features=64, **k),
    "mmd": lambda **k: metrics.MMDScore(GAUSSIAN, num_features=64, **k),
    "mmd cubic": lambda **k: metrics.MMDScore(**k),
}


def updated(metric, subset=slice(None), batch_size=97):
    """``metric`` after updates with the rows ``subset`` of its sets."""
    reference = [(Y, True)] if isinstance(metric, REFERENCE_METRICS) else []
    sets = [(X, T)] if isinstance(metric, PROMPT_METRICS) else [(X,), *reference]
    for x, *extra in sets:
        x = x[subset]
        for start in range(0, len(x), batch_size):
            batch = slice(start, start + batch_size)
            metric.update(x[batch], *[m[subset][batch] if isinstance(m, torch.Tensor) else m for m in extra])
    return metric


NORMALIZED = [torch.nn.functional.normalize(z) for z in (X, T)]
EXPECTED = {
    "vendi": lambda: F.vendi_score(X),
    "vendi gaussian": lambda: F.vendi_score(X, order=1.5, feature_map=RandomFourierFeatures(GAUSSIAN, 6, 64)),
    "truncated": lambda: F.vendi_score(X, truncation=3),
    "rke": lambda: F.rke_score(X),
    "scendi": lambda: F.scendi_score(X, T),
    "ken": lambda: F.ken_score(X, Y),
    "mmd": lambda: F.mmd(X, Y, feature_map=RandomFourierFeatures(GAUSSIAN, 6, 64)),
    "mmd cubic": lambda: F.mmd(X, Y, PolynomialKernel()),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_streamed_metric_matches_functional_score(name):
    assert updated(FACTORIES[name](), batch_size=10).compute().item() == pytest.approx(
        EXPECTED[name]().item(), rel=1e-6, abs=1e-7
    )


@pytest.mark.parametrize("name", FACTORIES)
def test_metric_is_invariant_to_batching_and_merging(name):
    full = updated(FACTORIES[name]()).compute().item()
    assert updated(FACTORIES[name](), batch_size=13).compute().item() == pytest.approx(full, rel=1e-6)
    a, b = updated(FACTORIES[name](), slice(0, 40)), updated(FACTORIES[name](), slice(40, None), 9)
    a.merge_state(b)
    assert a.compute().item() == pytest.approx(full, rel=1e-6)
    fresh = FACTORIES[name]()
    fresh.merge_state(a)
    assert fresh.compute().item() == pytest.approx(full, rel=1e-6)
    fresh.reset()
    with pytest.raises(ValueError, match=r"no samples|too few"):
        fresh.compute()


@pytest.mark.parametrize("name", FACTORIES)
def test_state_dict_round_trip_and_record(name):
    metric = updated(FACTORIES[name]())
    restored = FACTORIES[name]()
    restored.load_state_dict(metric.state_dict())
    assert restored.compute().item() == metric.compute().item()
    record = metric.record()
    assert record["count"] == 97
    assert {"score", "kernel", "features"} <= set(record)


@pytest.mark.slow
def test_conditional_metrics_approximate_exact_scores():
    k, kt = GaussianKernel(0.9), GaussianKernel(0.8)
    exact = F.conditional_vendi_score(*NORMALIZED, k, kt).item()
    metric = metrics.ConditionalVendiScore(k, kt, num_features=1024)
    metric.update(X, T)
    assert metric.compute().item() == pytest.approx(exact, rel=0.05)
    information = metrics.InformationVendiScore(k, kt, num_features=1024)
    information.update(X, T)
    vendi = metrics.VendiScore(k, num_features=1024)
    vendi.update(NORMALIZED[0])
    product = metric.compute() * information.compute()
    assert product.item() == pytest.approx(vendi.compute().item(), rel=1e-6)


def test_forward_returns_batch_score_and_accumulates():
    metric = metrics.VendiScore()
    first = metric(X[:20])
    assert first.item() == pytest.approx(F.vendi_score(X[:20]).item(), rel=1e-6)
    metric(X[20:])
    assert metric.compute().item() == pytest.approx(F.vendi_score(X).item(), rel=1e-6)


def test_metric_collection_keeps_states_separate():
    collection = MetricCollection(
        {"vendi": metrics.VendiScore(), "rke": metrics.RKEScore(), "max": metrics.VendiScore(order=math.inf)}
    )
    collection.update(X[:50])
    collection.update(X[50:])
    results = collection.compute()
    assert results["vendi"].item() == pytest.approx(F.vendi_score(X).item(), rel=1e-6)
    assert results["rke"].item() == pytest.approx(F.rke_score(X).item(), rel=1e-6)
    assert results["max"].item() == pytest.approx(F.vendi_score(X, order=math.inf).item(), rel=1e-6)


def test_metrics_work_with_default_arguments():
    k, kt = GaussianKernel(0.7), GaussianKernel(0.35)  # the documented defaults of scores given prompts
    expected = {
        "VendiScore": (F.vendi_score(X), 1e-6),
        "RKEScore": (F.rke_score(X), 1e-6),
        "ConditionalVendiScore": (F.conditional_vendi_score(*NORMALIZED, k, kt), 0.05),
        "InformationVendiScore": (F.information_vendi_score(*NORMALIZED, k, kt), 0.05),
        "ConditionalRKEScore": (F.conditional_rke_score(*NORMALIZED, k, kt), 0.05),
        "ScendiScore": (F.scendi_score(X, T), 1e-6),
        "KENScore": (F.ken_score(X, Y), 1e-6),
        "MMDScore": (F.mmd(X, Y), 1e-6),
    }
    assert set(expected) == set(metrics.__all__)
    for name, (value, tolerance) in expected.items():
        found = updated(getattr(metrics, name)()).compute().item()
        assert found == pytest.approx(value.item(), rel=tolerance), name


def test_plot_returns_axes():
    import matplotlib

    matplotlib.use("Agg")
    metric = updated(metrics.VendiScore())
    value = metric.compute().item()
    for values, expected in ((None, [value]), ([torch.tensor(v) for v in (1.0, 3.0, 2.0)], [1.0, 3.0, 2.0])):
        figure, axes = metric.plot(values)
        assert axes.get_ylabel() == "VendiScore"
        assert [y for line in axes.lines for y in line.get_ydata()] == pytest.approx(expected)
        matplotlib.pyplot.close(figure)


def test_interval_is_jackknife_over_groups():
    metric = updated(metrics.VendiScore(groups=10), batch_size=7)
    groups = torch.arange(len(X)) % 10
    left_out = torch.stack([F.vendi_score(X[groups != g]) for g in range(10)])
    expected, interval = jackknife_interval(F.vendi_score(X), left_out), metric.interval()
    for name in ("value", "low", "high", "standard_error"):
        assert getattr(interval, name) == pytest.approx(getattr(expected, name), rel=1e-6)
    with pytest.raises(ValueError, match="groups=4 or more"):
        metrics.VendiScore().interval()


def test_ken_reset_keeps_reference_features():
    metric = updated(metrics.KENScore(reset_real_features=False))
    before = metric.compute().item()
    metric.reset()
    metric.update(X)
    assert metric.compute().item() == pytest.approx(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.VendiScore(PolynomialKernel()), "cannot be streamed"),
        (lambda: metrics.VendiScore(GaussianKernel()), "needs a bandwidth"),
        (lambda: metrics.VendiScore(order=0), r"\(0, inf\]"),
        (lambda: metrics.VendiScore().compute(), "call update first"),
        (lambda: updated(metrics.VendiScore()).update(rows(3, 9)), "one embedder for all batches"),
        (lambda: metrics.VendiScore().update(torch.full((2, 2), float("nan"))), "NaN"),
        (lambda: metrics.VendiScore().update(torch.ones(2, 3, 4)), r"shape \[n, d\]"),
        (lambda: metrics.ConditionalVendiScore(CosineKernel()), "must be a GaussianKernel"),
        (lambda: metrics.ConditionalVendiScore().update(X, T[:5]), "one row of prompt features per sample"),
        (lambda: metrics.ScendiScore(part="both"), "part must be"),
        (lambda: metrics.KENScore(eta=-1), "at least 0"),
        (lambda: metrics.MMDScore(groups=4), "keeps rows"),
        (lambda: metrics.VendiScore(groups=0), "groups"),
    ],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_invalid_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _run_process(rank, world_size, folder, names):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world_size}", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)
    # one of four processes has no samples
    boundaries = [0, 0, 17, 60, 97] if world_size == 4 else [0, 90, 97] if world_size == 2 else [0, 97]
    results = {}
    for name in names:
        metric = updated(FACTORIES[name](), slice(boundaries[rank], boundaries[rank + 1]), 11)
        value = metric.compute().item()
        with metric.sync_context():
            results[name] = (value, {c: getattr(metric, c).tolist() for c in metric.counts})
    if rank == world_size - 1:
        torch.save(results, f"{folder}/results{world_size}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_results_agree_for_one_two_and_four_processes(tmp_path):
    names = [n for n in FACTORIES if n != "mmd cubic"]
    for world_size in (1, 2, 4):
        mp.start_processes(
            _run_process, (world_size, str(tmp_path), names), world_size, start_method=FORKS.get_start_method()
        )
    one, two, four = (torch.load(tmp_path / f"results{w}") for w in (1, 2, 4))
    for name in names:
        for other in (two, four):
            assert other[name][1] == one[name][1]
            assert other[name][0] == pytest.approx(one[name][0], rel=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_batches_of_another_width_raise_until_reset(name):
    metric = FACTORIES[name]()
    prompts, sets = isinstance(metric, PROMPT_METRICS), isinstance(metric, REFERENCE_METRICS)
    arguments = (T,) if prompts else ()
    metric.update(X, *arguments)
    with pytest.raises(ValueError, match="reset"):
        metric.update(X[:, :5], *arguments)
    if prompts:
        with pytest.raises(ValueError, match="prompt_features"):
            metric.update(X, T[:, :3])
    if sets:
        with pytest.raises(ValueError, match="reset"):
            metric.update(Y[:, :5], real=True)
    metric.reset()
    metric.update(X[:, :5], *arguments)


def test_forward_of_another_width_raises():
    metric = metrics.VendiScore(GAUSSIAN, num_features=16)
    assert metric(X) == metric(X)
    with pytest.raises(ValueError, match="reset"):
        metric(X[:, :5])


@pytest.mark.parametrize("name", FACTORIES)
def test_metrics_begun_in_inference_mode_go_on_outside(name):
    metric, plain = FACTORIES[name](), FACTORIES[name]()
    arguments = (T,) if isinstance(metric, PROMPT_METRICS) else ()
    with torch.inference_mode():
        metric.update(X, *arguments)
    metric.update(X, *arguments)
    plain.update(X, *arguments), plain.update(X, *arguments)
    if isinstance(metric, REFERENCE_METRICS):
        metric.update(Y, real=True), plain.update(Y, real=True)
    assert metric.compute() == plain.compute()


def test_truncation_is_checked_before_the_first_batch():
    with pytest.raises(ValueError, match="truncation"):
        metrics.VendiScore(truncation=0)


def test_streams_of_copies_count_them_once():
    x, order = X.repeat(20, 1), 0.3
    for make in (lambda: metrics.VendiScore(order=order), lambda: metrics.VendiScore(GAUSSIAN, order, num_features=128)):
        metric, once = make(), make()
        once.update(X)
        for batch in x.split(33):
            metric.update(batch)
        assert metric.compute().item() == pytest.approx(once.compute().item(), rel=1e-5)
