import json

import pytest
import yaml
from PIL import Image

from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, encode_reference, load_demo_reference
from kspec_guidance.synthesis import Arm, Prompt, SynthesisError, reproduce
from tests.cli.commands import call as command
from tests.synthesis.small_runs import contents, make

CALL = {"num_inference_steps": 2, "guidance_scale": 4.0}
PROMPTS = [
    {"prompt": "heart", "group": "a", "note": 1},
    {"prompt": "runner", "images": 2},
    {"prompt": "heart", "group": "a"},
]


def keep_all(image, row):
    return True


@pytest.mark.parametrize(
    "settings",
    [
        {"licence": "MIT", "duplicates": 0.999, "candidates": 2, "target": "vendi>=1.5"},
        {"filter": keep_all, "quotas": {"a": 3}, "marks": False, "memory": "exact"},
        {"guide": SPARKE(target="2 of 4"), "embedder": "demo"},
        {"arms": [Arm("a"), Arm("b", {"guidance_scale": 1.5}, scheduler="DDIMScheduler", cost=1.0)], "select": "uniform"},
        {"format": "parquet", "shard_size": 4},
    ],
)
@pytest.mark.filterwarnings("ignore:.*prompts are listed again")
def test_a_set_is_made_again_from_its_recipe(settings, tmp_path, pipe):
    if settings.get("format") == "parquet":
        pytest.importorskip("datasets")
    made = make(tmp_path / "set", pipe, PROMPTS, 3, 4, call=CALL, seed=5, **settings)
    again = reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", report=False)
    shards = -(-made.images // 4) if "format" in settings else made.images
    assert again.reproduced == {"same bytes": shards, "same pixels": 0, "different": 0}
    if "arms" not in settings:  # whose records have the measured cost
        assert contents(tmp_path / "set") == contents(tmp_path / "again")
    else:
        assert (tmp_path / "set" / "metadata.jsonl").read_bytes() == (tmp_path / "again" / "metadata.jsonl").read_bytes()


def test_scheduler_and_tensors_of_the_guide_are_restored(tmp_path, pipe):
    from diffusers import EulerDiscreteScheduler

    guide = MMDGuidance(encode_reference(pipe, load_demo_reference("dark-skin-tone")))
    own = pipe.scheduler
    try:
        pipe.scheduler = EulerDiscreteScheduler.from_config(own.config, use_karras_sigmas=True)
        make(tmp_path / "set", pipe, ["man"], 2, 2, call=CALL, guide=guide)
    finally:
        pipe.scheduler = own
    again = reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", pipe, report=False)
    assert again.reproduced["same bytes"] == 2
    assert pipe.scheduler is own


def test_images_with_other_pixels_are_counted(tmp_path, pipe):
    make(tmp_path / "set", pipe, ["heart"], 3, 3, call=CALL)
    for name, image in (("000000-0001", Image.new("RGB", (64, 64))), ("000000-0002", None)):
        path = tmp_path / "set" / "0000" / f"{name}.png"
        sums = tmp_path / "set" / "SHA256SUMS"
        with Image.open(path) as old:
            (image or old.copy()).save(path)
        sums.write_text("".join("0" * 64 + line[64:] if name in line else line for line in sums.open()))
    again = reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", pipe, report=False)
    assert again.reproduced == {"same bytes": 1, "same pixels": 1, "different": 1}
    sums.unlink()
    again = reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", pipe, report=False)
    assert again.reproduced == {"no original": 3}


def test_what_a_recipe_cannot_hold_is_named(tmp_path, pipe):
    make(tmp_path / "first", pipe, ["heart"], 2, call=CALL, memory_file=tmp_path / "memory")
    guide = SPARKE(memory=MemoryBank.load(tmp_path / "memory"))
    make(tmp_path / "set", pipe, ["heart"], 1, call=CALL, filter=lambda image, row: True, guide=guide)
    with pytest.raises(SynthesisError, match=r"it lacks filter, which this file cannot hold; the 2 entries"):
        reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", pipe)
    assert "; the 2 entries" in (tmp_path / "set" / "README.md").read_text()
    make(tmp_path / "more", pipe, ["heart"], 1, call=CALL)
    make(tmp_path / "more", pipe, ["heart"], 2, call=CALL, force=True)
    with pytest.raises(
        SynthesisError, match="what came before: settings were changed, or images left out, while the set was made"
    ):
        reproduce(tmp_path / "more" / "reproduce.yaml", tmp_path / "again", pipe)
    assert not (tmp_path / "again").exists()


def test_recipes_that_do_not_fit_are_refused_before_anything_is_made(tmp_path, pipe):
    make(tmp_path / "set", pipe, ["heart", Prompt("man")], 1, call=CALL)
    path = tmp_path / "set" / "reproduce.yaml"
    text = path.read_text()
    about = yaml.safe_load(text)
    about["settings"]["pipeline"]["denoiser"] = "UNet2DConditionModel-000000000000(+1+1+1)"
    for content, message in (
        ("[", "is no recipe of a set"),
        ("a: 1", "expected format 'kspec-guidance reproduce 1'"),
        (text.replace("kspec-guidance reproduce 1", "other"), "expected format"),
        (text.replace("settings:", "settins:"), "is no recipe of a set"),
        (text.replace("seed: 0", "seed: 1", 1), "seed: 0 before, now 1"),
        (yaml.safe_dump(about), "digest of the pipeline's weights"),
        (text.replace("!", "!") + "x: !!python/object/apply:os.system ['true']\n", "is no recipe of a set"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(SynthesisError, match=message):
            reproduce(path, tmp_path / "again", pipe)
    path.write_text(text)
    prompts = tmp_path / "set" / "prompts.jsonl"
    prompts.write_text('{"prompt": "cat face"}\n')
    with pytest.raises(SynthesisError, match="digest of all prompts"):
        reproduce(path, tmp_path / "again", pipe)
    prompts.unlink()
    with pytest.raises(SynthesisError, match=r"keep it beside reproduce.yaml"):
        reproduce(path, tmp_path / "again", pipe)
    with pytest.raises(SynthesisError, match="cannot read"):
        reproduce(tmp_path / "none.yaml", tmp_path / "again", pipe)
    assert not (tmp_path / "again").exists()


def test_the_command_makes_a_set_again(tmp_path):
    options = ("--steps", 1, "--images", 2, "--no-report", "--licence", "mit", "--no-sign")
    line = ("generate", "heart", "--out", tmp_path / "set", *options)
    assert command(*line).exit_code == 0
    again = ("generate", "--reproduce", tmp_path / "set" / "reproduce.yaml", "--out", tmp_path / "again", "--no-report")
    result = command(*again, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["reproduced"] == {"same bytes": 2, "same pixels": 0, "different": 0}
    result = command(*again, "--steps", 3, "heart")
    assert result.exit_code == 2
    assert "takes all settings of the images from its file; leave out" in result.stderr
