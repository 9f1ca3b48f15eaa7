"""How memory rows repel: those that a noisy sample is about to repeat."""

import math

import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, VendiGuidance
from kspec_guidance.guidance.recall import Recall, sharpness
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryBank, PromptWeights
from kspec_guidance.objectives import RKE, ConditionalRKE, LogDet, Novelty, Vendi
from tests.samples import normalize_rows, rows

OBJECTIVES = [RKE(), ConditionalRKE(), Vendi(GaussianKernel(), 0.5), LogDet()]


def unit(n, d, seed):
    return normalize_rows(rows(n, d, seed))


@pytest.mark.parametrize("sharpness", [0.5, 8.0, 1e4])
@pytest.mark.parametrize("chunks", [1, 3])
def test_likeliest_rows_are_a_softmax_of_standardised_cosines(sharpness, chunks):
    bank, x, kept = MemoryBank(), 3 * rows(4, 6, 0), rows(9, 6, 1)
    for part in kept.chunk(chunks):
        bank.add(part)
    z = normalize_rows(x) @ normalize_rows(bank.select().rows(x)).mT
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)
    expected = (sharpness * z).softmax(1) @ normalize_rows(kept.to(x))
    found, weight = bank.select().likeliest(x, sharpness)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (weight == 1).all()


def test_a_row_of_an_unrelated_prompt_is_not_recalled():
    t, bank = torch.eye(2), MemoryBank()
    near, far = unit(1, 6, 0), unit(1, 6, 1)
    bank.add(torch.cat([near, far]), torch.stack([t[1], t[0]]))
    weights = PromptWeights(GaussianKernel(0.35))
    found, weight = bank.select(t[:1], weights, 0.0).likeliest(near.float(), 8.0)
    torch.testing.assert_close(found, far.float(), atol=1e-4, rtol=1e-4)
    assert weight.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_without_noise_each_sample_moves_away_from_its_nearest_row(objective):
    bank, u = MemoryBank(), unit(3, 8, 2)
    bank.add(unit(5, 8, 3))
    for k in range(len(u)):  # one by one: no batch
        one = u[k : k + 1]
        g = Recall(objective, objective.pairs(one, None, bank)).gradient(one, None, None, one, 1e-3).rows
        kept = bank.select().rows(one)
        nearest = kept[(one @ kept.mT).argmax()]
        expected = -nearest + (nearest @ one[0]) * one[0]
        torch.testing.assert_close(g[0] / g.norm(), expected / expected.norm(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_batch_and_memory_have_the_same_largest_push(objective):
    bank, u = MemoryBank(), unit(4, 8, 2)
    bank.add(unit(5, 8, 3))
    g = Recall(objective, objective.pairs(u, None, bank)).gradient(u, None, None, rows(4, 8, 4), 1.0).rows
    alone = objective.gradient(u).rows
    alone = alone - (alone * u).sum(1, keepdim=True) * u
    alone = alone / alone.norm(dim=1).max()
    assert (g - alone).norm(dim=1).max().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose((g * u).sum(1), torch.zeros(4, dtype=g.dtype), atol=1e-5)


def test_size_and_scale_of_noisy_samples_do_not_matter():
    objective, bank, u, x = ConditionalRKE(), MemoryBank(), unit(4, 8, 2), rows(4, 8, 4)
    bank.add(unit(5, 8, 3))
    pairs = objective.pairs(u, None, bank)
    found = [Recall(objective, pairs).gradient(u, None, None, s * x, 0.7).rows for s in (1.0, 50.0)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [math.inf, 1e6, 1e-9, 0.0, torch.tensor(math.inf), torch.tensor(0.0)])
def test_pure_noise_and_no_noise_are_finite(ratio):
    objective, bank, u = ConditionalRKE(), MemoryBank(), unit(4, 8, 2)
    bank.add(unit(5, 8, 3))
    g = Recall(objective, objective.pairs(u, None, bank)).gradient(u, None, None, rows(4, 8, 4), ratio).rows
    assert torch.isfinite(g).all()
    assert g.norm() > 0


def test_sharpness_is_the_same_for_tensors():
    for ratio in (0.1, 1.0, 10.0):
        assert float(sharpness(torch.tensor(ratio))) == pytest.approx(sharpness(ratio), rel=1e-5)


def test_a_sample_on_a_row_of_memory_is_separated_from_it():
    objective, bank, u = ConditionalRKE(), MemoryBank(), unit(1, 8, 2).float()
    bank.add(u)
    pairs = objective.pairs(u, None, bank)
    found = Recall(objective, pairs).gradient(u, None, None, u, 1.0)
    assert found.coincident.all()
    assert found.rows.norm() < 1e-5
    jitter = 1e-2 * unit(1, 8, 9).float()
    assert Recall(objective, pairs).gradient(u, None, jitter, u, 1.0).rows.norm().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SPARKE(space="pooled", recall="nearest"), "space='x0', got 'pooled'"),
        (lambda: SPARKE(space="latents", recall="nearest"), "space='x0', got 'latents'"),
        (lambda: SPARKE(space="block", recall="nearest"), "space='x0', got 'block'"),
        (lambda: SPARKE.published(recall="nearest"), "PublishedRKE"),
        (lambda: SPARKE(transforms=("plain",), recall="nearest"), "got plain"),
        (lambda: SPARKE(memory=CentroidMemory(4), recall="nearest"), "CentroidMemory"),
        (lambda: KernelGuidance(Novelty(reference=torch.ones(3, 8)), 1.0, recall="nearest"), "Novelty"),
        (lambda: MMDGuidance(torch.ones(3, 8), recall="nearest"), "MMD"),
    ],
)
def test_where_nearest_rows_cannot_be_recalled_it_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("make", [SPARKE, VendiGuidance, lambda recall: VendiGuidance(order="logdet", recall=recall)])
def test_nearest_rows_are_recalled_only_if_asked_for(make):
    assert make(recall="nearest").terms[0].recall == "nearest"
    assert SPARKE().terms[0].recall == "all"


def test_unknown_recall_is_refused():
    with pytest.raises(ValueError, match="recall must be"):
        SPARKE(recall="some")


def test_means_of_samples_repel_as_the_objective_says():
    memory, u = CentroidMemory(capacity=2), unit(2, 8, 0).float()
    memory.add(unit(6, 8, 1).float())
    assert Recall.of(ConditionalRKE(), ConditionalRKE().pairs(u, None, memory)) is None
    assert Recall.of(ConditionalRKE(), ConditionalRKE().pairs(u, None, None)) is None


def test_recall_is_saved(tmp_path):
    for recall in ("nearest", "all"):
        SPARKE(recall=recall).save_config(tmp_path)
        assert KernelGuidance.from_config(tmp_path).terms[0].recall == recall
