import math

import pytest
import torch

from kspec_guidance.comparison import KernelAlignmentLoss, align_linear
from kspec_guidance.kernels import CosineKernel, GaussianKernel
from tests.samples import rows


def test_a_linear_kernel_of_the_features_is_recovered_exactly(g):
    x = torch.randn(40, 5, generator=g, dtype=torch.float64)
    root = torch.randn(5, 7, generator=g, dtype=torch.float64)
    for found in (align_linear(x, x @ root), align_linear(x, kernel_matrix=x @ root @ root.T @ x.T)):
        torch.testing.assert_close(found.weight @ found.weight, root @ root.T, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.weight, found.weight.T)
        assert found.residual < 1e-6
        torch.testing.assert_close(found(x) @ found(x).T, x @ root @ root.T @ x.T)


def test_no_other_matrix_is_closer_and_the_residual_is_its_distance(g):
    x, y = (torch.randn(30, d, generator=g, dtype=torch.float64) for d in (4, 6))
    k = CosineKernel()(y)
    found = align_linear(x, y, CosineKernel())

    def distance(m):
        return float((x @ m @ x.T - k).norm() / k.norm())

    best = found.weight @ found.weight
    assert distance(best) == pytest.approx(found.residual, rel=1e-9)
    for _ in range(5):
        change = 1e-3 * torch.randn(4, 4, generator=g, dtype=torch.float64)
        assert distance(best + change + change.T) > found.residual


def test_rounding_errors_of_float32_are_no_directions(g):
    low = torch.randn(40, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 8, generator=g, dtype=torch.float64)
    found = align_linear(low.float(), torch.randn(40, 5, generator=g))
    assert int((torch.linalg.eigvalsh(found.weight) > 1e-6).sum()) == 3


def test_as_few_rows_as_features_warn(g):
    with pytest.warns(UserWarning, match="several rows per feature"):
        align_linear(torch.randn(5, 5, generator=g), torch.randn(5, 2, generator=g))


def test_directions_that_the_features_lack_stay_zero(g):
    x = torch.randn(20, 3, generator=g)
    found = align_linear(torch.cat([x, torch.zeros(20, 2)], 1), x)
    assert float(found.weight[3:].abs().max()) < 1e-6
    assert found(torch.zeros(2, 5, dtype=torch.float16)).dtype == torch.float32


@pytest.mark.parametrize("kernel", ["cosine", "gaussian", "polynomial"])
def test_the_mean_over_pairs_of_a_batch_is_unbiased(kernel, g):
    x, y = torch.randn(24, 4, generator=g), torch.randn(24, 3, generator=g)
    loss = KernelAlignmentLoss(kernel, GaussianKernel(1.0))
    whole = float(loss(x, y).detach())
    order = torch.tensor([(i, j) for i in range(24) for j in range(i)])
    pairs = torch.stack([loss(x[p], y[p]).detach() for p in order]).mean()  # all batches of two
    assert float(pairs) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("kernel", ["cosine", "gaussian", "polynomial"])
def test_gradients_match_finite_differences(kernel, g):
    loss = KernelAlignmentLoss(kernel, anchor=0.1).double()
    x, y, frozen = (torch.randn(5, d, generator=g, dtype=torch.float64) for d in (3, 4, 3))
    assert torch.autograd.gradcheck(lambda z: loss(z, y, frozen), x.requires_grad_())
    loss(x, y, frozen).backward()
    for p in loss.parameters():
        step = 1e-6
        with torch.no_grad():
            p += step
            up = loss(x, y, frozen)
            p -= 2 * step
            down = loss(x, y, frozen)
            p += step
        assert float(p.grad) == pytest.approx(float(up - down) / (2 * step), rel=1e-4, abs=1e-8)


def test_fit_finds_the_bandwidth_that_makes_equal_kernels(g):
    x = torch.randn(60, 4, generator=g)
    loss = KernelAlignmentLoss("gaussian", GaussianKernel(1.7)).fit(x, x)
    assert float(loss.log_bandwidth.detach().exp()) == pytest.approx(1.7, rel=1e-2)
    assert loss(x, x).item() < 1e-6
    assert not KernelAlignmentLoss("gaussian", GaussianKernel()).fit(x, x).teacher_kernel.open


def test_training_brings_the_kernels_together_and_the_anchor_holds_the_features(g):
    x, y = torch.randn(64, 6, generator=g), torch.randn(6, 3, generator=g)
    teacher = x @ y

    def trained(anchor):
        tower = torch.nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            tower.weight.copy_(torch.eye(6))
        loss = KernelAlignmentLoss("cosine", anchor=anchor)
        optimizer = torch.optim.Adam([*tower.parameters(), *loss.parameters()], lr=0.03)
        for _ in range(100):
            optimizer.zero_grad()
            loss(tower(x), teacher, x).backward()
            optimizer.step()
        with torch.no_grad():
            return float(KernelAlignmentLoss("cosine")(tower(x), teacher)), float((tower(x) - x).square().mean())

    before = float(KernelAlignmentLoss("cosine")(x, teacher))
    free, held = trained(0.0), trained(10.0)
    assert free[0] < 0.1 * before
    assert held[1] < 0.1 * free[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align_linear(rows(4, 2)), "either y"),
        (lambda: align_linear(rows(4, 2), rows(4, 2), kernel_matrix=torch.eye(4)), "either y"),
        (lambda: align_linear(rows(4, 2), rows(5, 2)), "same samples"),
        (lambda: align_linear(torch.zeros(4, 2), rows(4, 2)), "zero"),
        (lambda: align_linear(rows(4, 2), rows(4, 2) * math.nan), "y contains NaN"),
        (lambda: align_linear(rows(4, 2), kernel_matrix=rows(4, 4)), "symmetric"),
        (lambda: align_linear(rows(4, 2), kernel_matrix=-torch.eye(4)), "positive semi-definite"),
        (lambda: KernelAlignmentLoss("rbf"), "kernel must be"),
        (lambda: KernelAlignmentLoss(weight=-1), "at least 0"),
        (lambda: KernelAlignmentLoss()(rows(1, 2), rows(1, 2)), "two or more samples"),
        (lambda: KernelAlignmentLoss()(rows(4, 2), rows(5, 2)), "two or more samples"),
        (lambda: KernelAlignmentLoss(anchor=1.0)(rows(4, 2), rows(4, 2)), "frozen"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_adapter_names_rows_of_another_length(g):
    x = torch.randn(30, 4, generator=g)
    with pytest.raises(ValueError, match="takes rows of 4 features"):
        align_linear(x, x)(x[:, :3])
