"""torchrun whose exit code says how the training ended.

    python tools/launch.py --standalone --nproc-per-node=8 -m mm.train configs/x.py --run.dir runs/x

Takes torchrun's flags. Ends with 0; with the exit code of the process that failed first (2: a setting is wrong;
128 + signal: stopped after a save, or killed); with 143 when TERM came to this agent, after the processes have ended;
with 75 when the agents did not find each other. torchrun itself has 1 for all of them, and a scheduler cannot tell
what to try again. USR1 is left to the processes, which save and stop.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # before the slow import: the agent would die of it

UNREACHABLE = 75  # EX_TEMPFAIL of sysexits.h


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # on a shared store the keys of processes that died would meet those that --max-restarts starts (torch 2.14, gloo)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run(parse_args(list(argv)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        print(f"launch: process {rank} on {os.uname().nodename} ended with {code}", file=sys.stderr)
        return code
    except SignalException as error:
        print(f"launch: ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval
    except DistError as error:
        print(f"launch: the agents did not find each other: {' '.join(str(error).split())}", file=sys.stderr)
        return UNREACHABLE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
