"""Ports, addresses, clocks and tokens: can the processes of a run reach each other, and nobody else them?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlprm.doctor.finding import ALL, Finding, fail, ok, warn
from rlprm.doctor.wanted import Wanted

CLOCK_WARN_S = 1.0
CLOCK_FAIL_S = 30.0  # certificates, munge credentials and leases go by the clock
DASHBOARD_PORT = 8265
EVERYWHERE = ("0.0.0.0", "::", "")
LOOPBACK = ("127.", "::1")


def ports(node: str, wanted: Wanted, owners: Mapping[int, str | None]) -> Iterator[Finding]:
    """``owners``: who listens on the ports that are asked for, None: nobody."""
    taken = {port: owner for port, owner in owners.items() if owner is not None}
    for port, owner in taken.items():
        what = "cluster.port" if port == wanted.port else "the port of Ray's dashboard"
        cure = "set cluster.port=0 (any), or another one" if port == wanted.port else "set cluster.dashboard=false"
        yield fail("ports", node, f"{port} ({what}) is in use by {owner}", f"{cure}, or end that process")
    if not taken:
        named = ", ".join(map(str, owners))
        yield ok("ports", node, f"{named} free" if named else "any free port will do")


def wanted_ports(wanted: Wanted) -> list[int]:
    """Ports that must be free before Ray is started here."""
    return [*([wanted.port] if wanted.port else []), *([DASHBOARD_PORT] if wanted.dashboard else [])]


def token(facts: Mapping[str, Mapping[str, Any]], joined: bool) -> Iterator[Finding]:
    """Ray runs whatever a connected client sends it, so nobody connects without the token."""
    if not joined:
        yield ok("Ray token", next(iter(facts)), "Ray is started here, on loopback and with a token of its own")
        return
    open_to_all = [node for node, each in facts.items() if each["environment"]["RAY_AUTH_MODE"] != "token"]
    # on all nodes it is how somebody else runs this cluster, on some a mistake
    say = warn if len(open_to_all) == len(facts) else fail
    for node in open_to_all:
        yield say("Ray token", node, "Ray runs there without token authentication: who reaches its port runs code",
                   "start every node with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN (rlprm launch does)")  # fmt: skip
    if not open_to_all:
        yield ok("Ray token", ALL if len(facts) > 1 else next(iter(facts)), "token authentication is on")


def dashboard(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Ray's dashboard listens on loopback: it takes jobs."""
    found = False
    for node, each in facts.items():
        for address, port in each["dashboards"]:
            if address.startswith(LOOPBACK):
                continue
            found = True
            cure = "start Ray with --dashboard-host 127.0.0.1 and reach it through ssh -L"
            if address in EVERYWHERE:
                yield fail("dashboard", node, f"listens on {address}:{port}, every interface of the node", cure)
            else:
                yield warn("dashboard", node, f"listens on {address}:{port}, which other machines may reach", cure)
    if not found:
        count = sum(len(each["dashboards"]) for each in facts.values())
        where = ALL if len(facts) > 1 else next(iter(facts))
        yield ok("dashboard", where, "on loopback" if count else "none runs here")


def clock(offsets: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """``offsets``: seconds that each node's clock is ahead of the first one's, and how sure that is (plus or minus)."""
    off = {node: value for node, (value, doubt) in offsets.items() if abs(value) - doubt > CLOCK_WARN_S}
    for node, value in off.items():
        say = fail if abs(value) > CLOCK_FAIL_S else warn
        word = "ahead of" if value > 0 else "behind"
        yield say("clock", node, f"{abs(value):.1f} s {word} {next(iter(offsets))}",
                  "run chronyd or systemd-timesyncd on every node")  # fmt: skip
    if not off:
        most = max((abs(value) + doubt for value, doubt in offsets.values()), default=0.0)
        yield ok("clock", ALL, f"{len(offsets)} nodes within {most:.2f} s")


def clock_here(node: str, now: float, newest: float) -> Iterator[Finding]:
    """One machine alone: its clock is not behind the files that are on it. ``newest``: time of rlprm's newest file."""
    if now < newest - CLOCK_FAIL_S:
        yield fail("clock", node, f"{newest - now:.0f} s behind the newest file of rlprm", "set the clock (chronyd)")
    else:
        yield ok("clock", node, "not behind its own files")


def connections(asked: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """``asked``: what each node found on trying to reach each other one, "" where it reached it."""
    broken = [(node, other, why) for node, each in asked.items() for other, why in each.items() if why]
    for node, other, why in broken:
        yield fail("connections", node, f"cannot reach {other}: {why}",
                   "open all ports between the nodes (firewall, security group); give both addresses of one network")  # fmt: skip
    if not broken:
        yield ok("connections", ALL, f"each of {len(asked)} nodes reaches every other on a free port")


def hub(facts: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Hugging Face stays offline, so that no node waits for a network that it does not have."""
    loose = [node for node, each in facts.items() if each["environment"]["HF_HUB_OFFLINE"] not in ("1", "true", "True")]
    for node in loose:
        value = facts[node]["environment"]["HF_HUB_OFFLINE"]
        yield warn("Hugging Face", node, f"HF_HUB_OFFLINE is {value or 'not set'}: a lookup may wait for the network",
                   "export HF_HUB_OFFLINE=1; models and data are local folders and files")  # fmt: skip
    if not loose:
        yield ok(
            "Hugging Face", ALL if len(facts) > 1 else next(iter(facts)), "offline: nothing is fetched during a run"
        )
