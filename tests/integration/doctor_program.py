"""Preflights of a cluster, as JSON: ADDRESS, then one word each: quick, pairs, or answer (with little patience)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlprm.run import preflight

RECIPE = ("recipe=chain_arithmetic_cpu", "placement.nodes=2")


def task(folder: str) -> Any:
    """What a preflight reads of a launch."""
    command = ("train", *RECIPE, f"output_dir={folder}")
    return SimpleNamespace(command=command, nodes=2, preflight="quick", object_store_bytes=None)


def main(address: str, folder: str, *words: str) -> None:
    said: dict[str, Any] = {}
    from rlprm.actors.cluster import cluster
    from rlprm.actors.nodes import wait_for_nodes

    with cluster(address=address, num_actors=0, gpus=0.0, object_store_bytes=None, working_dir=str(preflight.ROOT)):
        there = wait_for_nodes(2, timeout_s=30.0, say=lambda words: None)
        for word in words:
            begin = time.perf_counter()
            if word == "quick":  # the connection that is there already is taken
                said[word] = [each.plain() for each in preflight.preflight(address, task(folder))]
            elif word == "pairs":
                said[word] = [[*pair, answer] for pair, answer in preflight.in_pairs(there, "gloo", 0.0).items()]
            else:
                preflight.ANSWER_S = 3.0
                Path(folder, "asking").write_text("")
                said[word] = [each.plain() for each in preflight.preflight(address, task(folder))]
            said[f"{word}_s"] = time.perf_counter() - begin
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
