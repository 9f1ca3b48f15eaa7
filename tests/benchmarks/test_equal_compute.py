"""Group inference at equal compute: what is kept of more candidates, what it costs, and the table."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import equal_compute as ec
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.quality import FIGURES


def closest(x):
    return float(torch.pdist(x.flatten(1)).min())


@pytest.fixture(scope="module")
def bed():
    return Analytic(8, skewed=False)


def test_kept_samples_are_among_the_candidates_and_the_varied_ones_are_further_apart(bed):
    cases = bed.cases("report", 1)[:2]
    with torch.no_grad():
        made = ec.candidates(bed, ec.PLAIN, 1.0, tuple(cases))
        random, varied = (ec.samples(bed, ec.PLAIN, 1.0, keep, cases) for keep in (ec.RANDOM, ec.ALL))
    for all_of, some, chosen in zip(made, random, varied, strict=True):
        assert len(all_of) == ec.CANDIDATES * bed.images
        assert len(some) == len(chosen) == bed.images
        for x in (some, chosen):
            assert bool((x[:, None] == all_of).all(-1).any(1).all())
        assert closest(chosen) > closest(some)


def test_samples_of_a_guide_begin_at_noises_chosen_by_a_few_plain_steps(bed):
    cases = bed.cases("report", 1)[:1]
    with torch.no_grad():
        [start] = ec.chosen_starts(bed, cases)
        plain, guided = (ec.samples(bed, guide, 1.0, ec.FEW, cases) for guide in (ec.PLAIN, "OSCAR"))
        wanted = bed.run(cases[0], bed.images, start.view(bed.images, *bed.shape()))
    torch.testing.assert_close(plain[0], wanted.flatten(1), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(plain[0], guided[0], atol=1e-2)


def test_compute_counts_every_candidate(bed):
    assert ec.cost(bed, ec.PLAIN, ec.ONCE) == 1
    assert ec.cost(bed, "OSCAR", ec.ALL) == ec.cost(bed, ec.PLAIN, ec.RANDOM) == ec.CANDIDATES
    few = ec.look(bed) / bed.steps
    assert ec.cost(bed, ec.PLAIN, ec.FEW) == pytest.approx(1 + (ec.CANDIDATES - 1) * few)
    assert ec.cost(bed, "OSCAR", ec.FEW) == pytest.approx(1 + ec.CANDIDATES * few)


def test_the_table_has_the_gain_of_the_strength_that_keeps_quality():
    rng, prompts = np.random.default_rng(0), ["a", "b"]

    def block(modes, validity):
        noise = rng.normal(0, 1e-3, 2)
        values = {k: [1.0, 1.0] for k in FIGURES}
        return values | {"modes": list(modes + noise), "on_data": [validity] * 2, "seeds": 5}

    settings = {ec.BASE: block(4, 0.9), "OSCAR x0.5, one each": block(6, 0.9), "OSCAR x1, one each": block(8, 0.1)}
    found = {"bed": "a bed", "steps": 30, "prompts": prompts, "settings": {k: {"0": v} for k, v in settings.items()}}
    rows = ec.table("mixture-8", found).splitlines()
    assert "a bed, 30 steps, 5 seeds" in rows[0]
    cells = [cell.strip() for cell in rows[-1].split("|")]
    assert cells[1:6] == ["OSCAR", "one each", "1", "x0.5", "x1.50"]
    assert cells[-3].startswith("+5")


def test_the_page_has_the_tables_of_the_results():
    page = Path(__file__).parents[2] / "docs" / "arena" / "ablations.md"
    assert ec.tables(ec.RESULTS / "equal_compute.json") in page.read_text("utf-8")
