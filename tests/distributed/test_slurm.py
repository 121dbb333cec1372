"""tools/slurm/train.sbatch on a real Slurm of two nodes: preempted, requeued, resumed, and the weights are the same.

The training that preempts it is the one that nothing interrupts. Slurm and munge must be installed, or installable:
MM_INSTALL_SLURM=1 lets root do it. Where that fails these tests fail, with the log of the installation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mm.data.build import openmoji
from tools.slurm.local_cluster import Cluster, local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 120
REQUEUE_RACE = 2.0  # seconds before a requeued job is let in early; the old batch file's end must have been heard


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("shards")
    openmoji(out, size=32, per_shard=64, progress=False, limit=150)
    return str(out / "train-*.tar")


@pytest.fixture(scope="module")
def cluster(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster(tmp_path_factory.mktemp("slurm") / "state", grace=60) as cluster:
        cluster.environment |= {
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "MM_PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",  # both nodes are this machine, whose name need not resolve
        }
        yield cluster


class Jobs:
    """Submits from a folder that looks like the repository, and waits for what becomes of it."""

    def __init__(self, cluster: Cluster, root: Path, folder: Path, shards: str) -> None:
        self.cluster, self.folder, self.shards = cluster, folder, shards
        self.started = time.monotonic()
        for name in ("tools", "configs"):
            (folder / name).symlink_to(root / name)

    def submit(self, partition: str, run: str, *flags: str, options: tuple[str, ...] = ()) -> str:
        """The id of a two-node training job in a run folder of its own."""
        sbatch = ["sbatch", "--parsable", f"--chdir={self.folder}", f"--partition={partition}", "--nodes=2", *options]
        train = ["--data.train", self.shards, "--run.dir", run, "--run.steps", str(STEPS), "--parallel.threads", "1"]
        script = [str(self.folder / "tools/slurm/train.sbatch"), "configs/debug.py", *train, "--checkpoint.every", "50"]
        former = Path.cwd()
        os.chdir(self.folder)  # SLURM_SUBMIT_DIR
        try:
            return self.cluster.command(*sbatch, *script, *flags)
        finally:
            os.chdir(former)

    def until(self, what: str, true: Callable[[], bool], seconds: float, *jobs: str) -> None:
        """Wait, and say how long since the first; a failure shows the jobs' output."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                pytest.fail(f"not {what} in {seconds:g} s:\n" + "\n".join(map(self.output, jobs)) + self.cluster.logs())
            time.sleep(0.1)
        print(f"{time.monotonic() - self.started:6.1f} s: {what}")

    def ends(self, job: str, state: str, seconds: float = 150) -> None:
        """Wait for a final state, letting a requeued job in at once, and assert which one it is."""
        early = False

        def final() -> bool:
            nonlocal early
            now = self.cluster.fact(job, "JobState")
            if now == "PENDING" and not early and self.cluster.fact(job, "Restarts") != "0":
                time.sleep(REQUEUE_RACE)
                self.let_in(job)
                early = True
            return now in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.until(f"job {job} ended", final, seconds, job)
        assert self.cluster.fact(job, "JobState") == state, self.output(job)

    def let_in(self, job: str) -> None:
        """Skip what is left of the two minutes that a requeued job waits."""
        self.cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")

    def output(self, job: str) -> str:
        """What the job printed."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else f"job {job} printed nothing"

    def lines(self, run: str) -> list[dict]:
        """metrics.jsonl, as far as it goes."""
        path = self.folder / run / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        return [json.loads(line) for line in whole]


@pytest.fixture
def jobs(cluster: Cluster, root: Path, shards: str, tmp_path: Path) -> Jobs:
    return Jobs(cluster, root, tmp_path, shards)


def test_a_preempted_run_ends_with_the_weights_of_the_run_that_preempted_it(jobs: Jobs) -> None:
    low = jobs.submit("low", "interrupted")
    jobs.until("training", lambda: len(jobs.lines("interrupted")) >= 5, 90, low)
    high = jobs.submit("high", "whole")
    jobs.until("back in the queue", lambda: jobs.cluster.fact(low, "JobState") == "PENDING", 60, low)
    stopped = len(jobs.lines("interrupted"))
    jobs.until("preempting run training", lambda: len(jobs.lines("whole")) >= 1, 60, high)
    jobs.ends(high, "COMPLETED")
    jobs.ends(low, "COMPLETED")
    print(jobs.output(low))
    assert 5 <= stopped < STEPS
    assert f"stopped by signal 10 after step {stopped}" in jobs.output(low)
    assert f"training stopped {stopped} 10" in jobs.output(low)
    assert f"resuming after step {stopped}" in jobs.output(low)
    assert f"training finished {STEPS}" in jobs.output(low)
    assert jobs.cluster.fact(low, "Restarts") == "1" and jobs.cluster.fact(high, "Restarts") == "0"
    ours, theirs = jobs.lines("interrupted"), jobs.lines("whole")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["order"] for line in ours] == [line["order"] for line in theirs]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    weights = [(jobs.folder / run / "export/model.safetensors").read_bytes() for run in ("interrupted", "whole")]
    assert weights[0] == weights[1]
    assert time.monotonic() - jobs.started < 180


def test_a_wrong_setting_is_not_tried_again(jobs: Jobs) -> None:
    job = jobs.submit("low", "wrong", "--data.batch-size", "15")
    jobs.ends(job, "FAILED")
    assert jobs.cluster.fact(job, "Restarts") == "0" and jobs.cluster.fact(job, "ExitCode") == "2:0"
    assert "data.batch_size = 15" in jobs.output(job)


def test_a_cancelled_run_saves_and_stays_cancelled(jobs: Jobs) -> None:
    job = jobs.submit("low", "cancelled", "--run.steps", "100000")
    jobs.until("training", lambda: len(jobs.lines("cancelled")) >= 5, 90, job)
    jobs.cluster.command("scancel", job)
    jobs.ends(job, "CANCELLED")
    assert jobs.cluster.fact(job, "Restarts") == "0"
    step = jobs.lines("cancelled")[-1]["step"]
    assert f"training stopped {step} 15" in jobs.output(job)
    assert (jobs.folder / "cancelled/latest").read_text().strip() == f"step-{step:08d}"


def test_a_run_at_its_time_limit_saves_and_goes_back_to_the_queue(jobs: Jobs) -> None:
    job = jobs.submit("low", "limited", "--run.steps", "100000", options=("--time=2", "--signal=USR1@60"))
    jobs.until(
        "back in the queue", lambda: jobs.cluster.fact(job, "Restarts") == "1", 110, job
    )  # comes up to 30 s early
    step = jobs.lines("limited")[-1]["step"]
    assert f"training stopped {step} 10" in jobs.output(job)
    jobs.cluster.command("scancel", job)
