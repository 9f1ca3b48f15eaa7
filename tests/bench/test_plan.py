import pytest

from kspec_guidance.bench.methods import CODES
from kspec_guidance.bench.models import RECIPES
from kspec_guidance.bench.plan import SUITES, choose_methods, unfit

DEMO = RECIPES["demo"]


def test_methods_take_their_default_strength_those_after_their_name_or_a_sweep():
    plain, sparke, cads = choose_methods("plain, sparke@25/75,cads", DEMO)
    assert (plain.values, plain.chosen) == ((None,), None)
    assert (sparke.values, sparke.chosen) == ((25.0, 75.0), 25.0)
    assert cads.values == (cads.chosen,) == (0.25,)
    [sparke, particle] = choose_methods("sparke,particle", DEMO, sweep=True)
    assert sparke.values == (10.0, 25.0, 50.0, 75.0, 100.0)
    assert sparke.chosen == 50.0
    assert len(particle.values) == 3
    assert particle.chosen == particle.make(None).weight == 0.3


def test_a_choice_says_what_it_runs():
    [sparke] = choose_methods("sparke@25/50", DEMO)
    about = sparke.describe()
    assert (about["name"], about["strength"], about["strengths"], about["chosen"]) == (
        "sparke",
        "variety",
        ["25", "50"],
        "50",
    )
    [oscar] = choose_methods("oscar", DEMO)
    assert oscar.describe()["parameters"] == {"noise_weight": 0.05, "c": 4.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("plain,vivd", "unknown method 'vivd'.*did you mean 'vivid'"),
        ("plain,", "unknown method ''"),
        ("plain,plain", "given twice; for several strengths: plain@A/B/C"),
        ("plain@1", "plain has no strength, got @1"),
        ("sparke@", "must be numbers, as in sparke@50; got @"),
        ("sparke@10/10.0", "given twice"),
        ("sparke@200", "sparke@200: variety must be a number from 0"),
        ("cads@-1", "cads@-1: expected a finite number of at least 0"),
        ("cads@nan", "finite number"),
        ("group-inference@2.5", "group-inference@2.5: expected a whole number"),
        ("mmd", "mmd needs reference images: --like FOLDER"),
        ("dave", r"dave needs transformer blocks .* demo \(StableDiffusionPipeline\) has not; leave it out"),
    ],
)
def test_wrong_methods_and_strengths_are_told(names, message):
    with pytest.raises(ValueError, match=message):
        choose_methods(names, DEMO)


def test_methods_that_need_what_a_model_lacks_do_not_fit_it():
    flux, qwen = RECIPES["flux-dev"], RECIPES["qwen-image"]
    assert "classifier-free guidance" in unfit(CODES["lower-cfg"], flux)
    assert unfit(CODES["lower-cfg"], qwen) is None
    assert "one call" in unfit(CODES["eddy"], qwen)
    assert unfit(CODES["eddy"], flux) is None
    assert all(unfit(CODES[code], recipe) is None for code in ("plain", "sparke", "vivid") for recipe in RECIPES.values())


@pytest.mark.parametrize("suite", SUITES.values())
def test_suites_name_known_methods(suite):
    assert set(suite["methods"].split(",")) <= set(CODES)


def test_every_method_has_a_default_strength_within_its_sweep():
    for code, method in CODES.items():
        reference = "reference" in method.needs
        model = next(r for r in RECIPES.values() if unfit(method, r, reference) is None)
        [choice] = choose_methods(code, model, sweep=True, reference=reference)
        assert choice.chosen in choice.values
