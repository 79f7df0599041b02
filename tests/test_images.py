from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcm_rt import images
from lcm_rt.errors import ImageError, InputError
from lcm_rt.images import encode_picture, read_canvas
from lcm_rt.types import GenerateRequest


def file(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def gradient(width=96, height=64) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x + 128], axis=2).astype(np.uint8))


def read(image=None, mask=None, **kwargs):
    return read_canvas(GenerateRequest("m", "p", 0, image=image, mask=mask, **kwargs), 256)


def test_without_a_picture_the_size_is_the_one_asked_for_or_the_models():
    assert read(size=(512, 64)) == images.Canvas(512, 64)
    assert read() == images.Canvas(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_the_four_formats(kind):
    canvas = read(file(gradient(), kind))
    assert canvas.image.shape == (64, 96, 3)
    assert canvas.image.dtype == np.uint8
    assert (canvas.width, canvas.height, canvas.mask) == (96, 64, None)
    np.testing.assert_allclose(canvas.image.astype(int), np.asarray(gradient()).astype(int), atol=24)


def test_png_is_exact():
    np.testing.assert_array_equal(read(file(gradient())).image, np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(ImageError, match="image: is not a PNG"):
        read(file(gradient(64, 64), kind))


def test_only_the_first_frame_of_a_moving_picture():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    canvas = read(file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (canvas.image == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    # What a viewer shows, told apart by the corner that is red.
    stored = Image.new("RGB", (96, 64), "black")
    stored.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    canvas = read(file(stored, "PNG", exif=exif))
    assert canvas.image.shape == ((64, 96, 3) if orientation < 5 else (96, 64, 3))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert tuple(canvas.image[corner[orientation]]) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    canvas = read(file(picture if mode == "RGBA" else picture.convert(mode)))
    assert (canvas.image == 255).all()


def test_transparency_of_a_palette():
    picture = Image.new("P", (64, 64), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    assert (read(file(picture, transparency=0)).image == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16"])
def test_grey_and_palette(mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((64, 64), 128 * 256, dtype=np.uint16))
    else:
        picture = Image.new("L", (64, 64), 255 if mode == "1" else 128).convert(mode)
    expected = 255 if mode == "1" else 128
    np.testing.assert_allclose(read(file(picture)).image, expected, atol=3)


def test_a_mask_is_filled_where_it_is_white():
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[:, 10:] = 127
    mask[:, 20:] = 128
    mask[:, 30:] = 255
    canvas = read(file(gradient()), file(Image.fromarray(mask)))
    assert canvas.mask.dtype == bool
    np.testing.assert_array_equal(canvas.mask, mask >= 128)


def test_strokes_on_a_transparent_layer_are_a_mask():
    layer = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 32, 64))
    canvas = read(file(gradient()), file(layer))
    assert canvas.mask[:, :32].all()
    assert not canvas.mask[:, 32:].any()


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    with pytest.raises(ImageError, match="mask: is 64x96 pixels, but the image is 96x64"):
        read(file(gradient()), file(Image.new("L", (64, 96))))


def test_a_mask_without_a_picture():
    with pytest.raises(InputError, match="mask"):
        read(None, file(Image.new("L", (64, 64))))


def test_large_pictures_are_scaled_down_and_cut_to_multiples_of_8():
    canvas = read(file(gradient(2000, 1101)), file(Image.new("L", (2000, 1101), 255)))
    assert (canvas.width, canvas.height) == (1024, 560)  # 1024 x 564 before the cut
    assert canvas.image.shape == (560, 1024, 3)
    assert canvas.mask.shape == (560, 1024)
    assert canvas.mask.all()


def test_the_middle_is_kept():
    canvas = read(file(gradient(100, 70)))
    assert (canvas.width, canvas.height) == (96, 64)
    np.testing.assert_array_equal(canvas.image, np.asarray(gradient(100, 70))[3:67, 2:98])


@pytest.mark.parametrize("size", [(64, 64), (512, 64), (96, 64), (128, 1024), (200, 136)])
def test_a_size_given_is_covered_and_the_middle_cut_out(size):
    canvas = read(file(gradient()), file(Image.new("L", (96, 64), 255)), size=size)
    assert canvas.image.shape == (size[1], size[0], 3)
    assert canvas.mask.all()
    middle = canvas.image[size[1] // 2, size[0] // 2].astype(int)
    np.testing.assert_allclose(middle, [127, 127, 128], atol=5)


def test_a_narrow_picture_made_wide_is_not_scaled_as_a_whole():
    """All of 1x4096 at 1024 wide would be 4 million high: 13 GB."""
    picture = Image.new("RGB", (1, 4096), "red")
    canvas = read(file(picture), size=(1024, 1024))
    assert canvas.image.shape == (1024, 1024, 3)
    assert (canvas.image == (255, 0, 0)).all()


def test_small_pictures_are_refused():
    for size in [(63, 64), (1, 1), (4000, 100)]:
        with pytest.raises(ImageError, match="too small"):
            read(file(Image.new("L", size)))


def header_of_png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its data does not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + data + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ImageError, match=r"8000x8000 pixels; at most 16.8 million"):
        read(header_of_png(8000, 8000))
    # Pillow has a limit of its own, far above ours.
    with pytest.raises(ImageError):
        read(header_of_png(60000, 60000))


def test_a_file_too_large_is_not_even_opened(monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 2**20)
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        read(bytes(2**20 + 1))


@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize("data", [b"", b"not a picture", header_of_png(64, 64), file(gradient(), "JPEG")[:900]])
def test_broken_files_name_their_field_and_nothing_else(field, data):
    good = file(gradient())
    with pytest.raises(ImageError) as caught:
        read(**({"image": good} | {field: data}))
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: is not a PNG, JPEG, WebP or GIF file that can be decoded"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
def test_flipped_bytes_give_a_picture_or_an_image_error(data, kind):
    good = bytearray(file(gradient(64, 64), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        canvas = read(bytes(good))
    except ImageError:
        return
    assert canvas.image.shape == (canvas.height, canvas.width, 3)


@pytest.mark.parametrize(("format", "atol"), [("png", 0), ("jpeg", 12), ("webp", 12)])
def test_encoded_pictures_come_back(format, atol):
    pixels = np.asarray(gradient())
    data, content_type = encode_picture(pixels, format, 90)
    assert content_type == f"image/{format}"
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == format.upper()
        np.testing.assert_allclose(np.asarray(picture).astype(int), pixels.astype(int), atol=atol)


def test_quality_is_heeded():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for format in ("jpeg", "webp"):
        assert len(encode_picture(pixels, format, 30)[0]) < len(encode_picture(pixels, format, 95)[0])
