import pytest

from kspec_guidance import SPARKE, MemoryBank
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.synthesis import Prompt, SynthesisError
from kspec_guidance.synthesis.worker import Worker
from tests.synthesis.small_runs import make, rows_of


def test_the_memory_repels_across_batches(tmp_path, pipe):
    make(tmp_path / "on", pipe, ["heart"], images_per_prompt=12, batch_size=2)
    make(tmp_path / "off", pipe, ["heart"], images_per_prompt=12, batch_size=2, guide=SPARKE(0.0))
    last = lambda name: rows_of(tmp_path / name)[-1]["vendi"]  # noqa: E731
    assert last("on") > last("off")


@pytest.mark.parametrize("kind", ["auto", "exact", "centroids"])
def test_kinds_of_memory(tmp_path, pipe, kind):
    assert make(tmp_path / kind, pipe, memory=kind, images_per_prompt=4).images == 20


def test_a_centroid_memory_of_the_guide(tmp_path, pipe):
    guide = SPARKE(memory=CentroidMemory(4))
    assert make(tmp_path, pipe, ["heart"], guide=guide, images_per_prompt=8, memory="guide").images == 8
    assert len(guide.memory) == 8


def test_the_memory_of_the_guide_is_used_if_it_has_settings(tmp_path, pipe):
    guide = SPARKE(memory=MemoryBank(limit=3))
    make(tmp_path / "a", pipe, ["heart"], guide=guide, images_per_prompt=8)
    assert (len(guide.memory), guide.memory.total_added) == (3, 8)
    guide = SPARKE()
    make(tmp_path / "b", pipe, ["heart"], guide=guide, images_per_prompt=2)
    assert len(guide.memory) == 0
    with pytest.raises(SynthesisError, match="2 memories in different spaces"):
        make(tmp_path / "c", pipe, guide=SPARKE() + SPARKE(space="pooled"))


def test_a_run_with_random_features_is_resumed_with_the_same_images(tmp_path, pipe):
    def guide():
        kernel, prompts = GaussianKernel(1.0), GaussianKernel(0.35)
        phi, psi = RandomFourierFeatures(kernel, 576, 256), RandomFourierFeatures(prompts, 160, 64)
        return SPARKE(kernel=kernel, prompt_kernel=prompts, feature_map=phi, prompt_feature_map=psi)

    make(tmp_path / "whole", pipe, ["heart", "runner"], guide=guide())
    verdicts = iter([True] * 5 + [None])
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path / "cut", pipe, ["heart", "runner"], guide=guide(), filter=lambda image, row: next(verdicts))
    assert len(list((tmp_path / "cut").rglob("*.png"))) == 3
    make(tmp_path / "cut", pipe, ["heart", "runner"], guide=guide(), filter=lambda image, row: True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in ("whole", "cut"))
    assert one == two


def test_groups_have_separate_memories(tmp_path, pipe):
    prompts = [Prompt("heart", "a"), Prompt("heart ", "b"), Prompt("red heart", "b")]
    make(tmp_path / "x", pipe, prompts, 3, 4, memory_by="group")
    make(tmp_path / "x", pipe, prompts, 4, 4, memory_by="all", force=True)  # batches of both groups
    assert make(tmp_path / "x", pipe, prompts, 5, 4, memory_by="group", force=True).images == 15
    make(tmp_path / "y", pipe, prompts[:1], 3, 4, memory_by="group")
    third = lambda name: (tmp_path / name / "0000" / "000000-0002.png").read_bytes()  # noqa: E731
    assert third("x") == third("y")


def test_one_process_keeps_no_samples_to_send(tmp_path, pipe, monkeypatch):
    workers, run = [], Worker.run
    monkeypatch.setattr(Worker, "run", lambda self: (run(self), workers.append(self)))
    make(tmp_path, pipe, images_per_prompt=3)
    assert workers[0].memories.unsent == []
    assert not any(job.features for job in workers[0].jobs)
