"""How long a user waits for `mm --help`, against `import open_clip`: whole processes, in alternation."""

from __future__ import annotations

from _common import alternate, python, report


def main() -> None:
    ours, peer = alternate(lambda: python("-m", "mm.cli", "--help"), lambda: python("-c", "import open_clip"), 7)
    imported, empty = alternate(lambda: python("-c", "import mm"), lambda: python("-c", "pass"), 7)
    report(
        "mm --help against import open_clip",
        ours,
        peer,
        unit="s",
        mark=4.0,
        better="lower",
        packages=("mm", "open_clip_torch", "torch"),
        import_mm=sorted(imported)[len(imported) // 2],
        empty_interpreter=sorted(empty)[len(empty) // 2],
    )


if __name__ == "__main__":
    main()
