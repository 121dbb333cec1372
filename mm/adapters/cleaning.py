"""What open_clip does to a caption before it is cut into tokens; the same here, without it."""

from __future__ import annotations

import html
import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaned(text: str, how: str) -> str:
    """Mojibake repaired by ftfy, entities unescaped twice, runs of white space made one space.

    "lower": small letters too, as CLIP; "canonicalize": those, and no punctuation, as SigLIP's first models.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()
