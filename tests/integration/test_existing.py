"""`rlprm launch cluster=existing`: jobs in a Ray cluster that somebody else has started, with token authentication."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlprm.launch.node import free_port, own_address
from rlprm.launch.processes import end
from tests.integration.launched import RECIPE, Launched, called, small, stand_in, state, until

pytestmark = [pytest.mark.integration, pytest.mark.long]

START_S = 90.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head with a dashboard on loopback; whoever talks to it needs the token in this environment."""
    log = tmp_path_factory.mktemp("head") / "log"
    port, token = free_port("127.0.0.1"), secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as output:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        head = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--node-ip-address={own_address()}",
                f"--port={free_port('')}", "--num-cpus=8", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={port}", f"--ray-client-server-port={free_port('')}", "--min-worker-port=0",
                "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port('')}",
                "--object-store-memory=100000000", "--block",
            ],
            env={**os.environ, "PATH": path}, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + START_S
            while "Ray runtime started" not in log.read_text(errors="replace"):
                assert head.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < deadline, f"Ray did not start within {START_S:.0f} s"
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            end(head, 20.0)


def words(address: str, output_dir: Path, python: str | None = None) -> list[str]:
    return ["cluster=existing", f"cluster.address={address}", "cluster.poll_s=1", *small(output_dir, python)]


def test_a_run_of_one_step(address: str, tmp_path: Path) -> None:
    with Launched(*words(address, tmp_path)) as launched:
        assert launched.end(240) == 0, launched.text
    assert "launch: ended with exit code 0" in launched.text
    assert len((tmp_path / "chain_arithmetic_cpu" / "seed0" / "metrics.jsonl").read_text().splitlines()) == 1
    assert state(tmp_path)["exit_code"] == 0


def test_exit_code_and_ctrl_c(address: str, tmp_path: Path) -> None:
    fails, waits = tmp_path / "fails", tmp_path / "waits"
    for folder in (fails, waits):
        folder.mkdir()
    with Launched(*words(address, fails, stand_in(fails, code=7)), "cluster.upload=false") as launched:
        assert launched.end() == 7, launched.text
    with Launched(*words(address, waits, stand_in(waits, seconds=600)), "cluster.upload=false") as launched:
        launched.until("stand-in train")
        launched.process.send_signal(signal.SIGINT)
        assert launched.end(60) == 130, launched.text
    assert "the run is asked to end (rlprm stop)" in launched.text


def test_detached(address: str, tmp_path: Path) -> None:
    given = words(address, tmp_path, stand_in(tmp_path, seconds=600))
    done = called("launch", RECIPE, *given, "cluster.upload=false", "--detach")
    assert done.returncode == 0, done.stderr
    until(lambda: "stand-in train" in called("logs", f"output_dir={tmp_path}").stdout, "the run", 90)
    assert state(tmp_path)["state"] == "running"
    assert "ended, exit code 130" in called("stop", f"output_dir={tmp_path}").stdout


def test_a_wrong_token_is_one_sentence(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    done = called("launch", RECIPE, *words(address, tmp_path))
    assert done.returncode == 1
    assert "wants a token" in done.stderr
    assert "0" * 64 not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
