"""A bundle is one file of Python with our sources, which runs without us."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path

import pytest

from mm.interop import source
from mm.interop.bundle import bundle
from mm.interop.diffusers import PARTS


def test_a_bundle_holds_sources_and_no_import_of_ours(root: Path) -> None:
    made = bundle(f"{PARTS}.text_encoder")
    assert "import mm" not in made and "from mm" not in made
    block = (root / "mm" / "nn" / "block.py").read_text()
    assert block[block.index("class Block") : block.index("class Stream")].strip() in made


def test_a_bundle_refuses_an_operation_that_has_no_plain_form() -> None:
    with pytest.raises(ValueError, match="no plain form|launches kernels"):
        bundle("mm.objectives.contrastive")


def test_names_that_two_modules_share_stay_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = {
        "mm": "",
        "mm.main": """
            from mm.left import go as left
            from mm import right
            def both(x):
                return left(x), right.go(x), right.later(x)
        """,
        "mm.left": """
            STEP = 2  # at a time
            def go(x, STEP=STEP):
                return x + STEP
        """,
        "mm.right": """
            def go(x):
                return x * Go.STEP * STEP
            class Base:
                STEP = 1
            class Go(Base):
                pass
            STEP = 5
            def later(x):
                from mm.left import go as early
                return early(x)
        """,
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(source, "_file", lambda name: tmp_path / f"{name}.py")
    module = functools.cache(source.Module)
    for user in ("source", "bundle"):
        monkeypatch.setattr(f"mm.interop.{user}.module", module)
    made, space = bundle("mm.main"), {}
    exec(compile(made, "made", "exec"), space)
    assert space["both"](3) == (5, 15, 5)
    assert "# at a time" in made
    (tmp_path / "mm.main.py").write_text("def go():\n    pass\ndef f():\n    from mm.left import go\n    go(1)\n")
    module.cache_clear()
    with pytest.raises(ValueError, match="means another thing"):
        bundle("mm.main")
