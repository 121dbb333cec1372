"""Whether the tests of the Triton kernels notice when a kernel is wrong: break each in many places, see tests go red.

    python tools/mutate_kernels.py [op ...] [--seconds 200]     # again and again, until it says that all are done

Rules over the syntax tree choose the places, and a seed which of them: nobody picks mutants by hand. Each mutant is a
copy of kernels/ with one edit, against which the interpreted tests of its op run until the first failure. What is done
is kept in runs/mutants/ for as long as kernels and tests stay the same; benchmarks/mutants.json gets the counts and the
survivors, each with a place, `harmless`, to say why its edit changes no result: a person fills it in, and it stays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "bench"))
from _common import circumstances
from _mutants import KERNELS, ROOT, Mutant, mutants_of, source_of

OUT = ROOT / "benchmarks" / "mutants.json"
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may be as long and as old, to the second, as the one before it
}
PRELOADED = ["numpy", "torch", "triton", "triton.language", "pytest"]  # by the process that the others fork from


def tests_of(op: str) -> list[str]:
    """The files of an op's interpreted tests, from the repository's root; no op's name begins with another's."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/kernels/interpreted").glob(f"test_{op}*.py"))]


def run_tests(kernels: str, tests: list[str], output: str) -> None:
    """In a forked process: pytest with `kernels` in place of the repository's; exits with its status."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    sys.path.insert(0, kernels)
    import pytest

    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", f"pythonpath={kernels} . tests"]
    os._exit(pytest.main([*options, *tests]))


def outcome(kernels: Path, tests: list[str], deadline: float) -> tuple[str, str | None]:
    """What the tests say: "passed", "failed", "crashed" or "too slow"; and the test that failed, if one is named."""
    context = multiprocessing.get_context("forkserver")
    output = kernels.parent / f"{kernels.name}.txt"
    process = context.Process(target=run_tests, args=(str(kernels), tests, str(output)))
    process.start()
    process.join(deadline)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "too slow", None
    text = output.read_text(errors="replace")
    if process.exitcode == 0:
        return "passed", None
    if process.exitcode > 2:  # pytest's own trouble: no tests, a wrong option
        raise RuntimeError(f"pytest exits with {process.exitcode}: {text[-1000:]}")
    failed = [line.split()[1] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return ("failed" if process.exitcode > 0 else "crashed"), (failed[0] if failed else None)


def examine(op: str, mutants: list[Mutant], results: dict[str, str], keep: Any, args: argparse.Namespace) -> bool:
    """Run what is not among `results`, until the time is up; returns whether all of the op's mutants are done."""
    tests = tests_of(op)
    waiting = [mutant for mutant in mutants if mutant.key not in results]
    if not waiting:
        return True
    killers: Counter[str] = Counter()  # tests that find much come first
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            copy = Path(folder, f"kernels-{number}")
            shutil.copytree(KERNELS, copy / "mm_kernels", ignore=shutil.ignore_patterns("__pycache__"))
            copies.put(copy)
        start = time.monotonic()
        copy = copies.get()
        unbroken, test = outcome(copy, tests, args.deadline)
        copies.put(copy)
        if unbroken != "passed":
            raise SystemExit(f"{op}: the tests of the unbroken kernels: {unbroken} {test or ''}")
        deadline = max(30.0, 3 * (time.monotonic() - start))

        def one(mutant: Mutant) -> None:
            if time.monotonic() > args.end:
                return
            copy = copies.get()
            path = copy / "mm_kernels" / op / mutant.file
            path.write_text(source_of(mutant))
            first = [test for test, _ in killers.most_common(3)]
            said, test = outcome(copy, [*first, *tests], deadline)
            shutil.copy(KERNELS / op / mutant.file, path)
            copies.put(copy)
            if test:
                killers[test] += 1
            results[mutant.key] = said
            keep(mutant, said)

        list(pool.map(one, waiting))
    return all(mutant.key in results for mutant in mutants)


def fingerprint(op: str, args: argparse.Namespace) -> str:
    """Of everything that the results of an op hang on."""
    files = [*sorted(KERNELS.glob("*.py")), *sorted((KERNELS / op).glob("*.py"))]
    files += sorted((ROOT / "tools").glob("*muta*.py"))
    files += [path for path in sorted((ROOT / "tests/kernels").rglob("*.py")) if not path.name.startswith("test_")]
    files += [ROOT / test for test in tests_of(op)]
    digest = hashlib.sha256(f"{args.seed} {args.number}".encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def red_before(op: str, state: Path, keys: set[str]) -> dict[str, str]:
    """What the newest complete run before `state` found red: where tests were only added since, it still is."""
    runs = sorted(state.parent.glob(f"{op}-*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        results = dict(map(json.loads, path.read_text().splitlines()))
        if path != state and keys <= results.keys():
            return {key: said for key, said in results.items() if key in keys and said != "passed"}
    raise SystemExit(f"--survivors: there is no complete earlier run of {op}")


def report(examined: dict[str, tuple[list[Mutant], dict[str, str]]], args: argparse.Namespace) -> float:
    """Write benchmarks/mutants.json for these ops, others' entries kept; returns the smallest share found of an op."""
    before = json.loads(OUT.read_text()) if OUT.exists() else {"ops": {}}
    reasons = {
        (op, *(survivor[name] for name in ("file", "function", "rule", "before", "after"))): survivor["harmless"]
        for op, entry in before["ops"].items()
        for survivor in entry["survivors"]
    }
    shares = []
    for op, (mutants, results) in examined.items():
        red = [mutant for mutant in mutants if results[mutant.key] != "passed"]
        kernels: dict[str, dict[str, int]] = {}
        for mutant in mutants:
            counts = kernels.setdefault(mutant.kernel, {"mutants": 0, "red": 0})
            counts["mutants"] += 1
            counts["red"] += results[mutant.key] != "passed"
        survivors = [mutant for mutant in mutants if results[mutant.key] == "passed"]
        shares.append(len(red) / len(mutants))
        entry = {
            "mutants": len(mutants),
            "red": len(red),
            "share": round(shares[-1], 4),
            "outcomes": dict(Counter(results[mutant.key] for mutant in mutants)),
            "rules": dict(Counter(mutant.rule for mutant in mutants)),
            "kernels": kernels,
            "survivors": [],
        }
        for mutant in survivors:
            told = {name: value for name, value in asdict(mutant).items() if name not in ("op", "node", "variant")}
            place = (op, *(told[name] for name in ("file", "function", "rule", "before", "after")))
            entry["survivors"].append({**told, "harmless": reasons.get(place, "")})
        before["ops"][op] = entry
        print(f"{op}: {len(red)} of {len(mutants)} mutants red ({shares[-1]:.1%})")
        for survivor in entry["survivors"]:
            place = f"{survivor['file']}:{survivor['line']} {survivor['function']}"
            reason = survivor["harmless"] or "why is it harmless?"
            print(f"  {place}: {survivor['rule']}: {survivor['before']} -> {survivor['after']}: {reason}")
    before |= {"seed": args.seed, "marks": {"share": args.mark}, "ops": dict(sorted(before["ops"].items()))}
    before |= circumstances(("torch", "triton"))
    OUT.write_text(json.dumps(before, indent=1) + "\n")
    return min(shares)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="default: all that have interpreted tests")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--number", type=int, default=25, help="mutants a kernel, default 25")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long; run again to go on")
    parser.add_argument("--deadline", type=float, default=200, help="seconds for the unbroken tests, default 200")
    parser.add_argument("--jobs", type=int, default=2, help="processes, default 2")
    parser.add_argument("--mark", type=float, default=0.9, help="share that must be red, default 0.9")
    parser.add_argument("--survivors", action="store_true", help="only those that the last complete run left green")
    parser.add_argument("--list", action="store_true", help="only say which mutants there are")
    args = parser.parse_args()
    args.end = time.monotonic() + args.seconds
    os.environ.update(ENVIRONMENT)  # before the process starts from which the others fork
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)

    tested = [folder.name for folder in sorted(KERNELS.iterdir()) if folder.is_dir() and tests_of(folder.name)]
    examined: dict[str, tuple[list[Mutant], dict[str, str]]] = {}
    done = True
    for op in args.ops or tested:
        mutants = mutants_of(op, args.seed, args.number)
        if args.list:
            for kernel, count in Counter(mutant.kernel for mutant in mutants).items():
                print(f"{op}: {kernel}: {count}")
            continue
        state = ROOT / "runs" / "mutants" / f"{op}-{fingerprint(op, args)}.jsonl"
        state.parent.mkdir(parents=True, exist_ok=True)
        lines = state.read_text().splitlines() if state.exists() else []
        results = dict(map(json.loads, lines))
        if args.survivors and not results:
            results = red_before(op, state, {mutant.key for mutant in mutants})
        with state.open("a") as file:

            def keep(mutant: Mutant, said: str, file: Any = file) -> None:
                file.write(json.dumps([mutant.key, said]) + "\n")
                file.flush()

            finished = examine(op, mutants, results, keep, args)
        if finished:
            examined[op] = mutants, results
        else:
            done = False
            print(f"{op}: {len(results)} of {len(mutants)} mutants done; run again to go on")
    if args.list or not examined:
        return 0
    return 0 if report(examined, args) >= args.mark and done else 1


if __name__ == "__main__":
    sys.exit(main())
