"""What names mean in a module of ours, read from its source: where each is defined, and what its definition uses."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

OURS = ("mm", "mm_kernels")
PLAIN = {  # operations that choose a kernel -> the same from their references, which need torch only
    ("mm_kernels.attention", "attention"): ("mm.interop.diffusers_parts.plain", "attention"),
    ("mm_kernels.qk_norm_rope", "qk_norm_rope"): ("mm.interop.diffusers_parts.plain", "qk_norm_rope"),
    ("mm_kernels.adaln_modulate", "adaln_modulate"): ("mm.interop.diffusers_parts.plain", "adaln_modulate"),
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Symbol(NamedTuple):
    """A name that a module of ours defines; or, with name "", the module itself."""

    module: str
    name: str


class Import(NamedTuple):
    """An import statement of somebody else's package, and the name that it binds."""

    alias: str
    statement: str


Edit = tuple[int, int, "Symbol | Import | str"]  # bytes of the source from, to; what stands there instead


class Module:
    """The source of one module and what its names mean."""

    def __init__(self, name: str):
        self.name, self.source = name, _file(name).read_bytes()
        tree = ast.parse(self.source)
        self.defined: dict[str, ast.stmt] = {}
        self.imported: dict[str, Symbol | Import] = {}
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.defined[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                self.defined.update((name, statement) for name in bound([statement]))
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                self.imported.update(imports_of(statement))

    def place(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First and last byte of a node, decorators included."""
        first = min([node, *getattr(node, "decorator_list", [])], key=lambda part: part.lineno)
        column = 0 if first is not node else node.col_offset
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.place(first.lineno, column), self.place(node.end_lineno, node.end_col_offset)

    def comment(self, end: int) -> int:
        """Where the comment ends that follows on the same line; `end` itself where there is none."""
        rest = self.source[end:].split(b"\n", 1)[0]
        return end + len(rest.rstrip()) if rest.lstrip().startswith(b"#") else end

    def uses(self, name: str) -> Iterator[tuple[Edit, bool]]:
        """Where the definition of `name` uses a name of its module, and whether it does so when it is defined."""
        yield from self._uses(self.defined[name], frozenset(), True)

    def _uses(self, node: ast.AST, local: frozenset[str], at_once: bool) -> Iterator[tuple[Edit, bool]]:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in local:
            owner = self._meaning(node.value.id)
            if isinstance(owner, Symbol) and not owner.name:  # `reference.forward`
                yield (*self.span(node), resolve(owner.module, node.attr)), at_once
                return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
            meaning = self._meaning(node.id)
            if meaning is not None:
                yield (*self.span(node), meaning), at_once
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:  # inside a function
            yield (*self.span(node), "pass"), at_once
            for alias, target in imports_of(node):
                if alias in self.defined or self.imported.setdefault(alias, target) != target:
                    raise ValueError(f"{self.name}: {alias} is imported in a function and means another thing above it")
            return
        if not isinstance(node, FUNCTION):
            for field, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and field == "annotation":
                        yield from self._hints(cast("ast.expr", child))
                    elif isinstance(child, ast.AST):
                        yield from self._uses(child, local, at_once)
            return
        body = node.body if isinstance(node.body, list) else [node.body]
        for default in [*node.args.defaults, *node.args.kw_defaults, *getattr(node, "decorator_list", [])]:
            if default is not None:
                yield from self._uses(default, local, at_once)
        given = [part for part in ast.walk(node.args) if isinstance(part, ast.arg)]
        for hint in [*(part.annotation for part in given), getattr(node, "returns", None)]:
            if hint is not None:
                yield from self._hints(hint)
        arguments = [part.arg for part in given]
        inside = local | set(arguments) | set(bound(body))
        for part in body:
            yield from self._uses(part, inside, False)

    def _hints(self, annotation: ast.expr) -> Iterator[tuple[Edit, bool]]:
        """What a type comes from, of other packages only: a type is a string here, and nobody has to define it."""
        for node in ast.walk(annotation):
            target = self.imported.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(node, ast.Name) and isinstance(target, Import):
                yield (*self.span(node), target), False

    def _meaning(self, name: str) -> Symbol | Import | None:
        known = name in self.defined or name in self.imported
        return resolve(self.name, name) if known else None


@cache
def module(name: str) -> Module:
    return Module(name)


def resolve(owner: str, name: str) -> Symbol | Import:
    """Where `owner.name` is defined, through any number of imports, with plain operations instead of kernels."""
    if (owner, name) in PLAIN:
        return resolve(*PLAIN[owner, name])
    found = module(owner)
    if name in found.defined:
        return Symbol(owner, name)
    target = found.imported.get(name)
    if target is not None and target != Symbol(owner, name):  # unless a package imports a file of its own
        return resolve(*target) if isinstance(target, Symbol) and target.name else target
    if _file(f"{owner}.{name}").is_file():
        return Symbol(f"{owner}.{name}", "")
    raise ValueError(f"{owner}.{name}: not found; a bundle takes functions, classes and constants of a module")


def bound(body: Sequence[ast.AST]) -> Iterator[str]:
    """Names that statements bind, those inside nested functions too; not by imports of ours, which are resolved."""
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name, target in imports_of(node) if isinstance(target, Import))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            yield node.name


def imports_of(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Symbol | Import]]:
    """What each name of an import statement means; ours are absolute by house rule."""
    for part in node.names:
        alias = part.asname or part.name.split(".")[0]
        as_name = f" as {part.asname}" if part.asname else ""
        if isinstance(node, ast.Import):
            ours = part.name.split(".")[0] in OURS
            yield alias, Symbol(part.name, "") if ours else Import(alias, f"import {part.name}{as_name}")
        elif (node.module or "").split(".")[0] in OURS:
            yield alias, Symbol(node.module or "", part.name)
        elif node.module != "__future__":
            yield alias, Import(alias, f"from {node.module} import {part.name}{as_name}")


@cache
def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _file(name: str) -> Path:
    """The source file of a module of ours, which need not exist."""
    package, *parts = name.split(".")
    path = _root(package).joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
