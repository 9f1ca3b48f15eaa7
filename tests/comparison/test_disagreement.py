import pytest
import torch

from kspec_guidance.comparison import prompt_split
from kspec_guidance.functional.novelty import differential_spectrum
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel
from kspec_guidance.metrics import KENScore
from tests.samples import rows

CHANGED = {4, 11, 20}
GAUSSIAN = {"kernel": GaussianKernel(6.0), "prompt_kernel": GaussianKernel(4.0)}


@pytest.fixture(scope="module")
def models():
    """Thirty prompts, six samples of each; two models that differ in three of them."""
    prompt = torch.arange(30).repeat_interleave(6)
    centres, other, t = rows(30, 32), rows(30, 32, 1), rows(30, 24, 2)
    x_a = centres[prompt] + 0.2 * rows(180, 32, 3)
    changed = torch.where(torch.tensor([k in CHANGED for k in range(30)])[:, None], other, centres)
    return x_a, t[prompt], changed[prompt] + 0.2 * rows(180, 32, 4), t[prompt], prompt


ROUTES = {
    "exact": {},
    "exact, Gaussian": GAUSSIAN,
    "projection": {"features": 500},
    "Fourier": {"features": 500, **GAUSSIAN},
    "projection of Fourier": {"features": 800, "method": "projection", **GAUSSIAN},
    "Laplacian": {"kernel": LaplacianKernel(), "prompt_kernel": LaplacianKernel()},
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_planted_disagreement_is_found_first(models, route):
    *sets, prompt = models
    found = prompt_split(*sets, modes=3, **route)
    for side in (found, found.reverse):
        for lists in (side.indices_a, side.indices_b):
            assert {int(prompt[i]) for listed in lists for i in listed} == CHANGED
    assert all(len(listed) for listed in found.indices_a)


def test_two_different_answers_to_one_prompt_have_values_of_its_share():
    t = torch.eye(5).repeat_interleave(4, 0)
    same = torch.eye(3)[[0] * 20]
    found = prompt_split(same, t, torch.eye(3)[[0] * 16 + [1] * 4], t, modes=2)
    assert found.values.tolist() == pytest.approx([0.2, 0], abs=1e-12)
    assert found.reverse.values.tolist() == pytest.approx([0.2, 0], abs=1e-12)
    assert found.indices_a == [[16, 17, 18, 19], []]
    assert found.indices_b == [[16, 17, 18, 19], []]
    assert prompt_split(same, t, same, t).values.tolist() == [0, 0, 0]
    assert prompt_split(same, t, same, t, features=64).values.tolist() == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kernel", [CosineKernel(), GaussianKernel(3.0)])
def test_values_are_those_of_the_matrix_with_cross_terms(kernel, eta):
    x, t, y, s = rows(14, 5), rows(14, 3, 1), rows(10, 5, 2) + 0.5, rows(10, 3, 3)
    k = kernel.normalised(torch.cat([x, y])) * kernel.normalised(torch.cat([t, s]))
    weight = torch.cat([torch.full((14,), 1 / 14, dtype=torch.float64), torch.full((10,), -eta / 10, dtype=torch.float64)])
    expected = torch.linalg.eigvals(k * weight).real.sort(descending=True).values
    found = prompt_split(x, t, y, s, modes=4, eta=eta, kernel=kernel, prompt_kernel=kernel)
    assert found.values.tolist() == pytest.approx(expected[:4].clamp_min(0).tolist(), abs=1e-9)
    assert found.reverse.values.tolist() == pytest.approx((-expected.flip(0)[:4]).clamp_min(0).tolist(), abs=1e-9)


def test_it_is_novelty_of_joint_rows_for_gaussian_kernels():
    x, t, y, s = rows(14, 5), rows(14, 3, 1), rows(10, 5, 2) + 0.5, rows(10, 3, 3)
    joint = torch.cat([x / 2, t / 3], 1), torch.cat([y / 2, s / 3], 1)
    expected = differential_spectrum(*joint, GaussianKernel(1.0), 1.0)[0].flip(0)[:3]
    found = prompt_split(x, t, y, s, kernel=GaussianKernel(2.0), prompt_kernel=GaussianKernel(3.0))
    assert found.values.tolist() == pytest.approx(expected.tolist(), abs=1e-10)


def test_sums_over_batches_have_the_same_modes():
    x, t, y, s = rows(14, 5), rows(14, 3, 1), rows(10, 5, 2) + 0.5, rows(10, 3, 3)
    stream = KENScore(GaussianKernel(1.0), num_features=256)
    for start in (0, 7):
        stream.update(torch.cat([x / 2, t / 3], 1)[start : start + 7])
        stream.update(torch.cat([y / 2, s / 3], 1)[start : start + 7], real=True)
    kernels = {"kernel": GaussianKernel(2.0), "prompt_kernel": GaussianKernel(3.0)}
    found = prompt_split(x, t, y, s, **kernels, features=256)
    values = torch.linalg.eigvalsh(stream.difference())
    assert values.flip(0)[:3].tolist() == pytest.approx(found.values.tolist(), abs=1e-5)
    assert (-values[:3]).tolist() == pytest.approx(found.reverse.values.tolist(), abs=1e-5)


def test_exchanged_models_are_the_reverse(models):
    x_a, t_a, x_b, t_b, _ = models
    found, back = prompt_split(x_a, t_a, x_b, t_b), prompt_split(x_b, t_b, x_a, t_a)
    assert found.reverse.values.tolist() == pytest.approx(back.values.tolist(), rel=1e-8)
    assert found.reverse.indices_b == back.indices_a
    assert found.reverse.reverse is None


def test_a_prompt_of_one_model_alone_has_no_samples_of_the_other():
    t = torch.eye(3)
    x, y = torch.eye(4)[[0, 0, 1, 1, 2, 2]], torch.eye(4)[[0, 0, 1, 1]]
    found = prompt_split(x, t[[0, 0, 1, 1, 2, 2]], y, t[[0, 0, 1, 1]], modes=1)
    assert (found.indices_a, found.indices_b) == ([[4, 5]], [[]])


def test_p_values_tell_planted_from_chance(models):
    x_a, t_a, x_b, t_b, _ = models
    found = prompt_split(x_a, t_a, x_b, t_b, modes=5, features=200, permutations=19)
    assert float(found.p_values[:3].max()) <= 0.1
    assert float(found.p_values[3:].min()) > 0.3
    again = prompt_split(x_a, t_a, x_b, t_b, modes=5, features=200, permutations=19)
    assert again.p_values.tolist() == found.p_values.tolist()


def test_p_values_are_uniform_for_equal_models():
    prompt = torch.arange(6).repeat_interleave(8)
    t, centres = torch.eye(6)[prompt], rows(6, 12)[prompt]
    p = [
        float(prompt_split(centres + rows(48, 12, s), t, centres + rows(48, 12, s + 90), t, 1, permutations=19).p_values[0])
        for s in range(30)
    ]
    assert sum(v <= 0.1 for v in p) <= 7  # 3 are expected
    assert sum(v > 0.5 for v in p) >= 7


def test_bad_inputs_are_named(models):
    x_a, t_a, x_b, t_b, _ = models
    with pytest.raises(ValueError, match="x_a has 180 samples and t_a 3 rows"):
        prompt_split(x_a, t_a[:3], x_b, t_b)
    with pytest.raises(ValueError, match="x_a has 32 features per row and x_b has 5"):
        prompt_split(x_a, t_a, x_b[:, :5], t_b)
    with pytest.raises(ValueError, match="t_b contains NaN"):
        prompt_split(x_a, t_a, x_b, t_b / 0)
    with pytest.raises(ValueError, match="no prompt in common"):
        prompt_split(x_a, t_a, x_b, t_b + 1, permutations=9)
    with pytest.raises(ValueError, match="modes must be at least 1"):
        prompt_split(x_a, t_a, x_b, t_b, modes=0)
    with pytest.raises(ValueError, match="fourier, projection, got 'both'"):
        prompt_split(x_a, t_a, x_b, t_b, features=10, method="both")
    with pytest.raises(ValueError, match="all Gaussian or all Laplacian"):
        prompt_split(x_a, t_a, x_b, t_b, features=10, method="fourier")
    with pytest.raises(ValueError, match="eta"):
        prompt_split(x_a, t_a, x_b, t_b, eta=-1)
