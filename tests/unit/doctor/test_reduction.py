"""The all-reduce: real gloo groups between threads of this process, one of which lies, is missing, or dies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlprm.actors.nodes import Node
from rlprm.doctor import reduction
from rlprm.doctor.reduction import Meeting, findings, free_port, measure, pairs, suspicious
from rlprm.run.preflight import ranks_of

GOOD = {"right": True, "gb_s": 2.0, "problem": ""}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "SIZES", {"gloo": (1 << 12, 2, 0.0), "nccl": (1 << 12, 2, 1.0)})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def between(*ranks: Callable[[Meeting, int], Any], timeout_s: float = 10.0) -> dict[str, dict[str, Any]]:
    meeting = Meeting(
        host="127.0.0.1", port=free_port("127.0.0.1"), world=len(ranks), backend="gloo", timeout_s=timeout_s
    )
    answers: dict[str, dict[str, Any]] = {}

    def run(rank: int) -> None:
        answer = ranks[rank](meeting, rank)
        if answer is not None:
            answers[f"node{rank}"] = answer

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    return dict(sorted(answers.items()))


def test_two_ranks_sum_rightly() -> None:
    answers = between(measure, measure)
    assert all(each["right"] and each["gb_s"] > 0 and not each["problem"] for each in answers.values())
    (found,) = findings(answers, "gloo", {})
    assert (found.level, found.node) == ("ok", "all")
    assert "2 ranks (gloo) sum rightly" in found.found


def test_a_rank_that_changes_the_sum() -> None:
    def liar(meeting: Meeting, rank: int) -> None:
        from rlprm.engine.weights import make_group

        group = make_group(meeting.host, meeting.port, rank, meeting.world, meeting.backend, meeting.timeout_s)
        for _ in range(3):
            wrong = (torch.arange(1 << 10) % reduction.PERIOD).float() + rank
            wrong[17] += 1.0  # one number of a thousand
            group.process_group.allreduce([wrong]).wait()

    answers = between(measure, liar)
    assert answers["node0"] | {"gb_s": 0.0} == {"right": False, "gb_s": 0.0, "problem": ""}
    (found,) = findings(answers, "gloo", {})
    assert (found.level, found.node) == ("fail", "node0")
    assert "is wrong" in found.found
    assert found.cure


def test_a_rank_that_never_comes() -> None:
    answers = between(measure, lambda meeting, rank: None, timeout_s=0.3)
    assert not answers["node0"]["right"]
    assert answers["node0"]["problem"]
    (found,) = findings(answers, "gloo", {})
    assert (found.level, found.node) == ("fail", "node0")
    assert "GLOO_SOCKET_IFNAME" in found.cure


def test_a_rank_that_leaves_in_the_middle() -> None:
    def leaver(meeting: Meeting, rank: int) -> None:
        from rlprm.engine.weights import make_group

        make_group(meeting.host, meeting.port, rank, meeting.world, meeting.backend, meeting.timeout_s)

    answers = between(measure, leaver, timeout_s=3.0)
    (found,) = findings(answers, "gloo", {})
    assert found.level == "fail"
    assert found.node == "node0"


def test_pairs_meet_once_and_nobody_is_in_two_places() -> None:
    for count in (2, 3, 6, 7):
        names = [f"node{number}" for number in range(count)]
        rounds = pairs(names)
        flat = [pair for each in rounds for pair in each]
        assert len(flat) == len(set(flat)) == count * (count - 1) // 2
        for each in rounds:
            here = [name for pair in each for name in pair]
            assert len(here) == len(set(here))


def test_the_pair_that_is_bad_is_named_and_the_others_are_not() -> None:
    lost = {"right": False, "gb_s": 0.0, "problem": "Connection reset by peer"}
    together = dict.fromkeys(("node0", "node1", "node2"), lost)
    apart = {("node0", "node1"): GOOD, ("node0", "node2"): lost, ("node1", "node2"): GOOD}
    assert suspicious(together, "gloo")
    (found,) = findings(together, "gloo", apart)
    assert (found.level, found.node) == ("fail", "node0")
    assert "with node2 (gloo): Connection reset by peer" in found.found


def test_a_slow_pair_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace_speed(0.02)
    together = dict.fromkeys(("node0", "node1", "node2"), slow)
    assert suspicious(together, "nccl")
    assert not suspicious({"node0": GOOD}, "nccl")
    (found,) = findings(
        together, "nccl", {("node0", "node1"): slow, ("node0", "node2"): GOOD, ("node1", "node2"): GOOD}
    )
    assert (found.level, found.node) == ("warn", "node0")
    assert "with node1 (nccl): 0.020 GB/s, expected 1 or more" in found.found
    (found,) = findings(together, "nccl", {})  # two nodes are not tried again
    assert (found.level, found.node) == ("warn", "all")


def replace_speed(speed: float) -> dict[str, Any]:
    return {**GOOD, "gb_s": speed}


def test_meetings_are_plain_data() -> None:
    one = Meeting(host="127.0.0.1", port=1, world=2, backend="gloo", timeout_s=1.0)
    assert Meeting(**reduction.plain(one)) == replace(one)


def test_every_gpu_of_every_node_takes_part() -> None:
    nodes = [
        Node(index=number, id=name, name=name, address=name, cpus=1.0, gpus=2.0) for number, name in enumerate("ab")
    ]
    assert [each.name for each in ranks_of(nodes, {"a": 2, "b": 1}, "nccl")] == ["a:0", "a:1", "b:0"]
    assert [each.id for each in ranks_of(nodes, {"a": 2, "b": 1}, "nccl")] == ["a", "a", "b"]
    assert ranks_of(nodes, {"a": 2, "b": 1}, "gloo") == nodes
