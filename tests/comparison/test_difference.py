import pytest
import torch

from kspec_guidance.comparison import koda, spec
from kspec_guidance.comparison.joint import sides, upright
from kspec_guidance.kernels import CosineKernel, GaussianKernel
from tests.comparison.planted import planted
from tests.samples import rows


def test_merged_groups_have_the_value_of_half_of_their_share():
    z = torch.eye(3).repeat_interleave(4, 0)
    merged = torch.eye(3)[[0, 0, 2]].repeat_interleave(4, 0)
    found = spec(z, merged, modes=2)
    assert found.values.tolist() == pytest.approx([1 / 3, 0, 0, -1 / 3], abs=1e-12)
    assert sorted(map(sorted, (found.positive[0], found.negative[0]))) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(found.positive[-1]) == list(range(8))
    assert (found.negative[-1], found.positive[1]) == ([], [])
    assert found.distance == pytest.approx(1 / 3)
    assert spec(merged, z, modes=2).values.tolist() == pytest.approx([1 / 3, 0, 0, -1 / 3], abs=1e-12)


@pytest.mark.parametrize("kernel", [None, GaussianKernel(2.0)])
def test_equal_embeddings_differ_by_nothing(kernel):
    x = rows(30, 4)
    found = spec(x, x, kernel_a=kernel, kernel_b=kernel)
    assert found.distance == 0
    assert found.values.tolist() == [0] * 6
    assert spec(x, x @ torch.linalg.qr(rows(4, 4, 1)).Q).distance == 0  # a rotation changes no kernel


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_feature_form_equals_matrix_form(eta):
    x, y, k = rows(40, 5), rows(40, 4, 1), CosineKernel()
    expected = torch.linalg.eigvalsh((k(x) - eta * k(y)) / 40)
    found = spec(x, y, modes=3, eta=eta)
    assert found.values[:3].tolist() == pytest.approx(expected.flip(0)[:3].tolist(), abs=1e-10)
    assert found.values[3:].tolist() == pytest.approx(expected[:3].flip(0).tolist(), abs=1e-10)
    matrix = (k(x) - eta * k(y)) / 40
    assert torch.allclose(found.vectors @ matrix, found.values[:, None] * found.vectors, atol=1e-9)


def test_random_features_are_close():
    a, b, _ = planted((40,) * 6, noise=0.05)
    kernel = GaussianKernel(0.7)
    exact, close = (spec(a, b, kernel_a=kernel, kernel_b=kernel, features=f) for f in (None, 118))
    assert close.values.tolist() == pytest.approx(exact.values.tolist(), abs=0.1)


def test_it_returns_a_group_that_both_see_where_koda_does_not():
    a, b, group = planted(noise=0.02)
    b[group == 5] += 0.1 * rows(50, 32, 9)
    kernel = GaussianKernel(0.5)
    listed = [set(group[p + n].tolist()) for p, n in zip(*(lambda f: (f.positive, f.negative))(
        spec(a, b, modes=4, kernel_a=kernel, kernel_b=kernel)), strict=True)]  # fmt: skip
    assert 5 in set().union(*listed[:4])
    found = koda(a, b, directions=4, kernel_a=kernel, kernel_b=kernel)
    assert 5 not in set().union(*(set(group[p + n].tolist()) for p, n in zip(found.positive, found.negative, strict=True)))


def test_bad_inputs_are_named():
    x = rows(20, 4)
    with pytest.raises(ValueError, match="a has 20 rows and b has 19"):
        spec(x, x[:19])
    with pytest.raises(ValueError, match="modes"):
        spec(x, x, modes=0)
    with pytest.raises(ValueError, match="eta"):
        spec(x, x, eta=float("nan"))
    with pytest.raises(ValueError, match="at least two samples"):
        spec(x[:1], x[:1])


def test_the_modality_that_is_responsible_is_named():
    points = torch.eye(4)
    a = {"image": points[[0, 1, 2, 2]].repeat_interleave(10, 0), "text": points[[0, 0, 1, 2]].repeat_interleave(10, 0)}
    merged = {"image": points[[0, 0, 2, 2]].repeat_interleave(10, 0), "text": a["text"]}
    found = spec(a, merged, modes=1)
    assert found.values.tolist() == pytest.approx([0.25, -0.25])
    assert set(found.positive[0] + found.negative[0]) == set(range(20))
    assert found.modality == ["image", "image"]
    assert spec(a["image"], merged["image"]).modality == []


def test_the_positive_side_lists_the_strongest_samples():
    x = torch.tensor([[0.9, 0.8, *[-0.3] * 20], [-0.9, 0.5, *[0.0] * 20], [0.0] * 22])
    for turned in (upright(x), upright(-x)):
        positive, negative = sides(turned)
        assert positive[:2] == [[0, 1], [0]]
        assert negative[:2] == [[], [1]]
