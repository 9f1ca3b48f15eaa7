import pytest
import torch

from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.evaluation.image_sets import load_images
from kspec_guidance.synthesis import SynthesisError
from tests.synthesis.small_runs import make

PIXELS = ImageEmbedder(torch.nn.Flatten(), 8, "pixels")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_hold_the_images_of_a_folder_also_after_an_interruption(tmp_path, pipe, kind):
    make(tmp_path / "folder", pipe)
    make(tmp_path / "whole", pipe, format=kind, shard_size=4)
    images_left = 11

    def interrupt(image, row):
        nonlocal images_left
        images_left -= 1
        if not images_left:
            raise RuntimeError("interrupted")
        return True

    with pytest.raises(RuntimeError, match="interrupted"):
        make(tmp_path / "cut", pipe, format=kind, shard_size=4, filter=interrupt)
    images_left = -1
    make(tmp_path / "cut", pipe, format=kind, shard_size=4, filter=interrupt)
    suffix = "tar" if kind == "webdataset" else "parquet"
    names = sorted(p.name for p in (tmp_path / "whole").glob(f"*.{suffix}"))
    assert names == [f"shard-00-0000-{k:06d}.{suffix}" for k in range(7)]
    if kind == "webdataset":  # rows differ by the digest of the settings, which include the filter
        assert [p.stat().st_size for p in sorted((tmp_path / "cut").glob("*.tar"))] == [
            p.stat().st_size for p in sorted((tmp_path / "whole").glob("*.tar"))
        ]
    sets = [load_images(tmp_path / name, PIXELS) for name in ("folder", "whole", "cut")]
    for loaded in sets[1:]:
        assert loaded.prompts == sets[0].prompts
        assert torch.equal(loaded.features, sets[0].features)
    assert not list((tmp_path / "whole" / ".kspec").rglob("*.png"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_hold_all_images_of_an_interrupted_epoch(tmp_path, pipe, kind):
    verdicts = iter([True] * 11 + [None])
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path, pipe, format=kind, shard_size=4, filter=lambda image, row: next(verdicts))
    with pytest.raises(SynthesisError, match=f"in format '{kind}'; choose another folder for format 'imagefolder'"):
        make(tmp_path, pipe, force=True)
    result = make(tmp_path, pipe, images_per_prompt=6, format=kind, shard_size=5, force=True)
    assert len(load_images(tmp_path, PIXELS)) == result.images == 30
    assert not list((tmp_path / ".kspec").rglob("*.png"))
    assert sum("rest" in path.name for path in tmp_path.glob("shard-00-*")) == 1
    make(tmp_path, pipe, images_per_prompt=6, format=kind, shard_size=5)
    assert len(load_images(tmp_path, PIXELS)) == 30
