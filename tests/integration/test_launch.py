"""Launches on this machine: two nodes, exit codes, Ctrl-C, launches in the background, hosts behind a command and ssh."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.launched import Launched, called, gone, small, stand_in, state, until

pytestmark = pytest.mark.integration


def test_a_run_on_two_nodes_of_this_machine(tmp_path: Path) -> None:
    """A real step: policy rank on one node, engine on the other."""
    seats = ["placement.nodes=2", "placement.policy_nodes=[0]", "placement.prm_nodes=[0]", "placement.engine_nodes=[1]"]
    with Launched("cluster=local", *seats, *small(tmp_path)) as launched:
        code = launched.end(240)
    assert code == 0, launched.text
    assert "launch: nodes: node0 (127.0.0.1), node1 (127.0.0.1)" in launched.text
    assert "launch: ended with exit code 0" in launched.text
    assert len((tmp_path / "chain_arithmetic_cpu" / "seed0" / "metrics.jsonl").read_text().splitlines()) == 1
    found = state(tmp_path)
    assert (found["state"], found["exit_code"], found["nodes"]) == ("ended", 0, 2)


def test_ctrl_c_ends_the_run_once_and_leaves_nothing(tmp_path: Path) -> None:
    """Also: no port of Ray's is open to the network, and the token stands on no command line."""
    with Launched("cluster=local", *small(tmp_path, stand_in(tmp_path, seconds=600))) as launched:
        line = launched.until("stand-in")
        address = next(word for word in line.split() if word.startswith("placement.ray_address=")).split("=")[1]
        assert address.startswith("127.0.0.1:")
        processes = launched.below()
        assert any("gcs_server" in each.name() for each in processes)
        (folder,) = (tmp_path / "launches").iterdir()
        token = (folder / "token").read_text().strip()
        assert not [each for each in processes if any(token in word for word in each.cmdline())]
        port = int(address.rpartition(":")[2])
        listening = [
            each.laddr.ip
            for each in psutil.net_connections("inet")
            if each.status == "LISTEN" and each.laddr.port == port
        ]
        assert listening
        assert all("127.0.0.1" in each for each in listening)
        launched.process.send_signal(signal.SIGINT)
        assert launched.end() == 130
        assert launched.text.count("stand-in was interrupted") == 1
        assert gone(processes) == []
    assert state(tmp_path)["exit_code"] == 130


def test_a_launch_in_the_background(tmp_path: Path) -> None:
    """Status, log and end from other shells; the same run is not started a second time meanwhile."""
    words = ["cluster=local", *small(tmp_path, stand_in(tmp_path, seconds=600))]
    done = called("launch", "recipe=chain_arithmetic_cpu", *words, "--detach")
    assert done.returncode == 0, done.stderr
    launch_id = done.stdout.split()[1]
    log = tmp_path / "launches" / launch_id / "driver.log"
    until(lambda: log.exists() and "stand-in" in log.read_text(), "the run", 120)
    found = state(tmp_path, launch_id[:-2])
    assert (found["id"], found["state"]) == (launch_id, "running")
    launcher = psutil.Process(int(found["detail"].split()[1]))
    processes = [launcher, *launcher.children(recursive=True)]
    second = called("launch", "recipe=chain_arithmetic_cpu", *words)
    assert second.returncode == 1
    assert f"is in use by launch {launch_id} (running" in second.stderr
    assert "stand-in train" in called("logs", f"output_dir={tmp_path}").stdout
    stopped = called("stop", f"output_dir={tmp_path}")
    assert stopped.stdout.endswith(f"{launch_id}: ended, exit code 130\n")
    assert gone(processes) == []
    assert called("logs", "-f", f"output_dir={tmp_path}").stdout.endswith("launch: ended with exit code 130\n")


def test_hosts_behind_a_command_and_the_runs_own_exit_code(tmp_path: Path) -> None:
    words = [
        "cluster=hosts", "cluster.hosts=[one,two]", "cluster.addresses=[127.0.0.1,127.0.0.1]", "placement.nodes=2",
        "cluster.connect=[env,'AT={host}']", "cluster.shell=false",
    ]  # fmt: skip
    with Launched(
        *words, *small(tmp_path, stand_in(tmp_path, code=7)), environment={"HF_TOKEN": "sekret-99"}
    ) as launched:
        assert launched.end() == 7, launched.text
    assert "launch: nodes: one (127.0.0.1), two (127.0.0.1)" in launched.text
    assert "ended with exit code 7" in launched.text
    (folder,) = (tmp_path / "launches").iterdir()
    assert "node two leaves" in (folder / "host-two.log").read_text()
    assert not [path for path in folder.iterdir() if "sekret-99" in path.read_text(errors="replace")]


def test_a_port_in_use_and_missing_nodes(tmp_path: Path) -> None:
    """The first before anything starts; the second after the wait, with the names of who is missing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Launched("cluster=local", f"cluster.port={port}", *small(tmp_path)) as launched:
            assert launched.end() == 1
    assert f"127.0.0.1:{port} (Address already in use)" in launched.text
    lame = tmp_path / "lame"
    python = stand_in(tmp_path)
    # a machine on which Ray cannot join
    lame.write_text(f'#!/bin/sh\n[ "$2" = rlprm.launch.worker ] && exit 1\nexec {python} "$@"\n')
    lame.chmod(0o755)
    with Launched("cluster=local", "placement.nodes=2", "cluster.wait_s=3", *small(tmp_path, str(lame))) as launched:
        assert launched.end() == 1
    assert "launch: node node1 has ended; see" in launched.text
    assert "1 of 2 nodes are there (node0); missing 1: node1, since" in launched.text


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[list[str]]:
    """A server on loopback with its own keys; the words that reach it."""
    program, client = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin"), shutil.which("ssh")
    if program is None or client is None:
        pytest.skip("needs sshd and ssh (Debian: openssh-server)")
    for name in ("server", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/server\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants an empty folder for its unprivileged half
    log = tmp_path / "sshd.log"
    with log.open("wb") as output:
        server = subprocess.Popen([program, "-D", "-e", "-f", str(config)], stdout=output, stderr=output)
    try:
        until(lambda: server.poll() is not None or "listening" in log.read_text(), "sshd", 10)
        if server.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text().strip()}")
        yield [
            client, "-F", "none", "-i", f"{tmp_path}/user", "-p", str(port), "-o", "BatchMode=yes", "-o",
            "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/known", "-o", "LogLevel=ERROR",
        ]  # fmt: skip
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.long
def test_over_ssh(sshd: list[str], tmp_path: Path) -> None:
    """Two machines that are this one; then Ctrl-C, which must reach the run through ssh, and nothing stays behind."""
    connect = ",".join(f"'{word}'" for word in [*sshd, "{host}"])
    words = [
        "cluster=hosts", "cluster.hosts=['127.0.0.1','localhost']", "cluster.addresses=[127.0.0.1,127.0.0.1]",
        "placement.nodes=2", f"cluster.connect=[{connect}]",
    ]  # fmt: skip
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    quoted = [f'output_dir="{folder}"' if word.startswith("output_dir=") else word for word in small(folder)]
    python = stand_in(tmp_path, seconds=600)
    with Launched(*words, *quoted, f"cluster.python={python}", environment={"HF_TOKEN": "sekret-99"}) as launched:
        launched.until("stand-in")
        ray = [each for each in psutil.process_iter() if str(folder) in " ".join(_words(each))]
        inside = [*ray, *(child for each in ray for child in each.children(recursive=True))]
        assert not [each for each in psutil.process_iter() if "sekret-99" in " ".join(_words(each))]
        launched.process.send_signal(signal.SIGINT)
        assert launched.end() == 130, launched.text
    assert "stand-in was interrupted" in launched.text
    assert gone(inside) == []


@pytest.mark.long
def test_a_broken_connection_ends_everything_on_the_other_side(sshd: list[str], tmp_path: Path) -> None:
    connect = ",".join(f"'{word}'" for word in [*sshd, "{host}"])
    words = [
        "cluster=hosts",
        "cluster.hosts=['127.0.0.1']",
        "cluster.addresses=[127.0.0.1]",
        f"cluster.connect=[{connect}]",
    ]
    with Launched(*words, *small(tmp_path, stand_in(tmp_path, seconds=600))) as launched:
        launched.until("stand-in")
        (head,) = (each for each in psutil.process_iter() if "rlprm.launch.head" in _words(each) and str(tmp_path) in " ".join(_words(each)) and "ssh" not in each.name() and "sh" != each.name())  # fmt: skip  # noqa: E501, SIM300
        inside = [head, *head.children(recursive=True)]
        (link,) = (each for each in launched.below() if each.name() == "ssh")
        link.kill()
        assert launched.end() == 1
    assert "the connection to 127.0.0.1 is gone" in launched.text
    assert gone(inside, 60.0) == []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []
