"""Bytes to pictures. Everything that cannot be used raises ValueError with a reason for the ledger."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mm.adapters.resample import Box, resize, rgb, snap
from mm.data.dimensions import Jpeg, dimensions, jpeg

MAX_PIXELS = 50_000_000
_LEAST_SIDE = 384  # pixels that a reduced picture keeps on its shorter side, so that its crops tend to share a decode
_DAMAGE = ("Corrupt JPEG data", "Premature end")  # how libjpeg's warnings of lost pixels begin
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FLIPS = dict(zip(range(1, 9), 2 * [(False, False), (True, False), (True, True), (False, True)], strict=True))  # (x, y)


class Picture:
    """An upright picture that decodes what is asked of it, when it is: JPEG at 1/2, 1/4 or 1/8 where that is enough.

    At which scale depends on the picture and the crop only, so that a crop is the same whatever was asked before.
    Raises ValueError where the pixels cannot be decoded. What is decoded is kept until the picture goes.
    """

    def __init__(self, data: bytes, header: Jpeg | None, max_pixels: int):
        self._data, self._header, self._max_pixels = data, header, max_pixels  # no header: Pillow decodes
        self._kept: dict[int, np.ndarray] = {}  # by scale, as stored; what Pillow decodes as 0, upright

    @property
    def size(self) -> tuple[int, int]:
        """(width, height). Of PNG and WebP it decodes the pixels: what turns the picture may lie behind them."""
        if self._header is None:
            height, width, _ = self.pixels().shape
            return width, height
        width, height, orientation, _ = self._header
        return (height, width) if orientation >= 5 else (width, height)

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory: the file, while it may be decoded again, and what was decoded."""
        return len(self._data) + sum(pixels.nbytes for pixels in list(self._kept.values()))

    def pixels(self) -> np.ndarray:
        """All of it: uint8 `[height, width, 3]`, shared: copy before writing."""
        header = self._header
        if header is not None and (stored := self._stored(header, 1)) is not None:
            return _turned(stored, header.orientation)
        data = self._data  # before what is kept: another thread may be done with it in between
        if 0 not in self._kept:
            self._keep(0, np.asarray(image(data, max_pixels=self._max_pixels)), last=True)
        return self._kept[0]

    def crop(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        """Fresh uint8 `[h, w, 3]`: `box` (left, top, right, bottom, in upright pixels of full size) at `size` (w, h).

        The box moves to the nearest pixels of the scale that is decoded, by half a pixel of that scale at most.
        """
        header = self._header
        if header is not None:
            box_there, size_there = _as_stored(box, size, self.size, header.orientation)
            scale = _scale(header, box_there, size_there)
            stored = self._stored(header, scale)
            if stored is not None:
                height, width, _ = stored.shape
                part = resize(stored, snap(box_there, (width, height), scale), size_there)
                return _turned(part, header.orientation)
        pixels = self.pixels()
        height, width, _ = pixels.shape
        return resize(pixels, snap(box, (width, height)), size)

    def _stored(self, header: Jpeg, scale: int) -> np.ndarray | None:
        """The JPEG's pixels as stored, at 1 / `scale`; None where it is left to Pillow from here on."""
        data = self._data
        if scale in self._kept:
            return self._kept[scale]
        height, width = (0, 0) if scale == 1 else (-(-header.height // scale), -(-header.width // scale))
        try:
            pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)  # the smallest that has these
        except ValueError as error:
            if str(error).startswith(_DAMAGE):
                raise ValueError(f"image cannot be decoded: {_one_line(error)}") from error
            self._header = None  # odd rather than damaged, such as colours sampled in an unusual way
            return None
        self._keep(scale, pixels, last=min(header.width, header.height) < 2 * _LEAST_SIDE)
        return pixels

    def _keep(self, scale: int, pixels: np.ndarray, *, last: bool) -> None:
        pixels.setflags(write=False)
        self._kept[scale] = pixels
        if last:  # no other scale will be asked for
            self._data = b""


def picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in JPEG, PNG or WebP `data`: its header is read, nothing decoded.

    Raises ValueError where it is none of these, or has more than `max_pixels`.
    """
    header = jpeg(data) if data[:2] == b"\xff\xd8" else None
    if header is not None and header.plain and header.width and header.height:
        _check(header.width, header.height, max_pixels)
        return Picture(data, header, max_pixels)
    size = dimensions(data)
    if size is None:
        open_image(data, max_pixels=max_pixels)  # says what is wrong, if anything is
    else:
        _check(*size, max_pixels)
    return Picture(data, None, max_pixels)


def _scale(header: Jpeg, box: Box, size: tuple[int, int]) -> int:
    """The most that a picture may be reduced by while `box` has no fewer pixels than `size` either way."""
    for scale in (8, 4, 2):
        enough = box[2] - box[0] >= scale * size[0] and box[3] - box[1] >= scale * size[1]
        if enough and min(header.width, header.height) >= scale * _LEAST_SIDE:
            return scale
    return 1


def _as_stored(
    box: Box, size: tuple[int, int], whole: tuple[int, int], orientation: int
) -> tuple[Box, tuple[int, int]]:
    """A box and size in an upright picture of size `whole`, as they lie in the file."""
    left, top, right, bottom = box
    across, down = _FLIPS[orientation]
    if across:
        left, right = whole[0] - right, whole[0] - left
    if down:
        top, bottom = whole[1] - bottom, whole[1] - top
    if orientation >= 5:
        return (top, left, bottom, right), (size[1], size[0])
    return (left, top, right, bottom), size


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels `[H, W, 3]` as stored, upright."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    across, down = _FLIPS[orientation]
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1])


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in JPEG, PNG or WebP `data`, header read but pixels not yet decoded.

    Raises ValueError where it is none of these, or has more than `max_pixels`: no decoder runs on it then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:  # its message holds a memory address: never twice the same
        raise ValueError("not a JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
        raise ValueError(f"not a readable JPEG, PNG or WebP image: {_one_line(error)}") from error
    _check(*picture.size, max_pixels)
    return picture


def _check(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"image of {width}x{height} pixels is over the limit of {max_pixels}")


def image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB picture in `data`: EXIF orientation applied, transparency laid on white, 16 bits scaled to 8.

    Raises ValueError where it cannot be decoded or has more than `max_pixels` pixels (checked before decoding).
    """
    picture = open_image(data, max_pixels=max_pixels)
    try:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        picture = rgb(picture)
        return picture if turn is None else picture.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"image cannot be decoded: {_one_line(error)}") from error


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF leaves the pixels whole: show them as stored, as browsers do
        return 1


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
