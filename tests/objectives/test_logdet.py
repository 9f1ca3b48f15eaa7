import torch

from kspec_guidance import VendiGuidance
from kspec_guidance.kernels import CosineKernel, ExpCosineKernel, GaussianKernel, l2_normalize
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import LogDet
from tests.objectives.common import D
from tests.samples import rows


def test_given_a_memory_it_is_the_conditional_log_likelihood_up_to_a_constant():
    x, y = rows(4, D, 0), rows(30, D, 1)
    objective, bank = LogDet(CosineKernel()), MemoryBank()
    bank.add(y)
    u, v, c = l2_normalize(x), l2_normalize(y), objective.strength
    precision = torch.eye(D, dtype=x.dtype) + c * v.mT @ v  # of the memory, in the space of features
    inverse = torch.linalg.inv(precision)
    conditional = torch.logdet(torch.eye(4, dtype=x.dtype) + c * u @ inverse @ u.mT)
    torch.testing.assert_close(objective.value(x, memory=bank), conditional + torch.logdet(precision))


def test_samples_leave_the_direction_that_the_memory_fills():
    bank, e = MemoryBank(), torch.eye(D, dtype=torch.float64)
    bank.add(e[:1].repeat(20, 1) + 0.01 * rows(20, D, 0))
    x = l2_normalize(e[:1] + e[1:2])
    g = LogDet(normalize=False).gradient(x, memory=bank).rows
    assert g @ e[0] < 0 < g @ e[1]


def test_copies_of_a_sample_give_a_finite_gradient_and_a_jitter_separates_them():
    x = l2_normalize(rows(3, D, 0))
    x[1] = x[0]
    found = LogDet().gradient(x)
    assert found.coincident.tolist() == [1, 1, 0] or found.coincident.tolist() == [True, True, False]
    assert found.rows.isfinite().all()
    apart = LogDet().gradient(x, jitter=1e-3 * rows(3, D, 1)).rows
    assert (apart[0] - apart[1]).norm() > 1e-3 * apart[0].norm()


def test_rows_of_half_precision_get_the_gradient_of_float32():
    x = l2_normalize(rows(8, 64, 0)).half()
    found = LogDet().gradient(x).rows
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LogDet().gradient(x.double()).rows.float(), rtol=1e-4, atol=1e-6)


def test_many_memory_rows_are_those_nearest_to_the_batch():
    x, y = l2_normalize(rows(4, D, 0)), l2_normalize(rows(10_000, D, 1))
    bank, near = MemoryBank(), MemoryBank()
    bank.add(y)
    d = torch.cdist(x, y).amin(0)
    near.add(y[d.topk(128, largest=False).indices.sort().values])
    torch.testing.assert_close(LogDet().gradient(x, memory=bank).rows, LogDet().gradient(x, memory=near).rows)


def test_more_rows_than_dimensions_can_differ_with_the_exponential_only():
    angles = torch.arange(6) * (2 * torch.pi / 6)
    x = torch.stack([angles.cos(), angles.sin()], 1).double()
    assert torch.linalg.matrix_rank(CosineKernel()(x)) == 2
    assert torch.linalg.matrix_rank(ExpCosineKernel()(x)) == 6


def test_the_order_logdet_is_this_objective_and_is_saved_with_its_settings(tmp_path):
    guide = VendiGuidance(order="logdet")
    assert isinstance(guide.terms[0].objective, LogDet)
    assert isinstance(guide.terms[0].objective.kernel, ExpCosineKernel)
    guide.save_config(tmp_path)
    assert repr(VendiGuidance.from_config(tmp_path)) == repr(guide)
    narrow = VendiGuidance(order="logdet", kernel=GaussianKernel(0.5)).terms[0].objective
    assert narrow.kernel == GaussianKernel(0.5)
