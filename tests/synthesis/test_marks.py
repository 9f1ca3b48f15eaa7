import io
import shutil
import subprocess

import pytest
from PIL import Image

from kspec_guidance.synthesis import SynthesisError
from kspec_guidance.synthesis.marks import SOURCE_TYPE, encode_image
from tests.synthesis.small_runs import make, rows_of

ONE_STEP = {"num_inference_steps": 1}
ROW = {
    "prompt": 'a "heart" <b>&amp; \x00 ]]> \U0001f3a8 ' + "long " * 20_000,
    "model": "org/model",
    "revision": "0" * 40,
    "licence": "CC0-1.0",
    "versions": "kspec-guidance 1.0, torch 2",
}


def read_xmp(path):
    exiv2 = pytest.importorskip("exiv2")
    image = exiv2.ImageFactory.open(str(path))
    image.readMetadata()
    return {datum.key(): datum.toString() for datum in image.xmpData()}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_marks_are_read_by_exiv2_and_pixels_stay(format, tmp_path):
    image = Image.effect_noise((32, 32), 40).convert("RGB")
    path = tmp_path / "image"
    path.write_bytes(encode_image(image, format, ROW))
    found = read_xmp(path)
    assert found["Xmp.iptcExt.DigitalSourceType"] == SOURCE_TYPE
    assert found["Xmp.iptcExt.AISystemUsed"] == "org/model"
    assert found["Xmp.iptcExt.AISystemVersionUsed"] == "0" * 40
    assert found["Xmp.iptcExt.AIPromptInformation"].startswith('a "heart" <b>&amp;   ]]> \U0001f3a8 long')
    assert found["Xmp.xmp.CreatorTool"] == "kspec-guidance 1.0"
    assert found["Xmp.xmpRights.UsageTerms"].endswith("CC0-1.0")
    plain = encode_image(image, format)
    assert Image.open(path).tobytes() == Image.open(io.BytesIO(plain)).tobytes()
    assert encode_image(image, format, ROW) == path.read_bytes()


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="PNG, JPEG or WEBP, got 'GIF'"):
        encode_image(Image.new("RGB", (1, 1)), "GIF")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="no exiftool on this machine")
def test_exiftool_reads_the_mark_of_a_run(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"], 1, call=ONE_STEP)
    path = tmp_path / rows_of(tmp_path)[0]["file_name"]
    line = ["exiftool", "-s3", "-XMP-iptcExt:DigitalSourceType", str(path)]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() == SOURCE_TYPE
    assert (
        "error" not in subprocess.run(["exiftool", "-validate", str(path)], capture_output=True, text=True).stdout.lower()
    )


def test_every_image_of_a_run_is_marked_unless_switched_off(tmp_path, pipe):
    make(tmp_path / "marked", pipe, ["heart"], 2, call=ONE_STEP, licence="MIT")
    make(tmp_path / "bare", pipe, ["heart"], 2, call=ONE_STEP, marks=False)
    for row, bare in zip(rows_of(tmp_path / "marked"), rows_of(tmp_path / "bare"), strict=True):
        found = read_xmp(tmp_path / "marked" / row["file_name"])
        assert (found["Xmp.iptcExt.DigitalSourceType"], row["marks"]) == (SOURCE_TYPE, "iptc")
        with Image.open(tmp_path / "marked" / row["file_name"]) as a, Image.open(tmp_path / "bare" / row["file_name"]) as b:
            assert a.text["Software"].startswith("kspec-guidance ")
            assert a.tobytes() == b.tobytes()
            assert not b.text
        assert bare["marks"] is None
    with pytest.raises(SynthesisError, match=r"marks .*: none before, now none"):
        make(tmp_path / "marked", pipe, ["heart"], 2, call=ONE_STEP, licence="MIT", marks=False)
