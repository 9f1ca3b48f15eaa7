"""`evaluate` and `compare`: from folders, tar shards and Parquet to tables and pages."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import load_demo_reference
from kspec_guidance.cli import app
from kspec_guidance.evaluation.embedders import ImageEmbedder, one_hot_embedder
from kspec_guidance.evaluation.image_sets import SourceError, load_images, read_prompts
from kspec_guidance.evaluation.page import write_page
from kspec_guidance.evaluation.sets import compare_sets, evaluate_set, near_duplicates, prompt_ranking

PIXELS = ImageEmbedder(lambda x: torch.nn.functional.avg_pool2d(x, 8).flatten(1), 64, "8 x 8 pixels", fit="squash")
EVIL = "<script>alert(1)</script>"


def pictures(name, n):
    images = load_demo_reference(name)[:n] / 2 + 0.5
    return [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    (path / "sub").mkdir()
    rows = []
    for i, image in enumerate(pictures("noto", 24)):
        name = f"sub/{i}.png" if i % 2 else f"{i}.png"
        image.save(path / name)
        rows.append({"file_name": name, "prompt": [EVIL, "b", "c"][i % 3]})
    pictures("noto", 1)[0].save(path / "copy.png")
    rows.append({"file_name": "copy.png", "prompt": "c"})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "broken.jpg").write_bytes(b"no image")
    (path / "empty.png").write_bytes(b"")
    (path / "notes.txt").write_text("not an image")
    return path


def test_a_folder_is_read_with_its_prompts_and_broken_files_are_named(folder):
    found = load_images(folder, PIXELS)
    assert len(found) == 25
    assert found.features.shape == (25, 192)
    assert sorted(found.skipped) == ["broken.jpg", "empty.png"]
    assert found.prompts[found.names.index("copy.png")] == "c"
    assert found.prompts[found.names.index("sub/1.png")] == "b"


def test_shards_and_tables_hold_the_same_images(folder, tmp_path):
    import datasets

    images, prompts = pictures("noto", 6), ["a", "b"] * 3
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            for kind, data in (("png", png(image) if i else b"broken"), ("txt", prompt.encode())):
                info = tarfile.TarInfo(f"{i:03d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shard = load_images(tmp_path / "shard-000.tar", PIXELS)
    assert shard.prompts == prompts[1:]
    assert shard.skipped == ["000.png"]
    columns = {"image": [{"bytes": png(i), "path": None} for i in images], "caption": prompts}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "tables").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "tables" / "t.parquet")
    table = load_images(tmp_path / "tables", PIXELS)
    assert table.prompts == prompts
    torch.testing.assert_close(table.features[1:], shard.features)
    assert len(load_images(tmp_path, PIXELS)) == 5  # a folder of shards
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match="both"):
        load_images(tmp_path, PIXELS)


def test_prompts_from_a_csv(tmp_path):
    pictures("noto", 1)[0].save(tmp_path / "x.png")
    (tmp_path / "captions.csv").write_text('file_name,caption\nx.png,"a, b"\n')
    assert load_images(tmp_path, PIXELS).prompts == ["a, b"]
    (tmp_path / "bad.csv").write_text("name,caption\nx.png,a\n")
    with pytest.raises(SourceError, match="needs file_name"):
        read_prompts(tmp_path / "bad.csv")
    (tmp_path / "bad.jsonl").write_text('{"file_name": "x.png", "prompt": "a"}\n{oops\n')
    with pytest.raises(SourceError, match="line 2 is no JSON object"):
        load_images(tmp_path, PIXELS, prompts=tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p, "holds no readable image"),
        (lambda p: ((p / "a.zip").write_bytes(b"") and None) or p / "a.zip", "no folder, .tar shard or .parquet"),
    ],
)
def test_what_holds_no_images_is_an_error(make, words, tmp_path):
    with pytest.raises(SourceError, match=words):
        load_images(make(tmp_path), PIXELS)


def test_the_evaluation_knows_copies_prompts_and_scores(folder):
    images = load_images(folder, PIXELS)
    result = evaluate_set(images, PIXELS, one_hot_embedder())
    scores = {s.score: s for s in result.scores}
    assert {"Vendi", "RKE", "Conditional-Vendi", "Information-Vendi", "Scendi, images' own part"} <= set(scores)
    assert scores["Conditional-Vendi"].value * scores["Information-Vendi"].value == pytest.approx(scores["Vendi"].value)
    assert scores["Vendi"].interval[0] < scores["Vendi"].value < scores["Vendi"].interval[1]
    assert scores["Vendi"].fingerprint == PIXELS.fingerprint
    top = result.duplicates[0]
    assert {images.names[top.first], images.names[top.second]} == {"0.png", "copy.png"}
    assert top.cosine == pytest.approx(1)
    assert [p.share for p in result.prompts] == sorted(p.share for p in result.prompts)
    assert json.loads(json.dumps(result.as_dict(), default=list))["images"] == 25


def test_near_duplicates_are_the_nearest_of_all_pairs(g):
    x = torch.randn(60, 5, generator=g)
    found = near_duplicates(x, pairs=5, at_least=-1.0)
    u = torch.nn.functional.normalize(x.double())
    best = (u @ u.T).triu(1).flatten().topk(5).values
    assert [d.cosine for d in found] == pytest.approx(best.tolist())


def test_prompts_are_ranked_from_least_to_most_varied(g):
    x = torch.cat([torch.randn(1, 8, generator=g).repeat(4, 1), torch.randn(4, 8, generator=g)])
    ranking = prompt_ranking(x, ["same"] * 4 + ["free"] * 4)
    assert [p.prompt for p in ranking] == ["same", "free"]
    assert ranking[0].vendi == pytest.approx(1)


def test_many_images_go_by_random_features_and_agree(monkeypatch, folder):

    images = load_images(folder, PIXELS)
    exact = {s.score: s.value for s in evaluate_set(images, PIXELS).scores}
    monkeypatch.setattr("kspec_guidance.evaluation.sets.EXACT", 20)
    streamed = {s.score: s for s in evaluate_set(images, PIXELS).scores}
    assert streamed["Vendi"].features == "random Fourier, 1024"
    for name in ("Vendi", "RKE", "Conditional-Vendi", "Conditional RKE"):
        assert streamed[name].value == pytest.approx(exact[name], rel=0.1)


def test_pages_are_self_contained_and_escape_what_users_wrote(folder, tmp_path):
    images = load_images(folder, PIXELS)
    write_page(evaluate_set(images, PIXELS), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons", ""
    )
    assert page.count("data:image/jpeg;base64,") > 20
    assert page.count("<svg") == 3
    assert json.loads((tmp_path / "r.json").read_text())["skipped"] == ["broken.jpg", "empty.png"]


def test_comparing_styles_shows_what_each_has_more_of(tmp_path):
    for name in ("noto", "twemoji"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(name, 30 if name == "noto" else 24)):
            image.save(tmp_path / name / f"{i}.png")
    a, b = load_images(tmp_path / "noto", PIXELS), load_images(tmp_path / "twemoji", PIXELS)
    result = compare_sets(a, b, PIXELS)
    assert result.tests["Vendi"].n == (24, 24)
    assert result.only_in_a
    assert {"KID", "Precision", "Coverage"} <= {s.score for s in result.scores}
    write_page(result, tmp_path / "c.html")
    assert "noto beside twemoji" in (tmp_path / "c.html").read_text()
    same = compare_sets(a, a, PIXELS)
    assert same.tests["Vendi"].p_value == 1
    assert same.only_in_a == []


def test_the_commands(folder, tmp_path):
    run = CliRunner().invoke
    out = tmp_path / "page" / "r.html"
    cache = ["--cache", str(tmp_path / "cache")]
    result = run(app, ["evaluate", str(folder), "--reference", str(folder), "--out", str(out), *cache])
    assert result.exit_code == 0, result.output
    assert "Conditional-Vendi" in result.output
    assert "skipped 2 unreadable" in result.stderr
    assert out.is_file()
    again = run(app, ["evaluate", str(folder), "--json", *cache])
    assert json.loads(again.stdout)["images"] == 25
    both = run(app, ["compare", str(folder), str(folder), "--out", str(tmp_path / "c.html"), *cache])
    assert both.exit_code == 0, both.output
    for bad in (
        ["evaluate", "nowhere"],
        ["evaluate", str(folder), "--embedder", "nothing"],
        ["compare", str(folder), "no"],
    ):
        result = run(app, bad)
        assert result.exit_code == 2
        assert "error:" in result.stderr
        assert "Traceback" not in result.output


def test_a_line_of_metadata_ends_at_its_newline_only(tmp_path):
    from kspec_guidance.evaluation.image_sets import read_prompts

    prompt = "one\u2028two\x0bthree"
    (tmp_path / "a.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": prompt}, ensure_ascii=False) + "\n")
    assert read_prompts(tmp_path / "a.jsonl") == {"a.png": prompt}
