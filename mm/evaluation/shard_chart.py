"""One picture of what is in some shards, beside the table of `mm shards stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR = "#3b6fb6"


def draw(found: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG of 1200 × 840 pixels: image sizes, aspect ratios, caption lengths, samples per shard.

    `found` is what `mm.data.stats.stats` returns. Raises ConfigError without matplotlib, OSError where `path` cannot be
    written.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: needs no display, leaves no state behind
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError as error:
        raise ConfigError("the picture of mm shards stats needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    (sizes, aspects), (words, shards) = figure.subplots(2, 2)
    histograms = found["histograms"]

    _bars(sizes, histograms["image_bytes"], scale=1e-3)
    sizes.set_xscale("log")
    _name(sizes, "Image files", "size (kB, log)", "images")

    _aspects(aspects, found["pictures"])

    _bars(words, histograms["caption_words"], shift=-0.5)  # a bar's middle stands above its number
    above = histograms["caption_words"]["above"]
    last = histograms["caption_words"]["edges"][-2]
    rest = f"; the last bar: {last} and more" if above else ""
    read = found["captions"]["read"]
    _name(words, f"Captions ({read:,} of {found['captions']['of']:,} read)", f"length (words{rest})", "captions")

    _bars(shards, histograms["samples_per_shard"], shift=-0.5)
    shards.set_yscale("log")  # one short shard among thousands is seen too
    shards.set_ylim(bottom=0.5)
    _name(shards, "Shards", "usable samples in a shard", "shards (log)")

    for axis in (sizes.xaxis, shards.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")

    size = f"{found['bytes']['total'] / 1e6:,.1f} MB"
    figure.suptitle(f"{found['usable']:,} usable samples of {found['samples']:,} in {found['shards']:,} shards, {size}")
    figure.savefig(path, format="png")


def _bars(axes: Axes, histogram: dict[str, Any], *, scale: float = 1.0, shift: float = 0.0) -> None:
    edges = [edge * scale + shift for edge in histogram["edges"]]
    axes.stairs(histogram["counts"], edges, fill=True, color=COLOUR)


def _aspects(axes: Axes, pictures: dict[str, Any]) -> None:
    unknown = f" ({pictures['unknown']:,} of unknown size)" if pictures["unknown"] else ""
    _name(axes, f"Aspect ratios{unknown}", "width : height, to the nearest of these", "pictures")
    if not pictures["known"]:
        axes.text(0.5, 0.5, "sizes are not in the index:\nmm shards index", ha="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    names = list(pictures["aspect"])
    axes.bar(names, list(pictures["aspect"].values()), color=COLOUR)


def _name(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.0f}")
