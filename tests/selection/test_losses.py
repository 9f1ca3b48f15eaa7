"""Losses of mixtures against closed forms, the scores of the package, and finite differences."""

import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.kernels import CosineKernel, GaussianKernel
from kspec_guidance.selection.losses import make_loss


def filled(name, rows, reference=None, kernel=None):
    loss = make_loss(name, len(rows), kernel, 512, reference)
    for arm, samples in enumerate(rows):
        for x in samples:
            loss.add(arm, x)
    return loss


def samples(seed=0, sizes=(7, 9, 5), d=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=g).double() * (i + 1) + i for i, n in enumerate(sizes)]


ALL = torch.arange(3)


@pytest.mark.parametrize("name", ["rke", "kid", "vendi", "fid"])
def test_gradients_are_those_of_the_values(name):
    loss = filled(name, samples(), torch.randn(20, 3).double() if name in ("kid", "fid") else None)
    a = torch.tensor([0.2, 0.3, 0.5]).double()
    _, g = loss.evaluate(a, ALL)
    direction, h = torch.tensor([0.4, -0.6, 0.2]).double(), 1e-6
    slope = (loss.evaluate(a + h * direction, ALL)[0] - loss.evaluate(a - h * direction, ALL)[0]) / (2 * h)
    assert slope == pytest.approx(float(g @ direction), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["rke", "kid", "vendi", "fid"])
def test_losses_are_convex_in_the_weights(name):
    loss = filled(name, samples(), torch.randn(20, 3).double() if name in ("kid", "fid") else None)
    a, b = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.1, 0.1, 0.8]).double()
    middle = loss.evaluate((a + b) / 2, ALL)[0]
    assert middle <= (loss.evaluate(a, ALL)[0] + loss.evaluate(b, ALL)[0]) / 2 + 1e-12


def test_rke_leaves_out_pairs_of_a_sample_with_itself():
    rows = samples()
    k, _, _ = filled("rke", rows).matrix(ALL)
    squared = CosineKernel()(rows[0]).square()
    n = len(squared)
    assert float(k[0, 0]) == pytest.approx(float((squared.sum() - n) / (n * (n - 1))))
    assert float(k[0, 1]) == pytest.approx(float(CosineKernel()(rows[0], rows[1]).square().mean()))


def test_random_features_of_a_gaussian_kernel_are_near_the_exact_means():
    rows = samples()
    kernel = GaussianKernel(4.0)
    loss = make_loss("rke", 3, kernel, 4096, None)
    for arm, x in enumerate(rows):
        for row in x:
            loss.add(arm, row)
    k, _, _ = loss.matrix(ALL)
    assert float(k[0, 1]) == pytest.approx(float(kernel(rows[0], rows[1]).square().mean()), abs=0.03)


def test_kid_of_one_arm_is_the_unbiased_squared_mmd():
    rows, reference = samples(), samples(seed=3)[0]
    loss = filled("kid", rows, reference)
    x, k = rows[1], CosineKernel()
    n, m = len(x), len(reference)
    expected = (k(x).sum() - n) / (n * (n - 1)) + (k(reference).sum() - m) / (m * (m - 1)) - 2 * k(x, reference).mean()
    _, p, constant = loss.matrix(ALL)
    value = float(loss.matrix(ALL)[0][1, 1] - 2 * p[1]) + constant
    assert value == pytest.approx(float(expected))


def test_vendi_of_one_arm_is_its_score():
    rows = samples()
    value, _ = filled("vendi", rows).evaluate(torch.tensor([0.0, 1.0, 0.0]).double(), ALL)
    assert math.exp(-value) == pytest.approx(float(F.vendi_score(rows[1])))


def test_fid_of_one_arm_is_its_frechet_distance():
    rows, reference = samples(sizes=(30, 40, 20)), samples(seed=4, sizes=(50,))[0]
    value, _ = filled("fid", rows, reference).evaluate(torch.tensor([0.0, 1.0, 0.0]).double(), ALL)
    assert value == pytest.approx(F.frechet_distance(rows[1], reference), rel=1e-9)


def test_fid_of_a_mixture_of_equal_sets_is_that_of_their_union():
    x = samples(sizes=(60,))[0]
    reference = samples(seed=4, sizes=(50,))[0]
    parts = [x[:30], x[30:] + 2]
    loss = filled("fid", parts, reference)
    value, _ = loss.evaluate(torch.tensor([0.5, 0.5]).double(), torch.arange(2))
    union = torch.cat(parts)
    spread = [torch.cov(p.mT) + torch.outer(p.mean(0) - union.mean(0), p.mean(0) - union.mean(0)) for p in parts]
    c, r = sum(spread) / 2, torch.cov(reference.mT)
    eigenvalues = torch.linalg.eigvals(c @ r).real.clamp_min(0)
    distance = (union.mean(0) - reference.mean(0)).square().sum() + c.trace() + r.trace() - 2 * eigenvalues.sqrt().sum()
    assert value == pytest.approx(float(distance), rel=1e-9)


def test_fading_weights_give_the_weighted_means():
    rows = samples()[0]
    loss = make_loss("rke", 1, None, 512, None)
    for x in rows:
        loss.fade(0.8)
        loss.add(0, x)
    w = 0.8 ** torch.arange(len(rows) - 1, -1, -1).double()
    k = CosineKernel()(rows).square()
    pairs = torch.outer(w, w)
    pairs.fill_diagonal_(0)
    assert float(loss.matrix(torch.tensor([0]))[0]) == pytest.approx(float((pairs * k).sum() / pairs.sum()))
