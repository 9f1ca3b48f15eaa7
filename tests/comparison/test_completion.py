import math
import warnings

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.comparison import complete_kernel
from kspec_guidance.kernels import GaussianKernel

CHAINS = {0.1: 0.0050, 0.3: 0.0464, 0.5: 0.1374, 0.6: 0.2080, 0.8: 0.4393, 0.9: 0.6518}


def chain(a):
    return torch.tensor([[1, a, math.nan], [a, 1, a], [math.nan, a, 1]], dtype=torch.float64)


@pytest.mark.parametrize("a", CHAINS)
def test_missing_entry_of_a_chain_maximises_the_entropy(a):
    k = chain(a)
    x = complete_kernel(k, ~k.isnan())[0, 2].item()
    assert x == pytest.approx(CHAINS[a], abs=5e-5)

    def entropy(value):
        return float(F.matrix_vendi_score(k.nan_to_num(value)))

    assert entropy(x) >= max(entropy(x - 1e-3), entropy(x + 1e-3))


def test_nothing_observed_gives_the_identity_and_everything_itself(g):
    k = GaussianKernel(1.0)(torch.randn(6, 2, generator=g, dtype=torch.float64))
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    assert torch.equal(complete_kernel(k, nothing), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(complete_kernel(k, ~nothing), k)


def test_samples_without_a_chain_between_them_get_exactly_zero(g):
    k = GaussianKernel(1.0)(torch.randn(7, 2, generator=g, dtype=torch.float64))
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()
    found = complete_kernel(k.masked_fill(~mask, math.nan), mask)
    torch.testing.assert_close(found, torch.where(mask, k, 0.0), atol=1e-7, rtol=0)


def test_logarithm_is_zero_where_nothing_was_observed(g):
    k = GaussianKernel(1.5)(torch.randn(8, 3, generator=g, dtype=torch.float64))
    mask = torch.rand(8, 8, generator=g) < 0.3
    both = mask | mask.mT | torch.eye(8, dtype=torch.bool)
    assert not both.all()
    found = complete_kernel(k, mask)  # one of (i, j) and (j, i) is enough
    l, v = torch.linalg.eigh(found)
    assert float(l[0]) > 0
    torch.testing.assert_close(found[both], k[both], atol=1e-6, rtol=0)
    assert float(((v * l.log()) @ v.mT)[~both].abs().max()) < 1e-9
    torch.testing.assert_close(found.diagonal(), torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_missing_entries_of_clusters_are_closer_than_zero_fill(g):
    centres = 2 * torch.randn(3, 8, generator=g, dtype=torch.float64)
    x = centres.repeat_interleave(8, 0) + 0.5 * torch.randn(24, 8, generator=g)
    k, mask = GaussianKernel(3.0)(x), torch.rand(24, 24, generator=g) < 0.25
    missing = ~(mask | mask.mT | torch.eye(24, dtype=torch.bool))
    found = complete_kernel(k, mask)
    assert (found - k)[missing].square().mean() < 0.5 * k[missing].square().mean()


def test_entries_that_no_kernel_matrix_has_are_refused():
    k = torch.eye(4)
    for i, j, value in ((0, 1, 0.9), (1, 2, 0.9), (0, 2, -0.9)):
        k[i, j] = k[j, i] = value
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:3, :3] = True
    with pytest.raises(ValueError, match="no positive semi-definite matrix"):
        complete_kernel(k, mask)
    with pytest.raises(ValueError, match="eigenvalues go down to"):
        complete_kernel(k, torch.ones(4, 4, dtype=torch.bool))


def test_entries_that_only_a_singular_matrix_has_are_met_or_warned_of():
    k = torch.ones(3, 3)  # two copies of each other and of a third sample: the missing pair must be 1
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 2] = mask[2, 0] = False
    with pytest.warns(UserWarning, match="singular"):
        found = complete_kernel(k, mask, max_steps=3)
    assert found[0, 2] > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the completed matrix differs")
        assert complete_kernel(k, mask)[0, 2] > 0.99


@pytest.mark.parametrize(
    ("k", "mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3).bool(), r"shape \[n, n\]"),
        (torch.eye(2), torch.ones(2, 2), "boolean"),
        (torch.eye(2), torch.ones(3, 3).bool(), "boolean tensor of shape"),
        (torch.eye(2) * math.nan, torch.ones(2, 2).bool(), "NaN"),
        (2 * torch.eye(2), torch.ones(2, 2).bool(), "diagonal of K must be 1"),
        (torch.tensor([[1.0, 1.2], [1.2, 1.0]]), torch.ones(2, 2).bool(), "at most 1"),
        (torch.tensor([[1.0, 0.2], [0.5, 1.0]]), torch.ones(2, 2).bool(), "symmetric"),
    ],
)
def test_wrong_input_is_refused(k, mask, message):
    with pytest.raises(ValueError, match=message):
        complete_kernel(k, mask)
