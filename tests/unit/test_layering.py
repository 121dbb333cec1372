"""Imports go one way: a room imports only rooms above it in DESIGN.md's list, here in the same order."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = [
    {"mm_kernels"},
    {"mm.types"},
    {"mm.config", "mm.model_config", "mm.settings", "mm.fields", "mm.rules", "mm.rules_modalities"},
    {"mm.nn"},
    {"mm.adapters"},
    {"mm.models"},
    {"mm.diffusion"},
    {"mm.objectives"},
    {"mm.data"},
    {"mm.distributed"},
    {"mm.adaptation"},
    {"mm.training"},
    {"mm.evaluation"},
    {"mm.interop"},
    {"mm.api"},
    {"mm"},  # mm/__init__.py: `mm.load`
    {"mm.serving"},
    {
        "mm.demo",
        "mm.train",
        "mm.cli",
        "mm.commands",
        "mm.commands_checkpoints",
        "mm.commands_shards",
        "mm.usage",
        "mm.__main__",
        "mm.plan",
        "mm.commands_plan",
        "mm.chaos",
        "mm.commands_chaos",
        "mm.commands_release",
        "mm.commands_classify",
        "mm.commands_generate",
        "mm.commands_evaluate",
        "mm.commands_report",
        "mm.commands_search",
        "mm.commands_serve",
    },
]
RANKS = {name: rank for rank, room in enumerate(ROOMS) for name in room}
SLOW_TO_IMPORT = {"diffusers", "open_clip", "timm", "webdataset", "transformers", "peft", "tensorboard", "matplotlib"}
SLOW_TO_IMPORT |= {"faiss", "sklearn", "pyarrow", "fastapi", "uvicorn"}
SERVING = {
    "fastapi",
    "uvicorn",
}  # mm.serving may: only `mm serve` imports the room, and its routes are made of their types
BUNDLED = "mm.interop.diffusers_parts."  # copied into exports, where the library is there; nothing of mm imports it


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT)
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module of ours: its first two parts; benchmarks and gates of the kernels count as kernels."""
    if module.split(".")[0] != "mm":
        return "mm_kernels"
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, at top level) of every import that runs, in functions too, but not under TYPE_CHECKING."""

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = node.orelse if isinstance(node.test, ast.Name | ast.Attribute) else [*node.body, *node.orelse]
            for child in children:
                yield from visit(child, top)
            return
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:  # `from mm import data` is a room, `from mm import load` is mm itself
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if base == "mm" and whole in RANKS else base, top
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    return visit(tree, True)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room, found = room_of(module), []
    package = module if is_package else module.rpartition(".")[0]
    if room not in RANKS:
        return [f"{module}: {room} is in no room of DESIGN.md; add it to ROOMS in its place"]
    allowed = SERVING if room == "mm.serving" else set()
    for line, target, top in imports(ast.parse(source), package):
        if target.split(".")[0] in SLOW_TO_IMPORT - allowed and top and not module.startswith(BUNDLED):
            found.append(f"{module}:{line}: imports {target} at the top; import it where it is used")
        if target.split(".")[0] not in ("mm", "mm_kernels"):
            continue
        if RANKS.get(room_of(target), len(ROOMS)) > RANKS[room]:
            found.append(f"{module}:{line}: {room} imports {target}, which is below it")
    return found


def sources() -> list[Path]:
    folders = [folder for folder in (ROOT / "mm", ROOT / "kernels") if folder.is_dir()]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mm.nn.block", "from mm.models.encoder import Encoder"),
        ("mm.nn.block", "from mm import models"),
        ("mm.nn.block", "from ..models import encoder"),
        ("mm.nn.block", "import mm.training.loop"),
        ("mm.nn.block", "def f():\n    from mm.training import loop"),
        ("mm.nn.block", "try:\n    import mm.api\nexcept ValueError:\n    pass"),
        ("mm.training.loop", "import mm\nmm.load('x')"),
        ("mm.nn.block", "if not TYPE_CHECKING:\n    import mm.api"),
        ("mm.nn.block", "from mm.nowhere import x"),
        ("mm_kernels.attention", "from mm.config import TrainConfig"),
        ("mm.api", "import open_clip"),
        ("mm.api", "import fastapi"),
        ("mm.commands_serve", "import uvicorn"),
        ("mm.serving.app", "import faiss"),
        ("mm.nowhere", ""),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mm.models.encoder", "from mm.nn.block import Block\nfrom mm_kernels import attention"),
        ("mm.nn.block", "from . import pool"),
        ("mm.nn.block", "if TYPE_CHECKING:\n    from mm.api import LoadedModel"),
        ("mm.api", "def f():\n    import open_clip"),
        ("mm.serving.app", "import fastapi"),
        ("mm.commands", "def f():\n    import mm"),
    ],
)
def test_a_right_import_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the PyPI package `kernels`"
