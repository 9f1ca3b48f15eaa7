import numpy as np
import pytest
import torch

from kspec_guidance.comparison import koda
from kspec_guidance.comparison.contrast import _direction
from kspec_guidance.comparison.joint import JointKernel
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from tests.comparison.planted import planted
from tests.samples import normalize_rows, rows

GAUSSIAN = GaussianKernel(0.5)
SCATTER = 0.9  # of the samples of a group, at least, must be listed


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def groups_of(indices, group):
    """Groups of which most samples are listed, and whether no others are."""
    listed = group[indices]
    found = {int(k) for k in listed.unique()}
    return found, all((listed == k).sum() >= SCATTER * (group == k).sum() for k in found)


@pytest.mark.parametrize(
    ("eps", "value"), [(0.7, 0.88), (0.3, 0.57777777777), (0.1, 0.35555555555), (0.02, 0.1), (1.0, 1.0)]
)
def test_commuting_kernels_give_the_linear_program(eps, value):
    a, b = np.diag([1, 0.8, 0.3, 0.1]), np.diag([1, 0.5, 0.05, 0.02])
    y, _, gap = _direction(a, b, eps)
    assert y @ a @ y == pytest.approx(value, abs=1e-9)
    assert y @ b @ y <= eps + 1e-12
    assert gap < 1e-12
    assert _direction(a, b, 0.019) is None


@pytest.mark.parametrize("seed", range(4))
def test_no_direction_is_better_than_the_one_that_is_found(seed):
    x, y = rows(12, 20, seed), rows(12, 20, seed + 100)
    found = koda(x, y, directions=1, eps=1.2, keep_noise=True)
    a, b = unit(x) @ unit(x).T / 12, unit(y) @ unit(y).T / 12
    lams = torch.linspace(0, 20, 4001, dtype=torch.float64)
    dual = (torch.linalg.eigvalsh(a - lams[:, None, None] * b)[:, -1] + lams * 1.2 / 12).min()
    assert found.strength_a.item() == pytest.approx(dual.item(), rel=1e-4)
    assert found.strength_a.item() <= dual.item() + 1e-12
    assert found.gap.item() < 1e-10
    assert found.strength_b.item() <= 1.2 / 12 + 1e-12


def test_feature_form_equals_matrix_form():
    x, y = rows(40, 5), rows(40, 4, 1)
    narrow = koda(x, y, keep_noise=True)
    wide = koda(torch.cat([x, torch.zeros(40, 60)], 1), torch.cat([y, torch.zeros(40, 60)], 1), keep_noise=True)
    assert narrow.strength_a.tolist() == pytest.approx(wide.strength_a.tolist(), rel=1e-8)
    assert float(narrow.gap.max()) < 1e-10
    for z, w in zip(narrow.vectors, wide.vectors, strict=True):
        assert abs(float(z @ w)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kernel", [None, GAUSSIAN])
def test_planted_groups_are_found_and_none_invented(kernel):
    a, b, group = planted()
    a, b = unit(a), unit(b)
    found = koda(a, b, directions=8, kernel_a=kernel, kernel_b=kernel, rotate=True)
    assert len(found) == 3
    assert "noise" in found.stopped
    pairs = [(*groups_of(p, group), *groups_of(n, group)) for p, n in zip(found.positive, found.negative, strict=True)]
    seen = {frozenset(p | n) for p, _, n, _ in pairs}
    if kernel is not None:
        assert seen == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4})}
        assert all(whole for _, *rest in pairs for whole in (rest[0], rest[2]))
    assert set().union(*seen) == {0, 1, 2, 3, 4}
    assert float(found.gap.max()) < 1e-10
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-10)


def test_three_directions_of_planted_groups_are_found_at_most_seeds():
    found = [koda(*planted((20,) * 6, 32, 0.05, seed)[:2], directions=3) for seed in range(10)]
    assert sum(len(f) == 3 for f in found) >= 9
    assert min(len(f) for f in found) >= 1


def test_below_one_sample_only_what_is_merged_is_found():
    a, b, group = planted(noise=0.005)
    found = koda(unit(a), unit(b), directions=8, eps=0.05, kernel_a=GAUSSIAN, kernel_b=GAUSSIAN, rotate=True)
    listed = [set(group[p + n].tolist()) for p, n in zip(found.positive, found.negative, strict=True)]
    assert sorted(map(sorted, listed)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(("n", "d"), [(60, 32), (100, 16), (100, 512)])
@pytest.mark.parametrize("kernel", [None, GAUSSIAN])
def test_unrelated_rows_without_groups_have_no_direction(n, d, kernel):
    found = [koda(unit(rows(n, d, s)), unit(rows(n, d, s + 50)), kernel_a=kernel, kernel_b=kernel) for s in range(20)]
    assert sum(len(f) > 0 for f in found) <= 1
    empty = next(f for f in found if not len(f))
    assert empty.vectors.shape == (0, n)
    assert "noise" in empty.stopped


@pytest.mark.parametrize(("d", "noise"), [(32, 0.1), (32, 0.2), (64, 0.1)])
@pytest.mark.parametrize("kernel", [None, GAUSSIAN])
def test_groups_that_both_see_are_not_reported(d, noise, kernel):
    centres = normalize_rows(rows(5, d))[torch.arange(5).repeat_interleave(40)]
    a, b = (unit(centres + noise * rows(200, d, s)) for s in (1, 2))
    assert len(koda(a, b, kernel_a=kernel, kernel_b=kernel)) == 0
    assert len(koda(a, a)) == 0


def test_a_bound_that_all_directions_meet_exactly_leaves_the_largest_strength():
    found = koda(torch.eye(3).repeat_interleave(10, 0), torch.eye(30), eps=1.0, rotate=True)
    assert found.strength_a.tolist() == pytest.approx([1 / 3] * 3)
    assert found.strength_b.tolist() == pytest.approx([1 / 30] * 3)


def test_modalities_of_many_samples_are_compared_by_features(monkeypatch):
    def refuse(*_):
        raise AssertionError("a matrix of all samples was computed")

    monkeypatch.setattr("kspec_guidance.comparison.joint.joint_gram", refuse)
    a = {"image": unit(rows(400, 4)), "text": unit(rows(400, 4, 1))}
    b = {"image": unit(rows(400, 4, 2)), "text": unit(rows(400, 4, 3))}
    found = koda(a, b, features=100, eps=3.0, kernel_a=GAUSSIAN, kernel_b=GAUSSIAN, keep_noise=True)
    assert found.by_modality["text"].shape == (3, 2)


def test_random_features_are_as_many_as_asked_for_unless_exact_rows_are_narrower():
    parts = {"image": rows(400, 15), "text": rows(400, 20, 1)}
    assert JointKernel(parts, features=64).rows.shape == (400, 64)
    exact = JointKernel(parts, features=300)
    assert torch.allclose(exact.matrix, JointKernel(parts).matrix)


def test_quantile_is_the_bound_of_the_paper():
    a, b, _ = planted((20,) * 6)
    matrix = GAUSSIAN(unit(b)) / 120
    found = koda(unit(a), unit(b), kernel_a=GAUSSIAN, kernel_b=GAUSSIAN, eps_quantile=0.5)
    assert found.eps == pytest.approx(float(torch.linalg.eigvalsh(matrix).quantile(0.5)))


def test_infeasible_bound_says_what_is_least():
    x = rows(20, 40)
    with pytest.raises(ValueError, match=r"the least is .* / n; give a larger eps"):
        koda(x, unit(rows(20, 400, 1)), eps=0.1)
    for eps in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be at least 0"):
            koda(x, x, eps=eps)
    with pytest.raises(ValueError, match="eps_quantile must lie"):
        koda(x, x, eps_quantile=2.0)


def test_bad_inputs_are_named():
    x = rows(20, 4)
    with pytest.raises(ValueError, match="a has 20 rows and b has 19"):
        koda(x, x[:19])
    with pytest.raises(ValueError, match="same modalities, got \\['image'\\] and one tensor"):
        koda({"image": x}, x)
    with pytest.raises(ValueError, match="a\\['text'\\] contains NaN"):
        koda({"image": x, "text": x / 0}, {"image": x, "text": x})
    with pytest.raises(ValueError, match="one row per sample, got"):
        koda({"image": x, "text": x[:3]}, {"image": x, "text": x})
    with pytest.raises(ValueError, match="directions"):
        koda(x, x, directions=0)
    with pytest.raises(ValueError, match="no modality"):
        koda({}, {})
    with pytest.raises(ValueError, match="kernels for"):
        koda(x, x, kernel_a={"image": GAUSSIAN})


def test_the_modality_in_which_groups_are_seen_is_named():
    centres = torch.eye(8, dtype=torch.float64)
    image, text = torch.tensor([0, 1, 2, 2]).repeat_interleave(30), torch.tensor([0, 0, 1, 2]).repeat_interleave(30)
    merged_image, merged_text = (
        torch.tensor([0, 0, 2, 2]).repeat_interleave(30),
        torch.tensor([0, 0, 1, 1]).repeat_interleave(30),
    )
    noise = [0.02 * rows(120, 8, s) for s in range(4)]
    a = {"image": centres[image] + noise[0], "text": centres[text] + noise[1]}
    b = {"image": centres[merged_image] + noise[2], "text": centres[merged_text] + noise[3]}
    found = koda(a, b, kernel_a=GAUSSIAN, kernel_b=GAUSSIAN, rotate=True)
    named = dict(
        zip((min(p + n) < 60 for p, n in zip(found.positive, found.negative, strict=True)), found.modality, strict=True)
    )
    assert named == {True: "image", False: "text"}
    assert found.by_modality["image"].shape == (2, 2)


def test_random_features_find_the_same_groups():
    a, b, group = planted()
    found = koda(unit(a), unit(b), kernel_a=GAUSSIAN, kernel_b=GAUSSIAN, features=1000, eps=3.0, directions=8, rotate=True)
    listed = [set(group[p + n].tolist()) for p, n in zip(found.positive, found.negative, strict=True)]
    assert [5] not in map(sorted, listed)
    assert set().union(*listed) == {0, 1, 2, 3, 4}


def test_random_features_meet_the_bound_of_the_paper():
    x, r = unit(rows(200, 16)), 400  # Theorem 5.1: |K~ - K|_F / n <= (2 + sqrt(8 log(1 / delta))) / sqrt(r)
    exact = JointKernel({"": x}, GAUSSIAN).matrix
    close = JointKernel({"": x}, GAUSSIAN, features=2 * r).matrix if 2 * r < 200 else None
    phi = RandomFourierFeatures(GAUSSIAN, 16, 2 * r)(x)
    assert close is None
    assert float((phi @ phi.T - exact).norm()) / 200 <= (2 + (8 * np.log(1 / 0.01)) ** 0.5) / r**0.5


def test_spread_is_that_of_pairs():
    x = unit(rows(50, 6))
    pairs = (x @ x.T)[~torch.eye(50, dtype=torch.bool)]
    for features in (None, 10):
        assert JointKernel({"": x}, None, features).spread == pytest.approx(float(pairs.std(correction=0)))
    assert JointKernel({"": torch.eye(5)}).spread == 0


@pytest.mark.parametrize("seed", [0, 1, 4, 7])
def test_a_loose_bound_lists_no_leftovers_of_groups(seed):
    a, b, _ = planted(sizes=(20,) * 6, seed=seed)
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    found = koda(a, b, 8, eps=4.0, kernel_a=GaussianKernel(), kernel_b=GaussianKernel(), rotate=True)
    assert len(found) == 3
    assert "times the" in found.stopped or "coherence" in found.stopped


def test_counts_that_are_no_whole_numbers_are_named():
    x = torch.randn(12, 3)
    for options, message in [
        ({"directions": 2.5}, "directions must be at least 1"),
        ({"features": 0}, "features must be at least 1"),
        ({"eps": "4"}, "eps must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            koda(x, x, **options)


def test_random_features_of_rows_of_zeros_are_refused():
    x = {"image": torch.randn(30, 20), "text": torch.zeros(30, 20)}
    with pytest.raises(ValueError, match="30 rows of zeros"):
        koda(x, x, features=8)
