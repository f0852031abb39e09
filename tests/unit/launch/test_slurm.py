"""The batch script, what reaches Slurm, and a job's states, with stand-ins for Slurm's programs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rlprm.cli.compose import composed
from rlprm.config import validated
from rlprm.config_cluster import LaunchConfig, SlurmCluster
from rlprm.errors import ConfigError, WorkerLost
from rlprm.launch import slurm, slurm_node, slurm_queue, task
from rlprm.launch.launches import launches, running_in
from rlprm.launch.processes import Wishes
from tests.unit.launch.launching import a_task, written

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=rlprm-small-20260102-030405-ab12
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:8
#SBATCH --partition=gpu
#SBATCH --account=me
#SBATCH --time=1-00:00:00
#SBATCH --output=/data/launches/small/slurm.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --mem=0
#SBATCH --no-kill

cd /data/launches/small || { echo "rlprm: $(hostname) does not see /data/launches/small; output_dir must be on shared \
storage" >&2; exit 1; }
rm -f head.json exit_code stop  # of an earlier start of this job
trap 'touch stop; told=1' TERM  # before the time limit: the run finishes its step, saves, ends; also when the job is put back
srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=16 --ntasks=2 --export=ALL --kill-on-bad-exit=1 --wait=60 --no-kill \
bash -c 'cd /home/me/rlprm || exit 1
set -e
module load cuda
set +e
command -v /venv/bin/python >/dev/null || { echo "rlprm: $SLURMD_NODENAME has no /venv/bin/python (cluster.python)" \
>&2; exit 1; }
exec /venv/bin/python -u -m rlprm.launch.slurm_node /data/launches/small
' &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
[ -f exit_code ] && code=$(cat exit_code)
[ -n "$told" ] || rm -f secrets  # a job that was put back needs them again
exit "$code"
"""


def cluster(*words: str) -> SlurmCluster:
    made: Any = validated(LaunchConfig, composed("launch", ["cluster=slurm", "cluster.poll_s=0.01", *words]).values)
    return made.cluster


def program(folder: Path, name: str, lines: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that takes every job, gives it the number 7, and knows what stands in the file `job`."""
    program(
        tmp_path, "sbatch", f'cat >> {tmp_path}/given; env >> {tmp_path}/given; [ "$1" = --test-only ] || echo "7;here"'
    )
    program(
        tmp_path, "scontrol", f'cat {tmp_path}/job || {{ echo "slurm_load_jobs error: Invalid job id" >&2; exit 1; }}'
    )
    program(tmp_path, "scancel", f"echo $1 > {tmp_path}/cancelled")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def shown(folder: Path, state: str, reason: str = "None", code: str = "0:0") -> None:
    (folder / "job").write_text(
        f"JobId=7 JobName=x JobState={state} Reason={reason} ExitCode={code} NodeList=n[1-2] \n"
    )


def test_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "never-to-be-seen")
    made = a_task(
        Path("/home/me/rlprm"), kind="slurm", nodes=2, node_gpus=8, python="/venv/bin/python",
        folder="/data/launches/small", secrets=("HF_TOKEN",),
    )  # fmt: skip
    wanted = cluster(
        "cluster.node.cpus=16", "cluster.gpu_option=gres", "cluster.partition=gpu", "cluster.account=me",
        "cluster.time=1-00:00:00", "cluster.extra=['--mem=0','--no-kill']", "cluster.setup=['module load cuda']",
    )  # fmt: skip
    assert slurm.script(made, wanted) == SCRIPT
    assert slurm.dry_run(made, wanted) == f"# sbatch --parsable < this script\n{SCRIPT}"


def test_a_script_of_one_node_without_gpus_that_cannot_continue(tmp_path: Path) -> None:
    made = a_task(tmp_path, command=("sft",), folder="/data/100% of it/x")
    text = slurm.script(made, cluster("cluster.save_s=0", "cluster.extra=[]"))
    assert "#SBATCH '--output=/data/100%% of it/x/slurm.log'" in text
    assert "cd '/data/100% of it/x' ||" in text
    assert "#SBATCH --no-requeue" in text
    assert "gpu" not in text
    assert "--signal" not in text
    assert "--time=" not in text


def test_no_secret_reaches_slurm(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OTHER_API_KEY", "PLAIN"):
        monkeypatch.setenv(name, f"value-of-{name}")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    made = written(a_task(tmp_path, kind="slurm", secrets=("HF_TOKEN", "PLAIN", "NOT_SET")), cluster())
    slurm.submit(made, cluster("cluster.partition=gpu"), lambda sentence: None)
    given = (tmp_path / "given").read_text()
    assert "#SBATCH --partition=gpu" in given
    assert "PATH=" in given
    assert not [word for word in ("value-of", "SBATCH_PARTITION", task.token(made.path)) if word in given]
    assert (made.path / "secrets").stat().st_mode & 0o777 == 0o600
    assert slurm_node.secrets(made.path) == {"HF_TOKEN": "value-of-HF_TOKEN", "PLAIN": "value-of-PLAIN"}
    assert (made.path / "slurm_job").read_text() == "7\n"


def test_a_run_is_followed_to_its_end(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written(a_task(tmp_path, kind="slurm", nodes=2), cluster())
    slurm.submit(made, cluster(), lambda sentence: None)
    said: list[str] = []
    watched = slurm.Watched(made, 0.0, said.append, Wishes())
    states = [("PENDING", "Priority"), ("RUNNING", "None"), ("COMPLETING", "None"), ("FAILED", "NonZeroExitCode")]
    for state, reason in states:
        shown(tmp_path, state, reason, "3:0")
        if state == "COMPLETING":
            task.put(made.path, task.EXIT, "3\n")
        assert watched.over() == (state == "FAILED")
    assert watched.code() == 3
    assert said[0] == "Slurm job 7: PENDING: Priority - jobs of higher priority go first"
    assert said[-1] == "Slurm job 7: FAILED (NonZeroExitCode) on n[1-2]"
    assert not (made.path / "secrets").exists()
    (made.path / "slurm.log").write_text("one step\n")
    assert list(slurm.logs(made, False)) == ["one step\n"]
    assert slurm.status(made, cluster()).exit_code == 3


def test_a_wish_reaches_a_run_and_ends_what_waits(programs: Path, tmp_path: Path) -> None:
    made = written(a_task(tmp_path, kind="slurm"), cluster())
    slurm.submit(made, cluster(), lambda sentence: None)
    shown(tmp_path, "RUNNING")
    wishes = Wishes()
    watched = slurm.Watched(made, 0.0, lambda sentence: None, wishes)
    wishes.ask(signal.SIGINT, "")
    assert not watched.over()
    assert task.stop_is_asked(made.path)
    assert not (tmp_path / "cancelled").exists()
    wishes.ask(signal.SIGINT, "")
    assert watched.over()
    assert watched.code() == 130
    assert (tmp_path / "cancelled").read_text() == "7\n"
    (tmp_path / "cancelled").unlink()
    shown(tmp_path, "PENDING", "Resources")
    slurm.stop(made)
    assert (tmp_path / "cancelled").read_text() == "7\n"


def test_a_job_that_is_gone_is_lost(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(a_task(tmp_path, kind="slurm"), cluster())
    assert slurm.status(made, cluster()).detail == "it was not handed to Slurm"
    slurm.submit(made, cluster(), lambda sentence: None)
    assert slurm.status(made, cluster()).state == "lost"  # Slurm does not know it
    shown(tmp_path, "NODE_FAIL")
    watched = slurm.Watched(made, 0.0, lambda sentence: None, Wishes())
    assert not watched.over()  # it may be put back into the queue
    assert watched.over()
    with pytest.raises(
        WorkerLost, match=r"left no exit code: NODE_FAIL on n\[1-2\]. Look at .*the same command continues"
    ):
        watched.code()
    program(tmp_path, "scontrol", "echo Unable to contact slurm controller >&2; exit 1")
    assert slurm.status(made, cluster()).state == "unknown"  # it cannot be asked now
    monkeypatch.setattr(slurm, "SILENT_S", -1.0)
    with pytest.raises(WorkerLost, match="gives no answer about job 7"):
        slurm.Watched(made, 0.0, lambda sentence: None, Wishes()).over()


def test_a_job_that_was_put_back_has_not_ended(programs: Path, tmp_path: Path) -> None:
    """Although its first try has left an exit code; where Slurm cannot be asked, that is what is known."""
    made = written(a_task(tmp_path, kind="slurm"), cluster())
    slurm.submit(made, cluster(), lambda sentence: None)
    task.put(made.path, task.EXIT, "143\n")
    shown(tmp_path, "PENDING", "BeginTime")
    (launch,) = launches(made.path.parent)
    assert launch.status().state == "waiting"
    assert running_in(made.path.parent, made.run) is not None
    assert not slurm.Watched(made, 0.0, lambda sentence: None, Wishes()).over()
    program(tmp_path, "scontrol", "exit 1")
    assert launch.status().exit_code == 143


def test_a_job_that_only_the_accounts_know(programs: Path, tmp_path: Path) -> None:
    program(tmp_path, "sacct", "echo 'CANCELLED by 1000|n[1-2]|0:15'")
    assert slurm_queue.look("7") == slurm_queue.Job(state="CANCELLED", reason="", nodes="n[1-2]", code=143)


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = written(a_task(tmp_path, kind="slurm"), cluster())
    with pytest.raises(ConfigError, match=r"sbatch is not on PATH.*--dry-run prints the script"):
        slurm.submit(made, cluster(), lambda sentence: None)
    assert not (made.path / "secrets").exists()


def test_a_node_finds_its_address_by_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path,
        "scontrol",
        'case "$2" in hostnames) echo a; echo b;; *) echo "NodeName=$4 NodeAddr=127.0.0.1 x=y";; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert slurm_node.hosts("[a-b]") == ("a", "b")
    assert slurm_node.address(("a",), 0) == "127.0.0.1"
    assert slurm_node.address(("a", "b"), 1) == "127.0.0.1"
    program(tmp_path, "scontrol", "exit 1")
    with pytest.raises(ConfigError, match="`scontrol show hostnames x` does not answer"):
        slurm_node.hosts("x")


def test_a_worker_that_has_failed_stays_until_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end would make srun end the others."""
    made = written(a_task(tmp_path, kind="slurm"), cluster())
    (made.path / "secrets").write_text("{}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "x")
    monkeypatch.setattr(slurm_node, "hosts", lambda nodelist: ("a", "b"))
    monkeypatch.setattr(slurm_node, "address", lambda names, rank: "127.0.0.1")
    monkeypatch.setattr(slurm_node.signal, "signal", lambda *given: None)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        task.put(made.path, task.EXIT, "0\n")

    monkeypatch.setattr(slurm_node.time, "sleep", sleep)
    monkeypatch.setattr(slurm_node.worker, "main", lambda options: 1)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert slurm_node.main([made.folder]) == 0
    assert waited == [slurm_node.LOOK_S]
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(slurm_node.head, "main", lambda options: 9)
    assert slurm_node.main([made.folder]) == 0  # it has left its exit code
    (made.path / task.EXIT).unlink()
    assert slurm_node.main([made.folder]) == 9
    assert task.read(made.folder).names == ("a", "b")
