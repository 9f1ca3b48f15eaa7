import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.comparison import max_entropy_mixture, max_entropy_weights
from kspec_guidance.features import tensor_product
from kspec_guidance.kernels import CosineKernel, GaussianKernel
from tests.samples import rows

LABELS = torch.arange(6).repeat_interleave(20)


def merging(*groups):
    """Rows of an embedding that gives all clusters of a group one direction."""
    return torch.stack([sum((c == LABELS).double() for c in group) for group in groups], dim=1)


def test_orthogonal_supports_get_weights_in_proportion_to_their_vendi_scores():
    spectra = torch.zeros(3, 8, dtype=torch.float64)
    spectra[0, :2] = 1 / 2
    spectra[1:] = torch.tensor([[0, 0, 5, 3, 2, 0, 0, 0], [0, 0, 0, 0, 0, 8, 1, 1]]).double() / 10
    vendi = torch.special.entr(spectra).sum(1).exp()
    found = max_entropy_weights(torch.diag_embed(spectra))
    torch.testing.assert_close(found.weights, vendi / vendi.sum(), atol=1e-6, rtol=0)
    assert math.exp(-found.value) == pytest.approx(float(vendi.sum()), rel=1e-8)
    assert found.gap <= 1e-8


def test_embeddings_that_complement_each_other_share_the_weight_and_a_blind_one_gets_none():
    a, b, blind = merging((0, 1, 2), (3,), (4,), (5,)), merging((3, 4, 5), (0,), (1,), (2,)), merging((0, 1, 2, 3, 4, 5))
    found = max_entropy_mixture([a, b, blind])
    assert found.weights.tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-6)
    assert found.gap <= 1e-8
    torch.testing.assert_close(found.entropies.exp()[:2], torch.full((2,), float(F.vendi_score(a)), dtype=torch.float64))
    assert math.exp(found.entropy) > found.entropies.exp().max() + 1


def test_losses_of_used_embeddings_are_the_entropy_and_those_of_unused_ones_are_below(g):
    a, b = merging((0, 1, 2), (3,), (4,), (5,)), merging((3, 4, 5), (0, 1), (2,))
    c = merging((0, 1, 2, 3, 4), (5,))
    sets = [z + 0.05 * torch.randn(z.shape, generator=g) for z in (a, b, c)]
    found = max_entropy_mixture(sets)
    kernels = torch.stack([CosineKernel()(z) for z in sets]) / len(a)
    l, v = torch.linalg.eigh((found.weights[:, None, None] * kernels).sum(0))
    log = (v * l.clamp_min(1e-15).log()) @ v.mT
    losses = -(kernels * log).sum((1, 2))
    used = found.weights > 1e-6
    torch.testing.assert_close(losses[used], torch.full_like(losses[used], found.entropy), atol=1e-5, rtol=0)
    assert (losses[~used] < found.entropy).all()
    for _ in range(20):  # no other mixture has a larger entropy
        w = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample()
        assert F.matrix_vendi_score((w[:, None, None] * kernels).sum(0)).log() <= found.entropy + 1e-8


def test_features_and_kernel_matrices_give_the_same_mixture(g):
    sets = [torch.randn(60, d, generator=g, dtype=torch.float64) for d in (3, 5, 2)]
    wide = [torch.cat([z, torch.zeros(60, 50, dtype=torch.float64)], 1) for z in sets]
    narrow, direct = max_entropy_mixture(sets), max_entropy_mixture(wide)
    torch.testing.assert_close(narrow.weights, direct.weights, atol=1e-6, rtol=0)
    assert narrow.entropy == pytest.approx(direct.entropy, abs=1e-8)


def test_fused_rows_have_the_entropy_of_the_mixture_and_unit_norm(g):
    sets = [torch.randn(40, d, generator=g, dtype=torch.float64) for d in (4, 6)]
    found = max_entropy_mixture(sets)
    fused = found.fuse(sets)
    assert float(F.kernel_entropy(fused)) == pytest.approx(found.entropy, abs=1e-9)
    torch.testing.assert_close(fused.norm(dim=1), torch.ones(40, dtype=torch.float64))
    assert float(F.vendi_score(tensor_product(*sets))) > math.exp(found.entropy)  # the product splits more


def test_equal_embeddings_and_a_single_one_keep_their_entropy(g):
    z = torch.randn(30, 4, generator=g, dtype=torch.float64)
    assert max_entropy_mixture([z, z]).entropy == pytest.approx(float(F.kernel_entropy(z)), abs=1e-9)
    assert max_entropy_mixture([z]).weights.tolist() == [1]


def test_a_bandwidth_of_its_own_lets_noise_win_and_warns(g):
    signal, noise = merging(*[(i,) for i in range(6)]), torch.randn(120, 20, generator=g, dtype=torch.float64)
    with pytest.warns(UserWarning, match="pure noise"):
        assert max_entropy_mixture([signal, noise], GaussianKernel()).weights[1] > 0.9
    with pytest.raises(ValueError, match="cosine"):
        max_entropy_mixture([signal, noise], GaussianKernel(1.0)).fuse([signal, noise])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_entropy_mixture([]), "give a list"),
        (lambda: max_entropy_mixture(rows(4, 2)), "give a list"),
        (lambda: max_entropy_mixture([rows(4, 2), rows(5, 2)]), "same samples"),
        (lambda: max_entropy_mixture([rows(4, 2), rows(4, 2) * math.nan]), "embedding 2 contains NaN"),
        (lambda: max_entropy_mixture([rows(4, 2)]).fuse([rows(4, 2), rows(4, 2)]), "1 embeddings"),
        (lambda: max_entropy_weights(torch.eye(3)), r"\[m, p, p\]"),
        (lambda: max_entropy_weights(torch.eye(3)[None]), "trace 1"),
        (lambda: max_entropy_weights(torch.diag(torch.tensor([1.5, -0.5]))[None]), "positive semi-definite"),
        (lambda: max_entropy_weights(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])), "symmetric"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_row_of_zeros_is_like_no_other(g):
    x, y = torch.randn(12, 4, generator=g), torch.randn(12, 3, generator=g)
    x[0] = 0
    found = max_entropy_mixture([x, y])
    expected = max_entropy_mixture([torch.cat([x, torch.eye(12)[:, :1]], 1), y])
    torch.testing.assert_close(found.weights, expected.weights)
    assert found.gap < 1e-8
