import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel
from tests.samples import rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.vendi_score(torch.empty(0, 3)), "no samples"),
        (lambda: F.vendi_score(torch.ones(3)), r"shape \[n, d\]"),
        (lambda: F.vendi_score(torch.tensor([[float("nan")]])), "NaN"),
        (lambda: F.vendi_score(torch.ones(2, 2), order=0), r"\(0, inf\]"),
        (lambda: F.vendi_score(torch.ones(2, 2), order=float("nan")), r"\(0, inf\]"),
        (lambda: F.vendi_score(torch.eye(3), truncation=0), "at least 1"),
        (lambda: F.conditional_vendi_score(torch.ones(3, 2), torch.ones(4, 2)), "one row of prompt features per sample"),
        (lambda: F.mmd(torch.ones(1, 2), torch.ones(4, 2), CosineKernel()), "unbiased=False"),
        (lambda: F.vendi_score(torch.ones(2, 0)), "at least one feature"),
        (lambda: F.vendi_score(1e160 * rows(4, 2)), "rescale"),
        (lambda: F.scendi_score(1e-160 * rows(4, 2), rows(4, 2)), "rescale"),
        (lambda: F.mmd(1e80 * rows(4, 2), rows(4, 2)), "rescale"),
        (lambda: F.vendi_score(rows(4, 2), truncation=2.5), "must be an integer"),
        (lambda: F.vendi_score(rows(4, 2), feature_map=rows(4, 2) * math.nan), "feature_map gives NaN"),
        (lambda: F.conditional_vendi_score(rows(4, 2), rows(4, 2), feature_map=lambda z: z), "must be a pair"),
        (lambda: F.vendi_score(rows(4, 2), lambda a, b: torch.exp(a[:, :1] - b[:, :1].mT)), "differs from k"),
        (lambda: F.vendi_score(rows(4, 2), lambda a, b: a @ b.mT * math.nan), "this function gives NaN"),
        (
            lambda: F.rke_score(rows(4, 2), lambda a, b: 1 + torch.cdist(a, b)),
            r"is no kernel, since \|k\(x, y\)\| is up to",
        ),
        (
            lambda: F.vendi_score(torch.eye(4), lambda a, b: 1.5 * (a @ b.mT) - 0.5),
            "has negative eigenvalues, down to -0.125",
        ),
        (lambda: F.vendi_score(rows(4, 2), truncation=True), "must be an integer"),
    ],
)
def test_degenerate_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.ken_score(rows(3, 2), rows(3, 4)), "embed both with the same model"),
        (lambda: F.ken_score(rows(3, 2), rows(3, 2), eta=-1), "at least 0"),
        (lambda: F.ken_score(rows(3, 2), torch.empty(0, 2)), "reference has no samples"),
        (lambda: F.scendi_score(rows(3, 2), rows(4, 2)), "one row of prompt features per sample"),
        (lambda: F.scendi_score(rows(3, 2), rows(3, 2), feature_map=rows(3, 2)), "needs a pair"),
        (lambda: F.fidelity_scores(rows(4, 2), rows(9, 2)), "below 4"),
        (lambda: F.fidelity_scores(rows(9, 2), rows(9, 2), nearest=2.5), "must be an integer"),
        (lambda: F.ken_score(rows(3, 2), rows(3, 2), eta=math.inf), "finite"),
        (lambda: F.kid(rows(3, 2), rows(9, 2)), "at least 4"),
        (lambda: F.kid(rows(9, 2), rows(9, 2), subset_size=1), "at least 2"),
        (lambda: F.kid(rows(8, 2).view(2, 4, 2), rows(9, 2)), r"shape \[n, d\]"),
        (lambda: F.top_modes(rows(8, 2).view(2, 4, 2)), r"shape \[n, d\]"),
        (lambda: F.ken_score(rows(8, 2).view(2, 4, 2), rows(9, 2)), "batch dimensions must be the same"),
        (lambda: F.frechet_distance(rows(1, 2), rows(9, 2)), "two samples"),
        (lambda: F.kid(rows(4, 2), rows(9, 2), subsets=0), "subsets"),
        (lambda: F.mmd(rows(4, 2), rows(4, 2), feature_map=rows(4, 2)), "must be a function"),
    ],
)
def test_invalid_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inputs_that_are_no_real_tensors_raise_type_error():
    for x in (rows(4, 2).numpy(), [[1.0, 2.0]], rows(4, 2).to(torch.complex64), rows(4, 2).to_sparse()):
        with pytest.raises(TypeError, match="x must"):
            F.vendi_score(x)
    with pytest.raises(TypeError, match="feature_map must return"):
        F.vendi_score(rows(4, 2), feature_map=lambda z: [1.0])


SCORES = {
    "vendi": lambda x, y, t: F.vendi_score(x, GaussianKernel()),
    "order 0.5": lambda x, y, t: F.vendi_score(x, LaplacianKernel(), 0.5),
    "rke": lambda x, y, t: F.rke_score(x, GaussianKernel()),
    "conditional": lambda x, y, t: F.conditional_vendi_score(x, t, GaussianKernel(), GaussianKernel()),
    "ken": lambda x, y, t: F.ken_score(x, y, GaussianKernel()),
    "mmd": lambda x, y, t: F.mmd(x, y, GaussianKernel()),
    "precision": lambda x, y, t: torch.tensor(F.precision_score(x, y)),
    "density": lambda x, y, t: torch.tensor(F.fidelity_scores(x, y).density),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_distances_do_not_depend_on_shift_scale_rotation_or_order(name):
    x, y, t = rows(30, 5), 0.5 + rows(25, 5, 1), rows(30, 3, 2)
    q, permuted = torch.linalg.qr(rows(5, 5, 3)).Q, torch.randperm(30, generator=torch.Generator().manual_seed(0))
    expected = SCORES[name](x, y, t)
    changes = [lambda z: z + 1e6, lambda z: 1e-20 * z, lambda z: 1e20 * z]
    if name != "order 0.5":  # of L1 distances
        changes.append(lambda z: z @ q)
    for change in changes:
        torch.testing.assert_close(SCORES[name](change(x), change(y), t), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(SCORES[name](x[permuted], y, t[permuted]), expected, rtol=1e-9, atol=1e-12)


def test_repeated_sets_have_the_same_scores():
    x, y, t, k = rows(20, 5), rows(15, 5, 1), rows(20, 3, 2), GaussianKernel(2.0)
    xx, yy, tt = x.repeat(3, 1), y.repeat(2, 1), t.repeat(3, 1)
    for q in (0.2, 1.0, math.inf):
        assert F.vendi_score(xx, k, q).item() == pytest.approx(F.vendi_score(x, k, q).item(), rel=1e-8)
        expected = F.conditional_vendi_score(x, t, k, k, q).item()
        assert F.conditional_vendi_score(xx, tt, k, k, q).item() == pytest.approx(expected, rel=1e-8)
    assert F.ken_score(xx, yy, k).item() == pytest.approx(F.ken_score(x, y, k).item(), rel=1e-8)
    assert F.scendi_score(xx, tt).item() == pytest.approx(F.scendi_score(x, t).item(), rel=1e-8)
    assert F.mmd(xx, yy, k, unbiased=False).item() == pytest.approx(F.mmd(x, y, k, unbiased=False).item(), rel=1e-8)
