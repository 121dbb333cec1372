"""One file of Python that holds a module and, of everything of ours that it uses, the source: it runs without `mm`.

So a folder that is handed on contains the very code that trained it, never a second version of it. Definitions are
found from the names that others use, copied as they are written, and put where what they need at once (bases,
decorators, defaults) is above them. Imports of other packages come along; those of ours are resolved.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from graphlib import TopologicalSorter

from mm.interop.source import Edit, Import, Symbol, module


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
            raise ValueError(f"{symbol.module}: launches kernels; give the operation a plain form in mm.interop.source")
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
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        keyword = b"class " if isinstance(statement, ast.ClassDef) else b"def "
        place = home.source.index(keyword + statement.name.encode(), start) + len(keyword)
        changes.append((place, place + len(statement.name.encode()), names[symbol]))
    for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
        stored = [node for node in ast.walk(target) if isinstance(node, ast.Name)] if target is not None else []
        changes += [(*home.span(node), names.get(Symbol(symbol.module, node.id), node.id)) for node in stored]
    text = home.source[start : home.comment(end)]
    for first, after, meaning in sorted(changes, key=lambda change: -change[0]):
        new = meaning.alias if isinstance(meaning, Import) else meaning
        text = text[: first - start] + new.encode() + text[after - start :]
    return text.decode()
