"""``rlprm launch``: a run on a cluster, from the nodes to its exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprm.cli.compose import composed, parsed
from rlprm.cli.inner import COMMANDS, Inner, inner
from rlprm.config import validated
from rlprm.config_cluster import ClusterBase, HostsCluster, LaunchConfig, OwnRay
from rlprm.errors import ConfigError
from rlprm.launch import backends, launcher, task
from rlprm.launch.background import attached, refused
from rlprm.launch.hosts import chosen_hosts
from rlprm.launch.launches import running_in
from rlprm.launch.processes import this_python
from rlprm.launch.task import Task
from rlprm.run.redact import is_secret_name

OWN_HELP = False

HELP = """\
rlprm launch cluster=KIND [cluster.KEY=VALUE ...] [what `rlprm train` takes] [-- options of that command]

Starts Ray on the nodes, waits for all that placement.nodes asks for, runs the preflight, then the run; prints what the
run prints, and ends with its exit code. Ctrl-C once: the run finishes its step, saves and ends; again: it ends at once.
The same command continues the run, also after a failure.

clusters (files in cluster/, or in the folder `cluster` of --config-dir)
  local        this machine; with placement.nodes=2 two Ray nodes on it
  hosts        machines over ssh                cluster.hosts=[a,b]
  namespaces   two network namespaces of this machine (cluster/namespaces.sh up)
  slurm        a batch job                      cluster.partition=... cluster.time=...
  kuberay      a RayJob on Kubernetes           cluster.image=... cluster.claim=...
  existing     a Ray cluster that runs already  cluster.address=http://HOST:8265

options
  --command C   what to run: train (if not given), ablate, sft, dpo, prm, evaluate
  --dry-run     print what would be run on each node, and start nothing
  --detach      return as soon as it is started; see rlprm status, rlprm logs, rlprm stop
  --cfg         print the cluster's configuration and its origins
  --config-dir DIR

examples
  rlprm launch recipe=chain_arithmetic_cpu cluster=local
  rlprm launch recipe=chain_arithmetic_cpu cluster=local placement=cpu_two_ranks placement.nodes=2
  rlprm launch recipe=prime_eurus2_7b cluster=slurm cluster.partition=gpu cluster.time=1-12:00:00 --detach
  rlprm launch --command ablate recipe=chain_arithmetic_cpu normalizer=raw,group_zscore seeds=3 cluster=local

launches: <output_dir>/launches/<id>; cluster/README.md is the guide.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm launch`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value | group=option")
    parser.add_argument("-h", "--help", action="store_true", help="clusters, options and examples")
    parser.add_argument("--command", choices=sorted(COMMANDS), default="train", help="what to run")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and start nothing")
    parser.add_argument("--detach", action="store_true", help="return as soon as it is started")
    parser.add_argument("--cfg", action="store_true", help="print the cluster's configuration and its origins")
    parser.add_argument("--config-dir", type=Path, help="a folder of your own groups and options")


def run(options: argparse.Namespace) -> int:
    """Launch; the run's exit code."""
    if options.help:
        print(HELP, end="")
        return 0
    mine, words = split(options.overrides)
    configuration = composed("launch", mine, options.config_dir)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: LaunchConfig = validated(LaunchConfig, configuration.values)
    cluster = config.cluster
    wanted = inner(options.command, words, options.config_dir)
    found = made(wanted, cluster)
    backend = backends.backend(cluster.kind)
    if options.dry_run:
        print(backend.dry_run(found, cluster))
        return 0
    refuse_second(found)
    backends.checks(backend)(found, cluster)
    task.write(found)
    launcher.write_cluster(found, cluster)
    if options.detach:
        return detached(found, cluster, backend)
    code = attached(found, cluster)
    if code != 0:
        print(f"rlprm launch: {found.id} ended with exit code {code}; {HINT}", file=sys.stderr)
    return code


HINT = "rlprm logs shows what it said, and the same command continues it"


def detached(found: Task, cluster: ClusterBase, backend: backends.Backend) -> int:
    """Start and return.

    Raises:
        ConfigError: it did not start.
    """
    submit = backends.submits(backend)
    try:
        if submit is not None:
            submit(found, cluster, print)
        else:
            launcher.in_background(found, dict(os.environ))
    except ConfigError:
        refused(found)
        raise
    print(f"launched {found.id}\nrlprm status {found.id}\nrlprm logs -f {found.id}\nrlprm stop {found.id}")
    return 0


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the cluster, and what goes to the command: the other overrides, and options with what follows them.

    >>> split(["cluster=local", "steps=2", "cluster.port=0", "--seeds", "0,1"])
    (['cluster=local', 'cluster.port=0'], ['steps=2', '--seeds', '0,1'])

    Raises:
        ConfigError: a word that is not of Hydra's grammar.
    """
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    mine, others = [], []
    for word, override in zip(words[:first], parsed(words[:first]), strict=True):
        (mine if override.key_or_group.split(".")[0] == "cluster" else others).append(word)
    return mine, [*others, *words[first:]]


def made(wanted: Inner, cluster: Any) -> Task:
    """The task.

    Raises:
        ConfigError: too few hosts, or a secret where everybody can read it.
    """
    for name in cluster.environment:
        if is_secret_name(name):
            raise ConfigError(
                f"cluster.environment.{name} would be written to files that others can read; export {name} in this shell "
                f"and name it in cluster.secrets"
            )
    # absolute, but not resolved: a link to this folder may be the only name that all nodes know
    # ... and pods have folders of their own: what this machine keeps of their launch lies here
    directory = os.path.abspath(os.getcwd() if cluster.kind == "kuberay" else cluster.directory or os.getcwd())
    launch_id = task.new_id(re.sub(r"[^\w.-]+", "-", wanted.name))  # a folder's name and, on some clusters, a job's
    own = cluster if isinstance(cluster, OwnRay) else None  # elsewhere Ray is started by somebody else
    return Task(
        id=launch_id,
        command=wanted.command,
        kind=cluster.kind,
        nodes=wanted.nodes,
        node_gpus=cluster.node.gpus,
        names=names(cluster, wanted.nodes),
        directory=directory,
        python=cluster.python or this_python(),
        environment=cluster.environment,
        secrets=tuple(cluster.secrets),
        wait_s=cluster.wait_s,
        preflight=cluster.preflight,
        port=0 if own is None else own.port,
        dashboard=own is not None and own.dashboard,
        object_store_bytes=None if own is None else own.object_store_bytes or wanted.object_store_bytes,
        cpus=wanted.cpus,
        run=os.path.join(directory, wanted.run) if wanted.run else "",
        folder=os.path.join(directory, wanted.output_dir, task.LAUNCHES, launch_id),
    )


def names(cluster: ClusterBase, nodes: int) -> tuple[str, ...]:
    """Names of the nodes in Ray, where the launcher knows them before.

    Raises:
        ConfigError: there are fewer hosts than nodes.
    """
    if isinstance(cluster, HostsCluster):
        return tuple(chosen_hosts(nodes, cluster))
    return tuple(f"node{index}" for index in range(nodes)) if cluster.kind == "local" else ()


def refuse_second(found: Task) -> None:
    """One launch at a time in a run's folder.

    Raises:
        ConfigError: another one stands or waits there.
    """
    other = running_in(Path(found.folder).parent, found.run)
    if other is not None:
        name, now = other
        if now.state == "unknown":
            raise ConfigError(
                f"{found.run} may be in use by launch {name}, whose cluster gives no answer ({now.detail}); try again, choose "
                f"another name or output_dir, or, if that cluster is gone for good, remove {Path(found.folder).parent / name}"
            )
        raise ConfigError(
            f"{found.run} is in use by launch {name} ({now.state}, {now.detail}); see rlprm logs {name}, end it with "
            f"rlprm stop {name}, or choose another name or output_dir"
        )
