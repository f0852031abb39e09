"""Weights & Biases and the verifier: found wanting without waiting."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlprm.doctor.services import reached, verifier, wandb
from rlprm.doctor.wanted import Wanted

ONLINE = Wanted(wandb=True)


def section(target: str, **settings: Any) -> Any:
    function = {"_target_": target, "_partial_": True, **settings}
    return SimpleNamespace(function=function, timeout_s=5.0, memory_mb=2048)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_key_but_nobody_there(key: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        key.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        (found,) = wandb("here", ONLINE)
    assert (found.level, found.node) == ("fail", "here")
    assert "Connection refused" in found.found
    assert "planted" not in found.line()
    assert "WANDB_MODE=offline" in found.cure


def test_a_host_that_says_nothing_is_given_up_in_time(key: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        assert reached(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.3) != ""
        assert time.monotonic() - begin < 1.0


def test_a_name_that_cannot_be_looked_up_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()

    def stuck(*_: Any, **__: Any) -> Any:
        let_go.wait(20.0)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    begin = time.monotonic()
    assert reached("http://nowhere.invalid", 0.2) == "no answer within 0.2 s"
    assert time.monotonic() - begin < 1.0
    let_go.set()


def test_it_is_as_the_run_would_decide(key: pytest.MonkeyPatch) -> None:
    def unused(url: str, timeout_s: float) -> str:
        raise AssertionError(url)

    key.setenv("WANDB_MODE", "offline")
    (found,) = wandb("here", ONLINE, unused)
    assert found.level == "ok"
    assert "offline" in found.found
    (found,) = wandb("here", replace(ONLINE, wandb=False), unused)
    assert found.level == "ok"
    assert "not used" in found.found
    key.delenv("WANDB_MODE")
    (found,) = wandb("here", ONLINE, lambda url, timeout_s: "")
    assert found.level == "ok"
    assert "https://api.wandb.ai answers" in found.found


def test_a_verifier_whose_canary_fails() -> None:
    (found,) = verifier("here", section("tests.unit.doctor.planted_verifier.verify"))
    assert (found.level, found.check) == ("fail", "verifier")
    assert "1 canaries are judged wrongly" in found.found
    assert "gold='8'" in found.found
    assert found.cure


def test_a_verifier_that_cannot_be_loaded() -> None:
    (found,) = verifier("here", section("tests.unit.doctor.planted_verifier.broken"))
    assert found.level == "fail"
    assert "broken" in found.found


def test_a_verifier_that_is_right_and_one_without_canaries() -> None:
    exact = section(
        "rlprm.verify.exact.verify", pattern="(?s)(.*)", which="last", strip=True, casefold=False, spaces=True
    )
    (found,) = verifier("here", exact)
    assert found.level == "ok"
    assert "3 canaries" in found.found
    (found,) = verifier("here", section("tests.unit.doctor.planting_none.verify"))
    assert found.level == "warn"
    assert "CANARIES" in found.cure
    (found,) = verifier("here", section("rlprm.data.tasks.chain_arithmetic.verify"))
    assert found.level == "ok"
    assert "it has no canaries" in found.found
    assert list(verifier("here", None)) == []
