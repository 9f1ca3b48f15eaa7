import pytest
import torch

from kspec_guidance import functional as F
from tests.samples import rows


def test_frechet_distance_of_gaussians_matches_closed_form():
    x = rows(4000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance exactly 1
    shift = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert F.frechet_distance(x, x + shift) == pytest.approx(9, rel=1e-6)
    assert F.frechet_distance(x, 3 * x) == pytest.approx(3 * 4, rel=1e-6)  # sum of (3 - 1)^2


def test_fidelity_scores_of_identical_distant_and_collapsed_sets():
    x = rows(60, 4)
    same, distant = F.fidelity_scores(x, x), F.fidelity_scores(x + 100, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (distant.precision, distant.recall, distant.density, distant.coverage) == (0, 0, 0, 0)
    collapsed = F.fidelity_scores(x[:1] + 1e-3 * rows(60, 4, 1), x)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1
    assert collapsed.coverage < 0.2


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7])
def test_frechet_distance_matches_closed_form_far_from_the_origin(offset):
    x = rows(200, 5)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    expected = 5 * 0.5**2 + 5 * (2 - 1) ** 2
    assert F.frechet_distance(offset + 0.5 + 2 * x, offset + x) == pytest.approx(expected, rel=1e-7)
    assert F.frechet_distance(offset + x, offset + x) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_singular_covariances():
    x = torch.cat([rows(7, 3), torch.ones(7, 40, dtype=torch.float64)], 1)  # fewer samples than features, constant features
    assert F.frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert F.frechet_distance(x + 1, x) == pytest.approx(43)
    assert F.frechet_distance(3 * x[:, :3], x[:, :3]) == pytest.approx(
        4 * x[:, :3].var(0).sum().item() + 4 * x[:, :3].mean(0).square().sum().item()
    )
    line = torch.arange(4.0)[:, None] * torch.tensor([[1.0, 0.0]])
    across = line.flip(1)  # the product of the covariances is 0
    assert F.frechet_distance(line, across) == pytest.approx(2 * 5 / 3 + 2 * 1.5**2)


def by_definition(x, y, k):
    """Precision, recall, density and coverage from exact distances, balls open but for their centres."""
    distance = lambda a, b: (a[:, None] - b[None]).square().sum(-1).sqrt()  # noqa: E731
    radii = lambda z: distance(z, z).sort(1).values[:, k]  # noqa: E731
    within = lambda d, r: (d < r) | ((d == 0) & (r == 0))  # noqa: E731
    cross = distance(x, y)
    inside = within(cross, radii(y))
    return (
        inside.any(1).double().mean().item(),
        within(cross, radii(x)[:, None]).any(0).double().mean().item(),
        inside.sum(1).double().mean().item() / k,
        inside.any(0).double().mean().item(),
    )


def scores(x, y, k):
    found = F.fidelity_scores(x, y, k)
    assert F.precision_score(x, y, k) == found.precision
    return found.precision, found.recall, found.density, found.coverage


@pytest.mark.parametrize("scale_and_offset", [(1.0, 0.0), (1e-4, 1.0), (2.0**-30, 1.0)])
@pytest.mark.parametrize("nearest", [1, 4])
def test_fidelity_of_memorised_samples_follows_the_definition(nearest, scale_and_offset):
    scale, offset = scale_and_offset
    y = offset + scale * rows(60, 7)
    memorised = torch.cat([y[:25], offset + scale * rows(20, 7, 1)])
    assert scores(memorised, y, nearest) == pytest.approx(by_definition(memorised, y, nearest))
    assert scores(y, memorised, nearest) == pytest.approx(by_definition(y, memorised, nearest))
    assert scores(y, y.clone(), nearest) == pytest.approx((1, 1, 1, 1))


def test_fidelity_of_equidistant_samples_follows_the_definition():
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)).double()
    for x in (grid, grid + 0.5, grid[::3]):
        assert scores(x, grid, 3) == pytest.approx(by_definition(x, grid, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fidelity_of_copies_is_the_same_in_half_precision(dtype):
    y = rows(50, 6).to(dtype)
    x = torch.cat([y[:30], rows(20, 6, 1).to(dtype)])
    assert scores(x, y, 5) == pytest.approx(by_definition(x.double(), y.double(), 5))


def test_ball_of_radius_zero_contains_its_copies():
    y = torch.cat([rows(1, 4).expand(9, 4), 5 + rows(20, 4, 1)])  # nine copies: radius 0 for 3 neighbours
    assert scores(y[:5], y, 3)[0] == 1
    assert scores(y, y.clone(), 3)[:2] == (1, 1)
    assert scores(y, y.clone(), 3)[3] == 1


def test_block_size_does_not_change_fidelity(monkeypatch):
    from kspec_guidance.functional import fidelity

    y = rows(60, 5)
    x = torch.cat([y[:20], rows(30, 5, 1)])
    whole = F.fidelity_scores(x, y, 2)
    monkeypatch.setattr(fidelity, "BLOCK_ROWS", 7)
    assert F.fidelity_scores(x, y, 2) == whole


def test_neighbour_scores_are_those_of_all_fidelity_scores_and_need_no_covariance():
    x, y = rows(30, 3, 1), rows(40, 3, 2)
    found = vars(F.neighbour_scores(x, y))
    assert vars(F.fidelity_scores(x, y)) == found | {"frechet_distance": F.frechet_distance(x, y)}


def _rows(kind, n):
    """Rows whose distances a product in float32 does not determine."""
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(n))
    match kind:
        case "far from the origin":
            return x + 3e3
        case "groups far apart":
            return x + 1e4 * (torch.arange(n) % 3)[:, None]
        case "one huge row":
            return torch.cat([x[:-1], 1e9 * x[-1:]])
        case "nearly equal rows":
            return x[torch.arange(n) // 8] + 1e-5 * x
        case "equal rows":
            return x[torch.arange(n) // 8]
        case "constant rows":
            return torch.ones(n, 24)
        case "a grid":  # many equal distances
            return (2 * x).round()
        case "float16":
            return x.half()
        case "tiny":
            return 1e-30 * x.double()
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind",
    ["far from the origin", "groups far apart", "one huge row", "nearly equal rows", "equal rows", "constant rows",
     "a grid", "float16", "tiny"],
)  # fmt: skip
def test_neighbour_scores_are_those_of_exact_distances(kind):
    x, y, k = _rows(kind, 75), _rows(kind, 90), 3
    x = torch.cat([x, y[:15]])
    assert scores(x, y, k) == pytest.approx(by_definition(x.double(), y.double(), k), abs=1e-12)
