"""Programs on this machine that cannot be started."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.errors import ConfigError
from rlprm.launch import local, task
from rlprm.launch.background import attached
from rlprm.launch.processes import Wishes
from tests.unit.launch.launching import a_task, local_cluster, written


def test_an_interpreter_or_folder_that_is_not_there_is_named_before_anything_is_written(tmp_path: Path) -> None:
    local.check(a_task(tmp_path), local_cluster())
    local.check(a_task(tmp_path, python="python3"), local_cluster())  # on PATH
    with pytest.raises(ConfigError, match=r"cluster.python is /nope"):
        local.check(a_task(tmp_path, python="/nope"), local_cluster())
    with pytest.raises(ConfigError, match=r"cluster.directory is /nope, which is no folder"):
        local.check(a_task(tmp_path, directory="/nope"), local_cluster())


@pytest.mark.parametrize("changed", [{"python": "/nope"}, {"directory": "/nope"}])
def test_what_cannot_be_started_is_an_error_and_the_launch_has_ended(
    changed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wishes, "on_signals", lambda self: None)  # this process is not to become a launcher
    monkeypatch.setattr(local, "adopt_orphans", lambda: None)
    monkeypatch.setattr(local, "sweep", lambda: None)
    made = written(a_task(tmp_path, kind="local", **changed), local_cluster())
    with pytest.raises(ConfigError, match=r"cannot be started in .*/nope.*cluster\.python and cluster\.directory"):
        attached(made, local_cluster())
    assert task.exit_code(made.path) == 1
