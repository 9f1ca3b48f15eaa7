"""Code blocks of the README and the documentation run, in order: Python in one namespace, commands through the CLI."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from tests.few_steps import few_steps
from tests.processes import launch
from tests.tiny import build

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
DOCS = (p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "reference")  # the reference has no code blocks
HUB = {  # models that the README loads, their class, dtype and variant
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", torch.float16, "fp16"),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", torch.bfloat16, None),
}
PAGES = [*sorted(str(p.relative_to(ROOT)) for p in DOCS), "pipelines/README.md"]


@pytest.fixture
def tiny_hub(tmp_path_factory, monkeypatch):
    """Models of the hub are tiny pipelines of the same class, loaded from files, and stay on the CPU in float32."""
    folder, load, loaded = tmp_path_factory.mktemp("hub"), DiffusionPipeline.from_pretrained.__func__, []

    def from_pretrained(cls, name, **kwargs):
        if name not in HUB:
            return load(cls, name, **kwargs)
        kind, dtype, variant = HUB[name]
        build(kind).to(dtype).save_pretrained(folder / name, variant=variant)
        pipe = load(cls, folder / name, **kwargs)
        assert (type(pipe).__name__, pipe.dtype) == (kind, dtype)
        pipe.to(torch.float32)
        pipe.default_sample_size = 16
        pipe.to = lambda device: pipe
        pipe.enable_model_cpu_offload = lambda: None
        loaded.append(name)
        return pipe

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    return loaded


@pytest.mark.slow
def test_readme_code_runs(tmp_path, monkeypatch, tiny_hub):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = 0
    for language, block in BLOCK.findall(few_steps(TEXT)):
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
            ran += 1
            continue
        for line in block.splitlines():
            command = shlex.split(line, comments=True)
            if command and command[0] == "kspec-guidance":
                run_command(command)
                ran += 1
    assert ran == 6
    assert tiny_hub == list(HUB)
    written = {str(p.relative_to(tmp_path)) for p in [*tmp_path.glob("*"), *tmp_path.glob("outputs/*")]}
    assert written >= {"grid.png", "heart-0.png", "heart-1.png", "outputs/set", "outputs/report.html"}


def test_the_readme_is_short():
    assert len(TEXT.split()) <= 700


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    for name in ("kspec_guidance", "pipelines"):  # paths on the pages are relative to a clone
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    names: dict = {}
    for language, block in BLOCK.findall(few_steps((ROOT / page).read_text())):
        assert language in ("python", "bash", "text")
        if language == "python":
            exec(compile(block, page, "exec"), names)
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            run_command(shlex.split(line))


def run_command(words):
    """Run ``kspec-guidance`` and, small, the arena in this process, and launchers with processes that are forks."""
    from benchmarks.arena.__main__ import main as arena
    from kspec_guidance.cli import app

    piped = None
    if "|" in words:
        pipe = words.index("|")
        piped = subprocess.run(words[:pipe], capture_output=True, text=True, check=True).stdout
        words = words[pipe + 1 :]
    if words[0] == "kspec-guidance":
        result = CliRunner().invoke(app, words[1:], input=piped)
        assert result.exit_code == 0, result.output
        return
    if words[:3] == ["python", "-m", "benchmarks.arena"]:
        assert "--out" in words  # that of a clone would be written to
        words += ["--small", "--out", "arena"]
        if "--tuned-from" in words:
            words += ["--tuned-from", str(ROOT / words[words.index("--tuned-from") + 1])]
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr("sys.argv", words[2:])
            arena()
        return
    assert words[0] in ("torchrun", "accelerate")
    launch(words)


def test_readme_shell_commands_are_known():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for language, block in BLOCK.findall(TEXT):
        if language != "bash":
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[:3] == ["pip", "install", "-e"] or words[0] == "kspec-guidance" or words[1] in targets


def test_linked_images_and_files_exist():
    for page in ["README.md", *PAGES]:
        text = (ROOT / page).read_text()
        for path in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'<img src="([^"]+)"', text):
            assert path.startswith("https://") or (ROOT / page).parent.joinpath(path).is_file(), (page, path)
