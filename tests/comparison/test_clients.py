import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.comparison import ClientMessage, fid_over_clients, kid_over_clients
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from tests.samples import rows

NAMES = ("average", "over_all")


@pytest.fixture
def clients(g):
    return [torch.randn(n, 3, generator=g, dtype=torch.float64) + i for i, n in enumerate((30, 50, 20))]


@pytest.fixture
def models(g):
    return [scale * torch.randn(40, 3, generator=g, dtype=torch.float64) + 1 for scale in (0.5, 1.0, 2.0, 3.0)]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.2, 0.5, 0.3]])
def test_average_and_overall_kid_differ_by_a_number_that_no_model_changes(unbiased, weights, clients, models):
    found = [kid_over_clients(x, clients, weights=weights, unbiased=unbiased) for x in models]
    for scores in found[1:]:
        assert scores.difference == pytest.approx(found[0].difference, rel=1e-10)
    by_average, by_all = (sorted(range(4), key=[getattr(s, name) for s in found].__getitem__) for name in NAMES)
    assert by_average == by_all
    assert found[0].difference > 0


def test_kid_of_clients_is_the_mmd_to_each_and_to_the_pooled_rows(clients, models):
    found = kid_over_clients(models[0], clients, GaussianKernel(1.0), unbiased=False)
    expected = F.mmd(models[0], torch.cat(clients), GaussianKernel(1.0), unbiased=False)
    assert found.over_all == pytest.approx(float(expected), abs=1e-12)
    unbiased = kid_over_clients(models[0], clients)
    assert unbiased.per_client == pytest.approx([float(F.mmd(models[0], c)) for c in clients])
    assert unbiased.average == pytest.approx(sum(w * d for w, d in zip((0.3, 0.5, 0.2), unbiased.per_client, strict=True)))


def test_messages_give_the_scores_of_rows(clients, models):
    phi = RandomFourierFeatures(GaussianKernel(2.0), 3, 64)
    messages = [ClientMessage.of(c, phi) for c in clients]
    expected = [float(F.mmd(models[0], c, feature_map=phi)) for c in clients]
    assert kid_over_clients(models[0], messages, feature_map=phi).per_client == pytest.approx(expected, abs=1e-12)
    split = [ClientMessage.of(c[:7], phi) + ClientMessage.of(c[7:], phi) for c in clients]
    for scores, again in (
        (kid_over_clients(models[0], messages, feature_map=phi), kid_over_clients(models[0], split, feature_map=phi)),
        (fid_over_clients(models[0], messages), fid_over_clients(models[0], split)),
    ):
        assert again.over_all == pytest.approx(scores.over_all, rel=1e-9)
        assert again.per_client == pytest.approx(scores.per_client, rel=1e-9)


def test_the_size_of_a_message_does_not_depend_on_the_number_of_samples(clients):
    phi = RandomFourierFeatures(GaussianKernel(2.0), 3, 64)
    sizes = [{k: v.shape for k, v in ClientMessage.of(c, phi).state().items()} for c in clients]
    assert sizes[0] == sizes[1] == sizes[2]


def test_messages_survive_a_file(clients, tmp_path):
    from safetensors.torch import load_file, save_file

    message = ClientMessage.of(clients[0], RandomFourierFeatures(GaussianKernel(2.0), 3, 8))
    save_file(message.state(), tmp_path / "client.safetensors")
    again = ClientMessage.from_state(load_file(tmp_path / "client.safetensors"))
    assert all(torch.equal(v, again.state()[k]) for k, v in message.state().items())


def test_fid_to_all_is_that_to_the_pooled_rows(clients, models):
    found = fid_over_clients(models[2], clients)
    assert found.over_all == pytest.approx(F.frechet_distance(models[2], torch.cat(clients)), rel=1e-9)
    assert found.per_client == pytest.approx([F.frechet_distance(models[2], c) for c in clients], rel=1e-9)


def exact(mean, variance):
    """The message of a one-dimensional normal distribution."""
    z, n = torch.zeros(0, dtype=torch.float64), torch.tensor(1e12, dtype=torch.float64)
    mean, variance = torch.tensor([mean], dtype=torch.float64), torch.tensor([[variance]], dtype=torch.float64)
    return ClientMessage(n, mean, variance * (n - 1), z, n.new_zeros(()), z)


def test_average_and_overall_fid_rank_models_differently():
    clients = [exact(1.0, 1.0), exact(-1.0, 1.0)]
    wide, narrow = (fid_over_clients(exact(0.0, s**2), clients) for s in (1.4, 0.6))
    assert wide.average == pytest.approx(narrow.average) == pytest.approx(1.16)
    assert wide.over_all == pytest.approx((1.4 - math.sqrt(2)) ** 2, abs=1e-9)
    assert narrow.over_all == pytest.approx((0.6 - math.sqrt(2)) ** 2, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid_over_clients(rows(4, 2), []), "list of rows"),
        (lambda: kid_over_clients(rows(4, 2), rows(4, 2)), "list of rows"),
        (lambda: kid_over_clients(rows(4, 2), [rows(4, 3)]), "same model"),
        (lambda: fid_over_clients(rows(4, 2), [rows(4, 3)]), "same model"),
        (lambda: kid_over_clients(rows(4, 2), [rows(1, 2)]), "two samples"),
        (lambda: fid_over_clients(rows(4, 2), [rows(1, 2)]), "two samples"),
        (lambda: kid_over_clients(rows(4, 2), [rows(4, 2)], weights=[1, 2]), "one for each client"),
        (lambda: kid_over_clients(rows(4, 2), [rows(4, 2)], weights=[-1]), "at least 0"),
        (lambda: kid_over_clients(rows(4, 2), [ClientMessage.of(rows(4, 2))]), "with features"),
        (lambda: kid_over_clients(rows(4, 2), [rows(4, 2)], GaussianKernel(1.0), feature_map=lambda z: z), "kernel only"),
        (lambda: ClientMessage.of(rows(4, 2), lambda z: z) + ClientMessage.of(rows(4, 2), lambda z: 2 * z), "feature maps"),
        (lambda: ClientMessage.of(rows(4, 2)) + ClientMessage.of(rows(4, 3)), "same model"),
        (lambda: ClientMessage.of(rows(4, 2), rows(4, 2)), "must be a function"),
        (lambda: ClientMessage.of(rows(4, 2) * math.nan), "NaN"),
        (lambda: ClientMessage.from_state({"mean": torch.ones(2)}), "has the tensors"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
