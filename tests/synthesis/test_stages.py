import sys

import pytest
import torch
from PIL import Image, ImageFilter

from kspec_guidance.synthesis import SynthesisError, reproduce
from kspec_guidance.synthesis.filters import Screen, filter_stages
from kspec_guidance.synthesis.stages import ScoreFilter, blur_effect, parse_score_filter
from tests.synthesis.small_runs import make, rows_of

CALL = {"num_inference_steps": 2, "guidance_scale": 4.0}


@pytest.mark.parametrize("contrast", [1, 3])
def test_blur_grows_with_the_width_of_a_blur_whatever_the_contrast(contrast):
    squares = Image.effect_noise((8, 8), 150).resize((128, 128), Image.Resampling.NEAREST)
    squares = squares.point(lambda v: 128 + (v - 128) // contrast)
    found = [blur_effect(squares.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert found == sorted(found)
    assert 0 <= found[0] < 0.3 < 0.6 < found[-1] <= 1


@pytest.mark.parametrize("size", [(1, 1), (2, 50), (50, 2), (400, 3)])
def test_blur_is_known_for_images_of_any_size(size):
    assert 0 <= blur_effect(Image.effect_noise(size, 60)) <= 1
    assert blur_effect(Image.new("RGB", size)) == 1.0


def test_images_outside_of_the_range_are_dropped_and_counted_and_kept_ones_have_their_score(tmp_path, pipe):
    calls = []

    def width(images, prompts):
        calls.append(list(prompts))
        return [float(len(calls) + k) for k in range(len(images))]

    stages = ["blur<=0.999", ScoreFilter("width", width, at_least=2, at_most=3.5)]
    result = make(tmp_path, pipe, ["heart"], 3, 3, call=CALL, filter=stages)
    assert result.images == 3
    assert result.rejected["width below 2"] >= 1
    rows = rows_of(tmp_path)
    assert all(2 <= row["width"] <= 3.5 and 0 <= row["blur"] <= 0.999 for row in rows)
    assert set(calls[0]) == {"heart"}
    assert "width below 2 1" in (tmp_path / "README.md").read_text()
    assert "| filter |" in (tmp_path / "README.md").read_text()


def test_agreement_by_the_judge_of_the_embedded_model_and_the_recipe_makes_it_again(tmp_path, pipe):
    make(tmp_path / "set", pipe, ["heart", "no such thing"], 2, 2, call=CALL, filter=["agreement>=1", "blur<=1"])
    rows = rows_of(tmp_path / "set")
    assert all(row["agreement"] >= 1 for row in rows if row["prompt"] == "heart")
    assert all(row["agreement"] is None for row in rows if row["prompt"] != "heart")  # unknown to the judge: kept
    assert reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "b", pipe, report=False).reproduced["same bytes"] == 4


def test_scores_by_a_function_of_a_module_and_a_classifier(tmp_path, monkeypatch):
    (tmp_path / "scores_of_a_test.py").write_text("def red(images):\n    return [i.getpixel((0, 0))[0] for i in images]\n")
    monkeypatch.chdir(tmp_path)
    images = [Image.new("RGB", (4, 4), (9, 0, 0)), Image.effect_noise((4, 4), 9).convert("RGB")]
    stage = parse_score_filter("red>=10:scores_of_a_test:red")
    assert stage.scores(images[:1], [""]) == [9.0]
    assert stage.reason(9.0) == "red below 10"
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8, patch_size=4,
        id2label={0: "safe", 1: "nsfw"}, label2id={"safe": 0, "nsfw": 1},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    nsfw = parse_score_filter(f"nsfw<=0.2:transformers:{tmp_path / 'vit'}:nsfw")
    safe = parse_score_filter(f"safe>=0.2:transformers:{tmp_path / 'vit'}:safe")
    total = torch.tensor(nsfw.scores(images, ["", ""])) + torch.tensor(safe.scores(images, ["", ""]))
    assert torch.allclose(total, torch.ones(2))
    with pytest.raises(SynthesisError, match=r"no label 'porn'; its labels are (safe, nsfw|nsfw, safe)"):
        parse_score_filter(f"nsfw<=0.2:transformers:{tmp_path / 'vit'}:porn")
    sys.modules.pop("scores_of_a_test", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sharp>=3", "does not say what computes 'sharp'"), ("blur<=1e", "cannot read the number '1e'"),
        ("seed>=3:a:b", "a score cannot be named 'seed'|cannot import"), ("blur<=inf", "is named module:function"),
        ("nsfw<=1:transformers:x", "needs transformers:MODEL:LABEL"),
        ("nsfw<=1:transformers:/none:x", "cannot load '/none'"),
        (["blur<=1", "blur<=2"], "two filters use the name 'blur'; .* one ScoreFilter takes both"), ("", "got ''"),
        ("blur<0.5", "or is a score with one limit, <= or >= and a finite number"), ("blur<=1,agreement>=2", "one limit"),
        ("module:", "is named module:function"), (3, "a filter is a function"),
        ("agreement>=3:nothing", "cannot load the judge of agreement: unknown judge"), ("x", "is named module:function"),
    ],
)  # fmt: skip
def test_filters_that_cannot_be_are_refused(given, message):
    with pytest.raises(SynthesisError, match=message):
        filter_stages(given)


def test_scores_that_fail_or_collide_are_errors(tmp_path, pipe):
    image = Image.effect_noise((4, 4), 9)
    for function, message in (
        (lambda images, prompts: 1 / 0, "the score 'x' failed: ZeroDivisionError"),
        (lambda images, prompts: [1.0], "returned 1 numbers for 2 images"),
        (lambda images, prompts: ["a", "b"], "the score 'x' failed: ValueError"),
    ):
        with pytest.raises(SynthesisError, match=message):
            Screen(None, [ScoreFilter("x", function, 1)]).reasons([image] * 2, [{}, {}], torch.eye(2))
    assert Screen(None, [ScoreFilter("x", lambda i, p: [float("nan")], 1)]).reasons([image], [{}], torch.eye(1)) == [None]
    with pytest.raises(SynthesisError, match="the prompts have a column 'blur'"):
        make(tmp_path / "set", pipe, [{"prompt": "heart", "blur": 1}], 1, filter="blur<=1")
    assert not (tmp_path / "set").exists()


def test_scores_are_columns_of_tables(tmp_path, pipe):
    pq = pytest.importorskip("pyarrow.parquet")
    make(tmp_path, pipe, ["heart"], 2, 2, call=CALL, filter="blur<=1", format="parquet")
    (table,) = tmp_path.glob("*.parquet")
    assert all(0 <= value <= 1 for value in pq.read_table(table)["blur"].to_pylist())
