import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kspec_guidance.evaluation.embedders import (
    ImageEmbedder,
    efficientnet_lite,
    open_clip_embedder,
    open_clip_text_embedder,
    torchvision_embedder,
    transformers_embedder,
)
from kspec_guidance.utils.images import to_pixels


def mean_colour():
    return ImageEmbedder(lambda x: x.mean((2, 3)), 16, "mean colour", mean=(0, 0, 0), std=(1, 1, 1))


def stripes(size=256):
    """Alternating black and white columns of one pixel: grey after antialiased resizing, else black or white."""
    return Image.fromarray(np.tile(np.array([0, 255], np.uint8), (size, size // 2)))


@pytest.mark.parametrize("input_type", ["pil", "uint8", "float"])
def test_to_pixels_resizes_with_antialiasing(input_type):
    image = stripes()
    if input_type != "pil":
        image = torch.from_numpy(np.asarray(image).copy())[None, None]
        image = image if input_type == "uint8" else image.float() / 255
    pixels = to_pixels([image] if input_type == "pil" else image, 16)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[..., 1:-1].sub(0.5).abs().max() < 0.05  # the outermost columns include the border


def test_crop_keeps_aspect_ratio_and_squash_keeps_content():
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste("black", (0, 0, 16, 32))
    assert to_pixels([wide], 16).amin() > 0.9
    assert to_pixels([wide], 16, "squash").amin() < 0.1


def test_alpha_is_composited_over_white_and_image_modes_convert():
    transparent = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert to_pixels([transparent], 8).amin() == 1
    for mode in ("1", "L", "P", "CMYK", "LA", "I;16"):
        assert to_pixels([Image.new(mode, (20, 20))], 8).shape == (1, 3, 8, 8)


def test_tensor_and_pil_inputs_match(g):
    x = torch.randint(0, 255, (3, 3, 16, 16), generator=g, dtype=torch.uint8)
    images = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    embed = mean_colour()
    torch.testing.assert_close(embed(x), embed(images))
    torch.testing.assert_close(embed(x), embed(x.float() / 255))
    torch.testing.assert_close(embed(x, batch_size=2), embed(x))


def test_batches_on_a_cpu_are_small_unless_given(g):
    x, sizes = torch.rand(70, 3, 8, 8, generator=g), []
    embed = ImageEmbedder(lambda pixels: sizes.append(len(pixels)) or pixels.mean((2, 3)), 8, "mean colour")
    default = embed(x)
    assert sum(sizes) == 70
    assert max(sizes) == min(32, 4 * torch.get_num_threads())
    sizes.clear()
    assert torch.equal(embed(x, batch_size=50), default)
    assert sizes == [50, 20]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 16, 16, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(3, 16, 16), r"shape \[n, 3, h, w\], got \[3, 16, 16\]"),
        (torch.full((1, 3, 8, 8), 255.0), "divide by 255"),
        (torch.full((1, 3, 8, 8), -1.0), r"map -1\.\.1 to 0\.\.1"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "must be uint8"),
        (torch.full((1, 3, 8, 8), float("nan")), "must lie in 0..1"),
    ],
)
def test_invalid_images_raise(images, message):
    with pytest.raises(ValueError, match=message):
        to_pixels(images, 8)


def test_efficientnet_features_of_flipped_images_are_similar():
    from kspec_guidance import load_demo_reference

    noto, twemoji = load_demo_reference("noto"), load_demo_reference("twemoji")
    embed = efficientnet_lite()
    x = embed(noto[:12] / 2 + 0.5)
    assert x.shape == (12, 1280)
    flipped = embed((noto[:12] / 2 + 0.5).flip(3))
    cosine = torch.cosine_similarity
    assert cosine(x, flipped).mean() > cosine(x, x.roll(1, 0)).mean() + 0.2
    assert embed(twemoji[:2] / 2 + 0.5).shape == (2, 1280)


def test_open_clip_embeds_images_and_texts(tmp_path):
    import open_clip

    model = open_clip.create_model("ViT-S-32-alt")
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    image_embedder, text_embedder = open_clip_embedder("ViT-S-32-alt", path), open_clip_text_embedder("ViT-S-32-alt", path)
    assert image_embedder.size == 224
    assert image_embedder(torch.rand(2, 3, 40, 50)).shape[1] == text_embedder(["a dog", "a cat"]).shape[1]
    _, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt")
    image = Image.effect_noise((300, 200), 60).convert("RGB")
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(image)[None])
    torch.testing.assert_close(image_embedder([image]), expected, atol=2e-3, rtol=2e-3)


def test_transformers_vision_models_embed_images():
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

    config = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
    }
    x = torch.rand(2, 3, 30, 30)
    dino = Dinov2Model(Dinov2Config(patch_size=14, **config))
    assert transformers_embedder(dino)(x).shape == (2, 32)
    assert transformers_embedder(SiglipVisionModel(SiglipVisionConfig(patch_size=14, **config)))(x).shape == (2, 32)
    text_config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config={**config, "patch_size": 14}, projection_dim=24))
    assert transformers_embedder(clip)(x).shape == (2, 24)
    with pytest.raises(OSError, match="nowhere"):
        transformers_embedder("./nowhere")


def test_torchvision_loads_safetensors_and_pth(tmp_path):
    from torchvision.models import resnet18

    model = resnet18(weights=None)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "r.safetensors")
    torch.save(model.state_dict(), tmp_path / "r.pth")
    a, b = (torchvision_embedder("resnet18", tmp_path / f"r.{e}", size=64) for e in ("safetensors", "pth"))
    x = torch.rand(2, 3, 70, 70)
    assert a(x).shape == (2, 512)
    assert torch.equal(a(x), b(x))
    assert a.fingerprint == b.fingerprint
    assert torchvision_embedder("vit_b_16", None).fingerprint != a.fingerprint
