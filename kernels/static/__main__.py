"""Every shipped kernel compiled for four architectures without a GPU, and held to the gates: `make static`.

`python kernels/static [op ...] [--update] [--only TEXT]`: exits 1 where a gate fails, with one line for each fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import gate
from compile import Figures, figures
from shipped import ARCHITECTURES, configs, ops

PROCESSES = 2
MOST = 75  # configurations: four architectures of each take CI its four minutes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python kernels/static", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="default: all")
    parser.add_argument("--update", action="store_true", help="make today's figures the committed ones")
    parser.add_argument("--only", default="", metavar="TEXT", help="only configurations whose name has TEXT in it")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    if args.update and args.only:
        parser.error("--update writes whole files; leave --only out")
    if unknown := set(args.ops) - set(ops()):
        parser.error(f"{', '.join(sorted(unknown))}: no such op; there are {', '.join(ops())}")
    chosen = [(op, name) for op in args.ops or ops() for name in configs(op) if args.only in name]
    if not chosen:
        parser.error("no configuration is called that")

    start = time.monotonic()
    rows: dict[str, list[Figures]] = defaultdict(list)
    lines = [f"{len(chosen)} configurations ship, at most {MOST}"] if len(chosen) > MOST else []
    jobs: dict[Future[Figures], tuple[str, str, str]] = {}
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for op, name in chosen:
            for architecture in ARCHITECTURES:
                jobs[pool.submit(figures, op, name, architecture)] = op, name, architecture
        for job, (op, name, architecture) in jobs.items():
            error = job.exception()
            if error is None:
                rows[op].append(job.result())
            elif isinstance(error, BrokenProcessPool):
                lines.append(f"{op}, {name}, {architecture} or one beside it: the compiler crashed")
                break
            else:
                reason = " ".join(str(error).split())[:200]
                lines.append(f"{op}, {name}, {architecture}: does not compile: {type(error).__name__}: {reason}")

    for op, found in rows.items():
        if args.update:
            gate.write(op, found)
        lines += gate.failures(op, found, gate.read(op), partial=bool(args.only))
    for line in lines:
        print(line)
    verdict = f"{len(lines)} fail" if lines else "all pass"
    print(f"{len(jobs)} compilations of {len(chosen)} configurations in {time.monotonic() - start:.0f} s: {verdict}")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
