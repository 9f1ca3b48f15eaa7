"""The share of a push that is kept: of a single Gaussian it is known; settings of networks are those of the mixtures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.arena.batched import Setting, run, weight_by_spread
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.kept_share import FIXED, VIVID, Pushed, curve, kept_on, schedules, tables
from kspec_guidance.guidance.transforms import fading


@pytest.fixture
def bed():
    bed = Analytic(8, False)
    bed.steps = 6
    return bed


def test_a_single_gaussian_keeps_its_share_of_the_variance(bed):
    """Its denoiser is linear, so that any direction keeps ``alpha^2 std^2 / (alpha^2 std^2 + sigma^2)`` of what arrives."""
    bed.model.centres.zero_()
    bed.model.std = 0.7  # with the bed's 0.1, predictions are too small for single precision
    with torch.no_grad():
        found = kept_on(bed, bed.cases("tune", 1)[:2])
    times = [int(t) for t in bed.pipe.scheduler.timesteps[1:]]
    for k, t in enumerate(times):
        signal = float(bed.pipe.scheduler.alphas_cumprod[t])
        wanted = signal * bed.model.std**2 / (signal * bed.model.std**2 + 1 - signal)
        for name in ("kept", "random"):
            assert found[name][k][0] / found["passed"][k][0] == pytest.approx(wanted, rel=0.02, abs=1e-4)
    assert len(found["spread"]) == bed.steps
    assert max(value for value, _ in found["cfg"]) < 1e-4  # all modes are one, whatever the prompt


@pytest.mark.parametrize(
    "setting",
    [
        VIVID,
        Setting(),
        Setting(scale=1.5, order=0.5, weight=1.25),
        Setting(scale=1.5, order=0.5, share=0.25),
        Setting(scale=1.5, order=0.5, by_spread=0.25),
        Setting(scale=3.0, order=0.5, sizes=(0.2, 1.0, 0.5, 0.1, 0.0, 0.3)),
    ],
)
def test_a_setting_is_the_same_on_any_bed(bed, setting):
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        found = bed.sample(Pushed(setting=setting, own=bed.guidance_scale), case).flatten(1)
        wanted = run(bed, [case], setting)[0]
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)  # rounding grows: pushes part near samples


def test_guidance_is_bounded_by_the_spread():
    rows = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    added = torch.tensor([[[0.0, 4.0], [0.0, 4.0]]])
    assert float(weight_by_spread(0.5, 3.0, rows, added)) == pytest.approx(1.25)
    assert float(weight_by_spread(100.0, 3.0, rows, added)) == 3


def test_schedules_follow_what_is_kept():
    steps, peak = 30, 12
    more = np.exp(-((np.arange(steps - 1) - peak) ** 2) / 18)
    about = {"steps": steps, "kept": [[v, 0] for v in more], "random": [[0, 0]] * 29, "passed": [[1, 0]] * 29}
    kept, made = curve(about), schedules(about)
    assert kept.argmax() == peak
    assert kept.max() == 1
    assert made[FIXED] == [fading(k / steps, (0, 0.65)) if k / steps < 0.65 else 0 for k in range(steps)]
    constant = made["constant where kept"]
    assert [bool(v) for v in constant] == [v >= 0.5 for v in kept]
    assert made["fade until then"][0] == 1


def test_without_results_there_is_no_table(tmp_path: Path):
    assert set(tables(tmp_path / "none.json", tmp_path / "none.json").values()) == {"(not measured)"}


def test_the_page_has_the_tables_of_the_results():
    page = (Path(__file__).parents[2] / "docs" / "arena" / "ablations.md").read_text("utf-8")
    for name, part in tables().items():
        assert f"<!-- {name} -->\n{part}\n<!-- /{name} -->" in page
    assert "(not measured)" not in json.dumps(tables())
