"""Methods against exact solutions of small cases."""

import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.selection import DAKUCB, FDUCB, ISUCB, PAKUCB, RFFUCB, MixtureGreedy, PromptWise
from kspec_guidance.selection.contextual import GrownFactor
from kspec_guidance.selection.promptwise import fit_logistic


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()


def test_a_grown_factor_is_that_of_the_whole_matrix():
    x, kernel = rows(9, 3), GaussianKernel(1.0)
    grown = GrownFactor(kernel, 0.5)
    for row in x:
        grown.append(row)
    k = kernel(x) + 0.5 * torch.eye(9)
    assert torch.allclose(grown.factor, torch.linalg.cholesky(k.double()), atol=1e-12)
    t, kt = rows(1, 3, 1), kernel(rows(1, 3, 1), x)[0]
    assert grown.variance(t[0]) == pytest.approx(float(1 - kt @ torch.linalg.solve(k.double(), kt)))


def test_pak_is_a_kernel_ridge_regression():
    x, y, t, kernel = rows(8, 2), rows(8, 1)[:, 0], rows(1, 2, 3)[0], GaussianKernel(1.0)
    s = PAKUCB(1, kernel=kernel, ridge=0.5, centred=False)
    for row, reward in zip(x, y, strict=True):
        s.tell(0, reward=reward, context=row)
    mean, deviation = s.predict(t)
    k, kt = kernel(x) + 0.5 * torch.eye(8).double(), kernel(t[None], x)[0]
    assert float(mean[0]) == pytest.approx(float(kt @ torch.linalg.solve(k, y)))
    assert float(deviation[0]) == pytest.approx(math.sqrt(float(1 - kt @ torch.linalg.solve(k, kt)) / 0.5))


@pytest.mark.parametrize("centred", [True, False])
def test_random_features_approach_the_kernel_regression(centred):
    kernel, x = GaussianKernel(1.0), rows(30, 2)
    exact, random = PAKUCB(1, kernel=kernel, centred=centred), RFFUCB(1, kernel=kernel, num_features=2000, centred=centred)
    for k, row in enumerate(x):
        for s in (exact, random):
            s.tell(0, reward=math.sin(k) + 1, context=row)
    for t in rows(5, 2, 4):
        for a, b in zip(exact.predict(t), random.predict(t), strict=True):
            assert float(a[0]) == pytest.approx(float(b[0]), abs=0.05)


def test_centred_rewards_do_not_depend_on_their_origin():
    a, b = PAKUCB(2), PAKUCB(2)
    for k, row in enumerate(rows(12, 2)):
        a.tell(k % 2, reward=math.cos(k), context=row)
        b.tell(k % 2, reward=math.cos(k) + 7, context=row)
    assert torch.allclose(a.predict(rows(1, 2, 5)[0])[0] + 7, b.predict(rows(1, 2, 5)[0])[0])


def test_costs_lower_the_value_of_an_arm():
    s = PAKUCB(2, costs=[1.0, 5.0], cost_weight=0.5, exploration=0.0)
    for _ in range(5):
        s.tell(0, reward=0.6, context=[1.0])
        s.tell(1, reward=1.0, context=[1.0])
    assert s.choose(contexts=[1.0]) == 0


def test_distances_of_fd_ucb_are_frechet_distances_and_the_bonus_falls_with_pulls():
    reference, x = rows(40, 3, 1), rows(25, 3, 2) + 1
    s = FDUCB(2, reference)
    for row in x:
        s.tell(0, features=row)
        s.tell(1, features=row * 0.5)
    assert float(s.distances()[0]) == pytest.approx(F.frechet_distance(x, reference))
    before = s._score(0)[1]
    s.pending[0] += 25
    assert 0 < s._score(0)[1] < before


def test_scores_of_is_ucb_are_log_inception_scores_with_a_positive_bonus():
    p = rows(20, 4).softmax(1)
    s = ISUCB(1)
    for row in p:
        s.tell(0, features=row)
    marginal = p.mean(0)
    expected = (p * (p / marginal).log()).sum(1).mean()
    assert float(s.scores()[0]) == pytest.approx(float(expected))
    assert s._score(0)[1] > 0


def dak(objective="jrke", **kwargs):
    s, t, x, y = (
        DAKUCB(2, objective=objective, kernel=GaussianKernel(1.0), **kwargs),
        rows(10, 2),
        rows(10, 3),
        rows(10, 3, 7),
    )
    for k in range(10):
        more = {"reference": y[k]} if objective == "jkd" else {}
        s.tell(k % 2, features=x[k], reward=0.0, context=t[k], **more)
    return s, t, x, y


def test_likeness_of_dak_is_that_of_all_pairs_of_other_samples():
    s, t, x, _ = dak()
    k = (GaussianKernel(1.0)(t) * F.inputs.gram(x, None)).square()
    of = torch.arange(10) % 2
    for g in (0, 1):
        for m in (0, 1):
            block = k[of == g][:, of == m].clone()
            n = block.shape[1]
            if g == m:
                block.fill_diagonal_(0)
                n -= 1
            assert torch.allclose(s._labels(g, m), block.sum(1) / n)


def test_kernel_distance_of_dak_is_that_of_all_pairs():
    s, t, x, y = dak("jkd")
    gram = F.inputs.gram(torch.cat([x, y]), None)
    k = GaussianKernel(1.0)(t) * (gram[:10, :10] + gram[10:, 10:] - gram[:10, 10:] - gram[10:, :10])
    assert torch.allclose(s._labels(0, 1), k[::2, 1::2].mean(1))


def test_without_diversity_dak_is_pak():
    t, g = rows(30, 2), torch.Generator().manual_seed(0)
    a, b = DAKUCB(3, diversity=0.0, start=1), PAKUCB(3)
    for c in t:
        arm = a.choose(contexts=c)
        assert arm == b.choose(contexts=c)
        reward = float(torch.rand(1, generator=g)) + arm
        a.tell(arm, features=rows(1, 3)[0], reward=reward, context=c)
        b.tell(arm, reward=reward, context=c)


def test_the_logistic_fit_has_no_gradient():
    f, y = rows(40, 3), (rows(40, 1)[:, 0] > 0).double()
    theta = fit_logistic(f, y, 0.5, torch.zeros(3).double())
    assert float((f.mT @ (torch.sigmoid(f @ theta) - y) + 0.5 * theta).abs().max()) < 1e-8


def told(q, n=400, **kwargs):
    """PromptWise after many pulls of arms with these probabilities of success."""
    s = PromptWise(len(q), exploration=0.0, ridge=0.01, **kwargs)
    for arm, p in enumerate(q):
        for k in range(n):
            s.tell(arm, reward=float((k + 0.5) / n < p), context=[1.0])
    return s


def test_the_value_of_a_prompt_is_the_recursion():
    q, c, lam = [0.05, 0.6], [1.0, 10.0], 0.03
    s = told(q, costs=c, cost_weight=lam)
    value = 0.0
    for left in range(1, 5):
        value = max(0.0, *(p - lam * k + (1 - p) * value for p, k in zip(q, c, strict=True)))
        assert s.value([1.0], left) == pytest.approx(value, abs=2e-3)


def test_the_last_try_asks_the_best_arm_and_the_index_asks_the_cheapest_success():
    q, c = [0.3, 0.9], [1.0, 10.0]  # the first succeeds at 3.3 a success, the second at 11
    recursion, index = (told(q, costs=c, cost_weight=0.02, rule=r) for r in ("recursion", "index"))
    assert recursion.choose(contexts=[1.0], left=1) == 1
    assert recursion.choose(contexts=[1.0], left=50) == 0
    assert index.choose(contexts=[1.0], left=1) == index.choose(contexts=[1.0], left=50) == 0


def test_a_prompt_that_does_not_pay_is_skipped():
    s = told([0.01, 0.02], costs=[1.0, 2.0], cost_weight=0.5)
    assert s.choose(contexts=[1.0]) is None
    assert s.choose(2, contexts=[[1.0], [1.0]]) == [None, None]
    assert float(s.pending.sum()) == 0


def test_an_expensive_arm_loses_weight():
    s, g = MixtureGreedy(2, costs=[1.0, 1.0]), torch.Generator().manual_seed(0)
    dear = MixtureGreedy(2, costs=[1.0, 4.0], cost_weight=0.05)
    for k in range(60):
        x = torch.eye(8)[int(torch.randint(4, (1,), generator=g)) + 4 * (k % 2)]
        for m in (s, dear):
            m.tell(k % 2, features=x)
    assert float(dear.weights()[1]) < float(s.weights()[1]) - 0.1


def test_dropped_samples_are_made_up_for():
    s, g = MixtureGreedy(2), torch.Generator().manual_seed(0)
    for k in range(400):
        arm = k % 2
        if arm == 0 and k % 4:  # half of the pulls of the first arm
            s.tell(0, kept=False)
        else:
            s.tell(arm, features=torch.eye(8)[int(torch.randint(4, (1,), generator=g)) + 4 * arm])
    assert float(s.weights()[0]) == pytest.approx(0.5, abs=0.05)
    assert s.choose(300).count(0) / 300 == pytest.approx(2 / 3, abs=0.06)
