"""The tiles of `tiles.py` on a GPU, same functions: what launches the kernels, and the configurations that ship.

Embeddings have any of float32, float16, bfloat16; statistics, sums and products are float32, weights as embeddings.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from mm_kernels.contrastive_loss.kernels import product_kernel, sigmoid_kernel, softmax_kernel, statistics_kernel
from mm_kernels.runtime import interpreted, launches

EDGE = 8192  # of a tile: 128 MB of bfloat16 weights, and products large enough for every core of a GPU
SLOPES = True  # tiles sum dL/dt themselves: from the gradient of images it would have the error of rounded weights
OPTIONS = ("num_warps", "num_stages")
HALF = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}
FLOAT32 = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2}
SIGMOID = HALF | {"BN": 64}  # more is live in its epilogue: a tile of 128 × 128 spills registers
INTERPRETED = {"BM": 32, "BN": 64, "BK": 32, "num_warps": 1, "num_stages": 1}  # several programs for a small tile
OVERRIDES: dict[str, dict[str, Any]] = {"gfx942": {"BK": 32, "num_stages": 2}}  # 64 KB of shared memory


def statistics(image: Tensor, text: Tensor, scale: Tensor, first: int) -> tuple[Tensor, Tensor]:
    settings = _settings(image)
    grid = _grid(len(image), len(text), settings)
    rows = scale.new_empty(grid[1], len(image))
    columns = scale.new_empty(grid[0], len(text))
    arguments = image, text, scale, rows, columns, *_sizes(image, text), first
    _launch("contrastive_statistics", statistics_kernel, grid, arguments, settings, **_even(image, settings))
    return rows.logsumexp(0), columns.logsumexp(0)


def softmax_weights(
    image: Tensor, text: Tensor, scale: Tensor, first: int, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    settings = _settings(image)
    grid = _grid(len(image), len(text), settings)
    weights, sums = image.new_empty(len(image), len(text)), scale.new_zeros(3, *grid)
    arguments = image, text, scale, rows, columns, weights, sums, *_sizes(image, text), first
    _launch("contrastive_softmax", softmax_kernel, grid, arguments, settings, **_even(image, settings))
    return weights, sums.double().sum((1, 2))


def sigmoid_weights(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, first: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    settings = _settings(image, SIGMOID)
    grid = _grid(len(image), len(text), settings)
    weights = image.new_empty(len(image), len(text)) if gradients else image.new_empty(0)
    sums = scale.new_zeros(3, *grid)
    arguments = image, text, scale, bias, weights, sums, *_sizes(image, text), first
    _launch(
        "contrastive_sigmoid", sigmoid_kernel, grid, arguments, settings, GRADIENTS=gradients, **_even(image, settings)
    )
    return weights, sums.double().sum((1, 2))


def add_product(out: Tensor, weights: Tensor, embeddings: Tensor) -> None:
    if weights.dtype == torch.float32:
        out.addmm_(weights, embeddings)  # torch's exact product has tuned kernels everywhere
        return
    settings = _settings(embeddings)
    transposed = not weights.is_contiguous()
    arguments = weights.T if transposed else weights, embeddings, out, *weights.shape, embeddings.shape[1]
    grid = _grid(len(out), out.shape[1], settings)
    _launch("contrastive_product", product_kernel, grid, arguments, settings, TRANSPOSED=transposed)


def _sizes(image: Tensor, text: Tensor) -> tuple[int, int, int]:
    return len(image), len(text), image.shape[1]


def _grid(rows: int, columns: int, settings: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(rows, settings["BM"]), triton.cdiv(columns, settings["BN"])


def _even(embeddings: Tensor, settings: dict[str, Any]) -> dict[str, bool]:
    """Whether blocks divide the width, and so need no mask along it."""
    return {"EVEN": embeddings.shape[1] % settings["BK"] == 0}


def _launch(
    name: str, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], settings: dict[str, Any], **flags: bool
) -> None:
    launches[name] += 1
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **settings, **flags)


def _settings(embeddings: Tensor, half: dict[str, int] = HALF) -> dict[str, Any]:
    """How a kernel runs on these embeddings; `half`: where they are float16 or bfloat16."""
    if interpreted():
        return INTERPRETED
    if embeddings.dtype == torch.float32:
        return FLOAT32
    return half | OVERRIDES.get(_architecture(embeddings.device), {})


@cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def shipped() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int, dict[str, dict[str, Any]]]]:
    """Every kernel by type, and for one type with widths that its blocks do not divide."""
    cases: list[tuple[str, Any, dict[str, bool]]] = [
        ("statistics", statistics_kernel, {}),
        ("softmax", softmax_kernel, {}),
        ("sigmoid", sigmoid_kernel, {"GRADIENTS": True}),
        ("sigmoid value", sigmoid_kernel, {"GRADIENTS": False}),
        ("product", product_kernel, {"TRANSPOSED": False}),
        ("product transposed", product_kernel, {"TRANSPOSED": True}),
    ]
    found = []
    for name, kernel, flags in cases:
        for kind, even in (("bf16", True), ("bf16", False), ("fp16", True), ("fp32", True)):
            if kernel is product_kernel and (kind != "bf16" or not even):
                continue  # float32 products are torch's, and a half-precision one is the same for all lengths
            if name == "sigmoid value" and (kind == "fp16" or not even):
                continue  # less work than with gradients, which are listed
            settings = FLOAT32 if kind == "fp32" else SIGMOID if kernel is sigmoid_kernel else HALF
            constants = (
                ({} if kernel is product_kernel else {"EVEN": even})
                | flags
                | {key: n for key, n in settings.items() if key not in OPTIONS}
            )
            types = dict.fromkeys(("Image", "Text", "Weights", "Embeddings"), f"*{kind}") | dict.fromkeys(
                "MNKE", "i32:16"
            )
            singles = ("Scale", "Bias", "Rows", "Columns", "Sums", "Out")
            types |= dict.fromkeys(singles, "*fp32") | {"first": "i32"}
            signature = {key: types[key] for key in kernel.arg_names if key not in constants}
            title = f"{name} {kind}" + ("" if even else " ragged")
            overrides = {} if kind == "fp32" else OVERRIDES
            found.append((title, kernel, signature, constants, *(settings[key] for key in OPTIONS), overrides))
    return found
