"""What a check found, in one line, with the cure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Level = Literal["ok", "warn", "fail"]
HERE = "here"  # the node, where only this machine is examined
ALL = "all"  # what is said of all nodes together


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``level`` ok: as it should be; warn: it may run, but differently or slower than expected; fail: it will not."""

    check: str
    node: str
    level: Level
    found: str
    cure: str = ""  # what to do; empty where nothing is to be done
    seconds: float = 0.0  # that the whole check took

    def line(self, width: int = 8) -> str:
        """One line; ``width``: of the node's column.

        >>> Finding(check="disk space", node="node1", level="fail", found="1.0 GB free of 5.0", cure="free some").line()
        'fail  disk space      node1     1.0 GB free of 5.0; free some'
        """
        said = f"{self.found}; {self.cure}" if self.cure else self.found
        return f"{self.level:<4}  {self.check:<14}  {self.node:<{width}}  {' '.join(said.split())}"

    def plain(self) -> dict[str, Any]:
        """As a JSON object."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def ok(check: str, node: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, node=node, level="ok", found=found)


def warn(check: str, node: str, found: str, cure: str) -> Finding:
    """It may run, but."""
    return Finding(check=check, node=node, level="warn", found=found, cure=cure)


def fail(check: str, node: str, found: str, cure: str) -> Finding:
    """It will not run, or run wrongly."""
    return Finding(check=check, node=node, level="fail", found=found, cure=cure)


def timed(check: Callable[..., Iterable[Finding]], *arguments: Any, **named: Any) -> list[Finding]:
    """The findings of ``check(*arguments, **named)``, each with the seconds that the check took."""
    begin = time.perf_counter()
    found = list(check(*arguments, **named))
    seconds = time.perf_counter() - begin
    return [replace(each, seconds=seconds) for each in found]


def lines(findings: Iterable[Finding]) -> list[str]:
    """One line each, the nodes' column as wide as it must be; a last line counts them."""
    found = list(findings)
    width = max((len(each.node) for each in found), default=0)
    count = {level: sum(each.level == level for each in found) for level in ("ok", "warn", "fail")}
    return [*(each.line(width) for each in found), f"{count['ok']} ok, {count['warn']} warn, {count['fail']} fail"]


def failed(findings: Iterable[Finding]) -> bool:
    """Is anything such that a run must not start?"""
    return any(each.level == "fail" for each in findings)


def gigabytes(size: int | float) -> str:
    """Bytes in words.

    >>> gigabytes(2_500_000_000), gigabytes(64 << 20)
    ('2.50 GB', '0.07 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e9:.2f} GB"
