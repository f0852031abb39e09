"""`rlprm launch cluster=slurm` through a real Slurm of three nodes on this machine."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from rlprm.errors import ConfigError
from rlprm.launch import slurm_queue
from tests.integration.launched import RECIPE, Launched, called, small, stand_in, state, until
from tests.integration.slurm_here import NODES, Slurm, Unavailable, slurm_here
from tests.integration.support import json_lines

pytestmark = [pytest.mark.integration, pytest.mark.long]

SECRET = "not-to-be-seen-5f0c"
NODE = ("cluster.node.gpu=null", "cluster.node.gpus=0", "cluster.node.cpus=2", "cluster.poll_s=1")
SEATS = ("placement=cpu_two_ranks", "placement.nodes=2", "placement.policy_nodes=[0,1]", "placement.engine_nodes=[1]")


@pytest.fixture(scope="module")
def one_slurm() -> Iterator[Slurm]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(slurm_here())
        except Unavailable as error:
            pytest.skip(f"no Slurm on this machine: {error}")
        yield found


@pytest.fixture
def slurm(one_slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Slurm, for this process and those that it starts, and a secret in the shell."""
    monkeypatch.setenv("SLURM_CONF", one_slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return one_slurm


def words(output_dir: Path, python: str | None = None) -> list[str]:
    return ["cluster=slurm", *NODE, *small(output_dir, python)]


def launch_folder(output_dir: Path) -> Path:
    (folder,) = (output_dir / "launches").iterdir()
    return folder


def job(slurm: Slurm, output_dir: Path) -> str:
    """What Slurm shows of the job."""
    number = (launch_folder(output_dir) / "slurm_job").read_text().strip()
    return slurm.ask("scontrol", "--oneliner", "show", "job", number)


def with_secret(*folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_socket()]
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def left(slurm: Slurm) -> list[psutil.Process]:
    """Processes of jobs of this Slurm."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        mine = environment.get("SLURM_CONF") == slurm.environment["SLURM_CONF"]
        if mine and "SLURM_JOB_ID" in environment and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_policy_ranks_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    """The whole way: a queue, Ray's head and worker as tasks of one job, a step of PRIME over both nodes, the exit code."""
    with Launched(*words(tmp_path), *SEATS, "cluster.preflight=quick") as launched:
        launched.until("starts rlprm train")
        seen = with_secret(tmp_path, slurm.folder)
        assert [path.name for path in seen] == ["secrets"]
        assert seen[0].stat().st_mode & 0o777 == 0o600
        shown = job(slurm, tmp_path)
        assert "JobState=RUNNING" in shown
        assert "NumNodes=2" in shown
        assert SECRET not in shown
        code = launched.end(240)
    assert code == 0, launched.text
    assert "launch: nodes: n1 (127.0.0.1), n2 (127.0.0.1)" in launched.text
    assert "n1: 1 policy + 1 PRM, n2: 1 policy + 1 engines" in launched.text
    assert "RUNNING on n[1-2]" in launched.text
    assert "JobState=COMPLETED" in job(slurm, tmp_path)
    assert len(json_lines(tmp_path / "chain_arithmetic_cpu" / "seed0" / "metrics.jsonl")) == 1
    found = state(tmp_path)
    assert (found["state"], found["exit_code"], found["nodes"]) == ("ended", 0, 2)
    assert with_secret(tmp_path, slurm.folder) == []
    until(lambda: not left(slurm), "the end of the job's processes", 20)


def test_the_exit_code_of_a_run_that_fails(slurm: Slurm, tmp_path: Path) -> None:
    with Launched(*words(tmp_path, stand_in(tmp_path, code=7))) as launched:
        assert launched.end(120) == 7, launched.text
    assert "FAILED (NonZeroExitCode)" in launched.text
    assert "ExitCode=7:0" in job(slurm, tmp_path)


def test_detached_put_back_and_stopped(slurm: Slurm, tmp_path: Path) -> None:
    """After a requeue the same script starts again with its secrets; a stop reaches the run, and not the axe."""
    python = stand_in(tmp_path, seconds=600)
    done = called("launch", RECIPE, *words(tmp_path, python), "placement.nodes=2", "--detach")
    assert done.returncode == 0, done.stderr
    log = launch_folder(tmp_path) / "slurm.log"
    until(lambda: log.exists() and "stand-in train" in log.read_text(), "the run", 90)
    found = state(tmp_path)
    assert (found["state"], found["exit_code"]) == ("running", None)
    assert "RUNNING on n[1-2]" in found["detail"]
    number = (launch_folder(tmp_path) / "slurm_job").read_text().strip()
    slurm.ask("scontrol", "requeue", number)
    until(lambda: "JobState=PENDING" in job(slurm, tmp_path), "the queue", 60)
    assert state(tmp_path)["state"] == "waiting"
    slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    until(lambda: log.read_text().count("stand-in train") == 2, "the second start", 90)
    assert [p for p in left(slurm) if "stand_in.py" in " ".join(p.cmdline()) and p.environ().get("HF_TOKEN") == SECRET]
    said = called("logs", f"output_dir={tmp_path}").stdout
    assert said == log.read_text()
    done = called("stop", f"output_dir={tmp_path}")
    assert "ended, exit code 130" in done.stdout, done.stdout + done.stderr
    end = log.read_text().rpartition("stand-in train")[2]
    assert "the run is asked to end (rlprm stop)" in end
    assert end.index("ended with exit code 130") < end.index("node n2 leaves")  # its node is there until it has saved
    assert "ExitCode=130:0" in job(slurm, tmp_path)
    assert with_secret(tmp_path, slurm.folder) == []
    until(lambda: not left(slurm), "the end of the job's processes", 20)


def test_before_the_time_limit_the_run_is_asked_to_save(slurm: Slurm, tmp_path: Path) -> None:
    limits = ("cluster.time=0-00:04:00", "cluster.save_s=120")  # Slurm sends the signal up to a minute earlier
    with Launched(*words(tmp_path, stand_in(tmp_path, seconds=600)), *limits) as launched:
        assert launched.end(180) == 130, launched.text
    assert "the run is asked to end (rlprm stop)" in launched.text, launched.text
    assert "JobState=FAILED" in job(slurm, tmp_path)  # with its own exit code, and not TIMEOUT


def test_waiting_says_why_and_ctrl_c_leaves_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    taken = slurm.ask(
        "sbatch", "--parsable", f"--nodes={len(NODES)}", "--exclusive", "--output=/dev/null", "--wrap=sleep 300"
    )
    try:
        with Launched(*words(tmp_path), "placement.nodes=2") as launched:
            launched.until("PENDING: Resources - waiting for 2 nodes to be free")
            launched.process.send_signal(signal.SIGINT)
            assert launched.end(30) == 130
        assert "JobState=CANCELLED" in job(slurm, tmp_path)
        assert state(tmp_path)["exit_code"] == 130
        assert with_secret(tmp_path, slurm.folder) == []
    finally:
        slurm.ask("scancel", taken.strip())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "--partition=nope",
            "invalid partition specified: nope .*all .3 of 3 nodes up, 4 CPUs each.*cluster.partition",
        ),
        ("--nodes=4", "node configuration is not available .partitions: all .3 of 3 nodes up.*placement.nodes"),
        ("--cpus-per-task=5", "node configuration is not available .*cluster.node.cpus"),
        ("--gpus-per-node=3", "cluster.node.gpus"),
        ("--time=one day", "Invalid --time specification; write cluster.time as MINUTES"),
        ("--constraint=h100", "Invalid feature specification; no node has what cluster.constraint"),
        ("--memory=all", "unrecognized option.*cluster.extra"),
    ],
)
def test_what_slurm_refuses_is_said_before_anything_waits(slurm: Slurm, line: str, sentence: str) -> None:
    script = f"#!/bin/bash\n#SBATCH {line}\ntrue\n"
    with pytest.raises(ConfigError, match=f"(?i){sentence}"):
        slurm_queue.submit_script(script, slurm.environment)
    assert slurm.ask("squeue", "--noheader") == ""


def test_a_refused_launch_leaves_no_secret(slurm: Slurm, tmp_path: Path) -> None:
    done = called("launch", RECIPE, *words(tmp_path), "placement.nodes=4")
    assert done.returncode == 1
    assert "Slurm refuses the job" in done.stderr
    assert with_secret(tmp_path) == []
    assert json.loads((launch_folder(tmp_path) / "task.json").read_text())["secrets"] == ["WANDB_API_KEY", "HF_TOKEN"]
