"""What ``srun`` starts on every node of a Slurm job: the head on the first one, a worker on the others.

``python -m rlprm.launch.slurm_node FOLDER``
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rlprm.errors import ConfigError
from rlprm.launch import head, task, worker
from rlprm.launch.node import LOOPBACK, own_address
from rlprm.launch.slurm import SECRETS

CALL_S = 30.0
LOOK_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """This node's part of the job.

    0 says that it ended in order; the run's exit code lies in the launch folder. Anything else makes srun kill the parts
    on the other nodes, and so does the end of any part, after a minute. Therefore a worker that has failed stays: whether
    the run can go on without its node is not for Slurm to say, but for the run.
    """
    (folder,) = sys.argv[1:] if arguments is None else arguments
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        found = task.read(folder)
        os.environ.update(secrets(Path(folder)))
        names = hosts(os.environ["SLURM_JOB_NODELIST"])
        rank = int(os.environ["SLURM_PROCID"])
        options = [folder, "--name", name, "--ip", address(names, rank)]
        if rank == 0:
            # only now is it known which nodes they are; whoever waits for them can say who is missing
            task.put(folder, task.TASK, json.dumps(asdict(replace(found, names=names)), indent=1) + "\n")
            code = head.main(options)
            return 0 if task.exit_code(folder) is not None else code
        if worker.main(options):
            stay(Path(folder))
    except ConfigError as error:
        print(f"rlprm launch: node {name}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def stay(folder: Path) -> None:
    """Return when the run has ended; a signal ends the wait, and this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    while folder.is_dir() and task.exit_code(folder) is None:
        time.sleep(LOOK_S)


def secrets(folder: Path) -> dict[str, str]:
    """What ``rlprm launch`` handed on.

    Raises:
        ConfigError: the file is not there or not for us.
    """
    try:
        return dict(json.loads((folder / SECRETS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the secrets of this launch cannot be read ({error}); they are removed when its job has ended: launch again"
        ) from error


def hosts(nodelist: str) -> tuple[str, ...]:
    """The names in a list as Slurm writes it, ``n[1-2]``, in the order of the job's tasks.

    Raises:
        ConfigError: scontrol does not expand it.
    """
    return tuple(_asked("show", "hostnames", nodelist).split())


def address(names: Sequence[str], rank: int) -> str:
    """This node's address among the others: the one from which it reaches them.

    A machine's own name often stands for a loopback address on itself, so a neighbour's is asked for. Loopback comes
    out where it is alone, and where all nodes are this machine.
    """
    if len(names) == 1:
        return LOOPBACK
    neighbour = names[1 if rank == 0 else 0]
    shown = _asked("--oneliner", "show", "node", neighbour)
    known = [word.removeprefix("NodeAddr=") for word in shown.split() if word.startswith("NodeAddr=")]
    return own_address(towards=known[0] if known else neighbour)


def _asked(*words: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=CALL_S, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"`scontrol {' '.join(words)}` does not answer on this node ({error})") from error
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
