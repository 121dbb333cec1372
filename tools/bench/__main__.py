"""Every comparison with the peers, one after the other: `python tools/bench [--full] [--only NAME,...] [--readme]`.

Writes what each script measured to benchmarks/<date>-<commit>.json and prints the table; with --readme the table is put
into README.md too. A script that fails is said in the table, and the others go on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from _common import ROOT, circumstances
from _table import in_readme, markdown

USUAL: dict[str, tuple[str, ...]] = {  # script -> its arguments; in the order of the table
    "train_step": (),
    "train_shards": (),
    "joint_step": (),
    "generation": (),
    "zero_shot": (),
    "contrastive_loss": ("--quick", "1"),
    "data": ("--quick", "1"),
    "startup": (),
    "train_memory": ("--rounds", "2"),  # it hardly moves
}
FULL: dict[str, tuple[str, ...]] = {"sample_efficiency": (), "curves": ()}
LONGEST = {"sample_efficiency": 2 * 3600, "curves": 3600}  # seconds; of the others 900
PACKAGES = ("torch", "torchvision", "open_clip_torch", "diffusers", "webdataset")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also what takes long: seeds, and how cost grows")
    parser.add_argument("--only", default="", help=f"some of {', '.join([*USUAL, *FULL])}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/<date>-<commit>.json")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    known = USUAL | FULL
    names = args.only.split(",") if args.only else list(known if args.full else USUAL)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only {unknown[0]}: must be of {', '.join(known)}")
    about = circumstances(PACKAGES)
    out = args.out or Path(ROOT, "benchmarks", f"{datetime.date.today()}-{about['commit']}.json")
    rows: list[dict[str, Any]] = []
    seconds: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        start = time.monotonic()
        rows += measured(name, known[name])
        seconds[name] = round(time.monotonic() - start)
        print(f"    {seconds[name]} s", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".part").write_text(json.dumps(about | {"seconds": seconds, "results": rows}, indent=1) + "\n")
    out.with_suffix(".part").rename(out)
    table = markdown(rows)
    print(f"\n{table}\n\n{out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}")
    if args.readme:
        in_readme(Path(ROOT, "README.md"), table, out.name)
    return 1 if any("error" in row for row in rows) else 0


def measured(name: str, arguments: tuple[str, ...]) -> list[dict[str, Any]]:
    """The results of one script, each with its name as `script`; where it fails, one more row that says why."""
    command = [sys.executable, "-u", str(Path(__file__).with_name(f"{name}.py")), "--json", *arguments]
    limit, rows = LONGEST.get(name, 900), []
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT)
        end = threading.Timer(limit, process.terminate)  # not kill: what it has started must end too
        end.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"'):
                    rows.append({"script": name, **json.loads(line)})
                else:
                    print(f"    {line.rstrip()}", flush=True)
            process.wait()
        finally:  # Ctrl-C too
            late = not end.is_alive()
            end.cancel()
            process.terminate()
            process.wait()
        said.seek(0)
        last = [line.strip() for line in said if line.strip()][-1:]
    if process.returncode:
        why = f"no end within {limit} s" if late else (last or [f"exit {process.returncode}"])[0][:300]
        rows.append({"script": name, "what": name, "error": why})
        print(f"    failed: {why}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
