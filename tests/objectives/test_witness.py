"""The witness function of references against a baseline."""

import pytest
import torch

from kspec_guidance import KernelGuidance, MMDGuidance, NoveltyGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import Balance, Witness
from tests.objectives.common import FEATURE_MAP, PROMPT_KERNEL, D, P, fill, relative_error
from tests.samples import rows

REFERENCE, BASELINE = rows(9, D, 3), rows(11, D, 4)
PROMPTS = {"reference_prompts": rows(9, P, 7), "baseline_prompts": rows(11, P, 8)}


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["plain", "prompt-aware"])
@pytest.mark.parametrize("kernel", [GaussianKernel(1.3), CosineKernel(), PolynomialKernel(), LaplacianKernel(2.0)], ids=str)
def test_closed_form_gradient_matches_autograd(kernel, prompts):
    objective = Witness(REFERENCE, BASELINE, kernel, prompt_kernel=PROMPT_KERNEL, **prompts)
    assert relative_error(objective, MemoryBank()) < 1e-8


def test_gradient_of_random_features_matches_autograd():
    objective = Witness(REFERENCE, BASELINE, GaussianKernel(2.5), feature_map=FEATURE_MAP)
    assert relative_error(objective, MemoryBank()) < 1e-8


def test_an_open_bandwidth_is_twice_the_median_distance_of_the_references():
    fitted = Witness(REFERENCE, BASELINE).fitted
    assert fitted.bandwidth == pytest.approx(2 * float(GaussianKernel().fit(REFERENCE).bandwidth))
    assert Witness(REFERENCE, BASELINE, GaussianKernel(1.3)).fitted.bandwidth == 1.3


def test_value_is_the_difference_of_mean_kernels():
    k, x = GaussianKernel(1.3), rows(5, D, 0)
    expected = (k(x, REFERENCE).mean(1) - k(x, BASELINE).mean(1)).sum()
    torch.testing.assert_close(Witness(REFERENCE, BASELINE, k).value(x), expected)


def test_random_features_approach_the_exact_gradient():
    k, x = GaussianKernel(2.5), rows(5, D, 0)
    exact = Witness(REFERENCE, BASELINE, k).gradient(x).rows
    features = RandomFourierFeatures(k, D, 8192)
    approximate = Witness(REFERENCE, BASELINE, k, feature_map=features).gradient(x).rows
    assert (approximate - exact).norm() < 0.1 * exact.norm()


def test_what_both_sides_have_cancels():
    """Subjects are directions that both sides have in equal shares; a style is a shift of the references alone."""
    subjects, style = 4 * torch.eye(D, dtype=torch.float64)[:4], torch.zeros(D, dtype=torch.float64)
    style[5] = 1.0
    objective = Witness(subjects + style, subjects, GaussianKernel(3.0))
    g = objective.gradient(subjects[:1]).rows[0]  # one subject, as in a batch of one prompt
    assert g[5] > 5 * g[:5].abs().max()


def test_a_prompt_is_compared_with_rows_of_its_own():
    t = torch.eye(2, dtype=torch.float64)
    reference, baseline = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.zeros(2, 2).double()
    objective = Witness(reference, baseline, GaussianKernel(1.0), reference_prompts=t, baseline_prompts=t)
    g = objective.gradient(0.1 * torch.ones(2, 2).double(), t).rows
    assert g[0, 0] > 20 * g[0, 1].abs()
    assert g[1, 1] > 20 * g[1, 0].abs()


def test_one_reference_moves_samples_as_copies_of_it_do():
    wide, baseline, x = rows(1, 400, 1), rows(5, 400, 2), rows(3, 400, 3)
    one, copies = (Witness(r, baseline).gradient(x).rows for r in (wide, wide.repeat(4, 1)))
    assert one.norm(dim=1).min() > 1e-3
    assert torch.nn.functional.cosine_similarity(one, copies).min() > 0.9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sets_that_would_silence_the_guide_are_refused(value):
    for name in ("reference", "baseline"):
        sets = {"reference": REFERENCE, "baseline": BASELINE}
        with pytest.raises(ValueError, match=f"{name} contains NaN or infinite"):
            MMDGuidance(**(sets | {name: sets[name] * value}))
        with pytest.raises(TypeError, match=f"{name} must be a tensor of samples .*, got list"):
            Witness(**(sets | {name: list(sets[name])}))
    with pytest.raises(ValueError, match="a reference set contains NaN"):
        Balance([REFERENCE, BASELINE * value])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="samples of one shape"):
        Witness(REFERENCE, BASELINE[:, :4])
    with pytest.raises(ValueError, match="got one of them"):
        Witness(REFERENCE, BASELINE, reference_prompts=PROMPTS["reference_prompts"])
    with pytest.raises(ValueError, match="baseline has 11 samples and 3 rows"):
        Witness(REFERENCE, BASELINE, reference_prompts=rows(9, P, 7), baseline_prompts=rows(3, P, 8))
    with pytest.raises(ValueError, match="is exact"):
        Witness(REFERENCE, BASELINE, feature_map=FEATURE_MAP, **PROMPTS)
    with pytest.raises(ValueError, match="omit reference_prompts"):
        Witness(REFERENCE, BASELINE, **PROMPTS).gradient(rows(5, D, 0))
    with pytest.raises(ValueError, match="rows of length 6, samples have 4"):
        Witness(REFERENCE, BASELINE).gradient(rows(5, 4, 0))
    with pytest.raises(ValueError, match="count_memory is for a baseline"):
        MMDGuidance(REFERENCE, count_memory=True)
    with pytest.raises(ValueError, match="give baseline= too"):
        MMDGuidance(REFERENCE, baseline_prompts=PROMPTS["baseline_prompts"])


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["plain", "prompt-aware"])
@pytest.mark.parametrize("kernel", [GaussianKernel(1.3), CosineKernel()], ids=str)
def test_novelty_with_a_baseline_descends_the_witness(kernel, prompts):
    away = NoveltyGuidance(REFERENCE, 1.0, kernel, baseline=BASELINE, prompt_kernel=PROMPT_KERNEL, **prompts)
    objective = away.terms[0].objective
    assert relative_error(objective, MemoryBank()) < 1e-8
    toward = Witness(REFERENCE, BASELINE, kernel, prompt_kernel=PROMPT_KERNEL, **prompts)
    x, t = rows(5, D, 0), rows(5, P, 1)
    torch.testing.assert_close(objective.gradient(x, t).rows, -toward.gradient(x, t).rows)


def test_novelty_with_a_baseline_leaves_what_both_sides_have():
    """Subjects are directions that both sides have in equal shares; a style is a shift of the references alone."""
    subjects, style = 4 * torch.eye(D, dtype=torch.float64)[:4], torch.zeros(D, dtype=torch.float64)
    style[5] = 1.0
    guide = NoveltyGuidance(subjects + style, 1.0, GaussianKernel(3.0), baseline=subjects)
    g = guide.gradient(subjects[:1])[0]
    assert -g[5] > 5 * g[:5].abs().max()
    alone = NoveltyGuidance(subjects + style, 1.0, GaussianKernel(3.0)).gradient(subjects[:1])[0]
    assert -alone[5] < 2 * alone[:5].abs().max()


def test_novelty_with_a_baseline_has_random_features_and_refuses_those_of_prompts():
    guide = NoveltyGuidance(REFERENCE, 1.0, GaussianKernel(2.5), baseline=BASELINE, feature_map=FEATURE_MAP)
    assert relative_error(guide.terms[0].objective, MemoryBank()) < 1e-8
    with pytest.raises(ValueError, match="leave prompt_feature_map out"):
        NoveltyGuidance(REFERENCE, baseline=BASELINE, prompt_feature_map=FEATURE_MAP)
    with pytest.raises(ValueError, match="give baseline= too"):
        NoveltyGuidance(REFERENCE, baseline_prompts=PROMPTS["baseline_prompts"])


def test_settings_survive_saving(tmp_path):
    guide = MMDGuidance(REFERENCE.float(), baseline=BASELINE.float())
    guide.save_config(tmp_path)
    again = KernelGuidance.from_config(tmp_path).terms[0]
    x = rows(5, D, 0).float()
    assert torch.equal(again.objective.gradient(x).rows, guide.terms[0].objective.gradient(x).rows)
    assert again.scale == guide.terms[0].scale == 1.0


@pytest.mark.parametrize("settings", [{}, PROMPTS, {"feature_map": FEATURE_MAP}], ids=["plain", "prompt-aware", "features"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_with_a_memory_matches_autograd(settings, normalize):
    objective = Witness(REFERENCE, BASELINE, GaussianKernel(2.5), normalize=normalize, count_memory=True, **settings)
    assert relative_error(objective, fill(objective.make_memory())) < 1e-8


@pytest.mark.parametrize("settings", [{}, {"feature_map": FEATURE_MAP}], ids=["exact", "features"])
def test_counted_samples_in_memory_are_rows_of_the_baseline(settings):
    k, x = GaussianKernel(2.5), rows(5, D, 0)
    objective = Witness(REFERENCE, BASELINE, k, count_memory=True, **settings)
    longer = Witness(REFERENCE, torch.cat([BASELINE, rows(7, D, 5)]), k, **settings)
    torch.testing.assert_close(objective.gradient(x, memory=fill(objective.make_memory())).rows, longer.gradient(x).rows)
    torch.testing.assert_close(objective.value(x, memory=fill(objective.make_memory())), longer.value(x))
    ignored = Witness(REFERENCE, BASELINE, k, **settings)
    assert torch.equal(objective.gradient(x, memory=objective.make_memory()).rows, ignored.gradient(x).rows)


def test_counted_samples_of_other_prompts_repel_less():
    t = torch.eye(2, dtype=torch.float64)
    about = {"reference_prompts": t[:1].repeat(9, 1), "baseline_prompts": t[:1].repeat(11, 1), "count_memory": True}
    objective, x = Witness(REFERENCE, BASELINE, GaussianKernel(2.5), **about), rows(5, D, 0)
    memory = objective.make_memory()
    memory.add(rows(7, D, 5), t[1:].repeat(7, 1))  # of another prompt
    alone = Witness(REFERENCE, BASELINE, GaussianKernel(2.5)).gradient(x).rows
    found = objective.gradient(x, t[:1].repeat(5, 1), memory).rows
    torch.testing.assert_close(found, alone, rtol=0, atol=0.01 * float(alone.abs().max()))
