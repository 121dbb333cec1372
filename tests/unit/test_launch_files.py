"""The launch files: what they ask for exists, and train.sbatch goes back to the queue exactly when it should.

tests/distributed/test_slurm.py runs the batch file on a real Slurm; here programs of the same names stand in for it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm import settings
from mm.config import TrainConfig
from tools.slurm import local_cluster

STAND_INS = {
    "srun": """while [ "${1#-}" != "$1" ]; do echo "$1" >> srun.txt; shift; done
[ -z "$SAYS" ] || echo "$SAYS" > "$MM_STATUS"
[ -z "$TERM_IT" ] || kill -TERM $PPID
"$@"
exit "$CODE" """,
    "scontrol": """echo "$*" >> scontrol.txt
case "$*" in
    "show hostnames"*) printf 'n1\\nn2\\n' ;;
    *"show node n1") echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
esac""",
    "squeue": 'echo "$STATE"',
    "sleep": "",
    "agent": 'printf "%s\\n" "$@" > agent.txt',
}


def batch(folder: Path, root: Path, *arguments: str, **variables: str) -> tuple[int, str, bool]:
    """Run train.sbatch in a folder: its exit code, what it printed, and whether it asked to be requeued."""
    programs = folder / "programs"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (folder / "tools").symlink_to(root / "tools")
    slurm = {"JOB_ID": "12345", "JOB_NODELIST": "n[1-2]", "NNODES": "2", "NODEID": "1", "CPUS_ON_NODE": "4"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MM_"))}
    environment |= {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_SUBMIT_DIR": str(folder)}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "MM_PYTHON": "agent"}
    environment |= {"CODE": "0", "STATE": "RUNNING", "SAYS": "", "TERM_IT": "", **variables}
    words = ["bash", str(root / "tools/slurm/train.sbatch"), *arguments]
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    said = (folder / "scontrol.txt").read_text() if (folder / "scontrol.txt").exists() else ""
    return done.returncode, done.stdout, "requeue 12345" in said


@pytest.mark.parametrize(
    ("outcome", "code", "state", "term", "back"),
    [
        ("finished 100", 0, "RUNNING", False, False),
        ("stopped 7 10", 138, "RUNNING", False, True),  # preempted, or near the time limit
        ("stopped 7 15", 143, "RUNNING", True, True),
        ("stopped 7 10", 138, "SIGNALING", False, True),
        ("stopped 7 15", 143, "COMPLETING", True, False),  # scancel
        ("failed data.train = x: no such folder", 2, "RUNNING", False, False),
        ("failed data.train = x: no such folder", 2, "RUNNING", True, False),
        ("", 137, "RUNNING", False, False),  # killed, nobody knows why
        ("", 143, "RUNNING", True, True),  # told to end while it started
    ],
)
def test_a_job_is_requeued_when_slurm_stopped_it_and_only_then(
    root: Path, tmp_path: Path, outcome: str, code: int, state: str, term: bool, back: bool
) -> None:
    (tmp_path / "slurm-12345.status").write_text("stopped 3 10\n")  # of the start before, no longer true
    variables = {"SAYS": outcome, "CODE": str(code), "STATE": state, "TERM_IT": "1" if term else ""}
    got, said, requeued = batch(tmp_path, root, "configs/x.py", **variables)
    assert requeued is back, said
    assert back or got == code
    assert f"training {outcome or 'ended without a word'}" in said


def test_a_job_that_restarts_for_ever_is_given_up(root: Path, tmp_path: Path) -> None:
    code, said, requeued = batch(tmp_path, root, "configs/x.py", SLURM_RESTART_COUNT="4", MM_REQUEUES="3")
    assert code == 1 and not requeued and "restart 4 is more than MM_REQUEUES=3" in said
    assert not (tmp_path / "srun.txt").exists()


def test_a_batch_file_without_a_config_says_how_it_is_used(root: Path, tmp_path: Path) -> None:
    code, said, _ = batch(tmp_path, root)
    assert code == 2 and "sbatch tools/slurm/train.sbatch configs/x.py" in said


@pytest.mark.parametrize(("gpus", "processes"), [("8", "8"), ("", "1")])
def test_each_node_starts_a_process_a_gpu(root: Path, tmp_path: Path, gpus: str, processes: str) -> None:
    flags = ["--data.train", "/shards/{00000..00002}.tar", "--run.dir", "runs/a run"]
    batch(tmp_path, root, "configs/x.py", *flags, **({"SLURM_GPUS_ON_NODE": gpus} if gpus else {}))
    words = (tmp_path / "agent.txt").read_text().splitlines()
    agent = read_agent(words)
    assert (agent.nnodes, agent.nproc_per_node, agent.node_rank) == ("2", processes, 1)
    assert (agent.master_addr, agent.master_port, agent.max_restarts) == ("10.0.0.1", 22345, 0)
    assert agent.training_script_args == ["configs/x.py", *flags]
    assert "--kill-on-bad-exit=0" in (tmp_path / "srun.txt").read_text()


def read_agent(words: list[str]) -> Any:
    """torchrun's reading of `[exec] PYTHON tools/launch.py FLAGS -m mm.train ...`, which may not have unknown flags."""
    from torch.distributed.run import parse_args

    place = words.index("tools/launch.py")
    agent = parse_args(words[place + 1 :])
    assert agent.module and agent.training_script == "mm.train"
    return agent


def shell(text: str, **variables: str) -> list[str]:
    """The words of a shell command, its variables replaced; what bash does not parse fails."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    return shlex.split(text.replace("\\\n", " "))


def assert_trains(words: list[str]) -> Any:
    """The agent's flags are torchrun's, and the settings behind the config are mm's."""
    agent = read_agent(words)
    config, *flags = agent.training_script_args
    assert config.startswith("configs/")
    changed = settings.override(TrainConfig(), flags)
    assert changed.data.train and changed.run.dir != TrainConfig().run.dir
    return agent


def test_the_batch_file_parses(root: Path) -> None:
    path = root / "tools/slurm/train.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_the_skypilot_task_runs_what_exists(root: Path) -> None:
    task = yaml.safe_load((root / "tools/skypilot.yaml").read_text())
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    node = {"NUM_NODES": "1", "NODE_RANK": "0", "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1"}
    variables = {f"SKYPILOT_{name}": value for name, value in node.items()}
    run = task["run"].replace('$(basename "$CONFIG" .py)', "x")
    run = run.replace('$(head -n 1 <<< "$SKYPILOT_NODE_IPS")', "10.0.0.1")
    assert_trains(shell(run, **variables, CONFIG=task["envs"]["CONFIG"], TRAIN="s3://a/b.tar", ARGS=""))
    recovery = task["resources"]["job_recovery"]
    assert {75, 138, 143} <= set(recovery["recover_on_exit_codes"]) and 2 not in recovery["recover_on_exit_codes"]
    assert set(task) <= {"name", "num_nodes", "workdir", "resources", "envs", "file_mounts", "setup", "run"}


def test_skypilot_accepts_its_task(root: Path) -> None:
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load((root / "tools/skypilot.yaml").read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    jsonschema.validate(task["file_mounts"]["/runs"], schemas.get_storage_schema())


def jobset(root: Path) -> tuple[Any, Any, Any]:
    """The manifest, the specification of its job, and of its pod."""
    manifest = yaml.safe_load((root / "tools/kubernetes.yaml").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return manifest, job, job["template"]["spec"]


def test_the_jobset_runs_what_exists(root: Path) -> None:
    manifest, job, pod = jobset(root)
    container = pod["containers"][0]
    agent = assert_trains(shell(container["args"][0], JOB_COMPLETION_INDEX="1"))
    name, node = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"][0]["name"]
    assert agent.master_addr == f"{name}-{node}-0-0.{name}"
    assert int(agent.nnodes) == job["completions"] == job["parallelism"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_has_time_to_save_and_a_wrong_setting_ends_the_jobset(root: Path) -> None:
    manifest, job, pod = jobset(root)
    agent = read_agent(shell(pod["containers"][0]["args"][0], JOB_COMPLETION_INDEX="0"))
    assert agent.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"] and pod["restartPolicy"] == "Never"
    (reaction,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (reaction["action"], reaction["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0 and manifest["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_kubernetes_accepts_the_jobset(root: Path) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    manifest, _, _ = jobset(root)
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest  # an unknown field would be gone
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mm"}, **template}
    validator.validate(job, validator.latest_version(), strict=True)


def test_a_slurm_that_cannot_be_installed_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_cluster, "PROGRAMS", str(tmp_path))
    monkeypatch.delenv("MM_INSTALL_SLURM", raising=False)
    with pytest.raises(RuntimeError, match="slurmctld, slurmd, slurm-client, munge: not installed.*MM_INSTALL_SLURM=1"):
        local_cluster.install()
    apt = tmp_path / "apt-get"
    apt.write_text('#!/bin/sh\necho "E: cannot $1"; exit 100\n')
    apt.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("MM_INSTALL_SLURM", "1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match="E: cannot install"):
        local_cluster.install()


@pytest.mark.timeout(120)
def test_the_launcher_ends_with_the_code_of_the_process_that_failed(root: Path) -> None:
    bodies = {
        "kill -USR1 $PPID; exit 2": 2,  # USR1 is for the processes
        "kill -KILL $BASHPID": 137,
        "trap 'exit 0' TERM; sleep 1; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done": 143,
    }
    launch = [sys.executable, str(root / "tools/launch.py"), "--nnodes=1", "--nproc-per-node=1", "--master-port=0"]
    agents = [
        subprocess.Popen([*launch, "--no-python", "bash", "-c", body], stderr=subprocess.PIPE, text=True)
        for body in bodies
    ]
    said = [agent.communicate(timeout=100)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == list(bodies.values()), said
    assert not any("Traceback" in text for text in said)


def test_what_all_processes_find_wrong_is_said_by_the_first_of_a_machine(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait, so that the launcher ends them; one that is still there afterwards speaks as well."""
    from mm import train

    waited: list[float] = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    for rank, expected in (("0", []), ("1", [train.SPOKEN])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        waited.clear()
        assert train.main([str(root / "configs/debug.py"), "--nope", "1"]) == 2
        assert waited == expected
        assert capsys.readouterr().err.count("mm: error: ") == 1
