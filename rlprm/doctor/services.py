"""What a run asks beside Ray: the verifier's canaries, and Weights & Biases."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from rlprm.doctor.finding import Finding, fail, ok, warn
from rlprm.doctor.wanted import Wanted
from rlprm.errors import RlprmError

WANDB = "https://api.wandb.ai"
REACH_S = 3.0


def verifier(node: str, section: Any) -> Iterator[Finding]:
    """Known answers, judged by the run's own verifier in its own process with its own limits."""
    if section is None:
        return
    from rlprm.parts import made
    from rlprm.verify.pool import VerifierPool, failed_canaries

    try:
        with VerifierPool(
            made(section.function), workers=1, timeout_s=section.timeout_s, memory_mb=section.memory_mb
        ) as pool:
            wrong = failed_canaries(pool)
            judged = pool.counts["judged"]
            name = pool.verifier
    except RlprmError as error:
        yield fail("verifier", node, str(error), "correct the verifier's section, or install what it imports")
        return
    if wrong:
        yield fail("verifier", node, f"{len(wrong)} canaries are judged wrongly, first: {wrong[0]}",
                   "check the verifier's options and libraries: with such a one every reward would be wrong")  # fmt: skip
    elif judged:
        yield ok("verifier", node, f"{name} judges its {judged} canaries rightly")
    elif name.startswith("rlprm."):
        # what is right depends on the options or the prompt, so no pair of answers holds for all of them
        yield ok("verifier", node, f"{name} starts; it has no canaries")
    else:
        yield warn("verifier", node, f"{name} has no canaries, so only its start was tried",
                   "give its module CANARIES = [(gold, response, outcome), ...]")  # fmt: skip


def wandb(node: str, wanted: Wanted, reach: Callable[[str, float], str] | None = None) -> Iterator[Finding]:
    """Does the run send metrics anywhere, and can it? ``reach`` is what tries, for others than :func:`reached`."""
    if not wanted.wandb:
        yield ok("W&B", node, "not used (tracker.wandb is false)")
        return
    from rlprm.run.tracker import _wandb_mode

    mode = _wandb_mode()
    if mode != "online":
        yield ok(
            "W&B", node, f"{mode}; nothing is sent" + (" (wandb sync sends it later)" if mode == "offline" else "")
        )
        return
    url = os.environ.get("WANDB_BASE_URL") or WANDB
    problem = (reach or reached)(url, REACH_S)
    if problem:
        yield fail("W&B", node, f"a key is set and {url} cannot be reached: {problem}",
                   "export WANDB_MODE=offline (wandb sync sends the run later), or mend the network or proxy")  # fmt: skip
    else:
        yield ok("W&B", node, f"online, {url} answers")


def reached(url: str, timeout_s: float) -> str:
    """Why ``url`` does not answer within ``timeout_s`` seconds, looking up its name included; "" where it does."""
    found: list[str] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
                found.append("")
        except urllib.error.HTTPError:
            found.append("")  # an answer, whatever it says
        except urllib.error.URLError as error:
            found.append(str(error.reason))
        except (OSError, ValueError) as error:
            found.append(str(error))

    # a thread, because looking up a name cannot be given a deadline
    thread = threading.Thread(target=ask, name="rlprm-doctor-reach", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else f"no answer within {timeout_s:g} s"
