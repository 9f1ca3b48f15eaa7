import json

import pytest

from kspec_guidance.synthesis import SynthesisError, read_prompts


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
    ("name", "text", "message"),
    [
        ("none.txt", None, "no prompts file"),
        ("empty.txt", "\n \n", "no prompts in"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ("p.csv", "name,words\na,b\n", "no column prompt, caption, text; its columns are name, words"),
        ("p.json", '{"prompt": "a"}', "holds a dict; expected a list"),
        ("p.csv", "prompt,images\na,many\n", "prompt 1 has 'many' images; expected an integer"),
        ("p.jsonl", '{"prompt": "a", "images": -1}\n', "prompt 1 has -1 images; expected 0 or more"),
        ("p.docx", "x", "unknown suffix; expected one of .txt"),
        ("p.parquet", "x", "not a Parquet file"),
    ],
)
def test_unreadable_prompts_are_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SynthesisError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(SynthesisError, match="row with a column of prompts"):
        read_prompts([3])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SynthesisError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
