"""How a model reads pictures, in the words of other libraries."""

from __future__ import annotations

from typing import Any

from mm.config import ImageConfig

RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def open_clip(image: ImageConfig) -> dict[str, Any]:
    """open_clip's `preprocess_cfg`. mm's own "crop" takes the same part of a picture as its "shortest"."""
    return {
        "size": image.size,
        "mode": "RGB",
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "resize_mode": "shortest" if image.resize == "crop" else image.resize,
        "fill_color": image.fill,
    }


def hugging_face(image: ImageConfig, kind: str = "") -> dict[str, Any]:
    """The fields of Hugging Face's preprocessor_config.json; `kind` is the class of `transformers` that reads it.

    "longest" has the field `longest_edge` and padding, which `transformers`' own classes do not do.
    """
    side = {"height": image.size, "width": image.size}
    size = {"squash": side, "longest": {"longest_edge": image.size}}.get(image.resize, {"shortest_edge": image.size})
    return {
        **({"image_processor_type": kind} if kind else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": RESAMPLE[image.interpolation],
        "do_center_crop": image.resize in ("shortest", "crop"),
        "crop_size": side,
        **({"do_pad": True, "pad_size": side, "pad_value": image.fill} if image.resize == "longest" else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
