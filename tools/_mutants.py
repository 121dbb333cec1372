"""Mutants of Triton kernels by rules over the syntax tree: what tools/mutate_kernels.py runs the tests against."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "mm_kernels"

FLIPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
EXTREMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One edit: variant `variant` of what the rules make of node `node` of a function that a kernel is or calls."""

    op: str
    kernel: str
    file: str
    function: str
    line: int
    rule: str
    before: str
    after: str
    node: int
    variant: int

    @property
    def key(self) -> str:
        """What it is known by, one op's mutants apart."""
        return f"{self.function}:{self.node}.{self.variant}"


def edits(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What the rules make of a node: the rule, and what takes the node's place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in FLIPPED:
        yield (
            "comparison flipped",
            ast.Compare(node.left, [FLIPPED[type(node.ops[0])](), *node.ops[1:]], node.comparators),
        )
        for nudged in off_by_one(node.comparators[0]):
            yield "constant off by one", ast.Compare(node.left, node.ops, [nudged, *node.comparators[1:]])
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.BitAnd | ast.BitOr):
            yield "mask dropped", node.left
            yield "mask dropped", node.right
        elif isinstance(node.op, ast.Mult):
            yield "scale removed", node.left
            yield "scale removed", node.right
        elif isinstance(node.op, ast.Sub | ast.Div | ast.FloorDiv | ast.Mod):
            yield "operand swapped", ast.BinOp(node.right, node.op, node.left)
        for nudged in off_by_one(node.left):
            yield "constant off by one", ast.BinOp(nudged, node.op, node.right)
        for nudged in off_by_one(node.right):
            yield "constant off by one", ast.BinOp(node.left, node.op, nudged)
    elif isinstance(node, ast.AugAssign):
        yield "scale removed" if isinstance(node.op, ast.Mult) else "sum dropped", ast.Pass()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield from edits_of_call(node, node.func)


def edits_of_call(node: ast.Call, function: ast.Attribute) -> Iterator[tuple[str, ast.AST]]:
    """The rules for what `tl` offers."""
    if function.attr in ("load", "store") and any(keyword.arg == "mask" for keyword in node.keywords):
        kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
        yield "mask dropped", ast.Call(node.func, node.args, kept)
        for keyword in node.keywords:
            for nudged in off_by_one(keyword.value) if keyword.arg == "other" else ():
                others = [each for each in node.keywords if each is not keyword]
                yield "constant off by one", ast.Call(node.func, node.args, [*others, ast.keyword("other", nudged)])
    elif function.attr == "where":
        condition, yes, no = node.args
        yield "mask dropped", yes
        yield "operand swapped", ast.Call(node.func, [condition, no, yes], node.keywords)
        for nudged in off_by_one(no):
            yield "constant off by one", ast.Call(node.func, [condition, yes, nudged], node.keywords)
    elif function.attr in EXTREMES:
        yield (
            "comparison flipped",
            ast.Call(ast.Attribute(function.value, EXTREMES[function.attr], ast.Load()), node.args, node.keywords),
        )
    elif function.attr == "dot" and len(node.args) == 3:
        yield "sum dropped", ast.Call(node.func, node.args[:2], node.keywords)


def off_by_one(node: ast.AST) -> list[ast.AST]:
    """A number plus one; nothing of anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [ast.Constant(node.value + 1)]
    return []


def jitted(tree: ast.Module) -> list[ast.FunctionDef]:
    """The functions under @triton.jit."""
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
    ]


def nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """The nodes of its body, in an order that depends on the source only."""
    return [node for statement in function.body for node in ast.walk(statement)]


def mutants_of(op: str, seed: int, number: int) -> list[Mutant]:
    """For each kernel that an op launches, `number` edits of it and of the functions that it calls, none of them twice.

    All there are, where there are fewer. Rules take turns, and under a rule the seed decides.
    """
    functions = {}
    for path in sorted((KERNELS / op).glob("*.py")):
        functions |= {function.name: (path.name, function) for function in jitted(ast.parse(path.read_text()))}
    calls = {
        name: {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} & functions.keys() - {name}
        for name, (_, function) in functions.items()
    }
    taken: set[tuple[str, int, int]] = set()
    chosen = []
    for kernel in sorted(functions.keys() - set().union(*calls.values())):
        reached = [kernel]
        for name in reached:
            reached += sorted(calls[name] - set(reached))
        by_rule: dict[str, list[Mutant]] = {}
        for name in reached:
            for mutant in sites(op, kernel, *functions[name]):
                if (name, mutant.node, mutant.variant) not in taken:
                    by_rule.setdefault(mutant.rule, []).append(mutant)
        shuffled = random.Random(f"{seed}:{op}:{kernel}")
        for rule in sorted(by_rule):
            shuffled.shuffle(by_rule[rule])
        turns = max(map(len, by_rule.values()), default=0)
        in_turn = [by_rule[rule][i] for i in range(turns) for rule in sorted(by_rule) if i < len(by_rule[rule])]
        chosen += in_turn[:number]
        taken |= {(mutant.function, mutant.node, mutant.variant) for mutant in in_turn[:number]}
    return chosen


def sites(op: str, kernel: str, file: str, function: ast.FunctionDef) -> Iterator[Mutant]:
    """Every edit of a function."""
    for place, node in enumerate(nodes(function)):
        for variant, (rule, new) in enumerate(edits(node)):
            before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(new))
            if before != after:
                line = getattr(node, "lineno", function.lineno)
                yield Mutant(op, kernel, file, function.name, line, rule, before, after, place, variant)


def source_of(mutant: Mutant) -> str:
    """The file with the edit."""
    tree = ast.parse((KERNELS / mutant.op / mutant.file).read_text())
    (function,) = (each for each in jitted(tree) if each.name == mutant.function)
    target = nodes(function)[mutant.node]
    _, new = list(edits(target))[mutant.variant]

    class Edit(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Edit().visit(tree)))
