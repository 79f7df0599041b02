"""Picture files to pixels and back, with limits checked before decoding; knows no tensor and no network.

What becomes of an input picture, in this order: its EXIF orientation is applied, transparency is laid on white, it is
scaled to cover the size asked for (or, without one, scaled down until no side exceeds ``MAX_SIDE`` or what the server
allows), and its middle is cut out: at the size asked for, or at the largest multiples of 8. A mask belongs to the
picture's own pixels and takes the same road; its white is painted, or with ``mask_alpha`` what is transparent in it.

With ``inpaint_mask_only`` the mask's surroundings are then enlarged to the whole canvas, and an ``Overlay`` brings what
is painted there back into the picture. Region, enlargement and way back are those of the diffusers pipelines with
``padding_mask_crop``.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lcm_rt.cache import Cache, Counts, content_key, tally
from lcm_rt.errors import ImageError, InputError
from lcm_rt.types import MAX_SIDE, Format, GenerateRequest

MAX_FILE_BYTES = 32 * 2**20
MAX_PIXELS = 4096 * 4096
MAX_LENGTH = 2**16 - 1  # px, as in JPEG and GIF; Pillow's table of a million rows outweighs their pixels
MIN_SIDE = 64
GRID = 8  # px; one latent of the VAEs served here
PADDING = 32  # px around the mask that ``inpaint_mask_only`` paints from
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # Pillow's other decoders are seldom used and seldom looked at.
CANVAS_BYTES = 64 * 2**20  # of decoded pictures: 80 of 512x512, so that a few cameras do not push out a typist's sketch


@dataclass(frozen=True, slots=True)
class Overlay:
    """The way back of an enlarged region into its picture.

    ``picture`` is (H, W, 3) uint8. ``region`` is (left, top, right, bottom) in its pixels, and ``mask`` (bottom - top,
    right - left) uint8 says how much of what is painted shows there: 0 nothing, 255 all.
    """

    picture: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    region: tuple[int, int, int, int]

    def paste(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A copy of the picture with ``pixels`` (H, W, 3), the painted region in large, laid over it.

        Where the mask is 0, and outside of the region, it is the picture's pixels exactly.
        """
        left, top, right, bottom = self.region
        painted = _place(Image.fromarray(pixels), (right - left, bottom - top), cover=True)
        result = self.picture.copy()
        window = result[top:bottom, left:right]
        window[:] = np.asarray(Image.composite(painted, Image.fromarray(window), Image.fromarray(self.mask)))
        return result


@dataclass(frozen=True, slots=True)
class Canvas:
    """What to paint on: a size, perhaps a picture (H, W, 3), perhaps a mask (H, W) that is True where to paint.

    With an overlay, picture and mask are only a region of the input, enlarged, and the overlay pastes the result back.
    ``digest`` is of all that decides the picture's pixels: canvases with the same one have equal pictures, whatever
    their masks.
    """

    width: int
    height: int
    image: npt.NDArray[np.uint8] | None = None
    mask: npt.NDArray[np.bool_] | None = None
    overlay: Overlay | None = None
    digest: bytes | None = None

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        arrays = [self.image, self.mask, *([self.overlay.picture, self.overlay.mask] if self.overlay else [])]
        return sum(array.nbytes for array in arrays if array is not None)


class Canvases:
    """What ``read_canvas`` made of the files that came last: who types over a fixed sketch sends it with each key.

    Any thread may ask. Those who send the same files share a canvas, whose arrays cannot be written to.
    """

    def __init__(self, counts: Counts, max_bytes: int = CANVAS_BYTES) -> None:
        self._kept: Cache[Canvas] = Cache(max_bytes, lambda canvas: canvas.nbytes, tally(counts, "canvas"))

    def read(self, request: GenerateRequest, default_side: int) -> Canvas:
        """As ``read_canvas``; the same files, taken the same way, are decoded once. Raises: as ``read_canvas``."""
        if request.image is None:
            return read_canvas(request, default_side)
        facts = (request.size, request.max_side, request.mask_alpha, request.inpaint_mask_only)
        key = content_key(facts, request.image, request.mask)
        return self._kept.get_or_make(key, lambda: read_canvas(request, default_side))


def read_canvas(request: GenerateRequest, default_side: int) -> Canvas:
    """Decode the picture and the mask of ``request`` and settle the size of its result.

    Raises:
        ImageError: a file is too large, broken, of an unknown format, or does not fit the other.
        InputError: there is a mask, but no picture, or only the mask is to be painted, but there is none.
    """
    if request.inpaint_mask_only and request.mask is None:
        raise InputError("inpaint_mask_only", "needs a mask")
    if request.image is None:
        if request.mask is not None:
            raise InputError("mask", "a mask needs an image")
        side = min(default_side, request.max_side // GRID * GRID)
        width, height = request.size or (side, side)
        return Canvas(width, height)
    image = _on(_open("image", request.image), "white").convert("RGB")
    mask = None
    if request.mask is not None:
        mask = _mask(_open("mask", request.mask), by_alpha=request.mask_alpha)
        if mask.size != image.size:
            raise ImageError("mask", f"is {_times(mask.size)} pixels, but the image is {_times(image.size)}")
    scaled, size = _plan(image.size, request.size, min(MAX_SIDE, request.max_side))
    if min(size) < MIN_SIDE:
        raise ImageError("image", f"{_times(image.size)} pixels is too small: no side of the result may be under 64")
    image = _fit(image, scaled, size)
    digest = content_key((request.size, request.max_side), request.image)
    if mask is None:
        return Canvas(*size, _fixed(np.array(image)), digest=digest)
    mask, overlay = _fit(mask, scaled, size), None
    if request.inpaint_mask_only:
        region = _region(mask)
        overlay = Overlay(_fixed(np.array(image)), _fixed(np.array(mask.crop(region))), region)
        image, mask = _place(image.crop(region), size), _place(mask.crop(region), size)
        digest = content_key((digest, request.mask_alpha), request.mask)
    return Canvas(*size, _fixed(np.array(image)), _fixed(np.array(mask) >= 128), overlay, digest)


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)  # many requests may share it
    return array


def encode_picture(pixels: npt.NDArray[np.uint8], format: Format, quality: int) -> tuple[bytes, str]:
    """``pixels`` (H, W, 3) as a file, and its content type; for real-time use: fast before small."""
    options: dict[str, int] = {
        "jpeg": {"quality": quality},
        "png": {"compress_level": 1},
        "webp": {"quality": quality, "method": 0},
    }[format]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format.upper(), **options)
    return file.getvalue(), f"image/{format}"


def _open(field: str, data: bytes) -> Image.Image:
    """Decode the first picture of a file, upright, after a look at its header alone."""
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(field, f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height <= MAX_PIXELS and max(picture.size) <= MAX_LENGTH:
                return ImageOps.exif_transpose(picture)
            size = picture.size
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file.
        raise ImageError(field, "is not a PNG, JPEG, WebP or GIF file that can be decoded") from error
    raise ImageError(
        field, f"is {_times(size)} pixels; at most {MAX_PIXELS / 1e6:.1f} million, {MAX_LENGTH} a side, are taken"
    )


def _on(picture: Image.Image, ground: str) -> Image.Image:
    """Lay transparency on one colour; bring 16-bit grey to 8."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, ground), layer)


def _mask(picture: Image.Image, *, by_alpha: bool) -> Image.Image:
    """A mask file as levels of grey: 255 is painted anew."""
    if not by_alpha:
        # Drawn on a transparent layer, as browsers do, only the strokes are to be filled: so black, not white.
        return _on(picture, "black").convert("L")
    if not picture.has_transparency_data:
        raise ImageError("mask", "has no transparency, and what is transparent in it would be painted")
    return ImageOps.invert(picture.convert("RGBA").getchannel("A"))


def _plan(size: tuple[int, int], wanted: tuple[int, int] | None, limit: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to scale to, and the size of the middle to cut out of that."""
    width, height = size
    if wanted is None:
        factor = min(1.0, limit / max(size))
        scaled = (round(width * factor), round(height * factor))
        return scaled, (scaled[0] // GRID * GRID, scaled[1] // GRID * GRID)
    factor = max(wanted[0] / width, wanted[1] / height)
    # Rounding may lose the pixel that covers the edge.
    return (max(wanted[0], math.ceil(width * factor - 0.5)), max(wanted[1], math.ceil(height * factor - 0.5))), wanted


def _fit(picture: Image.Image, scaled: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    box = (left, top, left + size[0], top + size[1])
    if scaled == picture.size:
        return picture.crop(box)
    # Only the middle is scaled: all of a picture of 1x4096, made 1024 wide, would be four million high.
    x, y = picture.width / scaled[0], picture.height / scaled[1]
    return picture.resize(size, Image.Resampling.LANCZOS, (box[0] * x, box[1] * y, box[2] * x, box[3] * y))


def _region(mask: Image.Image) -> tuple[int, int, int, int]:
    """The part of a picture around all that is not black in ``mask``, padded, in the picture's proportions.

    Proportions hold to within a pixel. With nothing to paint it is the whole picture.
    """
    width, height = mask.size
    left, top, right, bottom = mask.getbbox() or (0, 0, width, height)
    left, top = max(0, left - PADDING), max(0, top - PADDING)
    right, bottom = min(width, right + PADDING), min(height, bottom + PADDING)
    # Divided in floating point, as diffusers does: its error decides whether some regions get their last pixel.
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widen(top, bottom, int((right - left) / ratio), height)
    else:
        left, right = _widen(left, right, int((bottom - top) * ratio), width)
    return left, top, right, bottom


def _widen(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """Widen low..high on both sides to ``length``, if it is shorter, without leaving 0..limit."""
    length = max(length, high - low)
    low = max(0, min(low - (length - (high - low)) // 2, limit - length))
    return low, low + length


def _place(part: Image.Image, size: tuple[int, int], *, cover: bool = False) -> Image.Image:
    """``part`` in the middle of ``size``, scaled in proportion until it fits, or until it covers all.

    What then stands out is cut off; a gap, which is due to rounding alone, is filled with the edge beside it.
    """
    width, height = size
    if (part.width * height > part.height * width) != cover:
        w, h = width, part.height * width // part.width
    else:
        w, h = part.width * height // part.height, height
    scaled = part.resize((w, h), Image.Resampling.LANCZOS)
    x, y = width // 2 - w // 2, height // 2 - h // 2
    placed = Image.new(part.mode, size)
    placed.paste(scaled, (x, y))
    # A box without extent is an edge drawn out.
    if x > 0:
        placed.paste(scaled.resize((x, h), Image.Resampling.BICUBIC, (0, 0, 0, h)), (0, 0))
        placed.paste(scaled.resize((x, h), Image.Resampling.BICUBIC, (w, 0, w, h)), (x + w, 0))
    if y > 0:
        placed.paste(scaled.resize((w, y), Image.Resampling.BICUBIC, (0, 0, w, 0)), (0, 0))
        placed.paste(scaled.resize((w, y), Image.Resampling.BICUBIC, (0, h, w, h)), (0, y + h))
    return placed


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
