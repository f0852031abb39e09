from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprm.cli.compose import composed
from rlprm.cli.main import main
from rlprm.data.tasks.chain_arithmetic import write_model_folder
from rlprm.errors import CheckpointError
from rlprm.run.checkpoint import Checkpointer
from rlprm.run.exporting import newest_checkpoint, run_config
from rlprm.run.folder import write_run_header
from rlprm.run.progress import Progress


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with its header and no checkpoint."""
    write_model_folder(tmp_path / "model", 0, hidden=32, layers=1, heads=1, context=128)
    folder = tmp_path / "runs/a/seed0"
    folder.mkdir(parents=True)
    made = composed("train", ["recipe=chain_arithmetic_cpu", f"model.path={tmp_path}/model"])
    write_run_header(folder, made.yaml(), {}, None)
    return folder


def saved(run: Path, *steps: int) -> list[Path]:
    checkpointer = Checkpointer(run / "checkpoints", 10)
    folders = []
    for step in steps:
        (checkpointer.begin(step) / "weights").write_text(str(step))
        folders.append(checkpointer.commit(step, {"step": step}))
    return folders


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()  # what making the model said
    assert main(["export", *words]) == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    return said


def test_folders_that_are_no_run(capsys, run, tmp_path):
    output = str(tmp_path / "out")
    assert "is no folder" in refused(capsys, str(tmp_path / "absent"), output)
    assert "holds no run (no run.json with config.yaml)" in refused(capsys, str(tmp_path / "model"), output)
    assert f"did you mean {run}?" in refused(capsys, str(run.parent), output)
    assert f"did you mean {run}?" in refused(capsys, str(run.parent.parent), output)
    assert "has no checkpoint yet" in refused(capsys, str(run), output)
    (run / "config.yaml").write_text("name: a\n")
    assert "is not a configuration of this version" in main_words(capsys, str(run), output)
    assert not (tmp_path / "out").exists()


def main_words(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()  # what making the model said
    assert main(["export", *words]) == 1
    return capsys.readouterr().err


def test_output_that_is_not_empty(capsys, run, tmp_path):
    saved(run, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("")
    assert "is not an empty folder" in refused(capsys, str(run), str(tmp_path / "out"))
    assert "is not an empty folder" in refused(capsys, str(run), str(tmp_path / "out/precious"))


def test_newest_intact_checkpoint_and_nothing_is_changed(run):
    first, second = saved(run, 9, 10)
    (run / "checkpoints/step_000011.tmp").mkdir()  # a run that is still going writes here
    assert newest_checkpoint(run, Progress(quiet=True)) == (10, second)
    (second / "weights").write_text("xx")
    assert newest_checkpoint(run, Progress(quiet=True)) == (9, first)
    (first / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"is intact: step_000010: .*step_000009: missing: weights"):
        newest_checkpoint(run, Progress(quiet=True))
    assert (run / "checkpoints/step_000011.tmp").is_dir()


def test_the_configuration_is_that_of_the_last_start(run, tmp_path):
    assert run_config(run).steps == 30
    made = composed("train", ["recipe=chain_arithmetic_cpu", f"model.path={tmp_path}/model", "steps=77"])
    write_run_header(run, made.yaml(), {}, None)
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    assert run_config(run).steps == 77
