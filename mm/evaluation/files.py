"""Pictures and lists of words that people name on a command line: opened, or refused in a line with the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mm.data.decode import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

# those that other programs' pictures come in; a few more that Pillow knows start a program, or are no pictures
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "QOI")
MAX_BYTES = 256 << 20  # of a picture file or a list of words


def open_image(path: str) -> Image.Image:
    """The decoded, upright image of a file. Raises ValueError naming the file where it is no image, or damaged."""
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and of sizes: the limit below is stricter
            with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS}")
                image.load()
                try:
                    return ImageOps.exif_transpose(image)
                except Exception:  # damaged EXIF leaves the pixels whole: show them as stored, as browsers do
                    return image.copy()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: over the limit of {MAX_PIXELS} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        if isinstance(error, OSError) and error.errno:  # missing, a folder, no permission: says so itself
            raise
        raise ValueError(f"{path}: a damaged image ({' '.join(str(error).split())[:200]})") from error


def read_lines(path: str, what: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank, stripped; `what` says in errors what a line should be.

    `-` is standard input. Raises ValueError where it is no text, too large, or holds nothing.
    """
    import sys

    try:
        if path == "-":
            text = sys.stdin.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise ValueError(f"stdin: over {MAX_BYTES >> 20} MB; is it a list, with {what} a line?")
        else:
            if Path(path).is_file() and Path(path).stat().st_size > MAX_BYTES:
                raise ValueError(f"{path}: over {MAX_BYTES >> 20} MB; is it a list, with {what} a line?")
            text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); give {what} a line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no {what.partition(' ')[2]} in it; give {what} a line")
    return lines
