"""Machines behind a command: quoting, the probe, secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rlprm.errors import ConfigError
from rlprm.launch import hosts, local, task
from rlprm.launch.lifeline import first_line, opening
from rlprm.launch.processes import Wishes
from tests.unit.launch.launching import a_task, hosts_cluster, local_cluster, written

# What ssh does with its arguments: joined with blanks, read by the login shell of the other side.
LIKE_SSH = """#!/bin/sh
[ "$1" = broken ] && { echo "ssh: connect to host broken port 22: No route to host" >&2; exit 255; }
shift
exec sh -c "$*"
"""


@pytest.fixture
def like_ssh(tmp_path: Path) -> str:
    path = tmp_path / "like ssh"
    path.write_text(LIKE_SSH)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("shell", [True, False])
def test_a_script_arrives_as_it_is(shell: bool, like_ssh: str) -> None:
    script = """printf '%s|' "a  b" 'it'"'"'s' "$HOME" '$x' "\\""; echo '*'"""
    connect = [like_ssh, "{host}"] if shell else ["env", "AT={host}"]
    command = hosts.remote(hosts_cluster(connect=connect, shell=shell), "far", script)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"a  b|it's|{os.environ['HOME']}|$x|\"|*\n"


def test_each_host_gets_its_program_and_its_address(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    made = a_task(folder, nodes=2, names=("a", "b"))
    cluster = hosts_cluster(addresses=["10.0.0.1", "10.0.0.2"], connect=["run", "--on={host}"])
    head, worker = hosts.commands(made, cluster)
    assert head[:4] == ["run", "--on=a", "sh", "-c"]
    assert worker[:4] == ["run", "--on=b", "sh", "-c"]
    assert " -m rlprm.launch.head " in head[4]
    assert " -m rlprm.launch.worker " in worker[4]
    assert head[4].endswith("--name a --ip 10.0.0.1 --stdin")
    assert worker[4].endswith("--name b --ip 10.0.0.2 --stdin")
    folder.mkdir()
    echoed = head[4].replace("exec ", "printf '%s\\n' ", 1)
    words = subprocess.run(["sh", "-c", echoed], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[3] == made.folder


def test_what_cannot_take_part_is_named_before_anything_starts(tmp_path: Path, like_ssh: str) -> None:
    made = written(a_task(tmp_path, nodes=2), hosts_cluster())
    cluster = hosts_cluster(hosts=["fine", "broken"], connect=[like_ssh, "{host}"], shell=True)
    with pytest.raises(ConfigError) as error:
        hosts.probe(made, cluster)
    assert str(error.value).startswith("broken cannot be reached (")
    assert str(error.value).endswith("ssh: connect to host broken port 22: No route to host")
    for changed, told in (
        ({"directory": str(tmp_path / "none")}, f"a has no folder {tmp_path / 'none'} (cluster.directory)"),
        ({"folder": str(tmp_path / "none")}, "a does not see .*storage that all hosts and this machine share"),
        ({"python": "/bin/false"}, "a cannot run /bin/false -c 'import rlprm'"),
    ):
        with pytest.raises(ConfigError, match=told.replace("(", r"\(").replace(")", r"\)")):
            hosts.probe(a_task(tmp_path, nodes=1, **changed), hosts_cluster())
    with pytest.raises(ConfigError, match="a cannot be reached: /no/such: No such file"):
        hosts.probe(made, hosts_cluster(hosts=["a", "b"], connect=["/no/such", "{host}"]))


def test_a_silent_host_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PROBE_S", 0.2)
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 30\n")
    slow.chmod(0o755)
    with pytest.raises(ConfigError, match="a gave no answer within"):
        hosts.probe(a_task(tmp_path), hosts_cluster(connect=[str(slow), "{host}"]))


@pytest.mark.parametrize(
    ("changed", "nodes", "told"),
    [
        ({}, 3, r"placement.nodes is 3 and cluster.hosts has 2 \(a, b\)"),
        ({"hosts": ["a", "b", "a"]}, 2, "cluster.hosts names a more than once"),
        ({"addresses": ["10.0.0.1"]}, 2, "cluster.addresses has 1 entries and cluster.hosts 2"),
    ],
)
def test_hosts_that_do_not_fit(changed: dict[str, Any], nodes: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        hosts.chosen_hosts(nodes, hosts_cluster(**changed))


def test_secrets_are_named_and_never_shown_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    cluster = hosts_cluster()
    made = written(a_task(tmp_path, nodes=2, environment={"NCCL_DEBUG": "INFO"}), cluster)
    text = hosts.dry_run(made, cluster) + local.dry_run(a_task(tmp_path), local_cluster())
    assert "export WANDB_API_KEY  # secret" in text
    assert "export NCCL_DEBUG=INFO" in text
    token = task.token(made.path)
    assert (made.path / task.TOKEN).stat().st_mode & 0o777 == 0o600
    everything = text + "".join(path.read_text() for path in made.path.iterdir() if path.name != task.TOKEN)
    assert "0123456789abcdef" not in everything
    assert token not in everything


def test_the_first_line_brings_the_secrets_and_is_never_repeated(tmp_path: Path) -> None:
    stream_of = tmp_path / "stdin"
    stream_of.write_bytes(opening({"RAY_AUTH_TOKEN": "t", "HF_TOKEN": "h"}) + b"stop\n")
    # select() knows pipes, not files
    with subprocess.Popen(["cat", str(stream_of)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wishes = Wishes()
        assert first_line(process.stdout, wishes) == {"RAY_AUTH_TOKEN": "t", "HF_TOKEN": "h"}
        process.wait()
        while wishes.asked is None:
            pass
    for wrong in ("sekret", json.dumps(["sekret"])):
        with subprocess.Popen(["echo", wrong], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            with pytest.raises(ConfigError, match="no JSON object of secrets") as error:
                first_line(process.stdout, Wishes())
            assert "sekret" not in str(error.value)


def test_a_host_that_comes_back_takes_part_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(a_task(tmp_path, nodes=2), hosts_cluster())
    # it is cut off the first time
    script = 'read line; echo "$line" >> got; [ -e came ] && exec sleep 60; touch came; echo power lost; exit 255'
    link = hosts.Link(made, "b", ["sh", "-c", f"cd {tmp_path}; {script}"], opening({"RAY_AUTH_TOKEN": "t"}))
    said: list[str] = []
    link.open(None)
    try:
        assert link.process is not None
        link.process.wait(10)
        link.renew(said.append)
        link.renew(said.append)
        assert said == ["the connection to b has ended (code 255), tries again: power lost"]
        assert link.process.poll() == 255
        monkeypatch.setattr(hosts, "AGAIN_S", 0.0)
        link.renew(said.append)
        assert link.process.poll() is None
        link.renew(said.append)
        assert len(said) == 1
    finally:
        link.hang_up()
        assert link.process is not None
        link.process.kill()
        link.process.wait()
    lines = (tmp_path / "got").read_text().splitlines()
    assert set(lines) == {'{"RAY_AUTH_TOKEN": "t"}'}  # each connection brings the secrets


LOST_HEAD = "cd {folder}; echo '{{}}' > head.json; (sleep 0.6; echo 130 > exit_code) & exit 255"
# What a worker does at its second line: it leaves, and notes whether the run had ended by then.
STAYING = "cd {folder}; read secrets; read wish; [ -e exit_code ] && echo after > left || echo before > left"


def two_links(made: task.Task, head: str, worker: str = STAYING) -> list[hosts.Link]:
    links = [
        hosts.Link(made, name, ["bash", "-c", script.format(folder=made.folder)], opening({}))
        for name, script in (("a", head), ("b", worker))
    ]
    for link in links:
        link.open(None)
    return links


def test_without_the_heads_connection_the_others_stay_until_the_run_has_saved(tmp_path: Path) -> None:
    made, said = written(a_task(tmp_path, nodes=2), hosts_cluster()), []
    links = two_links(made, LOST_HEAD)
    assert links[0].process is not None
    links[0].process.wait()
    assert hosts._until_the_end(made, links, Wishes(), said.append) == 1
    hosts._close(links)
    assert said[0] == "the connection to a is gone, and is not renewed"
    assert task.exit_code(made.path) == 130
    assert (made.path / "left").read_text() == "after\n"


@pytest.mark.parametrize("began", [True, False])
def test_a_lost_head_is_not_waited_for_where_it_cannot_or_shall_not_save(tmp_path: Path, began: bool) -> None:
    made, wishes = written(a_task(tmp_path, nodes=2), hosts_cluster()), Wishes()
    links = two_links(made, "cd {folder}; " + ("echo '{{}}' > head.json; " if began else "") + "exit 255")

    def say(text: str) -> None:
        if "Ctrl-C gives it up" in text:
            wishes.ask(signal.SIGINT, "somebody")

    began_at = time.monotonic()
    assert hosts._until_the_end(made, links, wishes, say) == 1
    hosts._close(links)
    assert time.monotonic() - began_at < 5
    assert (made.path / "left").read_text() == "before\n"


def test_at_the_end_the_head_goes_first(tmp_path: Path) -> None:
    made = written(a_task(tmp_path, nodes=2), hosts_cluster())
    hosts._close(two_links(made, "cd {folder}; read secrets; read wish; sleep 0.4; echo 130 > exit_code"))
    assert (made.path / "left").read_text() == "after\n"


def test_what_connects_is_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    hosts.check(a_task(tmp_path), hosts_cluster())
    with pytest.raises(ConfigError, match=r"cluster.connect begins with /no/such"):
        hosts.check(a_task(tmp_path), hosts_cluster(connect=["/no/such", "{host}"]))
