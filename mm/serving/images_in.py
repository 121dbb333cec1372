"""Pictures that arrive as base64 or as bytes. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from mm.data.decode import image
from mm.data.dimensions import dimensions
from mm.serving.errors import bad, over, short

if TYPE_CHECKING:
    from PIL import Image

    from mm.serving.limits import Limits

DATA_URL = re.compile(r"data:(?P<media>[a-z0-9.+/-]*)(?P<base64>;base64)?,", re.IGNORECASE)
MEDIA = ("image/png", "image/jpeg", "image/webp")
FORMS = "base64, or data:image/png;base64,..."


def from_text(text: str, param: str, limits: Limits) -> Image.Image:
    """The upright RGB picture in base64, bare or as a data URL. Raises ApiError 400 naming what is wrong with it."""
    found = DATA_URL.match(text)
    if found:
        if not found["base64"] or found["media"].lower() not in MEDIA:
            raise bad(
                f"{param} = {short(text[:40])}: a data URL must begin data:image/png;base64, (or jpeg, webp)", param
            )
        text = text[found.end() :]
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", text):
        raise bad(f"{param} = {short(text[:40])}: URLs are not fetched; send the picture itself as {FORMS}", param)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise bad(f"{param}: not base64 ({error}); send the picture as {FORMS}", param) from error
    return from_bytes(data, param, limits)


def from_bytes(data: bytes, param: str, limits: Limits) -> Image.Image:
    """The upright RGB picture in the bytes of a JPEG, PNG or WebP file. Raises ApiError 400."""
    if not data:
        raise bad(f"{param}: is empty; send a picture", param)
    size = dimensions(data)  # where the header is plain enough to tell; `image` checks whatever it opens
    if size is not None and size[0] * size[1] > limits.max_pixels:
        raise over(param, "--max-pixels", f"{size[0]}x{size[1]}", limits.max_pixels, "pixels")
    try:
        return image(data, max_pixels=limits.max_pixels)
    except ValueError as error:
        raise bad(f"{param}: {error}", param, "invalid_image") from error
