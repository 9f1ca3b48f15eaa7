import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.functional.scendi import schur_parts
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from tests.samples import rows


def test_scendi_matrices_sum_to_second_moment_with_unit_trace():
    x, t = rows(50, 6), rows(50, 4, 1)
    unexplained, explained = F.scendi_matrices(x, t)
    u = l2_normalize(x)
    torch.testing.assert_close(unexplained + explained, u.T @ u / 50)
    assert (unexplained.trace() + explained.trace()).item() == pytest.approx(1)
    assert torch.linalg.eigvalsh(unexplained).min() > -1e-12


def test_scendi_of_determining_and_constant_prompts():
    x, n = oracles.clusters(6, 2), 12
    assert F.scendi_score(x, x).item() == pytest.approx(1)  # the prompts determine the images
    assert F.prompt_vendi_score(x, x).item() == pytest.approx(6)
    constant = torch.ones(n, 1, dtype=torch.float64)
    centred = torch.cat([rows(n, 3, 2), -rows(n, 3, 2)])
    assert F.scendi_score(centred, torch.ones(2 * n, 1)).item() == pytest.approx(F.vendi_score(centred).item())
    # a constant prompt explains the mean image, 1/6 of the mass; five modes of 1/6 remain
    assert F.scendi_score(x, constant).item() == pytest.approx(math.exp(5 / 6 * math.log(5)))
    assert F.prompt_vendi_score(x, constant).item() == pytest.approx(1)


def test_scendi_matches_schur_complement_of_paper():
    x, t = l2_normalize(rows(80, 5)), l2_normalize(rows(80, 3, 1))
    c = torch.cat([x, t], 1)
    c = c.T @ c / 80
    s = c[:5, :5] - c[:5, 5:] @ torch.linalg.solve(c[5:, 5:], c[5:, :5])
    l = torch.linalg.eigvalsh(s)
    expected = (-(l * (l / l.sum()).log()).sum()).exp()
    assert F.scendi_score(x, t).item() == pytest.approx(expected.item(), rel=1e-9)


def test_scendi_handles_linearly_dependent_prompt_features_in_float32():
    x, t = rows(60, 6, dtype=torch.float32), rows(60, 3, 1, dtype=torch.float32)
    wide = torch.cat([t, t @ rows(3, 20, 2, torch.float32)], 1)
    narrow = t @ torch.linalg.qr(torch.cat([torch.eye(3), rows(3, 20, 2, torch.float32)], 1).T)[1].T
    assert F.scendi_score(x, wide).item() == pytest.approx(F.scendi_score(x, narrow).item(), rel=1e-3)


def test_remove_prompt_residual_is_uncorrelated_with_prompts():
    t = rows(200, 4, 1)
    x = t @ rows(4, 7, 2) + 0.3 * rows(200, 7, 3)
    residual = F.remove_prompt(x, t)
    assert residual.shape == x.shape
    assert (residual.T @ l2_normalize(t)).abs().max() < 1e-9
    assert F.remove_prompt(x[:5], t[:5], fit=(x, t)) == pytest.approx(residual[:5])


def test_scendi_with_random_features_of_determining_prompts():
    x = oracles.clusters(4, 5)
    phi = RandomFourierFeatures(GaussianKernel(0.3), 4, 512)
    assert F.scendi_score(x, x, feature_map=phi).item() == pytest.approx(1, abs=1e-6)
    assert F.prompt_vendi_score(x, x, feature_map=phi).item() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("exponent", [3.0, 3.9, 4.1, 4.9, 5.1, 7.0])
def test_schur_complement_is_the_same_for_any_condition_of_the_prompts(exponent):
    n, p = 200, 12  # singular values of the prompts over 10^exponent: a condition number of twice that, around both cutoffs
    q, u = torch.linalg.qr(rows(n, p)).Q, torch.linalg.qr(rows(p, p, seed=1)).Q
    t = q * torch.logspace(0, -exponent, p, dtype=torch.float64) @ u * n**0.5
    x = rows(n, 5, seed=2) + q @ rows(p, 5, seed=3) * n**0.5
    keep = torch.logspace(0, -exponent, p, dtype=torch.float64) ** 2 > 1e-10
    residual = x - q[:, keep] @ (q[:, keep].T @ x)  # least squares on the directions above the cutoff
    found, _ = schur_parts(x.T @ x / n, x.T @ t / n, t.T @ t / n)
    expected = residual.T @ residual / n
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.trace()))
