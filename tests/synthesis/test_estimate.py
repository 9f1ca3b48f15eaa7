from kspec_guidance import SPARKE
from kspec_guidance.synthesis import estimate
from tests.synthesis.small_runs import CALL, PROMPTS, make


def test_an_estimate_writes_nothing_and_is_near_the_measured_size(tmp_path, pipe):
    found = estimate(PROMPTS, tmp_path / "set", pipe, SPARKE(), images_per_prompt=5, batch_size=5, call=CALL)
    assert not (tmp_path / "set").exists()
    assert (found.images, found.prompts, found.batches, found.finished) == (25, 5, 5, 0)
    result = make(tmp_path / "set", pipe, batch_size=5)
    assert found.seconds > 0
    assert result.images == 25
    size = sum(p.stat().st_size for p in (tmp_path / "set").rglob("*") if p.is_file())
    assert 0.5 < size / found.disk_bytes < 2
    for text in ("25 images of 5 prompts", "exact rows", "nothing was written"):
        assert text in str(found)
    found = estimate(PROMPTS, tmp_path / "set", pipe, SPARKE(), images_per_prompt=6, batch_size=5, call=CALL)
    assert (found.finished, found.batches) == (25, 1)
