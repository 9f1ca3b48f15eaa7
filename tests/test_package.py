"""Contents of the built wheel, import cost, and version consistency."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_wheel_contains_pipeline_and_runs_standalone(tmp_path):
    # builds the sdist, then the wheel from it
    build = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], capture_output=True, text=True, check=False
    )
    assert build.returncode == 0, build.stderr[-2000:]
    [wheel], [_] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
        archive.extractall(tmp_path / "site")
    weights = [n for n in sizes if n.endswith(".safetensors")]
    assert len(weights) == 4
    assert sum(sizes[n] for n in weights) < 40e6
    for name in (
        "py.typed",
        "evaluation/templates/report.html",
        "demo/assets/MODEL_CARD.md",
        "demo/assets/references/twemoji.png",
    ):
        assert f"kspec_guidance/{name}" in sizes
    assert not [n for n in sizes if n.startswith(("tests", "benchmarks", "runs", "."))]
    assert any(n.endswith("licenses/NOTICE") for n in sizes)
    code = (
        "import kspec_guidance, sys; assert sys.argv[1] in kspec_guidance.__file__; "
        "pipe = kspec_guidance.load_demo_pipeline(); pipe.set_progress_bar_config(disable=True); "
        "print(pipe('heart', num_inference_steps=2).images[0].size)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "(64, 64)" in result.stdout


def test_import_does_not_load_heavy_dependencies():
    heavy = "diffusers", "open_clip", "matplotlib", "sklearn"
    code = f"import sys, kspec_guidance; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_version_is_consistent():
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11

    import kspec_guidance

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert kspec_guidance.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "docs" / "changelog.md").read_text()


def test_assets_contain_no_pickles_and_are_small():
    assets = list((ROOT / "kspec_guidance" / "demo" / "assets").rglob("*"))
    assert not [f for f in assets if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert sum(f.stat().st_size for f in assets if f.is_file()) < 45e6


def test_map_of_contributing_names_every_module():
    text, package, named = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ROOT / "kspec_guidance", set()
    for where, modules in re.findall(r"^\| (\[`.*?) \| .* \| (.*) \|$", text, re.MULTILINE):
        paths = re.findall(r"\]\(kspec_guidance/([^)]*)\)", where)
        named |= {path for path in paths if path.endswith(".py")}
        named |= {f"{paths[0]}{name}.py" for name in re.findall(r"`(\w+)`", modules)}
    found = {path.relative_to(package).as_posix() for path in package.rglob("[a-z]*.py")}
    assert named == found
