import numpy as np
import pytest
import torch

from kspec_guidance.evaluation.embedders import (
    ImageEmbedder,
    image_embedder,
    one_hot_embedder,
    open_clip_embedder,
    text_embedder,
    torchvision_embedder,
    weights_fingerprint,
)
from kspec_guidance.utils.images import to_pixels


def test_invalid_input_raises():
    with pytest.raises(TypeError, match="PIL images"):
        to_pixels([np.zeros((8, 8, 3))], 8)
    with pytest.raises(ValueError, match="'crop' or 'squash'"):
        to_pixels([], 8, "pad")
    with pytest.raises(ValueError, match="infinite features for images 0 to 1"):
        ImageEmbedder(lambda x: x.mean((2, 3)) / 0, 8, "broken")(torch.ones(1, 3, 8, 8))
    with pytest.raises(TypeError, match="list of strings"):
        one_hot_embedder()("a dog")
    for make_embedder in (image_embedder, text_embedder):
        with pytest.raises(ValueError, match="choose one of"):
            make_embedder("telepathy")
    with pytest.raises(FileNotFoundError, match="neither a file nor a pretrained tag"):
        open_clip_embedder("ViT-B-32", "nothing")
    with pytest.raises(FileNotFoundError, match="download=True"):
        open_clip_embedder("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(ValueError, match="no model 'ViT-Z'"):
        open_clip_embedder("ViT-Z", None)
    with pytest.raises(ValueError, match="no model 'resnet1'"):
        torchvision_embedder("resnet1", None)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        torchvision_embedder("resnet18", "nothing")


def test_fingerprint_depends_on_weights():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    assert weights_fingerprint(a) == weights_fingerprint(a)
    assert weights_fingerprint(a) != weights_fingerprint(b)
    copy = torch.nn.Linear(4, 4)
    copy.load_state_dict(a.state_dict())
    assert weights_fingerprint(copy) == weights_fingerprint(a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_network_in_half_precision(dtype):
    network = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8, 8), torch.nn.Flatten())  # noqa: E731
    torch.manual_seed(0)
    expected = ImageEmbedder(network(), 16, "a")(torch.ones(2, 3, 16, 16))
    torch.manual_seed(0)
    embedder = ImageEmbedder(network().to(dtype), 16, "a")
    with torch.inference_mode():
        found = embedder(torch.ones(2, 3, 16, 16))
    assert found.dtype == torch.float32
    assert not found.is_inference()
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_auto_takes_a_local_model_else_the_embedder_of_the_package(monkeypatch):
    names = "kspec_guidance.evaluation.embedders.names"
    monkeypatch.setattr(f"{names}.try_to_load_from_cache", lambda model, file: None)
    lite = image_embedder("auto")
    assert lite.name == "efficientnet-lite0"
    assert lite.measured
    assert lite.same_distance == 0.75
    found = ImageEmbedder(lambda x: x, 8, "found", fingerprint="x")
    asked = []
    monkeypatch.setattr(f"{names}.try_to_load_from_cache", lambda model, file: file if "dinov2-small" in model else None)
    monkeypatch.setattr(f"{names}.images.transformers_embedder", lambda model, device: asked.append(model) or found)
    assert image_embedder("auto") is found
    assert asked == ["facebook/dinov2-small"]
    assert not found.measured

    def broken(model, device):
        raise OSError("no config")

    monkeypatch.setattr(f"{names}.images.transformers_embedder", broken)
    with pytest.warns(UserWarning, match="dinov2-small is in the local cache, but cannot be loaded: no config"):
        assert image_embedder("auto").name == "efficientnet-lite0"
