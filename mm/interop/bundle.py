"""One file of Python that holds a module and, of everything of ours that it uses, the source: it runs without `mm`.

So a folder that is handed on contains the very code that trained it, never a second version of it. Definitions are
found from the names that others use, copied as they are written, and put where what they need at once (bases,
decorators, defaults) is above them. Imports of other packages come along; those of ours are resolved.
"""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
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
                self.defined.update((name, statement) for name in _bound([statement]))
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                self.imported.update(_imports(statement))

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
            self.imported.update(_imports(node))
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
        inside = local | set(arguments) | set(_bound(body))
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


def bundle(name: str) -> str:
    """The source of a file with all of module `name` and what it needs. Raises ValueError for what cannot be copied."""
    wanted = [Symbol(name, defined) for defined in module(name).defined]
    edits: dict[Symbol, list[Edit]] = {}
    before: dict[Symbol, set[Symbol]] = {}  # what must stand above a definition
    imports: set[Import] = set()
    while wanted:
        symbol = wanted.pop()
        if symbol in edits:
            continue
        if symbol.module.split(".")[-1] in ("op", "launch", "kernels"):
            raise ValueError(f"{symbol.module}: launches kernels; give the operation a plain form in mm.interop.bundle")
        edits[symbol], before[symbol] = [], set()
        for edit, at_once in module(symbol.module).uses(symbol.name):
            edits[symbol].append(edit)
            meaning = edit[2]
            if isinstance(meaning, Import):
                imports.add(meaning)
            elif isinstance(meaning, Symbol):
                wanted.append(meaning)
                if at_once and meaning != symbol:
                    before[symbol].add(meaning)
    twice = {one.alias for one in imports for other in imports if one.alias == other.alias and one != other}
    if any(found.alias in twice and not found.statement.startswith(f"import {found.alias}") for found in imports):
        raise ValueError(f"{name}: {', '.join(sorted(twice))} means two things in what it needs; rename one")
    names = _names(list(edits), {found.alias for found in imports}, name)
    parts, written, last = [], set(), ""
    for symbol in _sorted(before, name):
        statement = module(symbol.module).defined[symbol.name]
        if id(statement) in written:  # two names of one assignment
            continue
        written.add(id(statement))
        if symbol.module != last:
            parts.append(f"# {symbol.module}")
            last = symbol.module
        parts.append(_text(symbol, statement, edits[symbol], names))
    doc = ast.get_docstring(ast.parse(module(name).source)) or ""
    statements = _statements(imports)
    head = f'"""{doc}\n\nMade by `mm release`: every definition is copied from the module of mm named above it.\n"""'
    return "\n\n\n".join(["\n".join([head, "", "from __future__ import annotations", "", *statements]), *parts]) + "\n"


def _statements(imports: set[Import]) -> list[str]:
    """Import statements, those from one package joined."""
    plain, parts = set(), defaultdict(set)
    for found in imports:
        start, _, what = found.statement.partition(" import ")
        if what:
            parts[start].add(what)
        else:
            plain.add(start)
    return sorted(plain) + [f"{start} import {', '.join(sorted(what))}" for start, what in sorted(parts.items())]


def _sorted(before: dict[Symbol, set[Symbol]], main: str) -> list[Symbol]:
    """Definitions in an order that Python can run: by module and line, except where one needs another at once."""

    def place(symbol: Symbol) -> tuple[bool, int, str, int]:
        depth = [
            f"{symbol.module}.".startswith(f"{room}.") for room in ("mm_kernels", "mm.types", "mm.nn", "mm.adapters")
        ]
        rank = depth.index(True) if True in depth else len(depth)
        return symbol.module == main, rank, symbol.module, module(symbol.module).defined[symbol.name].lineno

    sorter = TopologicalSorter(before)
    ready: list[Symbol] = []
    done: list[Symbol] = []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=place)
        done.append(ready.pop(0))
        sorter.done(done[-1])
    return done


def _names(symbols: list[Symbol], taken: set[str], main: str) -> dict[Symbol, str]:
    """A name for each that no other has: its own, or where that is taken one with the module's path in front."""
    names: dict[Symbol, str] = {}
    homes = Counter(symbol.name for symbol in symbols)
    for symbol in symbols:
        name = symbol.name
        if name in taken or (homes[name] > 1 and symbol.module != main):
            name = "_".join([*symbol.module.split(".")[1:], name])
        assert name not in taken, name
        names[symbol] = name
        taken = taken | {name}
    return names


def _text(symbol: Symbol, statement: ast.stmt, edits: list[Edit], names: dict[Symbol, str]) -> str:
    """The source of a definition in which the names of other modules are those of the bundle."""
    home = module(symbol.module)
    start, end = home.span(statement)
    changes = [(*edit[:2], names[edit[2]] if isinstance(edit[2], Symbol) else edit[2]) for edit in edits]
    own = getattr(statement, "name", None)
    if own is not None and names[symbol] != own:
        keyword = b"class " if isinstance(statement, ast.ClassDef) else b"def "
        place = home.source.index(keyword + own.encode(), start) + len(keyword)
        changes.append((place, place + len(own.encode()), names[symbol]))
    text = home.source[start : home.comment(end)]
    for first, after, meaning in sorted(changes, key=lambda change: -change[0]):
        new = meaning.alias if isinstance(meaning, Import) else meaning
        text = text[: first - start] + new.encode() + text[after - start :]
    return text.decode()


def _bound(body: Sequence[ast.AST]) -> Iterator[str]:
    """Names that statements bind, those inside nested functions too; not by imports of ours, which are resolved."""
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name, target in _imports(node) if isinstance(target, Import))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            yield node.name


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Symbol | Import]]:
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
