"""Machines that a command reaches, as a rule ssh. The first is the head.

Each machine gets one connection, and over it one program (head or worker). Its stdin carries the secrets, then wishes,
and tells it by its end that the launcher is gone; so a program never stays behind on a machine. The launch folder lies
on storage that all of them share, and so does the run's folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from rlprm.config_cluster import HostsCluster
from rlprm.errors import ConfigError
from rlprm.launch import launcher, task
from rlprm.launch.backends import Say, Status
from rlprm.launch.lifeline import STOP_LINE, opening
from rlprm.launch.local import variables
from rlprm.launch.processes import GRACE_S, Wishes, adopt_orphans, asked, kill, start, sweep, tail, tree
from rlprm.launch.streams import forward
from rlprm.launch.task import Task

PROBE_S = 90.0  # for a machine to answer that it can run the programs
HEAD_GRACE_S = GRACE_S + 60.0
LEAVE_S = 45.0  # for the other machines once the run has ended
AGAIN_S = 15.0  # between two tries to reach a machine whose connection has broken
# Exit codes of the probe, and what they mean.
PROBLEMS = {
    91: "has no folder {directory} (cluster.directory)",
    92: "does not see {folder}; output_dir must lie on storage that all hosts and this machine share",
    93: "cannot run {python} -c 'import rlprm' in {directory} (cluster.python)",
}


def dry_run(found: Task, cluster: HostsCluster) -> str:
    """The command for each host; what goes through its stdin is named only."""
    lines = [f"folder: {found.folder}", *variables(found), ""]
    for index, (host, command) in enumerate(zip(_hosts(found, cluster), commands(found, cluster), strict=True)):
        lines += [f"{host} ({'head' if index == 0 else 'worker'}):", f"  {shlex.join(command)}"]
    named = ", ".join(["RAY_AUTH_TOKEN", *(name for name in found.secrets if name in os.environ)])
    lines += ["  stdin of each: one line of JSON with " + named, ""]
    return "\n".join([*lines, f"the head then runs: {shlex.join(['rlprm', *found.command])}"])


def check(found: Task, cluster: HostsCluster) -> None:
    """Is there a program that connects? The hosts themselves are asked once there is a launch folder to look for.

    Raises:
        ConfigError: there is none.
    """
    if shutil.which(cluster.connect[0]) is None:
        raise ConfigError(
            f"cluster.connect begins with {cluster.connect[0]}, which cannot be run; expected ssh or the like"
        )


def launch(found: Task, cluster: HostsCluster, say: Say) -> int:
    """Programs on all hosts; the run's exit code. The first Ctrl-C lets the run finish its step and save.

    Raises:
        ConfigError: a host cannot be reached or is not fit to take part; each is named.
    """
    hosts = _hosts(found, cluster)
    say(f"{found.id} on {', '.join(hosts)}")
    probe(found, cluster)
    wishes = Wishes(folder=None)
    wishes.on_signals()
    adopt_orphans()
    secrets = {name: os.environ[name] for name in found.secrets if name in os.environ}
    line = opening({"RAY_AUTH_TOKEN": task.token(found.path), **secrets})
    links = [Link(found, host, command, line) for host, command in zip(hosts, commands(found, cluster), strict=True)]
    try:
        for link in links:
            link.open(_screen if link is links[0] else None)
        code = _until_the_end(found, links, wishes, say)
    finally:
        _close(links)
        sweep()
    written = task.exit_code(found.path)
    if written is None:
        # the others leave when they see it
        task.put(found.path, task.EXIT, f"{code}\n")
        return code
    return written


def status(found: Task, cluster: HostsCluster) -> Status:
    """How it stands."""
    return launcher.status(found)


def logs(found: Task, follow: bool) -> Iterator[str]:
    """What the run has printed."""
    return launcher.logs(found, follow)


def stop(found: Task) -> None:
    """End the run."""
    launcher.stop(found)


def commands(found: Task, cluster: HostsCluster) -> list[list[str]]:
    """The command that starts each host's program; no secret in it.

    Raises:
        ConfigError: hosts and addresses do not fit together.
    """
    made = []
    for index, host in enumerate(_hosts(found, cluster)):
        program = ["rlprm.launch.head" if index == 0 else "rlprm.launch.worker", found.folder, "--name", host]
        if cluster.addresses is not None:
            program += ["--ip", cluster.addresses[index]]
        script = f"cd {shlex.quote(found.directory)} && exec " + shlex.join([found.python, "-m", *program, "--stdin"])
        made.append(remote(cluster, host, script))
    return made


def remote(cluster: HostsCluster, host: str, script: str) -> list[str]:
    """A shell script as a command on a host.

    ssh joins what it is given with blanks and hands it to the login shell there, so it is quoted once for that; a
    command that starts programs as they are (``cluster.shell=false``) gets the script as it is.
    """
    words = ["sh", "-c", script]
    connect = [word.replace("{host}", host) for word in cluster.connect]
    return [*connect, shlex.join(words)] if cluster.shell else [*connect, *words]


def probe(found: Task, cluster: HostsCluster) -> None:
    """Ask all hosts at once whether they can take part, before anything starts.

    Raises:
        ConfigError: every host that cannot, with the reason.
    """
    hosts = _hosts(found, cluster)
    facts = {"directory": found.directory, "folder": found.folder, "python": found.python}
    quoted = {name: shlex.quote(value) for name, value in facts.items()}
    script = (
        "cd {directory} || exit 91; test -r {folder}/task.json || exit 92; {python} -c 'import rlprm' || exit 93"
    ).format(**quoted)

    def ask(host: str) -> str | None:
        try:
            done = subprocess.run(
                remote(cluster, host, script),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_S,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return f"{host} gave no answer within {PROBE_S:.0f} s"
        except OSError as error:
            return f"{host} cannot be reached: {cluster.connect[0]}: {error.strerror}"
        if done.returncode == 0:
            return None
        if done.returncode in PROBLEMS:
            return f"{host} " + PROBLEMS[done.returncode].format(**facts)
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return f"{host} cannot be reached ({cluster.connect[0]}): {said}"

    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        problems = [answer for answer in pool.map(ask, hosts) if answer is not None]
    if problems:
        raise ConfigError("; ".join(problems))


class Link:
    """One host's connection, which is opened again when it breaks."""

    def __init__(self, found: Task, host: str, command: Sequence[str], line: bytes) -> None:
        self.host = host
        self.log = found.path / f"host-{host}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._line = line
        self._broken_at: float | None = None

    def open(self, write: Callable[[bytes], None] | None) -> None:
        """Connect; what the program prints goes to the host's log, or to ``write``."""
        with self.log.open("ab") as log:
            self.process = start(
                self._command,
                environment=os.environ,
                directory=None,
                output=subprocess.PIPE if write else log,
                stdin=subprocess.PIPE,
            )
        if write:
            self._copying = forward(self.process, write)
        self._broken_at = None
        self.tell(self._line)

    def tell(self, line: bytes) -> None:
        """Write to the program's stdin, if the connection stands."""
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """Close stdin, which ends the program on the other side."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def renew(self, say: Say) -> None:
        """Where the connection has broken, connect again from time to time: a machine may come back."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return
        if self._broken_at is None:
            self._broken_at = time.monotonic()
            say(f"the connection to {self.host} has ended (code {code}), tries again: {tail(self.log, 1)}")
        elif time.monotonic() - self._broken_at > AGAIN_S:
            self.hang_up()
            self.open(None)


def _until_the_end(found: Task, links: Sequence[Link], wishes: Wishes, say: Say) -> int:
    head = links[0].process
    assert head is not None
    told: float | None = None
    while (code := head.poll()) is None:
        if wishes.check() and told is None:
            say(asked(found.command[0]))
            links[0].tell(STOP_LINE)
            told = time.monotonic()
        if told is None:
            # the others leave when the run has ended, while the head still puts Ray away
            for link in links[1:] if task.exit_code(found.path) is None else ():
                link.renew(say)
        elif wishes.hard or time.monotonic() - told > HEAD_GRACE_S:
            say("the connections are closed: " + ("asked twice" if wishes.hard else "the run did not end in time"))
            return wishes.code()
        with suppress(subprocess.TimeoutExpired):
            head.wait(0.2)
    if (code == 255 or code < 0) and task.exit_code(found.path) is None:
        say(f"the connection to {links[0].host} is gone, and is not renewed")
        if (found.path / task.HEAD).exists():  # before that there is nothing to save
            _wait_for_a_lost_head(found, links, wishes, say, told is not None)
        return 1
    return wishes.code() if told is not None and code != 0 else code


def _wait_for_a_lost_head(found: Task, links: Sequence[Link], wishes: Wishes, say: Say, told: bool) -> None:
    """Without its connection the head lets the run finish its step and save, for which it needs the others."""
    deadline = time.monotonic() + HEAD_GRACE_S
    say(f"the run has {HEAD_GRACE_S:.0f} s to finish its step and save, as its head knows; Ctrl-C gives it up")
    while task.exit_code(found.path) is None and time.monotonic() < deadline:
        if wishes.hard or (wishes.check() and not told):
            say("the run is given up")
            return
        for link in links[1:]:
            link.renew(say)
        time.sleep(0.2)


def _close(links: Sequence[Link]) -> None:
    """Tell all to end, give them time, and close what is left: the head first, which may still need the others to save."""
    _part(links[:1])
    _part(links[1:])


def _part(links: Sequence[Link]) -> None:
    opened = [(link, link.process) for link in links if link.process is not None]
    for link, _ in opened:
        link.tell(STOP_LINE)
    deadline = time.monotonic() + LEAVE_S
    for link, process in opened:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        link.hang_up()
    for _, process in opened:
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            kill(tree(process.pid), process)


def chosen_hosts(nodes: int, cluster: HostsCluster) -> list[str]:
    """The hosts that a task of so many nodes uses: the first ones.

    Raises:
        ConfigError: there are too few, one is named twice, or the addresses do not fit.
    """
    if len(cluster.hosts) < nodes:
        raise ConfigError(
            f"placement.nodes is {nodes} and cluster.hosts has {len(cluster.hosts)} "
            f"({', '.join(cluster.hosts) or 'none'}); list more hosts, or ask for fewer nodes"
        )
    twice = sorted({host for host in cluster.hosts if cluster.hosts.count(host) > 1})
    if twice:
        raise ConfigError(f"cluster.hosts names {', '.join(twice)} more than once; a host takes part once")
    if cluster.addresses is not None and len(cluster.addresses) != len(cluster.hosts):
        raise ConfigError(
            f"cluster.addresses has {len(cluster.addresses)} entries and cluster.hosts {len(cluster.hosts)}; give one "
            "for each host, in the same order, or null"
        )
    return cluster.hosts[:nodes]


def _hosts(found: Task, cluster: HostsCluster) -> list[str]:
    return chosen_hosts(found.nodes, cluster)


def _screen(data: bytes) -> None:
    with suppress(OSError, ValueError):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
