import importlib.util
import io
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance.cli import app
from kspec_guidance.synthesis import SynthesisError, reproduce, synthesize
from kspec_guidance.synthesis.marks import SOURCE_TYPE
from kspec_guidance.synthesis.signing import Signer, _self_signed
from tests.synthesis.small_runs import make, rows_of

c2pa = pytest.importorskip("c2pa")
ONE_STEP = {"num_inference_steps": 1}


def read_manifest(data):
    with c2pa.Reader("image/png", io.BytesIO(data)) as reader:
        found = json.loads(reader.json())
        return (
            reader.get_validation_state(),
            found["manifests"][found["active_manifest"]],
            found.get("validation_status", []),
        )


def test_images_are_signed_with_a_certificate_that_says_it_is_self_signed(tmp_path, pipe):
    make(tmp_path / "signed", pipe, ["heart"], 2, call=ONE_STEP, sign="self-signed")
    make(tmp_path / "plain", pipe, ["heart"], 2, call=ONE_STEP)
    for row in rows_of(tmp_path / "signed"):
        data = (tmp_path / "signed" / row["file_name"]).read_bytes()
        state, manifest, doubts = read_manifest(data)
        assert state == "Valid"
        assert [d["code"] for d in doubts] == ["signingCredential.untrusted"]
        assert "self-signed, identity not verified" in manifest["signature_info"]["issuer"]
        (action,) = manifest["assertions"][0]["data"]["actions"]
        assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", SOURCE_TYPE)
        assert row["marks"] == "iptc, c2pa"
        with Image.open(io.BytesIO(data)) as image, Image.open(tmp_path / "plain" / row["file_name"]) as plain:
            assert image.tobytes() == plain.tobytes()
            assert "XML:com.adobe.xmp" in image.text
        assert read_manifest(data[:-20] + bytes(8) + data[-12:])[0] == "Invalid"
    assert "a signed C2PA manifest (self-signed, identity not verified)" in (tmp_path / "signed" / "README.md").read_text()
    for sign, marks in (("auto", "iptc, c2pa"), (None, "iptc")):
        again = reproduce(tmp_path / "signed" / "reproduce.yaml", tmp_path / str(sign), pipe, report=False, sign=sign)
        assert again.reproduced == {"same bytes": 0, "same pixels": 2, "different": 0}
        assert {row["marks"] for row in rows_of(tmp_path / str(sign))} == {marks}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()]


def test_images_are_signed_by_default_where_the_packages_are_installed(tmp_path, pipe, monkeypatch):
    settings = {"call": ONE_STEP, "images_per_prompt": 2, "report": False}
    synthesize(["heart"], tmp_path / "set", pipe, **settings)
    for row in rows_of(tmp_path / "set"):
        assert read_manifest((tmp_path / "set" / row["file_name"]).read_bytes())[0] == "Valid"
    synthesize(["heart"], tmp_path / "bare", pipe, marks=False, **settings)
    assert {row["marks"] for row in rows_of(tmp_path / "bare")} == {None}
    assert reproduce(tmp_path / "bare" / "reproduce.yaml", tmp_path / "again", pipe, report=False).reproduced == {
        "same bytes": 2, "same pixels": 0, "different": 0
    }  # fmt: skip
    found = importlib.util.find_spec
    monkeypatch.setattr("kspec_guidance.synthesis.signing.find_spec", lambda name: None if name == "c2pa" else found(name))
    synthesize(["heart"], tmp_path / "without", pipe, **settings)
    assert {row["marks"] for row in rows_of(tmp_path / "without")} == {"iptc"}
    with pytest.raises(SynthesisError, match=r"marks .*--no-sign.*: iptc, c2pa: self-signed before, now none"):
        synthesize(["heart"], tmp_path / "set", pipe, **settings)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(SynthesisError, match=r"needs: pip install 'kspec-guidance\[publish\]' .*--no-sign"):
        synthesize(["heart"], tmp_path / "other", pipe, sign="self-signed", **settings)


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_shards_of_signed_images_are_compared_by_pixels(tmp_path, pipe, format):
    pytest.importorskip("webdataset")
    pytest.importorskip("datasets")
    make(tmp_path / "set", pipe, ["heart"], 3, call=ONE_STEP, format=format, shard_size=2, sign="self-signed")
    again = reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", pipe, report=False)
    assert again.reproduced == {"same bytes": 0, "same pixels": 2, "different": 0}


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="no exiftool on this machine")
def test_exiftool_reads_the_manifest(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"], 1, call=ONE_STEP, sign="self-signed")
    path = tmp_path / rows_of(tmp_path)[0]["file_name"]
    line = ["exiftool", "-j", "-G1", "-a", "-validate", "-warning", str(path)]
    (found,) = json.loads(subprocess.run(line[:4] + line[-1:], capture_output=True, text=True, check=True).stdout)
    assert found["CBOR:ActionsDigitalSourceType"] == found["XMP-iptcExt:DigitalSourceType"] == SOURCE_TYPE
    assert "error" not in subprocess.run(line, capture_output=True, text=True).stdout.lower()


def test_the_command_line_says_that_a_signature_is_missing(tmp_path, monkeypatch):
    words = ["generate", "heart", "--out", str(tmp_path / "set"), "--steps", "1", "--images", "1", "--no-report"]
    monkeypatch.setattr("kspec_guidance.synthesis.signing.find_spec", lambda name: None)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "without a C2PA signature: c2pa-python is not installed" in " ".join(done.stderr.split())
    for more in (["--no-sign"], ["--no-marks", "--force"]):
        assert "C2PA" not in CliRunner().invoke(app, [*words, *more]).stderr
    done = CliRunner().invoke(app, [*words, "--sign", "self-signed", "--no-sign"])
    assert done.exit_code == 2
    assert "give one of them" in done.stderr


def test_images_are_signed_with_the_users_certificate(tmp_path, pipe):
    (tmp_path / "mine.pem").write_bytes(_self_signed())
    settings = {"call": ONE_STEP, "sign": tmp_path / "mine.pem"}
    make(tmp_path / "set", pipe, ["heart"], 1, **settings)
    assert make(tmp_path / "set", pipe, ["heart"], 1, **settings).made == 0
    (tmp_path / "mine.pem").write_bytes(_self_signed())
    with pytest.raises(SynthesisError, match=r"marks .*--no-sign.*: iptc, c2pa: \w+ before, now iptc, c2pa: \w+"):
        make(tmp_path / "set", pipe, ["heart"], 1, **settings)


def test_certificates_that_cannot_sign_are_refused_before_the_run(tmp_path, pipe):
    pem = _self_signed().decode()
    key = pem[pem.index("-----BEGIN PRIVATE") :]
    other = _self_signed().decode()
    for text, message in (
        (None, "cannot read the certificate .*No such file"),
        ("", "holds 0 certificates and 0 private key"),
        (pem.replace(key, ""), "holds 2 certificates and 0 private key"),
        (key, "holds 0 certificates and 1 private key"),
        (pem.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"), "an encrypted private key; .* without a password"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" + key, "its first certificate is damaged"),
        (pem[: pem.index("-----BEGIN PRIVATE")] + other[other.index("-----BEGIN PRIVATE") :], "cannot sign with"),
    ):  # fmt: skip
        path = tmp_path / "cert.pem"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(SynthesisError, match=message):
            make(tmp_path / "set", pipe, ["heart"], 1, sign=path)
    assert not (tmp_path / "set").exists()
    with pytest.raises(SynthesisError, match="give one of them"):
        make(tmp_path / "set", pipe, ["heart"], 1, sign="self-signed", marks=False)


def test_an_expired_certificate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kspec_guidance.synthesis.signing.YEARS", 0)
    (tmp_path / "old.pem").write_bytes(_self_signed())
    with pytest.raises(SynthesisError, match=r"valid from .* not today"):
        Signer(tmp_path / "old.pem")
