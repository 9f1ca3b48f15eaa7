"""Image sets from folders, tar shards and Parquet files; their evaluation, comparison, pages and commands."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import load_demo_pipeline, load_demo_reference
from kspec_guidance.cli import app
from kspec_guidance.evaluation.embedders import ImageEmbedder, one_hot_embedder
from kspec_guidance.evaluation.embedders.names import DEMO_NAME
from kspec_guidance.evaluation.image_sets import ImageSet, SourceError, load_images, read_captions, read_names
from kspec_guidance.evaluation.neighbours import near_duplicates
from kspec_guidance.evaluation.page import write_page
from kspec_guidance.evaluation.set_pairs import compare_sets
from kspec_guidance.evaluation.sets import evaluate_set, prompt_ranking
from kspec_guidance.utils.hashing import fingerprint

PIXELS = ImageEmbedder(lambda x: torch.nn.functional.avg_pool2d(x, 8).flatten(1), 64, "8 x 8 pixels", fit="squash")
SCRIPT_PROMPT = "<script>alert(1)</script>"


def demo_images(name, n):
    images = load_demo_reference(name)[:n] / 2 + 0.5
    return [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]


def encode_png(image):
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    (path / "sub").mkdir()
    rows = []
    for i, image in enumerate(demo_images("noto", 24)):
        name = f"sub/{i}.png" if i % 2 else f"{i}.png"
        image.save(path / name)
        rows.append({"file_name": name, "prompt": [SCRIPT_PROMPT, "b", "c"][i % 3]})
    demo_images("noto", 1)[0].save(path / "copy.png")
    rows.append({"file_name": "copy.png", "prompt": "c"})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "broken.jpg").write_bytes(b"not an image")
    (path / "empty.png").write_bytes(b"")
    (path / "notes.txt").write_text("not an image")
    return path


def test_load_images_from_folder_reports_unreadable_files(folder):
    image_set = load_images(folder, PIXELS)
    assert len(image_set) == 25
    assert image_set.features.shape == (25, 192)
    assert image_set.skipped == {
        "broken.jpg": "unreadable: an unknown or damaged format",
        "empty.png": "unreadable: an empty file",
        "notes.txt": "not an image",
    }
    assert image_set.prompts[image_set.names.index("copy.png")] == "c"
    assert image_set.prompts[image_set.names.index("sub/1.png")] == "b"


def test_tar_and_parquet_sources_match(folder, tmp_path):
    import datasets

    images, prompts = demo_images("noto", 6), ["a", "b"] * 3
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            for extension, data in (("png", encode_png(image) if i else b"broken"), ("txt", prompt.encode())):
                info = tarfile.TarInfo(f"{i:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shard = load_images(tmp_path / "shard-000.tar", PIXELS)
    assert shard.prompts == prompts[1:]
    assert list(shard.skipped) == ["000.png"]
    columns = {"image": [{"bytes": encode_png(i), "path": None} for i in images], "caption": prompts}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    (tmp_path / "tables").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "tables" / "t.parquet")
    table = load_images(tmp_path / "tables", PIXELS)
    assert table.prompts == prompts
    torch.testing.assert_close(table.features[1:], shard.features)
    assert len(load_images(tmp_path, PIXELS)) == 5  # a folder with a shard
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match="both"):
        load_images(tmp_path, PIXELS)


def test_read_captions_from_csv_and_jsonl(tmp_path):
    demo_images("noto", 1)[0].save(tmp_path / "x.png")
    (tmp_path / "captions.csv").write_text('file_name,caption\nx.png,"a, b"\n')
    assert load_images(tmp_path, PIXELS).prompts == ["a, b"]
    (tmp_path / "bad.csv").write_text("name,caption\nx.png,a\n")
    with pytest.raises(SourceError, match="needs file_name"):
        read_captions(tmp_path / "bad.csv")
    (tmp_path / "bad.jsonl").write_text('{"file_name": "x.png", "prompt": "a"}\n{oops\n')
    with pytest.raises(SourceError, match="line 2 is not a JSON object"):
        load_images(tmp_path, PIXELS, prompts=tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: p, "contains no readable images"),
        (lambda p: ((p / "a.zip").write_bytes(b"") and None) or p / "a.zip", "is not a folder"),
    ],
)
def test_source_without_images_raises(make_source, message, tmp_path):
    with pytest.raises(SourceError, match=message):
        load_images(make_source(tmp_path), PIXELS)


def test_evaluate_set_reports_scores_duplicates_and_prompts(folder):
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


def test_near_duplicates_are_closest_pairs(g):
    x = torch.randn(60, 5, generator=g)
    duplicates = near_duplicates(x, pairs=5, at_least=-1.0)
    u = torch.nn.functional.normalize(x.double())
    expected = (u @ u.T).triu(1).flatten().topk(5).values
    assert [d.cosine for d in duplicates] == pytest.approx(expected.tolist())


def test_prompt_ranking_sorts_by_diversity(g):
    x = torch.cat([torch.randn(1, 8, generator=g).repeat(4, 1), torch.randn(4, 8, generator=g)])
    ranking = prompt_ranking(x, ["same"] * 4 + ["free"] * 4)
    assert [p.prompt for p in ranking] == ["same", "free"]
    assert ranking[0].different == pytest.approx(1)


@pytest.mark.slow
def test_large_sets_use_random_features(monkeypatch, folder):
    images = load_images(folder, PIXELS)
    exact = {s.score: s.value for s in evaluate_set(images, PIXELS).scores}
    monkeypatch.setattr("kspec_guidance.evaluation.scores.EXACT_ROWS", 20)
    streamed = {s.score: s for s in evaluate_set(images, PIXELS).scores}
    assert streamed["Vendi"].features == "random Fourier, 1024"
    for name in ("Vendi", "RKE", "Conditional-Vendi", "Conditional RKE"):
        assert streamed[name].value == pytest.approx(exact[name], rel=0.1)


def test_page_is_self_contained_and_escapes_prompts(folder, tmp_path):
    images = load_images(folder, PIXELS)
    write_page(evaluate_set(images, PIXELS), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert SCRIPT_PROMPT not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons", ""
    )
    assert page.count("data:image/jpeg;base64,") > 20
    assert page.count("<svg") == 3
    assert json.loads((tmp_path / "r.json").read_text())["skipped"]["notes.txt"] == "not an image"


def test_compare_sets_of_two_styles(tmp_path):
    for name in ("noto", "twemoji"):
        (tmp_path / name).mkdir()
        for i, image in enumerate(demo_images(name, 30 if name == "noto" else 24)):
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


def test_evaluate_and_compare_commands(folder, tmp_path):
    run = CliRunner().invoke
    output = tmp_path / "page" / "r.html"
    cache = ["--cache", str(tmp_path / "cache")]
    result = run(app, ["evaluate", str(folder), "--reference", str(folder), "--out", str(output), *cache])
    assert result.exit_code == 0, result.output
    assert "Conditional-Vendi" in result.output
    assert "skipped 2 unreadable" in result.stderr
    assert output.is_file()
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


def test_jsonl_lines_split_on_newline_only(tmp_path):
    prompt = "one\u2028two\x0bthree"
    (tmp_path / "a.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": prompt}, ensure_ascii=False) + "\n")
    assert read_captions(tmp_path / "a.jsonl") == {"a.png": prompt}


COLOURS = ["red", "lime", "blue", "yellow", "cyan"]


def coloured(path, counts, size=64):
    """A folder of one-coloured images whose files all differ; a captions file has the colour as prompt, and a seed."""
    path.mkdir()
    rows = []
    for colour, count in zip(COLOURS, counts, strict=False):
        for k in range(count):
            Image.new("RGB", (size, size + k), colour).save(path / f"{colour}-{k}.png")
            rows.append({"file_name": f"{colour}-{k}.png", "prompt": colour, "seed": k})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_images(path, PIXELS)


def test_headline_counts_kinds_and_modes_share_the_set(tmp_path):
    result = evaluate_set(coloured(tmp_path / "set", [12, 6, 1, 1]), PIXELS)
    assert result.headline.images == 20
    assert result.headline.different == pytest.approx(400 / (144 + 36 + 2))
    assert result.headline.low < result.headline.different < result.headline.high
    record = result.as_dict()
    assert [len(m["images"]) for m in record["modes"]] == [12, 6, 1, 1]
    assert sum(m["share"] for m in record["modes"]) == pytest.approx(1)
    assert list(record)[:3] == ["embedder", "verdict", "headline"]
    assert record["headline"] == {"images": 20, "different": pytest.approx(2.198, abs=1e-3), "low": result.headline.low,
                                  "high": result.headline.high}  # fmt: skip
    assert record["verdict"].startswith("The 20 images are as varied as 2.2 different ones")
    assert len(record["redundant"]) == 16
    assert result.prompts[0].different == pytest.approx(1)
    assert "was not measured with 8 x 8 pixels" in " ".join(result.warnings)
    assert result.summary()[0] == "Image features: 8 x 8 pixels."
    assert not any(s.interval and s.interval[0] == s.interval[1] for s in result.scores)


def test_one_image_and_small_sets_get_no_interval(tmp_path):
    result = evaluate_set(coloured(tmp_path / "one", [1]), PIXELS)
    assert (result.headline.different, result.headline.low) == (1, None)
    few = evaluate_set(coloured(tmp_path / "few", [2, 2]), PIXELS)
    assert few.headline.low is None
    assert "There are only 4 images" in few.warnings[0]


def test_near_duplicates_are_listed_for_drop(tmp_path):
    images = coloured(tmp_path / "set", [4, 3, 1])
    files = write_page(evaluate_set(images, PIXELS), tmp_path / "r.html")
    assert [f.name for f in files] == ["r.html", "r.json", "r-duplicates.txt"]
    names = read_names(files[2])
    assert len(names) == 5
    rest = load_images(tmp_path / "set", PIXELS, drop=names)
    assert len(rest) == 3
    assert set(rest.skipped) == names
    assert rest.unmatched == {}
    assert [f.name for f in write_page(evaluate_set(rest, PIXELS), tmp_path / "rest.html")] == ["rest.html", "rest.json"]
    assert (
        "1 of 1 names to drop are not in the set: nothing.png"
        in load_images(tmp_path / "set", PIXELS, drop=["nothing.png"]).summary()
    )
    with pytest.raises(SourceError, match="cannot be read as a list of names"):
        read_names(tmp_path / "no.txt")


def test_comparison_names_kinds_that_one_set_has_more_of(tmp_path):
    a, b = coloured(tmp_path / "a", [9, 5, 0, 2]), coloured(tmp_path / "b", [2, 5, 9])
    result = compare_sets(a, b, PIXELS)
    kinds = [{a.names[i].split("-")[0] for i in k.samples} for k in result.only_in_a]
    assert kinds == [{"red"}, {"yellow"}]
    assert [(len(k.samples), len(k.samples_other)) for k in result.only_in_a] == [(9, 2), (2, 0)]
    assert [k.p_value < 0.05 for k in result.only_in_a] == [True, False]
    assert {b.names[i].split("-")[0] for i in result.only_in_b[0].samples} == {"blue"}
    assert result.only_in_b[0].share == pytest.approx(9 / 16)
    assert len(result.only_in_b) == 1
    assert result.prompts == {"lime": pytest.approx((1, 1)), "red": pytest.approx((1, 1))}
    warned = " ".join(result.warnings)
    assert "7 image files are in both sets" in warned
    assert "7 images of the two sets have the same prompt and seed" in warned
    assert result.verdict.startswith("No sure difference")


def test_comparison_of_six_shared_prompts_is_per_prompt(tmp_path, g):
    sets = []
    for name, spread in (("a", 0.02), ("b", 1.0)):
        centres = 3 * torch.randn(8, 1, 16, generator=g)
        rows = (centres + spread * torch.randn(8, 5, 16, generator=g)).flatten(0, 1)
        prompts = [f"p{k // 5}" for k in range(40)]
        names = [f"{k}.png" for k in range(40)]
        sets.append(ImageSet(tmp_path / name, names, prompts, [b""] * 40, rows, [f"{name}{k}" for k in range(40)]))
    result = compare_sets(*sets, PIXELS)
    assert result.main_test == "RKE per prompt"
    assert result.tests["RKE per prompt"].n == (8, 8)
    assert result.verdict.startswith("b is more varied than a:")
    assert "per prompt, over 8 prompts" in result.verdict
    assert result.as_dict()["headline"]["a"]["images"] == 40
    assert result.scalars()["RKE per prompt/p_value"] < 0.05


def test_demo_features_of_other_images_are_doubted(tmp_path):
    demo = ImageEmbedder(PIXELS.network, 64, DEMO_NAME, measured=True)
    images = coloured(tmp_path / "set", [20])
    assert evaluate_set(images, demo).warnings == [
        "Nothing says that the embedded model made these images, and demo tells other images apart badly."
    ]
    state = tmp_path / "set" / ".kspec" / "epoch-000"
    state.mkdir(parents=True)
    denoiser = fingerprint(load_demo_pipeline().unet)
    (state / "settings.json").write_text(json.dumps({"pipeline": {"denoiser": denoiser}}))
    assert evaluate_set(images, demo).warnings == []
