"""What two embedders see in one set of images: figures, page and command."""

import json

import pytest
import torch
from PIL import Image

from kspec_guidance.evaluation.embedders import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embeddings import compare_embeddings
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.evaluation.page import write_page
from tests.cli.commands import call
from tests.comparison.planted import planted
from tests.evaluation.test_sets import demo_images, encode_png
from tests.samples import rows

FIRST, SECOND = (ImageEmbedder(lambda x: x.flatten(1), 8, n, fingerprint=n) for n in ("first", "second"))


def image_set(features, path="pictures"):
    n = len(features)
    picture = encode_png(Image.new("RGB", (8, 8), "red"))
    return ImageSet(path, [f"{i}.png" for i in range(n)], None, [picture] * n, features.float(), [str(i) for i in range(n)])


def test_planted_groups_are_found_in_both_directions(tmp_path):
    a, b, group = planted((20,) * 6, noise=0.03)
    sets = image_set(a, tmp_path / "pictures"), image_set(b, tmp_path / "pictures")
    result = compare_embeddings(*sets, FIRST, SECOND, eps=1.5)
    assert result.verdict.startswith("A groups the 120 images in 3 ways that B does not see, and B in ")
    listed = [set(group[g.first + g.second].tolist()) for g in result.only_a]
    assert set().union(*listed) == {0, 1, 2, 3, 4}
    assert {int(group[i]) for g in result.only_b for i in g.first + g.second} <= {4}  # B tells its samples apart
    assert "noise" in result.stopped_a
    assert all(g.alike > 4 and g.gap < 1e-6 for g in result.only_a)
    assert result.spec[0].value > 0 > result.spec[-1].value
    back = compare_embeddings(*sets[::-1], SECOND, FIRST, eps=1.5)
    assert [g.first for g in back.only_b] == [g.first for g in result.only_a]
    files = write_page(result, tmp_path / "page.html")
    page, record = files[0].read_text(), json.loads(files[1].read_text())
    assert "Only first" in page
    assert "Only second" in page
    assert record["only_a"][0]["images"]
    assert record["b"]["name"] == "second"
    assert result.summary()[0] == "A: first. B: second."


def test_pairs_of_image_and_prompt_name_the_modality_that_is_responsible(tmp_path):
    points, noise = torch.eye(8), [0.02 * rows(121, 8, s) for s in range(2)]
    kinds = {"image": (0, 1, 2, 2), "merged image": (0, 0, 2, 2), "text": (0, 0, 1, 2), "merged text": (0, 0, 1, 1)}
    of = {name: torch.tensor(k).repeat_interleave(30) for name, k in kinds.items()}
    last = torch.tensor([5])  # an image without a caption
    a, b = (image_set(points[torch.cat([of[k], last])] + n, tmp_path) for k, n in zip(list(of)[:2], noise, strict=True))
    a.prompts = b.prompts = [str(int(k)) for k in of["text"]] + [None]
    fine = TextEmbedder(lambda texts: points[[int(t) for t in texts]], "fine", "fine")
    coarse = TextEmbedder(lambda texts: points[[min(int(t), 1) for t in texts]], "coarse", "coarse")
    result = compare_embeddings(a, b, FIRST, SECOND, eps=1.5, text_embedders=(fine, coarse))
    assert result.joint.compared == 120
    named = {g.modality: {i // 30 for i in g.first + g.second} for g in result.joint.only_a}
    assert named == {"image": {0, 1}, "text": {2, 3}}
    assert result.joint.only_b == []
    assert {g.modality for g in result.only_a} == {""}
    assert sorted(m.modality for m in result.joint.spec[:2]) == ["image", "text"]
    assert result.joint.distance == pytest.approx(max(abs(m.value) for m in result.joint.spec))
    assert "With prompts, A groups 120 images in 2 ways that B does not see, and B in no way" in result.summary()[-1]
    files = write_page(result, tmp_path / "page.html")
    assert "seen in the prompts" in files[0].read_text()
    assert {g["modality"] for g in json.loads(files[1].read_text())["joint"]["only_a"]} == {"image", "text"}
    a.prompts = ["one"] * 121
    assert compare_embeddings(a, b, FIRST, SECOND, eps=1.5).joint is None


def test_an_embedder_beside_itself_differs_by_nothing(tmp_path):
    a = planted((10,) * 6)[0]
    result = compare_embeddings(image_set(a, tmp_path), image_set(a, tmp_path), FIRST, FIRST)
    assert (result.only_a, result.only_b, result.spec, result.distance) == ([], [], [], 0)
    write_page(result, tmp_path / "page.html")


def test_other_images_are_refused(tmp_path):
    a = planted((10,) * 6)[0]
    other = image_set(a)
    other.digests = other.digests[::-1]
    with pytest.raises(ValueError, match="the same images"):
        compare_embeddings(image_set(a), other, FIRST, SECOND)
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        compare_embeddings(image_set(a[:3]), image_set(a[:3]), FIRST, SECOND)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    for i, image in enumerate(demo_images("noto", 16)):
        image.save(folder / f"{i}.png")
    return folder


def test_command_writes_a_page_and_json(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("embeddings", "efficientnet-lite0", "demo", emoji)
    assert result.exit_code == 0, result.output
    assert "A: efficientnet-lite0. B: demo" in result.stdout
    assert (tmp_path / "embeddings.html").is_file()
    result = call("embeddings", "demo", "demo", emoji, "--json", "--quiet")
    record = json.loads(result.stdout)
    assert (record["distance"], record["only_a"], record["files"]) == (0, [], [])
    assert record["joint"] is None
    lines = "".join(f'{{"file_name": "{i}.png", "text": "prompt {i % 4}"}}\n' for i in range(16))
    (emoji / "metadata.jsonl").write_text(lines)
    result = call("embeddings", "efficientnet-lite0", "demo", emoji, "--json", "--quiet")
    (emoji / "metadata.jsonl").unlink()
    assert json.loads(result.stdout)["joint"]["compared"] == 16
    unknown = call("embeddings", "nothing", "demo", emoji)
    assert unknown.exit_code == 2
    assert "unknown" in unknown.stderr


def test_pages_do_not_scroll_sideways(emoji, tmp_path, browser):
    assert call("embeddings", "efficientnet-lite0", "demo", emoji, "--out", tmp_path / "page.html").exit_code == 0
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("document.images.length && [...document.images].every(i => i.complete && i.naturalWidth)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.close()


def test_a_product_of_embedders_reads_a_folder(emoji):
    from kspec_guidance.evaluation import load_images
    from kspec_guidance.evaluation.embedders import image_embedder

    both = image_embedder("efficientnet-lite0") * image_embedder("demo")
    found = load_images(emoji, both)
    assert found.features.shape == (16, 3000)
    assert torch.isfinite(found.features).all()
