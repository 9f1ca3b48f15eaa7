import json
from importlib.util import find_spec

import pytest

from kspec_guidance import load_demo_pipeline
from kspec_guidance.bench.prompts import SOURCES, read_bench_prompts
from kspec_guidance.demo.pipeline import unknown_words
from kspec_guidance.synthesis.errors import SynthesisError

COCO = {
    "images": [{"id": 9}, {"id": 4}, {"id": 5}],
    "annotations": [
        {"id": 30, "image_id": 4, "caption": "later"}, {"id": 20, "image_id": 4, "caption": " A dog. "},
        {"id": 25, "image_id": 9, "caption": "A cat."},
    ],
}  # fmt: skip
GENEVAL = [{"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}]
DPG = 'item_id,text,keywords,proposition_id\na1,"A long, long text",,1\na1,"A long, long text",,2\nb2,Another,,1\n'
FILES = {  # a file of each source in its published form, and the prompts that it has
    "coco": ("captions_val2017.json", json.dumps(COCO), ["A cat.", "A dog."]),
    "coco2014": ("annotations/captions_val2014.json", json.dumps(COCO), ["A cat.", "A dog."]),
    "geneval": ("evaluation_metadata.jsonl", "\n".join(map(json.dumps, GENEVAL)), ["a photo of a dog"]),
    "drawbench": ("DrawBench.csv", "Prompts,Category\nA red car.,Colors\n", ["A red car."]),
    "parti": (
        "PartiPrompts.tsv",
        'Prompt\tCategory\tChallenge\tNote\n"OOPS" on a wall\tArts\tBasic\t\n"a ""sign"" here"\tArts\tBasic\t\n',
        ['"OOPS" on a wall', 'a "sign" here'],
    ),
    "dpg": ("dpg_bench/dpg_bench.csv", DPG, ["A long, long text", "Another"]),
    "imagenet": (
        "imagenet_class_index.json",
        json.dumps({"0": ["n01440764", "tench"], "1": ["n01484850", "great_white_shark"]}),
        ["A photo of tench", "A photo of great white shark"],
    ),
    "concepts": (
        "t2i_diversity.csv",
        "concept,attribute\napple,color\nhouse,style\napple,color\n",
        ["An image of an apple", "An image of a house"],
    ),
}  # fmt: skip


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.filterwarnings("ignore:.*is not the file of", "ignore:.*was not at hand")
@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read_from_their_folder_and_by_their_path(name, tmp_path):
    file, text, expected = FILES[name]
    path = write(tmp_path, file, text)
    for where in (tmp_path, path):
        assert [p.text for p in read_bench_prompts(name, where)] == expected
    assert [p.text for p in read_bench_prompts(f"{name}:1", tmp_path)] == expected[:1]


def test_every_source_has_a_test_or_one_of_its_own():
    assert set(SOURCES) - set(FILES) == {"dimcim"}


def test_dimcim_takes_the_concepts_in_turn_with_their_attributes(tmp_path):
    root = tmp_path / "COCO-DIMCIM"
    for concept in ("bus", "cat"):
        prompts = [{"coarse_prompt": f"A {concept} {k}", "dense_prompts": []} for k in range(2)]
        found = {"concept": concept, "coarse_dense_prompts": prompts}
        write(root, f"dense_prompts/{concept}_dense_prompts.json", json.dumps(found))
    write(
        root, "seed_captions_attributes/cat_seed_captions_attributes.json", json.dumps({"attributes": {"colour": ["red"]}})
    )
    for where in (tmp_path, root):
        found = read_bench_prompts("dimcim", where)
        assert [p.text for p in found] == ["A bus 0", "A cat 0", "A bus 1", "A cat 1"]
        assert found[1].truth == {"concept": "cat", "attributes": {"colour": ["red"]}}


def test_what_a_source_states_of_a_prompt_is_kept(tmp_path):
    write(tmp_path, *FILES["concepts"][:2])
    write(tmp_path, *FILES["geneval"][:2])
    with pytest.warns(UserWarning, match="was not at hand"):
        assert read_bench_prompts("concepts", tmp_path)[0].truth == {"concept": "apple", "attributes": {"color": []}}
    with pytest.warns(UserWarning, match="not the file of GenEval"):
        assert read_bench_prompts("geneval", tmp_path)[0].truth["tag"] == "two_object"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("imagenet_full.json", json.dumps({"0": {"class": "n1", "label": "great_grey_owl", "prompt": "x"}})),
        ("imagenet_classes.txt", "great grey owl\n"),
        ("LOC_synset_mapping.txt", "n01622779 great grey owl, great gray owl\n"),
    ],
)
def test_classes_of_imagenet_are_read_from_several_lists(file, text, tmp_path):
    write(tmp_path, file, text)
    assert [p.text for p in read_bench_prompts("imagenet", tmp_path)] == ["A photo of great grey owl"]


def test_dpg_is_read_from_its_text_files(tmp_path):
    for k in (10, 2):
        write(tmp_path, f"dpg_bench/prompts/{k}.txt", f"prompt {k}\n")
    for where in (tmp_path, tmp_path / "dpg_bench" / "prompts"):
        assert [p.text for p in read_bench_prompts("dpg", where)] == ["prompt 2", "prompt 10"]


@pytest.mark.skipif(find_spec("datasets") is None, reason="needs datasets")
def test_the_same_columns_are_read_from_parquet_as_data_sets_have_it(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"Prompt": ["a fox"], "Category": ["Animals"]}).to_parquet(tmp_path / "parti.parquet")
    found = read_bench_prompts("parti", tmp_path / "parti.parquet")
    assert (found[0].text, found[0].truth) == ("a fox", {"category": "Animals"})
    assert read_bench_prompts(str(tmp_path / "parti.parquet"))[0].text == "a fox"


def test_bundled_prompts_are_60_with_open_attributes_and_the_embedded_model_knows_the_first_24():
    prompts = read_bench_prompts("bundled")
    assert len({p.text for p in prompts}) == 60
    assert all(values for p in prompts for values in p.truth["attributes"].values())
    pipe = load_demo_pipeline()
    assert not [p.text for p in prompts[:24] if unknown_words(pipe, p.text)]
    assert read_bench_prompts("bundled:6") == prompts[:6]


@pytest.mark.filterwarnings("ignore:.*is not the file of", "ignore:.*was not at hand")
@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        ("coco:10", None, "no captions_val2017.json .* get it from annotations_trainval2017.zip .* --prompts-from"),
        ("coc", None, "no prompts named 'coc'.*did you mean 'coco'"),
        ("bundled:61", None, "has 60 prompts, fewer than the 61"),
        ("bundled:0", None, "at least 1"),
        ("coco", "empty.json", "has no images and annotations|is not as COCO"),
        ("coco", "broken.json", "not JSON"),
        ("concepts", "columns.csv", "no columns concept and attribute; it has a, b"),
        ("parti", "empty.tsv", "not as PartiPrompts is published"),
        ("parti", "nobody/nothing", "the prompts of PartiPrompts are not bundled"),
    ],
)
def test_missing_and_damaged_prompts_are_told(name, where, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, text in {"empty.json": "{}", "broken.json": "{", "columns.csv": "a,b\n1,2\n", "empty.tsv": ""}.items():
        write(tmp_path, file, text)
    with pytest.raises(SynthesisError, match=message):
        read_bench_prompts(name, where)
