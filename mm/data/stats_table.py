"""`mm shards stats` as text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mm.data.stats import OTHER, SMALL


def table(found: dict[str, Any]) -> str:
    """`stats`' figures as at most 40 lines of at most 110 characters."""
    pictures, captions, copies = found["pictures"], found["captions"], found["duplicates"]
    megabytes = {name: size / 1e6 for name, size in found["bytes"]["per_shard"].items()}
    kilobytes = {name: size / 1e3 for name, size in found["image_bytes"].items()}
    counts = f"{found['samples']:,} samples: {found['usable']:,} usable, {found['rejected']:,} rejected"
    members = ", ".join(f"{word} in {count:,}" for word, count in list(found["extensions"].items())[:8])
    aspects = pictures["aspect"]
    lines = [
        _line("shards", f"{found['shards']:,} of {found['bytes']['total'] / 1e6:,.1f} MB with {counts}"),
        _line("members", f"{members} shards"),
        _cells("", ("min", "median", "max")),
        _cells("samples per shard", found["samples_per_shard"].values()),
        _cells("MB per shard", megabytes.values()),
        _cells("", ("1 %", "25 %", "50 %", "75 %", "99 %", "mean")),
        _cells("image, kB", kilobytes.values()),
        *([_cells("width, pixels", pictures["width"].values())] if pictures["known"] else []),
        *([_cells("height, pixels", pictures["height"].values())] if pictures["known"] else []),
        _cells("caption, characters", captions["characters"].values()),
        _cells("caption, words", captions["words"].values()),
    ]
    if pictures["known"]:
        lines += [
            _line("width : height", "".join(f"{name:>7}" for name in aspects)),
            _line("  % of pictures", "".join(f"{100 * n / pictures['known']:7.1f}" for n in aspects.values())),
            _line(f"short side < {SMALL}", f"{pictures['small']:,} pictures, {100 * pictures['small_share']:.1f} %"),
        ]
    if pictures["unknown"]:
        lines.append(_line("size unknown", f"{pictures['unknown']:,} pictures (mm shards index looks at them)"))
    told = f"{captions['read']:,} of {captions['of']:,} read; {captions['empty']:,} empty, {captions['unreadable']:,}"
    same = f"{captions['identical']:,} ({100 * captions['identical_share']:.1f} %) the same as another"
    lines.append(_line("captions", f"{told} unreadable; {same}"))
    lines += _counts("", captions["problems"], 2)
    unread = f"; {copies['unread']:,} could not be read" if copies["unread"] else ""
    lines.append(
        _line("duplicate images", f"{copies['groups']:,} groups, {copies['surplus']:,} surplus samples{unread}")
    )
    for group in copies["first"][:3]:
        named = group["samples"][:3]
        names = [_fit(f"{os.path.basename(shard)}/{key}", 72 // len(named)) for shard, key in named]
        more = group["copies"] - len(names)
        lines.append(_line("", " = ".join(names) + (f" = {more:,} more" if more else "")))
    lines += _counts("left out", found["ledger"], 6)
    said = found["img2dataset"]
    if said is not None:
        status = ", ".join(f"{count:,} {word}" for word, count in said["status"].items())
        lines.append(_line("img2dataset", f"{said['attempted']:,} attempted for {said['shards']:,} shards: {status}"))
        lines += _counts("  why not", said["reasons"], 4)
        for one in said["first_different"][:2]:
            holds = f"{one['says']:,} success, {one['holds']:,} samples in {os.path.basename(one['shard'])}"
            lines.append(_line(f"  {said['different']:,} differ", holds))
        lines += [_line("  unreadable", what) for what in said["first_unreadable"][:1]]
    return "\n".join(line if len(line) <= 110 else line[:109] + "…" for line in lines)


def _line(label: str, text: str) -> str:
    return f"{label:<22}{text}".rstrip()


def _fit(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: room // 2]}…{name[len(name) + 1 - (room + 1) // 2 :]}"


def _cells(label: str, values: Iterable[float | str]) -> str:
    """Values in columns: whole numbers as such, others with three digits and more."""
    cells = (
        value if isinstance(value, str) else f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.3g}"
        for value in values
    )
    return _line(label, "".join(f"{cell:>12}" for cell in cells))


def _counts(label: str, counts: dict[str, int], most: int) -> list[str]:
    """One line for each of the most common, and one for the rest."""
    shown = [(why, count) for why, count in counts.items() if why != OTHER][:most]
    rest = sum(counts.values()) - sum(count for _, count in shown)
    lines = [f"{count:,} {why}" for why, count in shown] + ([f"{rest:,} for {OTHER}"] if rest else [])
    return [_line(label if not place else "", text) for place, text in enumerate(lines)]
