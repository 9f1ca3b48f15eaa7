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
        ("p.csv", "prompt,images\na,many\n", "line 2 has 'many' images; expected an integer"),
        ("p.jsonl", '{"prompt": "a", "images": -1}\n', "line 1 has -1 images; expected 0 or more"),
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


def missing_values():
    import numpy as np
    import pandas as pd

    return [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), pd.NA, pd.NaT]


@pytest.mark.parametrize("missing", missing_values(), ids=lambda value: type(value).__name__)
def test_missing_values_are_none_and_a_missing_prompt_is_refused(missing):
    rows = [{"prompt": "heart", "group": missing, "images": missing, "score": missing}, {"prompt": "runner", "score": 0.5}]
    first, second = read_prompts(rows)
    assert (first.group, first.images, first.extra) == (None, None, {"score": None})
    assert second.extra == {"score": 0.5}
    for prompts in ([{"prompt": missing}], [missing]):
        with pytest.raises(SynthesisError, match=r"prompt 1.*holds no text: the value is missing"):
            read_prompts(prompts)


@pytest.mark.parametrize("prompt", [["a", "b"], 3, 2.5, True, {"text": "a"}, b"heart"])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(SynthesisError, match=r"prompt 2.* is a (list|int|float|bool|dict|bytes), .*; expected text"):
        read_prompts([{"prompt": "heart"}, {"prompt": prompt}])


def test_rows_of_tables_with_the_types_of_numpy_and_pandas():
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    table = pd.DataFrame({"prompt": ["heart", "runner"], "group": [1.0, None], "images": [3.0, None], "id": [1, 2]})
    arrow = pa.Table.from_pandas(table)
    rows = [{"prompt": np.str_("heart"), "group": np.int64(1), "images": np.float32(3), "id": np.int8(1)}]
    rows += arrow.to_pylist()[1:]
    for source in (table, arrow, table.to_dict("records"), rows):
        found = read_prompts(source)
        assert [(p.text, p.group, p.images, p.extra) for p in found] == [
            ("heart", "1", 3, {"id": 1}),
            ("runner", None, None, {"id": 2}),
        ]
    assert type(read_prompts(rows)[0].extra["id"]) is int
    assert [p.text for p in read_prompts(table["prompt"])] == ["heart", "runner"]
    date = pd.Timestamp("2024-05-06")
    assert read_prompts([{"prompt": "heart", "made": date}])[0].extra == {"made": "2024-05-06T00:00:00"}


@pytest.mark.parametrize(
    ("images", "count"), [("3.0", 3), (3.0, 3), (" 3 ", 3), ("", None), (0, 0), ("2.5", None), ("inf", None), (True, None)]
)
def test_numbers_of_images(images, count):
    if count is None and images != "":
        with pytest.raises(SynthesisError, match=r"prompt 1 has .* images; expected an integer"):
            read_prompts([{"prompt": "heart", "images": images}])
    else:
        assert read_prompts([{"prompt": "heart", "images": images}])[0].images == count


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "prompt,group\nred, big heart,things\n", "line 2 has 3 fields, but the header has 2.*a comma.*in quotes"),
        ("p.csv", "prompt,group\nheart,a\n\nrunner\n", "line 4 has 1 fields, but the header has 2.*leave the fields"),
        ("p.csv", 'prompt,group\n"heart,a\nrunner,b\n', "line 3: unexpected end of data.*quotes in them doubled"),
        ("p.csv", 'prompt,group\n"red" heart,a\n', "line 2: .*quotes in them doubled"),
        ("p.tsv", "prompt\tgroup\nheart\ta\tb\n", "line 2 has 3 fields.*a tab"),
        ("p.csv", "prompt,id,id\nheart,1,2\n", "line 1 has several columns named id"),
        ("p.jsonl", '"a"\n{"prompt": "a", "prompt": "b"}\n', "line 2 has several columns named prompt"),
        ("p.csv", "prompt;group\nheart;a\n", "line 1 has one column, 'prompt;group'; separate columns by commas"),
        ("p.txt", "h\0e\0a\0r\0t\0", "line 1 holds null characters, as in text that is UTF-16"),
        ("p.csv", "prompt\nh\0e\0", "line 2 holds null characters"),
        ("p.csv", "", "no prompts in"),
        ("p.csv", "prompt,group\n", "no prompts in"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "not JSON.*named .jsonl"),
        ("p.json", "[]", "no prompts in"),
        ("p.jsonl", '{"prompt": "a", "score": Infinity}', "line 1: column 'score' holds inf; JSON has no infinite numbers"),
        ("p.jsonl", '{"prompt": "a\\ud800"}', "line 1: column 'prompt' holds text that is not valid Unicode"),
        ("p.jsonl", '{"prompt": "a", "id": 100000000000000000000}', "takes more than 64 bits; give it as text"),
    ],
)
def test_damaged_files_are_refused_with_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SynthesisError, match=message):
        read_prompts(tmp_path / name)


def test_tables_as_spreadsheets_write_them(tmp_path):
    (tmp_path / "p.csv").write_bytes('\ufeffprompt, group,\r\n"red, ""big""\r\nheart",people ,\r\n,,\r\n'.encode())
    (prompt,) = read_prompts(tmp_path / "p.csv")
    assert (prompt.text, prompt.group, prompt.extra) == ('red, "big"\r\nheart', "people", {})
    (tmp_path / "p.csv").write_text('prompt, group\n"red, big", "shapes, flat"\n')
    (prompt,) = read_prompts(tmp_path / "p.csv")
    assert (prompt.text, prompt.group) == ("red, big", "shapes, flat")


def test_a_column_has_one_type_in_all_rows():
    rows = [{"prompt": "heart", "id": 1}, {"prompt": "runner", "id": "b7"}]
    with pytest.raises(
        SynthesisError, match=r"column 'id' holds whole numbers and texts: 1 \(prompt 1\), 'b7' \(prompt 2\)"
    ):
        read_prompts(rows)
    with pytest.raises(SynthesisError, match="holds whole numbers and booleans"):
        read_prompts([{"prompt": "heart", "id": 1}, {"prompt": "runner", "id": True}])
    found = read_prompts([{"prompt": "heart", "id": 1}, {"prompt": "runner", "id": 2.5}, "man"])
    assert [repr(p.extra["id"]) for p in found] == ["1.0", "2.5", "None"]
    with pytest.raises(SynthesisError, match="mixes fractions with"):
        read_prompts([{"prompt": "heart", "id": 2**60}, {"prompt": "runner", "id": 2.5}])
    with pytest.warns(UserWarning, match=r"neither text nor numbers are not copied.*: tags \(list\)"):
        assert read_prompts([{"prompt": "heart", "tags": ["a"]}, {"prompt": "man", "tags": None}])[0].extra == {}
    with pytest.raises(SynthesisError, match=r"column 'tags' holds 'b' \(prompt 2\) and also a list"):
        read_prompts([{"prompt": "heart", "tags": ["a"]}, {"prompt": "man", "tags": "b"}])


def test_columns_that_the_metadata_uses_are_renamed_with_a_warning():
    row = {
        "caption": "heart",
        "prompt": "x",
        "seed": 5,
        "source_seed": 6,
        "attribute": "mine",
        "image": "a",
        "mask_file_name": "m",
    }
    with pytest.warns(UserWarning, match="have no effect on the run: .*seed is written as source_source_seed"):
        (prompt,) = read_prompts([row], column="caption")
    assert prompt.extra == {
        "source_prompt": "x", "source_source_seed": 5, "source_seed": 6, "source_attribute": "mine", "source_image": "a",
        "mask_file": "m",
    }  # fmt: skip


def test_prompts_that_are_listed_again_must_agree():
    rows = [{"prompt": "heart", "group": "a", "id": 1}, {"prompt": "heart", "group": "a", "id": 2}]
    with pytest.warns(UserWarning, match="1 prompts are listed again with other values.*prompt 2"):
        (prompt,) = read_prompts(rows)
    assert (prompt.times, prompt.extra) == (2, {"id": 1})
    with pytest.raises(SynthesisError, match=r"'heart' has group 'a' and also 'b' \(prompt 1 and prompt 2\)"):
        read_prompts([{"prompt": "heart", "group": "a"}, {"prompt": "heart", "group": "b"}])
    with pytest.raises(SynthesisError, match="with a number of images and also without"):
        read_prompts([{"prompt": "heart", "images": 3}, "heart"])
    with pytest.warns(UserWarning, match=r"1 prompts without text are left out \(the first is prompt 2\)"):
        assert len(read_prompts(["heart", " "])) == 1


def test_a_set_of_prompts_is_refused():
    with pytest.raises(SynthesisError, match="must have an order that is the same in each run, got a set"):
        read_prompts({"heart", "runner"})


@pytest.mark.parametrize("source", [{"prompt": ["heart"]}, b"heart", 3, None])
def test_sources_of_other_types_are_refused(source):
    with pytest.raises(SynthesisError, match="prompts must be a list, a file or a dataset, got"):
        read_prompts(source)
