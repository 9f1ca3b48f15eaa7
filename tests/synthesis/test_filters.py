import pytest
import torch
from PIL import Image

from kspec_guidance.synthesis import SynthesisError
from kspec_guidance.synthesis.filters import Screen, load_filter
from tests.synthesis.small_runs import make, rows_of


def test_dropped_images_are_made_again_and_counted(tmp_path, pipe):
    calls = []

    def drop_half(image, row):
        calls.append(row["file_name"])
        assert image.size == (64, 64)
        return "odd one" if len(calls) % 2 else True

    result = make(tmp_path, pipe, ["heart"], images_per_prompt=4, batch_size=4, filter=drop_half, report=True)
    assert result.images == 4
    assert result.rejected == {"odd one": 4}
    assert [r["attempt"] for r in rows_of(tmp_path)] == [1, 3, 5, 7]
    assert "dropped: odd one 4" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_near_duplicates_and_blank_images_are_dropped(tmp_path, pipe):
    result = make(tmp_path / "a", pipe, ["heart"], images_per_prompt=6, batch_size=3, duplicates=0.2)
    assert result.rejected["near duplicate"] > 0
    rows = rows_of(tmp_path / "a")
    assert all(r["nearest"] is None or r["nearest"] < 0.2 for r in rows)
    result = make(tmp_path / "b", pipe, ["heart"], images_per_prompt=4, batch_size=2, duplicates=1.0)
    assert result.rejected == {}
    white, noise = Image.new("RGB", (8, 8), "white"), Image.effect_noise((8, 8), 50)
    assert Screen(None, None).reasons([white, noise], [{}, {}], torch.randn(2, 3)) == ["blank", None]


def test_copies_are_near_duplicates_at_every_limit():
    noise = Image.effect_noise((8, 8), 50)
    for k in range(20):
        screen, features = Screen(1.0), torch.randn(1, 33, generator=torch.Generator().manual_seed(k))
        assert screen.reasons([noise] * 2, [{}] * 2, features.expand(2, -1)) == [None, "near duplicate"]
        screen.add(features)
        assert screen.reasons([noise], [{}], 3 * features) == ["near duplicate"]


def test_a_prompt_whose_images_are_all_dropped_is_given_up(tmp_path, pipe):
    result = make(tmp_path, pipe, ["heart", "man"], 2, 2, filter=lambda image, row: row["prompt"] == "man")
    assert result.stopped == {"all images made": 1, "too many rejected": 1}
    assert result.images == 2
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path / "none", pipe, images_per_prompt=1, filter=lambda image, row: None)


def test_filters_are_imported_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_filter_of_a_test.py").write_text("def keep(image, row):\n    return row['attempt'] > 0\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_filter("my_filter_of_a_test:keep")(None, {"attempt": 1})
    for name, message in (
        ("my_filter_of_a_test:number", "not a function"),
        ("x", "module:function"),
        ("os:nothing", "import"),
    ):
        with pytest.raises(SynthesisError, match=message):
            load_filter(name)
