"""One run, one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rlprm.errors import ConfigError
from rlprm.run.folder import RunFolder, write_run_header


def test_a_new_folder_is_made_and_an_empty_one_is_taken(tmp_path):
    with RunFolder(tmp_path / "a" / "b", resume=False) as folder:
        assert folder.path.is_dir()
    RunFolder(tmp_path / "a" / "b", resume=False).close()


@pytest.mark.parametrize("trace", ["run.json", "config.yaml", "metrics.jsonl"])
def test_a_folder_with_another_run_is_refused_unless_resumed(tmp_path, trace):
    (tmp_path / trace).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds another run \\({trace}\\).*resume=auto"):
        RunFolder(tmp_path, resume=False)
    # The refusal has let go of the folder.
    RunFolder(tmp_path, resume=True).close()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run", resume=False)


def test_two_runs_in_one_folder_are_refused_and_the_holder_is_named(tmp_path):
    with RunFolder(tmp_path, resume=True):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
            RunFolder(tmp_path, resume=True)
    RunFolder(tmp_path, resume=True).close()


def test_another_process_is_kept_out_and_a_killed_one_leaves_no_lock(tmp_path):
    program = (
        "import sys, time, pathlib; from rlprm.run.folder import RunFolder\n"
        "held = RunFolder(pathlib.Path(sys.argv[1]), resume=True); print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {other.pid} on "):
            RunFolder(tmp_path, resume=True)
    finally:
        other.kill()
        other.communicate()
    RunFolder(tmp_path, resume=True).close()


def test_the_header_says_what_was_started(tmp_path):
    write_run_header(tmp_path, "steps: 3\n", {"torch": "2.13.0"}, "abc123")
    write_run_header(tmp_path, "steps: 3\n", {"torch": "2.13.0"}, "abc123")
    write_run_header(tmp_path, "steps: 9\n", {"torch": "2.14.0"}, None)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["config"] for start in starts] == ["config.yaml", "config.yaml", "config.start3.yaml"]
    assert [start["commit"] for start in starts] == ["abc123", "abc123", None]
    assert starts[2]["versions"] == {"torch": "2.14.0"}
    assert (tmp_path / "config.yaml").read_text() == "steps: 3\n"
    assert (tmp_path / "config.start3.yaml").read_text() == "steps: 9\n"
