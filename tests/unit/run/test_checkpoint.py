"""A checkpoint is there completely or not at all; damage is found, named and passed over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rlprm.errors import CheckpointError
from rlprm.run import checkpoint
from rlprm.run.checkpoint import Checkpointer, damage, load_state


def save(checkpointer, step):
    folder = checkpointer.begin(step)
    (folder / "policy").mkdir()
    (folder / "policy" / "weights.safetensors").write_bytes(bytes(range(256)) * step)
    (folder / "rng.bin").write_bytes(b"rng of step %d" % step)
    return checkpointer.commit(step, {"step": step, "trust": 0.25})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_found(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    assert checkpointer.latest_valid() is None
    save(checkpointer, 10)
    path = save(checkpointer, 20)
    assert Checkpointer(tmp_path, keep_last=2).latest_valid() == (path, {"step": 20, "trust": 0.25})
    assert (path / "policy" / "weights.safetensors").read_bytes() == bytes(range(256)) * 20
    assert load_state(tmp_path / "step_000010")["step"] == 10


@pytest.mark.parametrize(("keep_last", "left"), [(1, [5]), (2, [4, 5]), (4, [2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_only_the_newest_stay(tmp_path, keep_last, left):
    checkpointer = Checkpointer(tmp_path, keep_last=keep_last)
    for step in range(1, 6):
        save(checkpointer, step)
    assert names(tmp_path) == [f"step_{step:06d}" for step in left]


def test_old_ones_are_removed_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    save(checkpointer, 1)
    seen = []
    remove = shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: (seen.append(names(tmp_path)), remove(path)))
    save(checkpointer, 2)
    assert seen == [["step_000001.tmp", "step_000002"]]


def test_steps_of_seven_digits_are_newer_than_steps_of_six(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    save(checkpointer, 3)
    source = tmp_path / "step_000003"
    shutil.copytree(source, tmp_path / "step_1000000")
    assert checkpointer.latest_valid()[0].name == "step_1000000"


FILES = ["policy/weights.safetensors", "rng.bin", "state.json", "manifest.json"]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["delete", "truncate", "empty", "flip_first", "flip_middle", "flip_last"])
def test_every_damage_to_every_file_is_found_and_the_one_before_is_used(tmp_path, caplog, name, harm):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    good = save(checkpointer, 10)
    bad = save(checkpointer, 20)
    file = bad / name
    size = file.stat().st_size
    match harm:
        case "delete":
            file.unlink()
        case "truncate":
            os.truncate(file, size - 1)
        case "empty":
            os.truncate(file, 0)
        case _:
            flip(file, {"flip_first": 0, "flip_middle": size // 2, "flip_last": size - 1}[harm])
    assert damage(bad) is not None
    assert checkpointer.latest_valid() == (good, {"step": 10, "trust": 0.25})
    (reported,) = checkpointer.skipped
    assert str(bad) in reported
    assert "step_000020" in caplog.text
    with pytest.raises(CheckpointError, match="step_000020 cannot be used"):
        load_state(bad)


def test_every_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path):
    path = save(Checkpointer(tmp_path, keep_last=1), 1)
    manifest = path / "manifest.json"
    original = manifest.read_bytes()
    meaning = json.loads(original)
    unnoticed = []
    for position in range(len(original)):
        flip(manifest, position)
        if damage(path) is None:
            unnoticed.append(json.loads(manifest.read_bytes()))
        manifest.write_bytes(original)
    assert all(other == meaning for other in unnoticed)
    assert len(unnoticed) < len(original) // 10


def test_a_file_of_another_checkpoint_is_damage(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    first, second = save(checkpointer, 10), save(checkpointer, 20)
    shutil.copy(first / "state.json", second / "extra.json")
    assert "not in manifest.json: extra.json" in damage(second)
    (second / "extra.json").unlink()
    assert damage(second) is None
    shutil.copy(first / "state.json", second / "state.json")  # equally long, so only the hash can tell
    assert damage(second) == "state.json has other contents than were saved"


def test_a_run_never_starts_over_by_itself(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    for path in [save(checkpointer, step) for step in (1, 2)]:
        (path / "rng.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is intact.*rng\.bin"):
        checkpointer.latest_valid()
    assert len(checkpointer.skipped) == 2


class Crash(BaseException):
    """A kill: nothing of ours may catch it."""


STAGES = ["write_state", "sync_file", "hash", "manifest", "sync_folder", "rename", "sync_parent", "prune"]


def arm(monkeypatch, stage, error, tmp_path):
    """Make ``stage`` of the next commit raise ``error``."""
    write, sync, sha, replace = Path.write_text, checkpoint._sync, checkpoint._sha256, os.replace

    def broken_write(path, *args, **kwargs):
        if path.name == {"write_state": "state.json", "manifest": "manifest.json"}.get(stage):
            write(path, '{"half')
            raise error
        return write(path, *args, **kwargs)

    def broken_sync(path):
        kind = "sync_parent" if path == tmp_path else "sync_folder" if path.is_dir() else "sync_file"
        if kind == stage:
            raise error
        sync(path)

    def broken_sha(path):
        if stage == "hash":
            raise error
        return sha(path)

    def broken_replace(source, target):
        if stage == ("prune" if str(target).endswith(".tmp") else "rename"):
            raise error
        replace(source, target)

    monkeypatch.setattr(Path, "write_text", broken_write)
    monkeypatch.setattr(checkpoint, "_sync", broken_sync)
    monkeypatch.setattr(checkpoint, "_sha256", broken_sha)
    monkeypatch.setattr(checkpoint.os, "replace", broken_replace)


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_any_stage_leaves_a_whole_checkpoint(tmp_path, monkeypatch, stage):
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    save(checkpointer, 10)
    with monkeypatch.context() as patch:
        arm(patch, stage, Crash(), tmp_path)
        with pytest.raises(Crash):
            save(checkpointer, 20)
    reopened = Checkpointer(tmp_path, keep_last=1)
    committed = stage in ("sync_parent", "prune")
    path, state = reopened.latest_valid()
    assert (path.name, state["step"]) == (("step_000020", 20) if committed else ("step_000010", 10))
    assert reopened.skipped == []
    assert not list(tmp_path.glob("*.tmp"))
    save(reopened, 30)
    assert reopened.latest_valid()[1]["step"] == 30


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_at_any_stage_is_fatal_and_the_previous_one_stays(tmp_path, monkeypatch, stage):
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    save(checkpointer, 10)
    with monkeypatch.context() as patch:
        arm(patch, stage, OSError(28, "No space left on device"), tmp_path)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(checkpointer, 20)
    assert load_state(tmp_path / "step_000010")["step"] == 10


def test_a_disk_that_cannot_be_written_is_fatal(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, keep_last=1)

    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        checkpointer.begin(1)


def test_half_a_save_is_removed_and_never_loaded(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    save(checkpointer, 10)
    (checkpointer.begin(20) / "rng.bin").write_bytes(b"half")
    assert names(tmp_path) == ["step_000010", "step_000020.tmp"]
    reopened = Checkpointer(tmp_path, keep_last=2)
    assert names(tmp_path) == ["step_000010"]
    assert reopened.latest_valid()[1]["step"] == 10


def test_a_damaged_step_that_is_run_again_is_replaced_and_a_good_one_is_not(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    save(checkpointer, 10)
    (save(checkpointer, 20) / "rng.bin").unlink()
    assert checkpointer.latest_valid()[1]["step"] == 10
    save(checkpointer, 20)
    assert checkpointer.latest_valid()[1]["step"] == 20
    with pytest.raises(CheckpointError, match="complete already"):
        checkpointer.begin(20)


def test_a_damaged_one_does_not_take_the_place_of_a_good_one(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    save(checkpointer, 1)
    (save(checkpointer, 2) / "rng.bin").unlink()
    save(checkpointer, 3)
    assert names(tmp_path) == ["step_000001", "step_000003"]


def test_misuse_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpointer(tmp_path, keep_last=0)
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    with pytest.raises(CheckpointError, match=r"call begin\(5\)"):
        checkpointer.commit(5, {})
    checkpointer.begin(5)
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpointer.commit(5, {"trust": float("nan")})
    assert checkpointer.latest_valid() is None
