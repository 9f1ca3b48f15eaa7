"""Agreement of images with their prompts: by CLIP models, and by the classifier of the embedded pipeline's images."""

import json

import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.demo import load_demo_judge
from kspec_guidance.evaluation import compare_sets, evaluate_set, load_images, write_page
from kspec_guidance.evaluation.embedders import ImageEmbedder, TextEmbedder, transformers_text_embedder
from kspec_guidance.evaluation.judges import PromptJudge, clip_judge, demo_judge, prompt_judge
from kspec_guidance.evaluation.verdicts import agreement_verdict
from kspec_guidance.statistics import compare_paired

MEAN_COLOUR = ImageEmbedder(lambda x: x.mean((2, 3)), 8, "mean colour", (0.0,) * 3, (1.0,) * 3)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TEXTS = TextEmbedder(lambda texts: torch.tensor([COLOURS[t] for t in texts]).float(), "colours", "colours")


@pytest.fixture
def colours(tmp_path):
    """Two images of each prompt, of which the second of ``blue`` is green, and one image without a prompt."""
    rows = []
    for k, (prompt, colour) in enumerate([*COLOURS.items(), *COLOURS.items()]):
        Image.new("RGB", (16, 16), COLOURS["green"] if k == 5 else colour).save(tmp_path / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "prompt": prompt})
    Image.new("RGB", (16, 16), "white").save(tmp_path / "alone.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_demo_judge_tells_images_of_the_embedded_pipeline_apart():
    pipe, judge = load_demo_pipeline(), demo_judge()
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["heart", "cat face"], num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images
    right = judge.agreement(judge.images(images), ["heart", "cat face"])
    wrong = judge.agreement(judge.images(images), ["cat face", "heart"])
    assert (right > 40).all()
    assert (wrong < 5).all()
    assert judge.agreement(judge.images(images), ["a photo of a lorry", "heart, no such style"]).isnan().all()


def test_demo_judge_knows_attributes():
    judge = load_demo_judge()
    subject, narrower = judge.described("farmer"), judge.described("farmer, woman, dark skin tone, noto style")
    assert narrower.sum() == 1
    assert subject.sum() > narrower.sum()
    assert not (narrower & ~subject).any()


def test_agreement_is_read_with_the_images_in_one_pass(colours):
    images = load_images(colours, MEAN_COLOUR, judge=clip_judge(MEAN_COLOUR, TEXTS))
    expected = {**{f"{k}.png": 100.0 for k in range(5)}, "5.png": 0.0}
    found = dict(zip(images.names, images.agreement.tolist(), strict=True))
    assert {k: v for k, v in found.items() if k != "alone.png"} == pytest.approx(expected, abs=1e-3)
    assert torch.tensor(found["alone.png"]).isnan()


def test_page_and_json_have_agreement_beside_variety(colours, tmp_path):
    result = evaluate_set(load_images(colours, MEAN_COLOUR, judge=clip_judge(MEAN_COLOUR, TEXTS)), MEAN_COLOUR)
    about = result.as_dict()
    assert next(s["value"] for s in about["scores"] if s["score"] == "Prompt agreement") == pytest.approx(500 / 6, abs=1e-2)
    assert {p["prompt"]: round(p["agreement"]) for p in about["prompts"]} == {"red": 100, "green": 100, "blue": 50}
    page = write_page(result, tmp_path / "page.html")[0].read_text()
    assert "CLIP score of images and their prompts" in page
    assert "show their prompt least" in page


def test_compare_says_which_set_agrees_better(colours):
    pixels = ImageEmbedder(lambda x: x.flatten(1), 2, "pixels", (0.0,) * 3, (1.0,) * 3)
    good = PromptJudge("j", "agreement", pixels, lambda x, p: torch.full((len(p),), 90.0) + torch.arange(len(p)) / 10)
    a = load_images(colours, MEAN_COLOUR, judge=good)
    b = load_images(colours, MEAN_COLOUR, judge=good)
    b.agreement = a.agreement - 40
    report = compare_sets(a, b, MEAN_COLOUR)
    assert report.tests["Prompt agreement"].difference == pytest.approx(-40, abs=1e-4)
    assert "agree" in report.verdict


def test_agreement_verdict_names_the_better_set_only_if_sure():
    sure = compare_paired([80.0] * 10, [60.0 + k for k in range(10)])
    unsure = compare_paired([80.0, 70.0], [79.0, 72.0])
    assert agreement_verdict(("plain", "guided"), sure).startswith(
        " plain agrees better with its prompts than guided: 80.0"
    )
    assert "No sure difference" in agreement_verdict(("plain", "guided"), unsure)
    assert agreement_verdict(("plain", "guided"), None) == ""


def test_sets_without_a_judge_have_no_agreement(colours):
    report = compare_sets(load_images(colours, MEAN_COLOUR), load_images(colours, MEAN_COLOUR), MEAN_COLOUR)
    assert "Prompt agreement" not in report.tests
    assert "agree" not in report.verdict


def test_judge_of_a_transformers_folder(tmp_path):
    import transformers

    tokenizer = load_demo_pipeline().tokenizer
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)
    judge = prompt_judge(f"transformers:{tmp_path}")
    images = [Image.new("RGB", (32, 32), c) for c in COLOURS.values()]
    found = judge.agreement(judge.images(images), ["heart", "cat", "dog"])
    with torch.no_grad():
        t = model.eval().get_text_features(**tokenizer(["heart", "cat", "dog"], padding=True, return_tensors="pt"))
    t = t if isinstance(t, torch.Tensor) else t.pooler_output
    expected = 100 * torch.cosine_similarity(judge.images(images), t).clamp_min(0)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_bad_judges_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown judge 'clip'"):
        prompt_judge("clip")
    with pytest.raises(OSError, match="missing"):
        prompt_judge(f"transformers:{tmp_path / 'missing'}")
    with pytest.raises(ValueError, match="one space"):
        clip_judge(MEAN_COLOUR, TextEmbedder(lambda texts: torch.ones(len(texts), 5), "t", "t")).agreement(
            torch.ones(1, 3), ["red"]
        )
    pipe = load_demo_pipeline()
    with pytest.raises(ValueError, match="no text features"):
        transformers_text_embedder(pipe.text_encoder, pipe.tokenizer)
    assert prompt_judge("none") is None
    assert prompt_judge("auto", tmp_path) is None


def test_a_judge_is_the_guard_of_a_target(pipe):
    guide = SPARKE(target="7 of 8", fidelity=demo_judge())
    with guide.attach(pipe):
        pipe(["heart", "zzkj"], num_images_per_prompt=4, num_inference_steps=8, guidance_scale=5.0)
    known, unknown = guide.target.prompts
    assert known.fidelity > 0.5
    assert (unknown.fidelity, unknown.status) == (0, "stopped")
    assert "does not know this prompt" in unknown.reason
