"""Checkpoints whose files come from ranks on other nodes: on disk there, seen here, then listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprm.engine.checkpoints import written
from rlprm.errors import CheckpointError
from rlprm.run import checkpoint
from rlprm.run.checkpoint import Checkpointer, complete


def test_a_rank_reports_its_own_files_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    own = [
        "random_0.pt",
        "learner.json",
        "state/mp_rank_00_model_states.pt",
        "state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ]
    others = ["random_1.pt", "random_10.pt", "state/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    for name in [*own, *others]:
        (tmp_path / name).write_text("four")
    assert written(tmp_path) == {str(tmp_path / name): 4 for name in sorted(own)}


def test_a_file_that_comes_late_is_waited_for_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(tmp_path, 1)
    file = checkpointer.begin(3) / "policy" / "random_1.pt"
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        file.parent.mkdir(exist_ok=True)
        file.write_text("ab" if len(waited) == 1 else "abcd")  # first it is seen too short

    monkeypatch.setattr(checkpoint.time, "sleep", sleep)
    final = checkpointer.commit(3, {"step": 3}, {str(file): 4})
    assert len(waited) == 2
    assert json.loads((final / "manifest.json").read_text())["files"]["policy/random_1.pt"]["size"] == 4
    assert complete(tmp_path) == [(3, final)]


def test_a_file_that_never_comes_ends_the_run_and_no_checkpoint_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "VISIBLE_S", 0.0)
    checkpointer = Checkpointer(tmp_path, 1)
    partial = checkpointer.begin(3)
    with pytest.raises(
        CheckpointError, match=r"random_1.pt \(1 of 1 files\) was written by a rank and is not seen here"
    ):
        checkpointer.commit(3, {"step": 3}, {str(partial / "random_1.pt"): 4})
    assert complete(tmp_path) == []
