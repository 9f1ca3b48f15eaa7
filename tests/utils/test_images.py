"""Pixels of image files of many kinds, and the files of folders."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from kspec_guidance.utils.folders import list_files
from kspec_guidance.utils.images import SourceError, decode_image, image_types, read_folder, to_pixels, to_rgb

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def encode(image, kind, **settings):
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


def read(data):
    return np.asarray(decode_image(data)[0]).astype(int)


def tiff(samples, bits, kind):
    """A TIFF file of one grey channel, in the byte order of the samples."""
    order = ">" if samples.dtype.byteorder == ">" else "<"
    data, (height, width) = samples.tobytes(), samples.shape
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, kind),
    ]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "I", 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)


DEEP = {
    "big-endian 16-bit TIFF": tiff((RAMP * 65535).astype(">u2"), 16, 1),
    "signed 16-bit TIFF": tiff((RAMP * 60000 - 30000).astype("<i2"), 16, 2),
    "unsigned 32-bit TIFF": tiff((RAMP * (2**32 - 1)).astype("<u4"), 32, 1),
    "16-bit PNG": encode(Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
    "16-bit TIFF": encode(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"),
    "32-bit TIFF": encode(Image.fromarray((RAMP * 2_000_000).astype(np.int32)), "TIFF"),
    "32-bit TIFF in 0..255": encode(Image.fromarray((RAMP * 255).round().astype(np.int32)), "TIFF"),
    "signed 32-bit TIFF": encode(Image.fromarray((RAMP * 4000 - 2000).astype(np.int32)), "TIFF"),
    "float TIFF in 0..1": encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "float TIFF in 0..255": encode(Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
    "float TIFF in 0..0.01": encode(Image.fromarray((RAMP * 0.01).astype(np.float32)), "TIFF"),
    "float TIFF in -5..5": encode(Image.fromarray((RAMP * 10 - 5).astype(np.float32)), "TIFF"),
    "16-bit PGM": b"P5 64 64 65535\n" + (RAMP * 65535).astype(">u2").tobytes(),
    "10-bit PGM": b"P5 64 64 1023\n" + (RAMP * 1023).astype(">u2").tobytes(),
    "white-is-zero TIFF": encode(Image.fromarray((65535 - RAMP * 65535).astype(np.uint16)), "TIFF", tiffinfo={262: 0}),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_scaled_to_8_bits(name):
    found = read(DEEP[name])
    assert np.abs(found - (RAMP * 255).round()[..., None]).max() <= 1


def test_pixels_that_are_not_finite_keep_the_others_and_none_finite_is_an_error():
    values = (RAMP * 10).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = read(encode(Image.fromarray(values), "TIFF"))
    assert np.abs(found[1:] - (RAMP * 255).round()[1:, :, None]).max() <= 1
    assert found[0, :3, 0].tolist() == [0, 255, 0]
    with pytest.raises(SourceError, match="finite"):
        decode_image(encode(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_turned_upright_once(orientation, kind, mode):
    upright = Image.fromarray((RAMP[:32] * 255).astype(np.uint8)).convert(mode)
    T = Image.Transpose
    inverse = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE,
               8: T.ROTATE_270}  # fmt: skip
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(stored, kind, exif=exif, **({"quality": 98} if kind in ("JPEG", "WEBP") else {}))
    expected = np.asarray(upright.convert("RGB")).astype(int)
    assert read(data).shape == expected.shape
    assert np.abs(read(data) - expected).mean() < 2
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(to_rgb(to_rgb(opened))), read(data))
    torch.testing.assert_close(to_pixels([opened], 16), to_pixels([decode_image(data)[0]], 16))


def test_a_16_bit_image_is_turned_as_well():
    exif = Image.Exif()
    exif[274] = 6
    data = encode(
        Image.fromarray((RAMP[:32] * 65535).astype(np.uint16)).transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif
    )
    assert np.abs(read(data) - (RAMP[:32] * 255).round()[..., None]).max() <= 1


def test_damaged_exif_data_do_not_hide_the_image():
    data = encode(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read(data).shape == (8, 8, 3)


def test_transparency_is_over_white_in_all_modes():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    data = [
        encode(half, "PNG"), encode(half, "WEBP", lossless=True), encode(half.convert("LA"), "PNG"),
        encode(palette, "PNG", transparency=1), encode(palette, "GIF", transparency=1),
        encode(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", transparency=(255, 0, 0)),
        encode(Image.new("L", (4, 4), 7), "PNG", transparency=7), encode(half, "TIFF"), encode(half, "TGA"),
        encode(Image.fromarray(np.full((4, 4), 700, np.uint16)), "PNG", transparency=700),
    ]  # fmt: skip
    for d in data:
        assert read(d).min() == 255
    for image in (half.convert("RGBa"), half.convert("LA").convert("La")):
        assert np.asarray(to_rgb(image)).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGB", "I", "F", "I;16"])
def test_opaque_modes_keep_their_grey(mode):
    image = Image.new("L", (3, 5), 255).convert("RGB" if mode in ("HSV", "CMYK", "YCbCr") else "L").convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 3), 65535, np.uint16))
    assert np.asarray(to_rgb(image)).min() >= 254


def test_first_frame_of_animations_and_pages_is_read():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        image, more = decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert more
        assert image.getpixel((0, 0))[0] > 200
        assert not decode_image(encode(frames[0], kind))[1]


@pytest.mark.parametrize(("size", "box"), [((20_000, 1), 224), ((1, 20_000), 224), ((1, 1), 224), ((30_000, 2), (64, 32))])
def test_extreme_shapes_are_cropped_before_they_are_scaled(size, box, monkeypatch):
    largest = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda i, s, *a, **k: largest.append(s[0] * s[1]) or resize(i, s, *a, **k))
    image = Image.new("RGB", size, (255, 128, 0))
    pixels = to_pixels([image], box)
    assert max(largest) <= 224 * 224
    torch.testing.assert_close(pixels, pixels[:, :, :1, :1].expand_as(pixels))
    x = torch.rand(1, 3, *size[::-1])
    assert to_pixels(x, box).shape == pixels.shape


def test_only_the_middle_of_a_long_tensor_is_scaled(monkeypatch):
    shapes = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "kspec_guidance.utils.images.nnf.interpolate", lambda x, size, **k: shapes.append(size) or interpolate(x, size, **k)
    )
    x = torch.rand(1, 1, 8, 1600)
    long = to_pixels(x, 16)
    assert shapes[-1][1] < 100
    torch.testing.assert_close(long, to_pixels(x[..., 780:820], 16))


@pytest.mark.parametrize(
    ("size", "box", "fit"), [((300, 200), 64, "crop"), ((37, 91), (50, 20), "crop"), ((64, 50), 32, "squash")]
)
def test_cropping_before_scaling_gives_the_same_pixels(size, box, fit):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    box = (box, box) if isinstance(box, int) else box
    scale = max(box[0] / size[1], box[1] / size[0])
    h, w = (max(box[0], round(size[1] * scale)), max(box[1], round(size[0] * scale))) if fit == "crop" else box
    whole = image.resize((w, h), Image.Resampling.BICUBIC)
    top, left = (h - box[0]) // 2, (w - box[1]) // 2
    expected = np.asarray(whole.crop((left, top, left + box[1], top + box[0]))).astype(int)
    found = (to_pixels([image], box, fit)[0].permute(1, 2, 0) * 255).round().int().numpy()
    assert np.abs(found - expected).max() <= 1


def test_reasons_of_files_that_cannot_be_decoded(monkeypatch):
    png = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
    for data, reason in (
        (b"", "empty"),
        (b"not an image", "unknown or damaged"),
        (png[: len(png) // 2], "truncated|cut"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "unknown or damaged"),  # no Ghostscript
    ):
        with pytest.raises(SourceError, match=reason):
            decode_image(data)
    with pytest.raises(SourceError, match="64 x 64 pixels"):
        decode_image(png, max_pixels=100)
    with pytest.raises(SourceError, match="unknown"):
        decode_image(png, formats=["JPEG"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SourceError, match="far more pixels"):
        decode_image(png)


def test_types_are_those_of_the_installed_pillow(monkeypatch):
    assert {".png", ".jpg", ".jfif", ".jp2", ".tga", ".webp", ".tif"} <= image_types()
    assert not {".eps", ".ps", ".wmf", ".pdf", ".h5", ".txt"} & image_types()
    monkeypatch.setitem(Image.EXTENSION, ".made-up", "PNG")  # as a plugin does
    assert ".made-up" in image_types()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no links or pipes")
def test_list_files_follows_links_once_and_names_what_it_leaves_out(tmp_path):
    root, other = tmp_path / "set", tmp_path / "other"
    for folder in (root / "sub", root / ".hidden", root / "__MACOSX", other):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"")
    (root / "Thumbs.db").write_bytes(b"")
    (root / "linked.png").symlink_to(other / "0.png")
    (root / "broken.png").symlink_to(tmp_path / "nowhere")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "outside").symlink_to(other)
    (root / "again").symlink_to(root / "sub")
    (root / "up").symlink_to(tmp_path)
    (other / "loop").symlink_to(other)
    os.mkfifo(root / "pipe.png")
    files, left_out = list_files(root)
    assert [f.relative_to(root).as_posix() for f in files] == ["linked.png", "outside/0.png", "sub/0.png"]
    assert set(left_out) == {
        ".hidden/", "Thumbs.db", "__MACOSX/", "again/", "broken.png", "outside/loop/", "pipe.png", "self.png", "up/"
    }  # fmt: skip


def test_read_folder_reads_as_evaluate_and_warns_of_what_it_leaves_out(tmp_path):
    (tmp_path / "0.png").write_bytes(DEEP["16-bit PNG"])
    (tmp_path / "0.txt").write_text("a ramp")
    assert np.abs(np.asarray(next(read_folder(tmp_path)))[..., 0] - (RAMP * 255).round()).max() <= 1
    (tmp_path / "a.svg").write_text("<svg/>")
    (tmp_path / "b.gif").write_bytes(
        encode(Image.new("L", (4, 4)), "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 255)])
    )
    with pytest.warns(UserWarning, match=r"a\.svg \(of a type .*b\.gif \(all frames but the first\)"):
        assert len(list(read_folder(tmp_path))) == 2
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"c\.png cannot be read as an image: an empty file"):
        list(read_folder(tmp_path))
