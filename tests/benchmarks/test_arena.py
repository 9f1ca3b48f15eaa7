"""The arena: its beds, methods and statistics against exact results."""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from safetensors.torch import save_file

from benchmarks.arena import cost, figures, networks
from benchmarks.arena.beds import BEDS, Bed, transformer
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import CALL_SEEDS, Case, blocks
from benchmarks.arena.page import PAGES
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.base import Moment, repulsion
from kspec_guidance.bench.methods.diverseflow import dpp
from kspec_guidance.bench.methods.eddy import EDDY, pairs
from kspec_guidance.bench.methods.oscar import OSCAR
from kspec_guidance.bench.methods.selection import varied
from kspec_guidance.bench.methods.spell import SPELL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bed() -> Analytic:
    return Analytic(8, skewed=True)


def moment(x0: torch.Tensor, sigma: float = 0.6, seed: int = 0) -> Moment:
    alpha = math.sqrt(1 - sigma**2)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed), dtype=x0.dtype)
    return Moment(x0, alpha * x0 + sigma * noise, alpha, sigma, 3, 10, None, None, None, None)  # type: ignore[arg-type]


def test_exact_denoiser_is_the_score_of_its_mixture(bed: Analytic) -> None:
    model, t = bed.model.double(), 400
    abar = float(bed.pipe.scheduler.alphas_cumprod[t])
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    c = bed.pipe.conditions.rows(["prompt 3"]).detach().double()
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64, requires_grad=True)
    variance = (alpha * model.std) ** 2 + sigma**2
    d2 = (x.flatten(1)[:, None] - alpha * model.centres).square().sum(-1)
    log_p = (model.log_shares(c[:, 0]) - d2 / (2 * variance)).logsumexp(-1).sum()
    (score,) = torch.autograd.grad(log_p, x)
    got = model(x.detach(), torch.tensor(t), c)[0]
    assert torch.allclose(got, -sigma * score, atol=1e-10)
    bed.model.float()


@pytest.mark.slow
def test_samples_drawn_from_the_mixture_are_judged_valid_and_complete(bed: Analytic) -> None:
    case, g = Case("prompt 9", 0), torch.Generator().manual_seed(0)
    shares = bed.shares(case.prompt)
    k = torch.multinomial(shares, 4000, replacement=True, generator=g)
    x = bed.model.centres[k] + bed.model.std * torch.randn(4000, 8, generator=g)
    figures = bed.judge(x.view(-1, 1, 1, 8)[:, :, :, :], case)
    assert figures["valid"] > float(shares[shares >= 0.01].sum()) - 0.01
    assert figures["modes"] == figures["of"]
    assert figures["total_variation"] < 0.05
    far = bed.judge(x.view(-1, 1, 1, 8) + 1.0, case)
    assert far["valid"] < 0.01


def test_fresh_prompts_of_emoji_have_truths_and_are_not_those_of_the_halves() -> None:
    emoji = BEDS["emoji"]()
    chosen_on = {*emoji.prompts("tune"), *emoji.prompts("report")}
    emoji.fresh = True
    assert len(set(emoji.prompts("report"))) == 40
    assert not chosen_on & set(emoji.prompts("report"))
    for prompt in [*chosen_on, *emoji.prompts("report")]:
        assert len(emoji.truth(prompt)) == int(emoji.judge_.described(prompt).sum()) >= 20


def test_fresh_prompts_are_those_on_which_nothing_was_chosen(bed: Analytic, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen_on = {*bed.prompts("tune"), *bed.prompts("report")}
    before = bed.prompts("tune")
    monkeypatch.setattr(bed, "fresh", True)
    assert bed.prompts("tune") == before
    assert len(bed.prompts("report")) == 40
    assert not chosen_on & set(bed.prompts("report"))
    vectors = bed.pipe.conditions.rows([*chosen_on, *bed.prompts("report")])[:, 0]
    assert len(vectors.unique(dim=0)) == 56
    # those before are what they were, so results of them still hold
    g = torch.Generator().manual_seed(5)
    of = torch.nn.functional.normalize(torch.randn(16, 12, generator=g), dim=1)
    torch.testing.assert_close(bed.pipe.conditions.rows([f"prompt {k}" for k in range(16)])[:, 0], of)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_restores_the_pipeline(name: str, bed: Analytic) -> None:
    if not bed.fits(METHODS[name]):
        pytest.skip("the analytic bed has no denoiser's features")
    case = Case("prompt 1", 3)
    before = bed.run(case, 4)
    bed.sample(METHODS[name](), case)
    assert torch.equal(bed.run(case, 4), before)
    with pytest.raises(RuntimeError), METHODS[name]().attach(bed.pipe):
        raise RuntimeError
    assert torch.equal(bed.run(case, 4), before)
    assert not bed.pipe.unet._forward_hooks
    assert not bed.pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("name", list(METHODS))
def test_a_method_samples_without_gradients_as_the_arena_runs(name: str, bed: Analytic) -> None:
    if not bed.fits(METHODS[name]):
        pytest.skip("the analytic bed has not what the method needs")
    with torch.no_grad():
        assert bed.sample(METHODS[name](), Case("prompt 1", 3)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "off"),
    [("lower CFG", {"weight": 3.0}), ("interval CFG", {"start": 0.0, "stop": 1.0}), ("score rescaling", {"k": 1.0}),
     ("CADS", {"s": 0.0, "tau1": 1.0}), ("seed variance", {"noise": 0.0}), ("particle guidance", {"weight": 0.0}),
     ("DiverseFlow", {"weight": 0.0}), ("SPELL", {"r": 0.0}), ("OSCAR", {"weight": 0.0, "noise_weight": 0.0}),
     ("EDDY", {"weight": 0.0}), ("SPARKE, ours", {"scale": 0.0}), ("SPARKE, authors' code", {"scale": 0.0})],
)  # fmt: skip
def test_a_method_without_strength_is_plain_sampling(name: str, off: dict, bed: Analytic) -> None:
    case = Case("prompt 2", 1)
    assert torch.allclose(bed.sample(METHODS[name](**off), case), bed.run(case, bed.images), atol=2e-5)


def test_lower_guidance_is_the_pipeline_at_that_scale(bed: Analytic) -> None:
    case = Case("prompt 5", 2)
    got = bed.sample(METHODS["lower CFG"](weight=1.7), case)
    expected = bed.pipe(case.prompt, bed.images, bed.steps, 1.7, bed.noise(case, bed.images))
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "off"),
    [("OSCAR", {"weight": 0.0, "noise_weight": 0.0}), ("DiverseFlow", {"weight": 0.0}), ("SPARKE, ours", {"scale": 0.0}),
     ("SPARKE, ours, log det", {"scale": 0.0})],
)  # fmt: skip
def test_a_method_without_strength_in_an_interval_is_interval_guidance(name: str, off: dict, bed: Analytic) -> None:
    case = Case("prompt 5", 2)
    expected = bed.sample(METHODS["interval CFG"](start=0.3, stop=0.7), case)
    got = bed.sample(METHODS[f"{name}, interval CFG"](**off, cfg_start=0.3, cfg_stop=0.7), case)
    assert torch.allclose(got, expected, atol=2e-5)
    assert not torch.allclose(expected, bed.run(case, bed.images), atol=1e-2)


@pytest.mark.parametrize("name", ["OSCAR", "DiverseFlow", "SPARKE, ours, order 0.5"])
def test_a_method_with_guidance_in_the_whole_run_is_the_method(name: str, bed: Analytic) -> None:
    case = Case("prompt 5", 2)
    got = bed.sample(METHODS[f"{name}, interval CFG"](cfg_start=0.0, cfg_stop=1.0), case)
    assert torch.allclose(got, bed.sample(METHODS[name](), case), atol=2e-5)


def test_further_predictions_of_a_step_have_its_weight(bed: Analytic) -> None:
    differences = []

    class Again(METHODS["lower CFG"]):  # type: ignore[misc]
        again = True

        def move(self, m: Any) -> None:
            differences.append(float((m.denoise(m.x) - m.x0).abs().max()))

    bed.sample(Again(weight=1.7), Case("prompt 5", 2))
    assert len(differences) == bed.steps
    assert max(differences) < 1e-4


def test_score_rescaling_samples_a_wider_gaussian() -> None:
    """One mode: the score of variance ``s^2 / k`` must give samples of that variance."""
    bed = Analytic(8, skewed=False)
    bed.model.log_weights = torch.tensor([0.0] + [-1e9] * 23)
    bed.model.std, bed.images, bed.steps, bed.guidance_scale = 0.5, 400, 100, 1.0
    method = METHODS["score rescaling"](k=0.5, width=0.5)
    x = bed.sample(method, Case("", 0)).flatten(1)
    assert float(x.var(0).mean()) == pytest.approx(0.5**2 / 0.5, rel=0.08)


def test_repulsion_is_minus_the_gradient_of_each_samples_own_potential() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = repulsion(x)
    for i in range(5):
        others = x[torch.arange(5) != i]
        h = (x[i] - others).norm(dim=1).median() ** 2 / math.log(4)
        own = x[i].clone().requires_grad_()
        (g,) = torch.autograd.grad(-torch.exp(-(own - others).square().sum(1) / h).sum(), own)
        assert torch.allclose(got[i], g, rtol=1e-6)


def test_dpp_of_far_points_is_the_closed_form() -> None:
    x = torch.eye(4, dtype=torch.float64) * 1e3  # equal distances: L has exp(-h / 2) off its diagonal
    a, n = math.exp(-30 / 2), 4
    expected = sum(math.log(l) - math.log1p(l) for l in [1 - a + n * a, *[1 - a] * (n - 1)])
    assert float(dpp(x, 30.0)) == pytest.approx(expected, abs=1e-4)


def test_eddy_derivatives_are_those_of_autograd() -> None:
    x, s = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    r, along, div = pairs(x, s)
    h = (x[0] - x[1:]).norm(dim=1).median() ** 2 / math.log(3)

    def own(xi: torch.Tensor) -> torch.Tensor:
        away = xi - x[1:]
        return (2 / h * torch.exp(-away.square().sum(1) / h)[:, None] * away).sum(0)

    jacobian = torch.autograd.functional.jacobian(own, x[0])
    assert torch.allclose(r[0], own(x[0]), rtol=1e-4)
    assert torch.allclose(along[0], jacobian @ s[0], rtol=1e-4)
    assert torch.allclose(div[0, 0], jacobian.trace(), rtol=1e-4)


def test_eddy_moves_across_the_score_to_first_order() -> None:
    m = moment(torch.randn(6, 1, 1, 8))
    move = EDDY(divergence=False).move(m)
    assert move is not None
    inside = (move * m.score).flatten(1).sum(1) / (move.flatten(1).norm(dim=1) * m.score.flatten(1).norm(dim=1))
    assert inside.abs().max() < 1e-5


def test_oscar_moves_across_the_velocity() -> None:
    m, method = moment(torch.randn(6, 1, 1, 8)), OSCAR(noise_weight=1.0)
    v = method.velocity(m)
    with torch.enable_grad():
        move = method.move(m)
    assert move is not None
    for part in (move, method.after(m, m.x) - m.x):
        cosine = torch.nn.functional.cosine_similarity(part.flatten(1), v.flatten(1))
        assert cosine.abs().max() < 1e-5


def test_spell_separates_two_samples_to_its_radius_and_moves_no_distant_one() -> None:
    x0 = torch.tensor([[0.0, 0.0], [0.3, 0.0], [9.0, 0.0]]).view(3, 1, 1, 2)
    move = SPELL(r=1.0, radius_unit=1.0).move(moment(x0))
    assert move is not None
    moved = (x0 + move).flatten(1)
    assert float((moved[0] - moved[1]).norm()) == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(moved[2], x0[2].flatten())


def test_spell_told_to_remember_moves_a_sample_out_of_the_ball_around_a_finished_one() -> None:
    method = SPELL(r=1.0, radius_unit=1.0)
    method.remember()
    assert method.earlier == []
    method.earlier.append(torch.tensor([[0.3, 0.0], [9.0, 0.0]]).view(2, 1, 1, 2))
    x0 = torch.tensor([[0.0, 0.0]]).view(1, 1, 1, 2)
    move = method.move(moment(x0))
    assert move is not None
    assert torch.allclose((x0 + move).flatten(), torch.tensor([-0.7, 0.0]), atol=1e-6)


REMEMBER = ["SPARKE, ours", "SPARKE, ours, order 0.5, lower CFG", "SPARKE, authors' code", "c-VSG", "SPELL"]


@pytest.mark.parametrize("name", [*REMEMBER, "plain", "OSCAR", "group inference"])
def test_several_calls_are_single_ones_but_for_the_memory_of_methods_that_have_one(
    name: str, bed: Analytic, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = functools.partial(METHODS[name], **{"SPELL": {"r": 1.5}, "SPARKE, authors' code": {"scale": 0.3}}.get(name, {}))
    monkeypatch.setattr(bed, "images", 4)
    with torch.no_grad():
        alone = [bed.sample(make(), Case("prompt 9", seed)) for seed in (7, 7 + CALL_SEEDS)]
        monkeypatch.setattr(bed, "calls", 2)
        first, second = bed.sample(make(), Case("prompt 9", 7)).split(4)
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1]) == (name not in REMEMBER)


def test_the_tuned_setting_is_on_the_front_of_a_method_with_few_settings() -> None:
    method = METHODS["group inference"]
    assert method.sweep(8, 5) == [2, 3, 4, 5, 6, 8]
    assert method.sweep(4, 5) == [2, 3, 4, 5, 6]


def test_greedy_choice_takes_one_of_each_cluster() -> None:
    rows = torch.randn(4, 3).mul(10).repeat_interleave(5, 0) + 0.01 * torch.randn(20, 3)
    assert sorted(k // 5 for k in varied(rows, 4)) == [0, 1, 2, 3]


def test_the_first_prediction_of_the_distilled_model_is_close_to_its_samples() -> None:
    """The differences between finished samples are in the student's first prediction, and less so in the teacher's."""

    def similarity(bed: Bed) -> float:
        case = bed.cases("tune", 1)[0]
        noise = bed.start(case, 24)
        states = bed.pipe.conditions.rows([case.prompt] * len(noise))
        with torch.no_grad():
            velocity = bed.pipe.unet(noise, torch.tensor(1000.0), encoder_hidden_states=states, return_dict=False)[0]
        first, last = ((x - x.mean(0)).flatten(1) for x in (noise - velocity, bed.run(case, len(noise), noise)))
        return float(torch.cosine_similarity(first, last).mean())

    student, teacher = similarity(BEDS["digits-distilled"]()), similarity(BEDS["digits-4"]())
    assert student > 0.8
    assert teacher < student - 0.2


def test_every_table_of_the_arena_is_on_one_page_between_its_markers() -> None:
    """The pages hold the markers that the generator fills, and no others, which it would leave as they are."""
    docs = ROOT / "docs"
    pages = {p.relative_to(docs).as_posix() for p in docs.rglob("*.md") if "arena" in p.relative_to(docs).as_posix()}
    pages |= set(PAGES)
    found = {page: re.findall(r"<!-- (\w+) -->", (docs / page).read_text()) for page in pages}
    assert found == {page: list(names) for page, names in PAGES.items()}
    assert len({name for names in PAGES.values() for name in names}) == sum(map(len, PAGES.values()))


def test_a_stored_record_is_drawn_the_same_when_methods_are_added_that_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = ROOT / "benchmarks" / "results" / "arena"
    data = [json.loads((stored / f"{name}.json").read_text()) for name in ("digits", "digits--distilled")]
    measured = {method for d in data for method in d["methods"]}
    figures.overview(data, tmp_path / "with.png")
    monkeypatch.setattr(figures, "METHODS", {name: m for name, m in METHODS.items() if name in measured})
    figures.overview(data, tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


@pytest.fixture(scope="module")
def transformer_bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    folder = tmp_path_factory.mktemp("weights")
    tiny = functools.partial(networks.emoji_transformer, width=16, layers=3)  # one in the middle, where DAVE acts
    torch.manual_seed(0)
    save_file({k: v.half() for k, v in tiny().state_dict().items()}, folder / "emoji_transformer.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARENA_WEIGHTS", str(folder))
        patch.setattr(transformer, "emoji_transformer", tiny)
        bed = transformer.EmojiTransformer(2)
    bed.images = 3
    return bed


def test_the_transformer_bed_is_sampled_and_judged(transformer_bed: Bed) -> None:
    case = Case("flower", 0)
    samples = transformer_bed.run(case, 3)
    assert samples.shape == (3, *transformer_bed.shape())
    assert torch.equal(samples, transformer_bed.run(case, 3, transformer_bed.start(case, 3)))
    assert 0 <= transformer_bed.judge(samples, case)["valid"] <= 1
    assert transformer_bed.name == "emoji, transformer, 2 steps"


@pytest.mark.parametrize("name", ["CADS", "seed variance"])
def test_noise_on_the_prompt_reaches_its_tokens_and_its_pooled_state(name: str, transformer_bed: Bed) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append({k: kwargs[k] for k in ("encoder_hidden_states", "pooled_projections")})

    case, network = Case("flower", 0), transformer_bed.pipe.transformer
    for method in ("plain", name):
        with METHODS[method]().attach(transformer_bed.pipe):
            handle = network.register_forward_pre_hook(watch, with_kwargs=True)  # after the method's own
            transformer_bed.run(case, 3)
            handle.remove()
    plain, noisy = seen[0], seen[transformer_bed.steps]
    for k, states in plain.items():
        assert noisy[k].shape == states.shape
        assert torch.equal(noisy[k][:3], states[:3])  # of the empty prompt
        assert not torch.allclose(noisy[k][3:], states[3:])
        assert not torch.allclose(noisy[k][3] - states[3], noisy[k][4] - states[4])


def test_transformer_beds_have_what_methods_on_blocks_and_on_images_need() -> None:
    for bed, missing in ((transformer.EmojiTransformer, set()), (transformer.DistilledEmojiTransformer, {"guidance"})):
        assert {need for m in METHODS.values() for need in m.needs} - bed.has == missing


ON_OUTPUTS = ["CADS", "OSCAR", "feature self-guidance", "interval CFG", "SPARKE, ours"]
ON_BLOCKS_AND_NOISE = ["DAVE", "contextual repulsion", "pink noise"]


@pytest.mark.parametrize("name", ON_OUTPUTS + ON_BLOCKS_AND_NOISE)
def test_methods_act_on_a_transformer_and_restore_it(name: str, transformer_bed: Bed) -> None:
    case, method = Case("flower", 0), METHODS[name]()
    before = transformer_bed.run(case, 3)
    assert transformer_bed.fits(METHODS[name])
    assert not torch.equal(transformer_bed.sample(method, case), before)
    assert torch.equal(transformer_bed.run(case, 3), before)


def test_hooks_of_diffusers_reach_the_blocks_of_the_transformer(transformer_bed: Bed) -> None:
    seen = []

    class Watch(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: tuple) -> tuple:
            found = TransformerBlockRegistry.get(type(module))
            seen.append((output[found.return_hidden_states_index], output[found.return_encoder_hidden_states_index]))
            return output

    block = transformer_bed.pipe.transformer.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Watch(), "watch")
    transformer_bed.run(Case("flower", 0), 3)
    block._diffusers_hook.remove_hook("watch")
    images, text = seen[0]
    assert (len(seen), images.shape, text.shape) == (2, (6, 16, 16), (6, 16, 16))  # two steps, CFG; 16 patches, 16 tokens


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_the_small_arena_runs_and_does_not_measure_twice(tmp_path: Path) -> None:
    beds = ["mixture-32", "digits", "emoji-4"]
    command = [sys.executable, "-m", "benchmarks.arena", "--small", "--out", str(tmp_path), "--beds", *beds,
               "--methods", "plain", "OSCAR", "SPARKE, ours", "--docs", str(tmp_path / "docs")]  # fmt: skip
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        written = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert len(written) == len(beds)
    data = json.loads((tmp_path / "emoji--4-steps.json").read_text())
    assert len(data["methods"]["OSCAR"]["trials"]) == 2
    assert len(data["methods"]["SPARKE, ours"]["front"]) == 3
    for page in PAGES:
        assert (tmp_path / "docs" / page).is_file()
    page = (tmp_path / "docs" / "arena.md").read_text()
    assert "OSCAR" in page
    assert "digits" in page


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_the_small_arena_of_several_calls_fills_its_table(tmp_path: Path) -> None:
    small = [sys.executable, "-m", "benchmarks.arena", "--small", "--beds", "mixture-8", "--methods", "plain", "OSCAR",
             "SPARKE, ours", "--docs", str(tmp_path / "docs"), "--out"]  # fmt: skip
    for command in ([*small, str(tmp_path / "calls"), "--calls", "2", "--images", "3"], [*small, str(tmp_path)]):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = [
        json.loads((path / "mixture--8-dimensions--balanced.json").read_text()) for path in (tmp_path / "calls", tmp_path)
    ]
    assert [(data["settings"]["calls"], data["settings"]["images"]) for data in found] == [(2, 3), (1, 6)]
    assert "mixture, 8 dimensions" in (tmp_path / "docs" / "arena" / "sets.md").read_text()
    other = subprocess.run([*small, str(tmp_path / "calls"), "--calls", "3"], cwd=ROOT, capture_output=True, text=True)
    assert "--calls 2" in other.stderr
    other = subprocess.run([*small, str(tmp_path), "--fresh"], cwd=ROOT, capture_output=True, text=True)
    assert "--fresh False" in other.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_cases_on_several_processes_have_the_figures_of_one(tmp_path: Path) -> None:
    def figures(data: Any) -> Any:
        if isinstance(data, dict):
            return {k: figures(v) for k, v in data.items() if k != "seconds"}
        return [figures(v) for v in data] if isinstance(data, list) else data

    found = []
    for jobs in ("1", "2"):
        command = [sys.executable, "-m", "benchmarks.arena", "--small", "--out", str(tmp_path / jobs), "--jobs", jobs,
                   "--beds", "mixture-8", "--methods", "plain", "OSCAR", "SPARKE, ours"]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (path,) = (tmp_path / jobs).glob("*.json")
        found.append(figures(json.loads(path.read_text())))
    assert found[0] == found[1]


def test_blocks_hold_successive_seeds_of_one_prompt():
    prompts = ["a", "b", "c"] * 12  # twelve seeds: two blocks, the last of seven
    found = blocks(prompts)
    assert [len(block) for block in found] == [5, 5, 5, 7, 7, 7]
    assert sorted(k for block in found for k in block) == list(range(36))
    assert all(len({prompts[k] for k in block}) == 1 for block in found)


def test_sample_in_another_prompts_mode_is_on_the_data_and_does_not_agree(bed: Analytic) -> None:
    case = Case("prompt 9", 0)
    own, other = int(bed.shares(case.prompt).argmax()), int(bed.shares(case.prompt).argmin())
    at_own, at_other, off = (bed.model.centres[k].repeat(4, 1) + shift for k, shift in ((own, 0), (other, 0), (own, 9)))
    figures = [bed.figures(x, case) for x in (at_own, at_other, off)]
    assert [f["on_data"] for f in figures] == [1, 1, 0]
    assert [f["valid"] for f in figures] == [1, 0, 0]
    assert [f["agreement"] for f in figures[:2]] == [1, 0]


def test_denoiser_calls_of_a_method_are_counted() -> None:
    assert 0.5 < cost.calls("DiverseFlow") < 1


def test_noise_on_the_prompt_reaches_a_denoiser_whose_forward_is_wrapped() -> None:
    bed, case, method = BEDS["digits"](), Case("digit 3", 0), METHODS["CADS"]
    direct, forward = bed.sample(method(), case), bed.pipe.unet.forward
    bed.pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert torch.equal(bed.sample(method(), case), direct)
