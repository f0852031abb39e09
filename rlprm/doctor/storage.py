"""Disk, the shared run folder, models and data: there, large enough, and the same on every node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlprm.doctor.finding import ALL, Finding, fail, gigabytes, ok, warn
from rlprm.doctor.software import most_common
from rlprm.doctor.wanted import Wanted

STATE = 16  # bytes per trained number in a checkpoint: weights, and weight and two moments in float32
MARGIN = 200 << 20  # logs, rollouts, events
FULL = 0.95  # of Ray's disk
WEIGHTS = (".safetensors", ".bin")


def disk(node: str, facts: Mapping[str, Any], wanted: Wanted) -> Iterator[Finding]:
    """Room for the checkpoints of the run, estimated from the models' sizes."""
    space = facts["disk"]
    if wanted.folder is None or space is None:
        return
    sizes = [facts["models"][path]["parameters"] for path in wanted.trained if path in facts["models"]]
    one = STATE * sum(sizes)
    needed = one * wanted.checkpoints + MARGIN
    have = f"{gigabytes(space['free'])} free at {space['path']}"
    what = f"{wanted.checkpoints} checkpoints of {gigabytes(one)} and logs" if wanted.checkpoints else "logs"
    if space["free"] < needed:
        yield fail("disk space", node, f"{have}, {what} take {gigabytes(needed)}",
                   "free some, choose another output_dir, or keep fewer (checkpoint.keep_last)")  # fmt: skip
    elif space["free"] < 2 * needed:
        yield warn(
            "disk space", node, f"{have}, {what} take {gigabytes(needed)}", "leave more room: nobody else may fill it"
        )
    else:
        yield ok("disk space", node, f"{have}, {gigabytes(needed)} needed")


def temporary(node: str, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Where Ray keeps its logs and what does not fit into its store; it stops to when the disk is nearly full."""
    space = facts["temporary"]
    if space is None or not space["total"]:
        return
    if 1 - space["free"] / space["total"] > FULL:
        yield warn("temporary", node, f"{gigabytes(space['free'])} free of {gigabytes(space['total'])} at {space['path']}",
                   f"free some: above {FULL:.0%} Ray refuses objects that do not fit into its store")  # fmt: skip
    else:
        yield ok("temporary", node, f"{gigabytes(space['free'])} free at {space['path']}")


def run_folder(facts: Mapping[str, Mapping[str, Any]], folder: str | None) -> Iterator[Finding]:
    """Every node writes there, and all nodes mean the same folder."""
    if folder is None:
        return
    bad = False
    for node, each in facts.items():
        found = each["folder"]
        if found["problem"]:
            bad = True
            yield fail("run folder", node, f"{found['path']} cannot be written: {found['problem']}",
                       "choose another output_dir, or mend its owner and mount")  # fmt: skip
        elif found["sees"] is False:
            bad = True
            yield fail("run folder", node, f"a file that the head has just made in {found['path']} is not there",
                       "set output_dir to a folder on storage that all nodes share: each rank writes its checkpoint")  # fmt: skip
    if not bad:
        shared = f", shared by {len(facts)} nodes" if len(facts) > 1 else ""
        yield ok("run folder", ALL if len(facts) > 1 else next(iter(facts)), f"{folder} can be written{shared}")


def models(facts: Mapping[str, Mapping[str, Any]], wanted: Wanted) -> Iterator[Finding]:
    """Each model that the configuration names: complete on every node, and the same."""
    for path in dict.fromkeys(wanted.models.values()):
        keys = ", ".join(key for key, one in wanted.models.items() if one == path)
        yield from _model(keys, path, {node: each["models"][path] for node, each in facts.items()})


def _model(key: str, path: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    bad, whole = False, {}
    for node, each in found.items():
        lacking = _lacking(each)
        if lacking:
            bad = True
            yield fail("model", node, f"{key} {path}: {lacking}",
                       "copy the folder to this node, or put it on storage that all nodes share (downloads are off)")  # fmt: skip
        else:
            whole[node] = each["files"]
    usual = most_common(list(whole.values())) if whole else {}
    for node, files in whole.items():
        if files != usual:
            bad = True
            other = next(name for name, one in whole.items() if one == usual)
            names = sorted(name for name in files.keys() | usual.keys() if files.get(name) != usual.get(name))
            yield fail("model", node, f"{key} {path}: {', '.join(names)} differ from {other}'s",
                       "copy the folder anew: every node must start from the same weights and the same tokenizer")  # fmt: skip
    if not bad:
        first = next(iter(found.values()))
        size = f"{first['parameters'] / 1e6:.1f} million numbers, {gigabytes(first['bytes'])}"
        yield ok("model", *_where(found), f"{key} {path}: {size}{_equal(found)}")


def _lacking(model: Mapping[str, Any]) -> str:
    files = model["files"]
    if model["problem"]:
        return model["problem"]
    if "config.json" not in files:
        return "it has no config.json"
    weights = [name for name in files if name.endswith(WEIGHTS)]
    if not weights:
        return "it holds no weights (*.safetensors)"
    if empty := [name for name in weights if files[name][0] < 1024]:
        return f"{empty[0]} has {files[empty[0]][0]} bytes (a pointer of Git LFS?)"
    return ""


def data(facts: Mapping[str, Mapping[str, Any]], wanted: Wanted) -> Iterator[Finding]:
    """Each data file: the head reads it, so only there its absence is fatal."""
    head = next(iter(facts))
    for path in wanted.data:
        found = {node: each["data"][path] for node, each in facts.items()}
        usual, bad = found[head]["files"], False
        for node, each in found.items():
            if each["problem"] and node == head:
                bad = True
                yield fail(
                    "data", node, f"{path}: {each['problem']}", "correct the path, or make the file (rlprm prepare)"
                )
            elif each["problem"] or each["files"] != usual:
                bad = True
                yield warn("data", node, f"{path}: {each['problem'] or f'not the same as on {head}'}",
                           f"only the head, {head}, reads it now; put it on shared storage")  # fmt: skip
        if not bad:
            size = sum(one[0] for one in usual.values())
            yield ok("data", *_where(found), f"{path}: {len(usual)} files, {gigabytes(size)}{_equal(found)}")


def _where(found: Mapping[str, Any]) -> Sequence[str]:
    return [ALL if len(found) > 1 else next(iter(found))]


def _equal(found: Mapping[str, Any]) -> str:
    return f", the same on {len(found)} nodes" if len(found) > 1 else ""
