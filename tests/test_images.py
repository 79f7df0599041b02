from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from lcm_rt import images
from lcm_rt.errors import ImageError, InputError
from lcm_rt.images import Canvas, Canvases, encode_picture, read_canvas
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


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_mask_by_alpha_is_filled_where_it_is_transparent(mode):
    """Whatever its colours: the same layer as a mask by colour would be filled where it is white."""
    layer = Image.new("RGBA", (96, 64), (255, 255, 255, 255))
    for left, level in ((0, 0), (16, 127), (32, 128), (48, 254)):
        layer.paste((0, 0, 0, level), (left, 0, left + 16, 64))
    mask = file(layer.convert(mode))
    canvas = read(file(gradient()), mask, mask_alpha=True)
    assert canvas.mask[:, :32].all()
    assert not canvas.mask[:, 32:].any()
    assert (read(file(gradient()), mask).mask == (np.arange(96) >= 64)).all()


def test_a_palette_or_webp_may_be_a_mask_by_alpha():
    palette = Image.new("P", (96, 64), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(1, (0, 0, 32, 64))
    layer = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    layer.paste((0, 0, 0, 0), (0, 0, 32, 64))
    for mask in (file(palette, transparency=1), file(layer, "WEBP", lossless=True)):
        canvas = read(file(gradient()), mask, mask_alpha=True)
        assert (canvas.mask == (np.arange(96) < 32)).all()


def test_a_mask_by_alpha_is_pasted_softly():
    layer = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    layer.paste((0, 0, 0, 100), (40, 20, 50, 30))
    overlay = read(file(gradient()), file(layer), mask_alpha=True, inpaint_mask_only=True).overlay
    assert set(np.unique(overlay.mask)) == {0, 155}


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "I;16"])
def test_a_mask_by_alpha_has_transparency(mode):
    mask = Image.new("L", (96, 64), 255)
    mask = Image.fromarray(np.zeros((64, 96), np.uint16)) if mode == "I;16" else mask.convert(mode)
    with pytest.raises(ImageError, match="mask: has no transparency"):
        read(file(gradient()), file(mask), mask_alpha=True)


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
    for size in [(65536, 1), (1, 65536)]:
        with pytest.raises(ImageError, match="65535 a side"):
            read(header_of_png(*size), size=(64, 64))
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


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def boxes(size: tuple[int, int], *filled: tuple[int, int, int, int]) -> Image.Image:
    """A hard mask: white in boxes of (left, top, width, height)."""
    mask = Image.new("L", size)
    for left, top, width, height in filled:
        mask.paste(255, (left, top, left + width, top + height))
    return mask


def by_diffusers(picture: np.ndarray, mask: np.ndarray, painted: np.ndarray):
    """The region, what is painted on, where, and the end result, as the pipelines make them."""
    from diffusers.image_processor import VaeImageProcessor  # loads torch, which the other tests here do without

    pictures = VaeImageProcessor()
    masks = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    height, width = mask.shape
    picture, mask, painted = (Image.fromarray(pixels) for pixels in (picture, mask, painted))
    region = masks.get_crop_region(mask, width, height, pad=32)
    options = {"height": height, "width": width, "crops_coords": region, "resize_mode": "fill"}
    image = np.asarray(pictures.postprocess(pictures.preprocess(picture, **options))[0])
    filled = masks.preprocess(mask, **options)[0, 0].numpy() == 1
    return region, image, filled, np.asarray(pictures.apply_overlay(mask, picture, painted, region))


def mask_of(overlay: images.Overlay) -> np.ndarray:
    """The overlay's mask in the whole picture."""
    left, top, right, bottom = overlay.region
    mask = np.zeros(overlay.picture.shape[:2], dtype=np.uint8)
    mask[top:bottom, left:right] = overlay.mask
    return mask


def assert_like_diffusers(canvas: images.Canvas, atol: int):
    painted = noise(canvas.width, canvas.height, seed=1)
    overlay = canvas.overlay
    region, image, filled, result = by_diffusers(overlay.picture, mask_of(overlay), painted)
    assert overlay.region == region
    np.testing.assert_array_equal(canvas.image, image)
    np.testing.assert_array_equal(canvas.mask, filled)
    np.testing.assert_allclose(overlay.paste(painted).astype(int), result.astype(int), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "mask",
    [
        boxes((512, 384), (200, 100, 40, 30)),
        boxes((512, 384), (0, 0, 1, 1)),
        boxes((512, 384), (511, 0, 1, 1)),
        boxes((512, 384), (0, 383, 1, 1)),
        boxes((512, 384), (511, 383, 1, 1)),
        boxes((512, 384), (0, 150, 512, 20)),
        boxes((512, 384), (250, 0, 3, 384)),
        boxes((512, 384), (450, 300, 62, 84)),
        boxes((512, 384), (5, 5, 1, 1), (500, 370, 3, 3)),
        boxes((512, 384), (40, 40, 1, 1), (300, 44, 9, 1)),
        boxes((512, 384), (0, 0, 512, 384)),
        boxes((64, 64), (31, 31, 1, 1)),
        boxes((64, 1024), (30, 0, 1, 1)),
        boxes((64, 1024), (63, 600, 1, 200)),
        boxes((1024, 64), (300, 63, 513, 1)),
        boxes((1024, 64), (0, 0, 1024, 1)),
        boxes((616, 888), (17, 23, 101, 67)),
        boxes((64, 600), (0, 300, 16, 10)),  # these two lose a pixel to floating point
        boxes((72, 424), (0, 0, 1, 339)),
    ],
    ids=lambda mask: f"{mask.size}{mask.getbbox()}",
)
def test_the_mask_only_is_painted_as_by_diffusers(mask):
    picture = noise(*mask.size)
    canvas = read(file(Image.fromarray(picture)), file(mask), inpaint_mask_only=True)
    assert (canvas.width, canvas.height) == mask.size
    np.testing.assert_array_equal(canvas.overlay.picture, picture)
    np.testing.assert_array_equal(mask_of(canvas.overlay), np.asarray(mask))
    assert_like_diffusers(canvas, atol=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_hard_mask_is_painted_as_by_diffusers(data):
    width, height = (8 * data.draw(st.integers(8, 60)) for _ in "xy")
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top)))
    picture = file(Image.fromarray(noise(width, height)))
    canvas = read(picture, file(boxes((width, height), box)), inpaint_mask_only=True)
    assert_like_diffusers(canvas, atol=0)


@pytest.mark.parametrize("size", [None, (256, 192), (128, 256), (384, 64)])
@pytest.mark.parametrize("faintest", [1, 100, 255])
def test_a_soft_mask_is_pasted_softly(size, faintest):
    """To within one level of 255: diffusers rounds twice on the way."""
    mask = Image.new("L", (200, 152))
    ImageDraw.Draw(mask).ellipse((60, 50, 110, 90), fill=faintest)
    mask = mask.filter(ImageFilter.GaussianBlur(5))
    canvas = read(file(Image.fromarray(noise(200, 152))), file(mask), size=size, inpaint_mask_only=True)
    assert_like_diffusers(canvas, atol=1)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99), size=st.sampled_from([None, (64, 64), (256, 64), (96, 200)]))
def test_outside_the_mask_not_a_bit_changes(data, seed, size):
    width, height = (data.draw(st.integers(64, 200)) for _ in "xy")
    levels = st.sampled_from([0, 0, 0, 1, 128, 255])
    few = data.draw(st.lists(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1), levels), max_size=9))
    mask = Image.new("L", (width, height))
    for x, y, level in few:
        mask.paste(level, (x, y, x + seed, y + seed))
    picture, mask = file(Image.fromarray(noise(width, height, seed))), file(mask)
    plain, canvas = (read(picture, mask, size=size, inpaint_mask_only=flag) for flag in (False, True))
    assert plain.overlay is None
    assert (canvas.width, canvas.height) == (plain.width, plain.height)
    weights = mask_of(canvas.overlay)
    np.testing.assert_array_equal(weights >= 128, plain.mask)
    result = canvas.overlay.paste(noise(canvas.width, canvas.height, seed=100))
    assert (result.dtype, result.shape) == (np.uint8, plain.image.shape)
    np.testing.assert_array_equal(result[weights == 0], plain.image[weights == 0])
    np.testing.assert_array_equal(canvas.overlay.picture, plain.image)


def test_a_small_mask_is_painted_in_large():
    canvas = read(file(gradient(512, 512)), file(boxes((512, 512), (100, 200, 64, 64))), inpaint_mask_only=True)
    assert canvas.overlay.region == (68, 168, 196, 296)
    assert canvas.mask[130:382, 130:382].all()  # scaled, its corners are a little round
    assert canvas.mask[128:384, 128:384].sum() == canvas.mask.sum()
    # Painted blue, the square is blue and nothing else is.
    result = canvas.overlay.paste(np.full((512, 512, 3), (0, 0, 255), dtype=np.uint8))
    blue = (result == (0, 0, 255)).all(axis=2)
    assert blue[200:264, 100:164].all()
    assert blue.sum() == 64 * 64


def test_with_nothing_to_paint_the_result_is_the_input():
    canvas = read(file(gradient()), file(Image.new("L", (96, 64))), inpaint_mask_only=True)
    assert canvas.overlay.region == (0, 0, 96, 64)
    np.testing.assert_array_equal(canvas.image, np.asarray(gradient()))
    assert not canvas.mask.any()
    np.testing.assert_array_equal(canvas.overlay.paste(noise(96, 64)), np.asarray(gradient()))


def test_with_all_to_paint_the_result_is_what_was_painted():
    canvas = read(file(gradient()), file(Image.new("L", (96, 64), 255)), inpaint_mask_only=True)
    np.testing.assert_array_equal(canvas.image, np.asarray(gradient()))
    np.testing.assert_array_equal(canvas.overlay.paste(noise(96, 64)), noise(96, 64))


def test_the_mask_only_without_a_mask_is_refused():
    for image in (None, file(gradient())):
        with pytest.raises(InputError, match="needs a mask") as caught:
            read(image, inpaint_mask_only=True)
        assert caught.value.field == "inpaint_mask_only"
    with pytest.raises(InputError, match="mask: a mask needs an image"):
        read(None, file(Image.new("L", (64, 64))), inpaint_mask_only=True)


@pytest.mark.parametrize(
    ("given", "size"),
    [((96, 64), (4096, 64)), ((64, 96), (2048, 4096)), ((1000, 700), (4096, 2048)), ((2000, 1101), (1536, 2048))],
)
def test_sizes_beyond_1024_show_the_same_middle(given, size):
    """A ramp stays a ramp: its value tells which place of the input a pixel shows."""
    canvas = read(file(gradient(*given)), size=size)
    factor = max(size[0] / given[0], size[1] / given[1])
    for axis, middle in ((0, canvas.image[size[1] // 2, :, 0]), (1, canvas.image[:, size[0] // 2, 1])):
        place = given[axis] / 2 + (np.arange(size[axis]) + 0.5 - size[axis] / 2) / factor
        inner = (place > 3) & (place < given[axis] - 3)  # the ramp ends at the edges
        expected = (place - 0.5) * 255 / given[axis]
        np.testing.assert_allclose(middle[inner], expected[inner], atol=2)


@settings(max_examples=200)
@given(
    given_size=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    size=st.tuples(st.integers(8, 512), st.integers(8, 512)),
)
def test_every_size_up_to_4096_is_covered_and_no_more(given_size, size):
    size = (8 * size[0], 8 * size[1])
    scaled, cut = images._plan(given_size, size, 1024)
    assert cut == size
    assert min(scaled[0] - size[0], scaled[1] - size[1]) == 0
    factor = max(size[0] / given_size[0], size[1] / given_size[1])
    np.testing.assert_allclose(scaled, np.multiply(given_size, factor), rtol=0, atol=0.51)


LARGE = """
import io, resource
from PIL import Image
from lcm_rt.images import read_canvas
from lcm_rt.types import GenerateRequest

def file(mode, size, colour):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG", compress_level=1)
    return out.getvalue()

held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 640 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
for size in (4096, 4096), (256, 65535), (1, 65535), (65535, 1):
    picture, mask = file("RGBA", size, (255, 0, 0, 255)), file("L", size, 255)
    request = GenerateRequest("m", "p", 0, image=picture, mask=mask, size=(4096, 4096), inpaint_mask_only=True)
    canvas = read_canvas(request, 256)
    assert canvas.image.shape == (4096, 4096, 3)
    assert (canvas.image[::64, ::64] == (255, 0, 0)).all() and canvas.mask[::64, ::64].all()
    assert (canvas.overlay.paste(canvas.image)[::64, ::64] == (255, 0, 0)).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its memory limit")
def test_the_largest_pictures_and_sizes_need_no_more_than_640_mib():
    subprocess.run([sys.executable, "-c", LARGE], check=True, timeout=100)


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


def stripe(left: int, right: int) -> bytes:
    """A mask for the sketch."""
    mask = Image.new("L", (96, 96), 0)
    mask.paste(255, (left, 0, right, 96))
    return file(mask)


SKETCH = GenerateRequest("m", "p", 0, image=file(gradient(96, 96)), mask=stripe(0, 32))
HIT, MISS = ("cache", "canvas", "hit"), ("cache", "canvas", "miss")


def arrays_of(canvas: Canvas) -> list[np.ndarray]:
    overlay = [canvas.overlay.picture, canvas.overlay.mask] if canvas.overlay else []
    return [array for array in (canvas.image, canvas.mask, *overlay) if array is not None]


OTHERWISE = [
    {"image": file(gradient(96, 96).rotate(180))},
    {"mask": None},
    {"mask": stripe(0, 31)},
    {"mask": file(Image.new("RGBA", (96, 96), (255, 255, 255, 0))), "mask_alpha": True},
    {"mask": file(Image.new("RGBA", (96, 96), (255, 255, 255, 0))), "mask_alpha": False},
    {"inpaint_mask_only": True},
    {"size": (64, 64)},
    {"max_side": 80},
]


@pytest.mark.parametrize("seen_before", [False, True])
def test_remembered_canvases_are_those_that_would_be_read(seen_before):
    counts: Counter = Counter()
    canvases = Canvases(counts)
    asked = [SKETCH, *(replace(SKETCH, **changes) for changes in OTHERWISE)]
    if seen_before:
        for request in asked:
            canvases.read(request, 256)
    for request in asked:
        canvas, expected = canvases.read(request, 256), read_canvas(request, 256)
        assert (canvas.width, canvas.height, canvas.digest) == (expected.width, expected.height, expected.digest)
        assert len(arrays_of(canvas)) == len(arrays_of(expected))
        for array, other in zip(arrays_of(canvas), arrays_of(expected), strict=True):
            np.testing.assert_array_equal(array, other)
            assert not array.flags.writeable
    assert counts[MISS] == len(asked)
    assert counts[HIT] == (len(asked) if seen_before else 0)


def test_a_new_prompt_over_the_same_sketch_decodes_nothing(monkeypatch):
    canvases = Canvases(Counter())
    canvas = canvases.read(SKETCH, 256)
    monkeypatch.setattr(images, "_open", None)
    for other in (replace(SKETCH, prompt="lake", seed=5, strength=0.3), replace(SKETCH, session="s", model="n")):
        assert canvases.read(other, 512) is canvas


def test_without_a_picture_nothing_is_remembered():
    counts: Counter = Counter()
    canvases = Canvases(counts)
    request = replace(SKETCH, image=None, mask=None)
    assert canvases.read(request, 256) == Canvas(256, 256)
    assert canvases.read(request, 512) == Canvas(512, 512)
    assert not counts


def test_bad_files_are_refused_each_time():
    counts: Counter = Counter()
    canvases = Canvases(counts)
    for _ in range(2):
        with pytest.raises(ImageError, match="mask: is not a PNG"):
            canvases.read(replace(SKETCH, mask=b"junk"), 256)
    assert counts == {MISS: 2}


def test_remembered_canvases_are_bounded_by_bytes():
    counts: Counter = Counter()
    one, two, large = SKETCH, replace(SKETCH, max_side=88), replace(SKETCH, size=(512, 512))
    room = read_canvas(one, 256).nbytes + read_canvas(two, 256).nbytes + 4096
    assert read_canvas(one, 256).nbytes == 96 * 96 * (3 + 1)
    canvases = Canvases(counts, room)
    for request in (one, two, large, one, two):
        canvases.read(request, 256)
    assert counts == {MISS: 3, HIT: 2}  # the large one has no room, and takes nobody's


def test_threads_share_canvases():
    counts: Counter = Counter()
    canvases = Canvases(counts)
    asked = [replace(SKETCH, max_side=side) for side in (64, 72, 80, 88)] * 8
    expected = {request.max_side: read_canvas(request, 256) for request in asked}
    with ThreadPoolExecutor(2) as pool:
        for canvas, request in zip(pool.map(lambda request: canvases.read(request, 256), asked), asked, strict=True):
            np.testing.assert_array_equal(canvas.image, expected[request.max_side].image)
    assert counts[HIT] + counts[MISS] == len(asked)


def test_a_digest_is_of_the_pixels_alone():
    """So that who paints on a mask, with each stroke, has the picture encoded once."""

    def digest(**changes):
        return read_canvas(replace(SKETCH, **changes), 256).digest

    assert digest() == digest(mask=None) == digest(mask=stripe(0, 31)) == digest(prompt="lake", seed=9)
    only = digest(inpaint_mask_only=True)
    others = [digest(inpaint_mask_only=True, mask=stripe(0, 31)), digest(size=(64, 64)), digest(max_side=80)]
    assert len({digest(), only, *others, digest(image=file(gradient(96, 96).rotate(180)))}) == 6
    layer = file(Image.new("RGBA", (96, 96), (255, 255, 255, 0)))
    by_alpha, by_colour = (digest(inpaint_mask_only=True, mask=layer, mask_alpha=alpha) for alpha in (True, False))
    assert by_alpha != by_colour
    assert read().digest is None
