"""Prompts, goals, targets, quotas, filters, shards and the command line of synthesis."""

import json

import pytest
import torch
from PIL import Image
from synthesising import make, quiet_pipeline, rows_of

from kspec_guidance import load_demo_reference
from kspec_guidance.demo import encode_reference
from kspec_guidance.synthesis import (
    Attribute,
    Prompt,
    SynthesisError,
    Target,
    read_prompts,
)
from kspec_guidance.synthesis.jobs import goals, image_seed
from kspec_guidance.synthesis.quotas import Balance, allot, read_attribute
from kspec_guidance.synthesis.sharding import shard
from kspec_guidance.synthesis.store import Store


@pytest.fixture(scope="module")
def pipe():
    return quiet_pipeline()


# -- prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_from_every_kind_of_source(tmp_path):
    import datasets

    rows = [{"caption": "heart", "group": "a", "mood": "warm"}, {"caption": "runner", "group": "b", "images": 2}]
    (tmp_path / "p.txt").write_text("heart\n\nrunner\n")
    (tmp_path / "p.csv").write_text('caption,group,mood,images\nheart,a,warm,\n"runner",b,,2\n')
    (tmp_path / "p.tsv").write_text("caption\tgroup\tmood\timages\nheart\ta\twarm\t\nrunner\tb\t\t2\n")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    table = datasets.Dataset.from_list([{"images": None, "mood": None, **row} for row in rows])
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == ["heart", "runner"]
    for source in (
        *(tmp_path / f"p.{k}" for k in ("csv", "tsv", "jsonl", "json", "parquet")),
        tmp_path / "saved",
        table,
        rows,
    ):
        found = read_prompts(source)
        assert [(p.text, p.group, p.images) for p in found] == [("heart", "a", None), ("runner", "b", 2)], source
        assert found[0].extra["mood"] == "warm"
    assert [p.text for p in read_prompts(rows[:1], column="mood")] == ["warm"]
    again = read_prompts(["heart", "runner", "heart"])
    assert [(p.text, p.times) for p in again] == [("heart", 2), ("runner", 1)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.txt", None, "no prompts file"),
        ("empty.txt", "\n \n", "no prompts in"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ("p.csv", "name,words\na,b\n", "no column prompt, caption, text; its columns are name, words"),
        ("p.json", '{"prompt": "a"}', "holds a dict; expected a list"),
        ("p.csv", "prompt,images\na,many\n", "asks for 'many' images"),
        ("p.jsonl", '{"prompt": "a", "images": -1}\n', "asks for -1 images"),
        ("p.docx", "x", "of no known kind"),
        ("p.parquet", "x", "no Parquet file"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SynthesisError, match=words):
        read_prompts(tmp_path / name)
    with pytest.raises(SynthesisError, match="row with a column of prompts"):
        read_prompts([3])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SynthesisError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_goals_and_seeds():
    prompts = [Prompt("a", "x"), Prompt("b", "x"), Prompt("c", "y", images=7), Prompt("d", times=3)]
    assert goals(prompts, 4, {}) == [4, 4, 7, 12]
    assert goals(prompts, 4, {"x": 9}) == [5, 4, 7, 12]
    with pytest.raises(SynthesisError, match="no prompt has group z; groups are x, y"):
        goals(prompts, 4, {"z": 1})
    assert len({image_seed(s, p, k) for s in range(3) for p in "abc" for k in range(50)}) == 450


# -- targets, quotas, filters --------------------------------------------------------------------------------------------


def test_a_target_stops_a_prompt_early_and_says_why(tmp_path, pipe):
    result = make(tmp_path / "a", pipe, ["heart", "cat face"], images=40, batch=4, target="vendi>=3")
    assert result.stopped == {"target reached": 2}
    assert result.images < 40
    from kspec_guidance.synthesis.engine import back

    rows = [r for r in Store(tmp_path / "a").records(tensors=True) if r.rows[0]["prompt"] == "heart"]
    features = torch.cat([back(r.tensors)[2] for r in rows])
    target = Target.parse("vendi>=3")
    assert target.reached(features, 4) == "target reached"
    assert target.reached(features[:-4], 4) is None
    again = make(tmp_path / "a", pipe, ["heart", "cat face"], images=40, batch=4, target="vendi>=3")
    assert (again.made, again.stopped) == (0, {"target reached": 2})
    high = make(tmp_path / "b", pipe, ["heart"], images=12, batch=4, target="vendi>=12")
    assert sum(high.stopped.values()) == 1
    assert "target reached" not in high.stopped


def test_returns_that_diminish_stop_too(g):
    target = Target("vendi", 10.0, gain=0.05)
    few = torch.randn(3, 8, generator=g)
    x = few[torch.arange(40) % 3] + 1e-3 * torch.randn(40, 8, generator=g)
    assert target.reached(x, 8) == "more images add little"
    assert target.reached(torch.randn(40, 400, generator=g), 8) == "target reached"
    assert target.reached(x[:7], 4) is None


@pytest.mark.parametrize("text", ["vendi", "vendi>12", "fid>=3", "vendi>=0.5", "vendi>=1.2.3", "vendi>=", ""])
def test_targets_that_mean_nothing_are_refused(text):
    with pytest.raises(SynthesisError):
        Target.parse(text)


def test_quotas_by_group(tmp_path, pipe):
    prompts = [Prompt("heart", "a"), Prompt("red heart", "a"), Prompt("man", "b"), Prompt("runner")]
    result = make(tmp_path, pipe, prompts, images=2, quotas={"a": 5, "b": 3})
    assert result.images == 10
    counts = [sum(r["prompt"] == p.text for r in rows_of(tmp_path)) for p in prompts]
    assert counts == [3, 2, 3, 2]


def test_attributes_come_out_in_the_wanted_shares(tmp_path, pipe):
    call = {"num_inference_steps": 10, "guidance_scale": 5.0}
    dark, light = (encode_reference(pipe, load_demo_reference(f"{n}-skin-tone")) for n in ("dark", "light"))
    quotas = {"dark": Attribute(dark, 3.0), "light": Attribute(light, 1.0)}
    prompts = ["man", "farmer", "student", "health worker"]
    result = make(tmp_path / "a", pipe, prompts, images=8, batch=8, call=call, quotas=quotas)
    assert sum(result.attributes.values()) == 32
    assert 20 <= result.attributes["dark"] <= 28  # 24 wanted
    with pytest.raises(SynthesisError, match="two reference sets or more"):
        make(tmp_path / "b", pipe, quotas={"dark": Attribute(dark)})
    with pytest.raises(SynthesisError, match="encode the references"):
        make(tmp_path / "b", pipe, quotas={"x": Attribute(torch.ones(3, 5)), "y": Attribute(torch.zeros(3, 5))})
    with pytest.raises(SynthesisError, match="a number of images or an Attribute"):
        make(tmp_path / "b", pipe, quotas={"x": "many"})


def test_attributes_are_read_from_folders_and_by_name(tmp_path, pipe):
    images = load_demo_reference("dark-skin-tone")[:4]
    (tmp_path / "dark" / "more").mkdir(parents=True)
    for k, image in enumerate(images):
        pixels = ((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "dark" / ("more" if k % 2 else ".") / f"{k}.png")
    found = read_attribute(pipe, f"{tmp_path / 'dark'}:0.25")
    assert found.share == 0.25
    order = [0, 2, 1, 3]  # the folder first, then what is in it
    torch.testing.assert_close(found.reference, encode_reference(pipe, images)[order], rtol=1e-3, atol=0.05)
    named = read_attribute(pipe, "light-skin-tone")
    torch.testing.assert_close(named.reference, encode_reference(pipe, load_demo_reference("light-skin-tone")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("no image")
    for source, words in (("nothing", "no reference set named"), ("empty", "holds 0 images"), ("broken", "cannot read")):
        with pytest.raises(SynthesisError, match=words):
            read_attribute(pipe, str(tmp_path / source) if (tmp_path / source).exists() else source)


def test_the_balance_objective_is_the_gradient_of_its_value(g):
    references = [torch.randn(5, 6, generator=g).double() + 1, torch.randn(7, 6, generator=g).double() - 1]
    objective = Balance(references)
    objective.wanted = [0, 1, 1, 0]
    x = torch.randn(4, 6, generator=g).double().requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(x), x)
    torch.testing.assert_close(objective.gradient(x.detach()), expected)
    assert objective.assign(torch.cat(references)) == [0] * 5 + [1] * 7
    assert allot([10, 0], [1, 1], 4) == [1] * 4
    assert allot([0, 0, 0], [2, 1, 1], 8).count(0) == 4


def test_what_a_filter_drops_is_made_again_and_counted(tmp_path, pipe):
    seen = []

    def every_other(image, row):
        seen.append(row["file_name"])
        assert image.size == (64, 64)
        return "odd one" if len(seen) % 2 else True

    result = make(tmp_path, pipe, ["heart"], images=4, batch=4, filter=every_other, report=True)
    assert result.images == 4
    assert result.rejected == {"odd one": 4}
    assert [r["attempt"] for r in rows_of(tmp_path)] == [1, 3, 5, 7]
    assert "dropped: odd one 4" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_near_duplicates_and_blank_images_are_dropped(tmp_path, pipe):
    result = make(tmp_path / "a", pipe, ["heart"], images=6, batch=3, duplicates=0.2)
    assert result.rejected["near duplicate"] > 0
    rows = rows_of(tmp_path / "a")
    assert all(r["nearest"] is None or r["nearest"] < 0.2 for r in rows)
    again = make(tmp_path / "b", pipe, ["heart"], images=4, batch=2, duplicates=1.0)
    assert again.rejected == {}
    from kspec_guidance.synthesis.screening import Screen

    white, picture = Image.new("RGB", (8, 8), "white"), Image.effect_noise((8, 8), 50)
    assert Screen(None, None).reasons([white, picture], [{}, {}], torch.randn(2, 3)) == ["blank", None]


def test_a_prompt_whose_images_are_all_dropped_is_given_up(tmp_path, pipe):
    result = make(tmp_path, pipe, ["heart", "man"], images=2, batch=2, filter=lambda image, row: row["prompt"] == "man")
    assert result.stopped == {"all images made": 1, "too many rejected": 1}
    assert result.images == 2
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path / "none", pipe, images=1, filter=lambda image, row: None)


# -- sharding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shards_are_even_and_keep_similar_prompts_together(g, parts):
    centres = 10 * torch.randn(parts, 16, generator=g)
    which = torch.arange(parts * 20) % parts
    owner = torch.tensor(shard(centres[which] + 0.1 * torch.randn(parts * 20, 16, generator=g), [3] * (parts * 20), parts))
    assert torch.bincount(owner, minlength=parts).tolist() == [20] * parts
    for k in range(parts):
        assert len(set(owner[which == k].tolist())) == 1
    sizes = torch.randint(1, 30, (200,), generator=g).tolist()
    owner = torch.tensor(shard(torch.randn(200, 8, generator=g), sizes, parts))
    loads = torch.zeros(parts).index_add_(0, owner, torch.tensor(sizes).float())
    assert loads.max() / loads.min() < 1.4
    assert set(shard(torch.zeros(10, 2), [1] * 10, parts)) == set(range(min(parts, 10)))


def test_command_line(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    (tmp_path / "p.jsonl").write_text('{"prompt": "heart", "group": "a"}\n{"prompt": "man", "group": "b"}\n')
    call = lambda *more: CliRunner().invoke(  # noqa: E731
        app, ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "set"), "--steps", "3", *more]
    )
    said = call("--images", "4", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "8 images of 2 prompts" in said.output
    assert not (tmp_path / "set").exists()
    said = call("--images", "4", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert said.exit_code == 0, said.output
    assert len(rows_of(tmp_path / "set")) == 6
    said = call("--images", "5", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert said.exit_code == 2
    assert "images: 4 before, now 5" in said.stderr
    said = call("--images", "5", "--quota", "b=2", "--no-report", "--force")
    assert said.exit_code == 0
    assert len(rows_of(tmp_path / "set")) == 7
    tones = [part for tone in ("dark", "light") for part in ("--attribute", f"{tone}={tone}-skin-tone:0.5")]
    said = call("--images", "6", "--quota", "b=2", "--no-report", "--force", *tones)
    assert said.exit_code == 0, said.output
    assert rows_of(tmp_path / "set")[-3]["attribute"] in ("dark", "light")
    for more, words in (
        (("--quota", "b"), "name=value"), (("--target", "x"), "cannot read the target"),
        (("--filter", "nothing:here"), "import"), (("--device", "nowhere"), "cannot use device"),
        (("--dtype", "int8"), "dtype must be one of"), (("heart",), "not both"),
    ):  # fmt: skip
        said = call(*more)
        assert said.exit_code == 2, words
        assert words in said.stderr


def test_filters_are_found_by_name(tmp_path, monkeypatch):
    from kspec_guidance.synthesis.screening import load_filter

    (tmp_path / "my_filter_of_a_test.py").write_text("def keep(image, row):\n    return row['attempt'] > 0\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_filter("my_filter_of_a_test:keep")(None, {"attempt": 1})
    for name, words in (
        ("my_filter_of_a_test:number", "not a function"),
        ("x", "module:function"),
        ("os:nothing", "import"),
    ):
        with pytest.raises(SynthesisError, match=words):
            load_filter(name)
