"""What checkpoints cost a run: the time that each adds to the demo's training, as a share of a minute.

One run saves every EVERY steps, in the background and blocking in turn. The steps right after a save are compared with
the quiet ones around them; what is more than those would have taken is the cost of that save.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from _common import ROOT, arguments, circumstances
from _training import demo_shards

from mm import config as settings
from mm.training import loop, trainer

EVERY, AFTER = 12, 6  # steps between saves; of those, the ones that a save may slow down
SECONDS = 60.0  # between saves, for the share


def main() -> None:
    args = arguments("what checkpoints cost a run", saves=10)
    ended: list[float] = []  # when each step's line was written; a save comes after that
    background: dict[int, bool] = {}  # of the save after each step
    update, save = loop.Progress.update, trainer.Trainer.save

    def updated(self: loop.Progress, record: dict) -> None:
        update(self, record)
        ended.append(time.perf_counter())

    def saved(self: trainer.Trainer, wait: bool = False) -> None:
        self.config.checkpoint.background = background[self.step] = len(background) % 2 == 0
        save(self, wait)

    loop.Progress.update, trainer.Trainer.save = updated, saved  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        config = settings.load(os.path.join(ROOT, "configs/demo.py"))
        config.data.train, config.run.dir, config.run.diagnose_every = demo_shards(), folder, 0
        config.run.steps, config.checkpoint.every = EVERY * (args.saves + 2), EVERY
        settings.validate(config)
        loop.run(config)
        newest = max(Path(folder, "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in newest.iterdir())

    steps = [after - before for before, after in itertools.pairwise(ended)]  # steps[i]: from step i+1's end
    costs: dict[bool, list[float]] = {True: [], False: []}
    for step in range(2 * EVERY, EVERY * (args.saves + 2), EVERY):  # the first save also allocates its host copy
        first = step - 1
        quiet = median([*steps[first - EVERY + AFTER : first], *steps[first + AFTER : first + EVERY]])
        cost = sum(steps[first : first + AFTER]) - AFTER * quiet
        costs[background[step]].append(cost)
        how = "background" if background[step] else "blocking"
        print(f"step {step}: {how}: {cost:.3f} s more than {AFTER} quiet steps of {quiet:.3f} s")
    ours, peer = (100 * median(costs[how]) / SECONDS for how in (True, False))
    print(f"one save a minute: {ours:.2f} % of the run time in the background, {peer:.2f} % blocking")
    if args.json:
        result = {
            "name": "checkpoints of the demo at one a minute",
            "ours": ours,
            "peer": peer,
            "ratio": peer / ours if ours > 0 else None,
            "unit": "% of run time, in the background against blocking",
            "mark": 3.0,
            "better": "lower",
            "rounds": len(costs[True]),
            "seconds": {"background": costs[True], "blocking": costs[False]},
            "step_seconds": median(steps),
            "megabytes": size / 1e6,
            **circumstances(("mm", "torch")),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
