"""Scores of a comparison with real small networks, and with stubs of those whose weights cannot be had."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kspec_guidance.bench.judge import judge
from kspec_guidance.bench.metrics import ASPECTS, METRICS, Metric, attribute_values
from kspec_guidance.bench.resources import Resources, Sample, Unavailable, package
from kspec_guidance.evaluation.embedders import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.judges import clip_judge
from tests.bench.runs import make_run

EXTERNAL = ("lpips", "dreamsim", "t2v_metrics", "ImageReward", "hpsv3", "pyiqa", "torch_fidelity")


@pytest.fixture(autouse=True)
def _no_packages(monkeypatch):
    for name in EXTERNAL:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), 2, 4)


def samples(run, setting=("plain", None), prompt=0):
    return [Sample(path, f"prompt {prompt}") for path in run.groups()[setting][prompt].paths]


def test_every_score_of_the_protocol_is_there_with_an_aspect_and_words():
    expected = {
        "vendi", "conditional_vendi", "mss", "lpips", "dreamsim", "dino_pairwise", "recall", "coverage",
        "attribute_coverage", "clip_score", "vqascore", "image_reward", "hpsv2", "hpsv3", "pickscore", "fid", "fd_dinov2",
        "kid", "cmmd", "precision", "density", "aesthetic",
    }  # fmt: skip
    assert expected <= set(METRICS)
    assert all(m.about and m.aspect in ASPECTS for m in METRICS.values())
    with pytest.raises(ValueError, match="needs a tolerance"):
        Metric("x", "x", "realism", "set", lambda r: None)
    with pytest.raises(ValueError, match="aspect must be one of"):
        Metric("x", "x", "looks", "set", lambda r: None)


def test_the_documentation_names_every_score():
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in text] == []


def test_absent_packages_networks_and_references_are_named(run, monkeypatch):
    monkeypatch.setattr("kspec_guidance.bench.resources.in_cache", lambda *_: False)
    found = judge(run, [n for n in METRICS if METRICS[n].features != "own"])
    assert not found["methods"]["plain"]
    reasons = found["skipped"]
    for name, words in {
        "lpips": "lpips needs: pip install lpips", "dreamsim": "dreamsim needs: pip install dreamsim",
        "vqascore": "t2v-metrics asks for other",
        "image_reward": "elsewhere.py OUT image_reward", "hpsv3": "elsewhere.py OUT hpsv3",
        "aesthetic": "pyiqa needs: pip install pyiqa",
        "clip_score": "openai/clip-vit-large-patch14 is not in the Hugging Face cache",
        "pickscore": "yuvalkirstain/PickScore_v1 is not in", "hpsv2": "HPS_v2.1_compressed.pt", "fid": "--reference FOLDER",
        "cmmd": "--reference FOLDER", "agreement": "is for images of the embedded model",
    }.items():  # fmt: skip
        assert words in reasons[name]


def test_a_package_without_its_own_dependency_says_so(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match="halfway is installed, but needs nowhere_to_be_found"):
        package("halfway")


def test_packages_get_files_and_prompts_in_order_and_return_a_value_an_image(run, monkeypatch):
    """Stubs with the signatures of t2v-metrics 3.0, image-reward 1.5, hpsv3 1.0.0 and pyiqa 0.1.16."""

    def number(path):
        return float(str(path)[-7:-4])

    class VQAScore:
        def __init__(self, model, device):
            assert model == "clip-flant5-xxl"

        def __call__(self, images, texts):
            assert texts == ["prompt 1"]
            return torch.tensor([[number(p)] for p in images])

    class Reward:
        def __init__(self, device):
            pass

        def reward(self, image_paths, prompts):
            assert prompts == ["prompt 1"] * len(image_paths)
            return torch.tensor([[number(p), 99.0] for p in image_paths], requires_grad=True)

    def score(prompt, paths):
        values = [number(p) for p in paths]
        return values if len(values) > 1 else values[0]

    def create_metric(name, device):
        assert name == "laion_aes"
        return lambda x: (255 * x[:, 2, :1, 0] / 20).requires_grad_()

    monkeypatch.setitem(sys.modules, "t2v_metrics", SimpleNamespace(VQAScore=VQAScore))
    monkeypatch.setitem(sys.modules, "hpsv3", SimpleNamespace(HPSv3RewardInferencer=Reward))
    load = lambda name, device: SimpleNamespace(score=score)  # noqa: E731
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    group = samples(run, prompt=1)
    for name in ("vqascore", "image_reward", "hpsv3", "aesthetic"):
        measure = METRICS[name].load(Resources())
        torch.testing.assert_close(measure(group), torch.arange(4.0))
        assert measure(group[:1]).shape == (1,)
        assert not measure(group).requires_grad


def test_perceptual_distances_are_means_over_pairs_in_batches(run, monkeypatch):
    seen = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b, normalize):
            seen.append(len(a))
            return (a - b).abs().mean((1, 2, 3))[:, None, None, None]

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr("kspec_guidance.evaluation.perceptual.BATCH", 4)
    found = METRICS["lpips"].load(Resources())(samples(run))
    pairs = [20 * abs(i - j) / 255 / 3 for i in range(4) for j in range(i)]
    assert float(found) == pytest.approx(sum(pairs) / 6)
    assert seen == [4, 2]


def stub_embedder(columns=3):
    return ImageEmbedder(lambda x: x.mean((2, 3))[:, :columns], 8, "colours", (0.0,) * 3, (1.0,) * 3, fingerprint="colours")


def test_scores_against_a_reference_of_the_same_images(tmp_path, monkeypatch):
    run = make_run(tmp_path, 4, 4)
    monkeypatch.setattr(Resources, "embedder", lambda self, name: stub_embedder())
    names = ["recall", "coverage", "fd_dinov2", "fid", "kid", "cmmd", "fd", "precision", "density"]
    found = judge(run, names, reference=tmp_path / "images/plain/plain")
    same, other = found["methods"]["plain"], found["methods"]["cads"]
    assert {n: same[n]["value"] for n in ("recall", "coverage", "precision")} == {
        "recall": 1,
        "coverage": 1,
        "precision": 1,
    }
    for name in ("fd_dinov2", "fid", "fd", "cmmd"):
        assert same[name]["value"] == pytest.approx(0, abs=1e-9)
        assert other[name]["value"] > 0.01
    assert other["precision"]["value"] == 0
    assert found["reference"]["images"] == 16
    few = judge(make_run(tmp_path / "few", 1, 3), ["precision"], reference=tmp_path / "images/plain/plain")
    assert "needs more than 5 images" in few["skipped"]["precision"]


def test_attribute_coverage_counts_the_values_that_images_show(tmp_path):
    """Images of a stub that are like ``red``, ``red``, ``blue`` show two of the three values that three images could."""
    directions = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0]}
    texts = TextEmbedder(lambda found: torch.tensor([directions[t.rpartition(", ")[2]] for t in found]), "stub", "stub")
    resources = Resources()
    resources._judges["clip"] = clip_judge(stub_embedder(), texts)
    truth = {"attributes": {"colour": ["red", "green", "blue"], "alone": ["red"]}}
    group = []
    for k, colour in enumerate([(200, 0, 0), (180, 10, 0), (0, 0, 90)]):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{k}.png")
        group.append(Sample(tmp_path / f"{k}.png", "a ball", truth))
    measure = METRICS["attribute_coverage"].load(resources)
    assert float(measure(group)) == pytest.approx(2 / 3)
    assert torch.isnan(measure([Sample(s.path, s.prompt) for s in group]))
    assert attribute_values({"attributes": ["red", "green"]}) == [["red", "green"]]
    assert attribute_values({}) == []


def test_images_of_the_embedded_model_are_scored_by_the_judge_that_comes_with_it(tmp_path):
    run = make_run(
        tmp_path, images=2, model="demo", names=["heart", "cat face", "no emoji at all"], methods={"plain": [None]}
    )
    names = ["vendi", "mss", "attribute_coverage", "conditional_vendi", "vendi_set", "agreement", "on_data"]
    found = judge(run, names)
    values = {n: found["methods"]["plain"][n]["value"] for n in names}
    assert found["features"] == "emoji judge"
    assert found["prompt_features"] == "all-MiniLM-L6-v2"
    assert 1 <= values["vendi"] <= 2
    assert 1 <= values["conditional_vendi"] <= 6
    assert all(0 <= values[n] <= 100 for n in ("agreement", "on_data"))
    assert 0 <= values["attribute_coverage"] <= 1


def test_images_of_the_embedded_model_are_compared_with_the_emoji_that_come_with_it(tmp_path):
    run = make_run(tmp_path, 2, 3, model="demo", methods={"plain": [None]})
    names = [n for n in METRICS if n in ("recall", "coverage", "precision", "density", "fd", "on_data")]
    found = judge(run, names)
    assert found["reference"] == {"path": "Noto Emoji and Twemoji", "images": 192}
    assert set(found["methods"]["plain"]) == set(names)
    assert list(found["quality"]) == ["on_data"]
    assert judge(run, names) == found
    assert judge(run, ["vendi"])["reference"] is None
    own = judge(run, ["fd"], reference=tmp_path / "images")
    assert own["reference"]["images"] == 6
    assert own["methods"]["plain"]["fd"]["value"] == pytest.approx(0, abs=1e-9)


def test_other_images_are_scored_by_the_embedder_of_the_package(tmp_path):
    found = judge(make_run(tmp_path, 1, 4, methods={"plain": [None]}), ["vendi", "mss"])
    assert found["features"] == "efficientnet-lite0"
    assert 1 <= found["methods"]["plain"]["vendi"]["value"] <= 4
