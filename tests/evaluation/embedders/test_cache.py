import torch
from PIL import Image

from kspec_guidance.evaluation.embedders import ImageEmbedder, embed_files


def test_embed_files_caches_features_by_content(tmp_path):
    calls = []

    def network(x):
        calls.append(len(x))
        return x.mean((2, 3))

    embed = ImageEmbedder(network, 8, "counting", (0, 0, 0), (1, 1, 1))
    paths = []
    for i, colour in enumerate(("red", "blue", "red")):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (9, 9), colour).save(paths[-1])
    features = embed_files(paths, embed, tmp_path / "cache")
    assert sum(calls) == 2  # two of the three files are identical
    torch.testing.assert_close(embed_files(paths, embed, tmp_path / "cache"), features)
    assert sum(calls) == 2
    torch.testing.assert_close(embed_files(paths, embed), features)
    Image.new("RGB", (9, 9), "lime").save(paths[1])
    assert not torch.equal(embed_files(paths, embed, tmp_path / "cache")[1], features[1])
    [cache_file] = (tmp_path / "cache").iterdir()
    cache_file.write_bytes(b"damaged")
    torch.testing.assert_close(embed_files(paths[:1], embed, tmp_path / "cache"), features[:1])
