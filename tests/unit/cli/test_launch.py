"""`rlprm launch`, `status`, `logs` and `stop` up to where something would start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlprm.cli import launch
from rlprm.cli.main import main
from rlprm.launch import launcher, task
from tests.unit.launch.launching import a_task, hosts_cluster, written
from tests.unit.launch.test_manifest import cluster as kuberay_cluster

RECIPE = "recipe=chain_arithmetic_cpu"
KUBERAY = ["cluster=kuberay", "cluster.image=i", "cluster.claim=c"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipe=chain_aritmetic_cpu"], "nearest is 'chain_arithmetic_cpu'"),
        ([RECIPE, "cluster=slrm"], "nearest is 'slurm'"),
        ([RECIPE, "cluster.prt=1"], "nearest is 'cluster.port'"),
        ([RECIPE, "cluster.port=99999"], "cluster.local.port: found 99999"),
        ([RECIPE, "stps=1"], "nearest is 'steps'"),
        ([RECIPE, "steps=0"], "steps: found 0"),
        ([RECIPE, "cluster=hosts"], "no value for cluster.hosts"),
        ([RECIPE, "cluster=hosts", "cluster.hosts=[a]", "placement.nodes=2"], "placement.nodes is 2 and cluster.hosts has 1"),
        ([RECIPE, "placement.ray_address=auto"], "for a cluster that runs use cluster=existing"),
        ([RECIPE, "+cluster.environment.MY_TOKEN=abc"], "export MY_TOKEN in this shell"),
        ([RECIPE, "--", "--sedes", "0,1"], "nearest is '--seeds'"),
        ([RECIPE, "--", "--cfg"], "--cfg runs nothing"),
        ([RECIPE, "--comand", "sft"], "nearest is '--command'"),
        ([RECIPE, "cluster.python=/nope"], "cluster.python is /nope"),
        ([RECIPE, "cluster.directory=nope"], "which is no folder"),
        ([RECIPE, *KUBERAY, "cluster.claim=null"], "cluster.claim is null"),
        (["--command", "sft", "recipe=gsm8k_qwen2.5_0.5b"], "warm_up"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("rlprm launch: ")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.parametrize("name", ["train", "evaluate", "sft"])
def test_a_command_that_runs_here_points_at_launch(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, RECIPE, "cluster=local"]) == 1
    assert f"cluster=local: rlprm {name} runs here; rlprm launch runs it" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_the_same_command_continues_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    two = ["placement=cpu_two_ranks", "placement.nodes=2"]
    assert main(["launch", RECIPE, "cluster=local", *two, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}/runs/launches/chain_arithmetic_cpu-" in text
    assert text.count("-m rlprm.launch.head") == 1
    assert text.count("-m rlprm.launch.worker") == 1
    assert "--name node1 --ip 127.0.0.1" in text
    assert text.rstrip().endswith(f"rlprm train {RECIPE} {' '.join(two)} resume=auto")
    assert main(["launch", RECIPE, "resume=never", "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("resume=never")
    assert list(tmp_path.iterdir()) == []


def test_other_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RECIPE, "normalizer=raw,batch_mean", "seeds=1", "cluster=local"]
    assert main(["launch", "--command", "ablate", *words, "--dry-run", "--", "--parallel", "2"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith(f"rlprm ablate {RECIPE} normalizer=raw,batch_mean seeds=1 --parallel 2")
    assert main(["launch", "--command", "evaluate", RECIPE, "--dry-run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"rlprm evaluate {RECIPE}")
    assert main(["launch", RECIPE, "--dry-run", "--", "--seeds", "0,1"]) == 0
    assert "resume=auto --seeds 0,1" in capsys.readouterr().out


def test_every_file_of_a_cluster_composes_and_says_its_kind() -> None:
    from rlprm.cli.compose import composed
    from rlprm.config import validated
    from rlprm.config_cluster import LaunchConfig
    from rlprm.launch.backends import backend
    from rlprm.paths import cluster_dir

    needed = {
        "hosts": ["cluster.hosts=[a]"], "kuberay": ["cluster.image=i", "cluster.claim=c", "cluster.mount=/c"],
        "existing": ["cluster.address=http://h:8265"],
    }  # fmt: skip
    for file in cluster_dir().glob("*.yaml"):
        words = [f"cluster={file.stem}", *needed.get(file.stem, [])]
        config = validated(LaunchConfig, composed("launch", words).values)
        assert callable(backend(config.cluster.kind).launch)


def test_a_run_that_is_going_on_is_not_launched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "chain_arithmetic_cpu" / "seed0"
    going = a_task(tmp_path, "first-1", run=str(run), folder=str(tmp_path / "runs" / "launches" / "first-1"))
    launcher.sign(written(going, hosts_cluster()))
    assert main(["launch", RECIPE]) == 1
    error = capsys.readouterr().err
    assert f"{run} is in use by launch first-1 (waiting" in error
    assert "rlprm stop first-1" in error
    assert len(list((tmp_path / "runs" / "launches").iterdir())) == 1


def test_status_logs_and_stop_find_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert "no launch in" in capsys.readouterr().out
    assert main(["logs"]) == 1
    assert main(["stop", "a", "b"]) == 1
    assert "a and b: name one launch" in capsys.readouterr().err
    assert main(["status", "outputdir=x"]) == 1
    capsys.readouterr()
    ended = written(a_task(tmp_path / "out", "small-1"), hosts_cluster())
    task.put(ended.path, task.EXIT, "3\n")
    (ended.path / task.LOG).write_text("what it said\n")
    assert main(["status", "output_dir=out", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["id"], row["state"], row["exit_code"]) == ("small-1", "ended", 3)
    assert main(["status", "output_dir=out"]) == 0
    assert "small-1" in capsys.readouterr().out
    assert main(["logs", "-f", "sm", "output_dir=out"]) == 0
    assert capsys.readouterr().out == "what it said\n"
    assert main(["stop", "output_dir=out"]) == 0
    assert capsys.readouterr().out == "small-1: ended, exit code 3\n"


def test_what_the_cluster_would_refuse_leaves_no_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["launch", RECIPE, *KUBERAY]) == 1
    assert "kubectl is not on PATH" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_launch_whose_cluster_gives_no_answer_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")  # so there is no kubectl to ask with
    run = str(tmp_path / "runs" / "chain_arithmetic_cpu" / "seed0")
    folder = tmp_path / "runs" / "launches"
    written(a_task(tmp_path, "far-1", kind="kuberay", run=run, folder=str(folder / "far-1")), kuberay_cluster())
    assert main(["stop"]) == 1
    assert "far-1 was not asked to end, because its cluster gives no answer" in capsys.readouterr().err
    assert main(["status", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["exit_code"]) == ("unknown", None)
    assert main(["launch", RECIPE]) == 1
    error = capsys.readouterr().err
    assert f"{run} may be in use by launch far-1" in error
    assert f"remove {folder / 'far-1'}" in error
    assert len(list(folder.iterdir())) == 1


def test_the_id_of_a_command_that_only_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--command", "evaluate", RECIPE, "--dry-run"]) == 0
    assert re.search(r"/launches/evaluate-\d{8}-\d{6}-[0-9a-f]{4}\n", capsys.readouterr().out)
    assert main(["launch", "--command", "evaluate", RECIPE, "output=my results.json", "--dry-run"]) == 0
    assert "/launches/evaluate-my-results-2" in capsys.readouterr().out


def test_help_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--help"]) == 0
    text = capsys.readouterr().out
    assert text == launch.HELP
    from rlprm.paths import cluster_dir

    assert all(f"\n  {file.stem} " in text for file in cluster_dir().glob("*.yaml"))
