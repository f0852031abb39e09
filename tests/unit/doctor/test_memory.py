"""What a run takes of a node: memory of the host for what is offloaded, and no GPU for ranks that are not started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlprm.doctor import machine
from tests.unit.doctor.planting import asked, diagnosed, gathered, nodes

GPU = {"index": "0", "name": "H100", "memory": 80 << 30, "used": 0, "driver": "590.10"}
CUDA = ("placement=gpu8", "model.dtype=bfloat16")


def gpus(run: Any, count: int) -> dict[str, dict[str, Any]]:
    facts = gathered(run, ("node0",))
    facts["node0"]["gpus"] = [{**GPU, "index": str(index)} for index in range(count)]
    return facts


def test_what_is_offloaded_needs_the_hosts_memory(tmp_path: Path) -> None:
    """Two models of 1e9 numbers: 18 bytes each of them beside what is read while they load, whatever the ranks."""
    needed = []
    for offload in ("none", "cpu"):
        run = asked(tmp_path, *CUDA, f"policy.offload={offload}")
        facts = gpus(run, 8)
        for known in facts["node0"]["models"].values():
            known["parameters"] = 1_000_000_000
        seated, _ = machine.placed(run, nodes(facts))
        needed.append(machine.memory_needed(seated, 0, run, facts["node0"]))
    assert needed[1] - needed[0] == 2 * 18e9
    facts["node0"]["memory"] = {"total": 32 << 30, "available": 16 << 30}
    found = next(each for each in diagnosed(run, facts) if each.check == "host memory")
    assert found.level == "fail"


def test_a_run_without_a_prm_takes_no_gpu_for_one(tmp_path: Path) -> None:
    run = asked(tmp_path, *CUDA, "method=outcome_grpo", "placement.engines=4")
    assert not run.prm
    seated, _ = machine.placed(run, nodes(gpus(run, 8)))
    assert seated is not None
    assert (seated.prm, len(seated.engines)) == ((), 4)
