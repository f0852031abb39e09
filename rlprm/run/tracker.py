"""Where metrics and readable rollouts go: JSON lines always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import yaml

from rlprm.core.metrics import check_name
from rlprm.errors import ConfigError
from rlprm.run.redact import redact

METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"
# How many values of a step were NaN or infinite; written beside them, so that a gap in a curve has a cause.
NONFINITE = "training/nonfinite_metrics"


@runtime_checkable
class Sink(Protocol):
    """One place that metrics go to. Values are finite; None stands for one that was not."""

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Take the metrics of one step."""
        ...

    def close(self) -> None:
        """Write what is buffered and let go."""
        ...


class Trackers:
    """All sinks behind one call. Names are checked against the table in ``core/metrics.py``; steps only rise."""

    def __init__(self, sinks: Sequence[Sink], rollouts: RolloutLog | None = None) -> None:
        self._sinks = list(sinks)
        self._rollouts = rollouts
        self._known: set[str] = set()
        self._last_step: int | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of ``step`` everywhere, once.

        Raises:
            ConfigError: a name is not in the table of metrics.
            ValueError: the step was logged already.
        """
        for name in metrics.keys() - self._known:
            check_name(name)
            self._known.add(name)
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics of step {step} came after step {self._last_step}; log each step once, in order")
        self._last_step = step
        safe = finite(metrics)
        for sink in self._sinks:
            sink.log(step, safe)

    def rollouts(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append readable rollouts (see :mod:`rlprm.core.readable`) to ``rollouts.jsonl``."""
        if self._rollouts is not None:
            self._rollouts.write(step, samples)

    def close(self) -> None:
        """Close every sink, also when one of them fails to."""
        errors: list[OSError] = []
        for sink in [*self._sinks, *([self._rollouts] if self._rollouts is not None else [])]:
            try:
                sink.close()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Plain floats, with None for NaN and infinity (JSON has no word for them) and their number, if there are any.

    >>> finite({"actor/pg_loss": 0.5})
    {'actor/pg_loss': 0.5}
    >>> finite({"actor/pg_loss": float("nan")})
    {'actor/pg_loss': None, 'training/nonfinite_metrics': 1.0}
    """
    plain = {name: float(value) for name, value in metrics.items()}
    safe: dict[str, float | None] = {name: value if math.isfinite(value) else None for name, value in plain.items()}
    count = sum(value is None for value in safe.values())
    return {**safe, NONFINITE: float(count)} if count else safe


class JsonLines:
    """One strict JSON object a line, flushed line by line: a killed run loses at most the line being written.

    ``resume_from`` continues the file of a run that goes on after step ``resume_from``: what the interrupted run
    wrote about later steps, and a line it did not finish, are cut off, so that each step stands there once.
    """

    def __init__(self, path: Path, resume_from: int | None = None) -> None:
        if path.exists():
            if resume_from is None:
                raise ConfigError(f"{path} exists already; continue that run with resume=auto or choose another folder")
            _keep_through(path, resume_from)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; NaN and infinity are refused with a ValueError."""
        self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Calling it twice is fine."""
        self._file.close()


class MetricsLog:
    """``metrics.jsonl``: ``{"step": 1, "actor/pg_loss": ...}``, null where a value was not finite."""

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        self._lines = JsonLines(folder / METRICS, resume_from)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line."""
        self._lines.write({"step": step, **metrics})

    def close(self) -> None:
        """Let the file go."""
        self._lines.close()


class RolloutLog:
    """``rollouts.jsonl``: a few rollouts of each step, readable by people."""

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        self._lines = JsonLines(folder / ROLLOUTS, resume_from)

    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """One line per rollout."""
        for sample in samples:
            self._lines.write({"step": step, **sample})

    def close(self) -> None:
        """Let the file go."""
        self._lines.close()


class TensorBoard:
    """Event files in ``folder``; a value that was not finite leaves a gap."""

    def __init__(self, folder: Path, resume_from: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what the interrupted run wrote about steps that are run again.
        purge = None if resume_from is None else resume_from + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandB:
    """Weights & Biases, offline without a key (``WANDB_API_KEY`` or a netrc entry) unless ``WANDB_MODE`` decides.

    Files go to ``<folder>/wandb``; ``wandb sync`` sends an offline run later. The same ``run_id`` continues a run. The
    configuration is sent without secrets, and neither the command line, the code, the console nor the machine is.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        name: str,
        group: str | None,
        job_type: str,
        tags: Sequence[str],
        run_id: str,
        config: Mapping[str, Any],
        artifact: str | None,
    ) -> None:
        import wandb

        self._run = wandb.init(
            dir=str(folder),
            project=project,
            name=name,
            group=group,
            job_type=job_type,
            tags=list(tags),
            id=run_id,
            resume="allow",
            mode=_wandb_mode(),
            config=redact(config),
            settings=_discreet(),
        )
        if artifact is not None:
            kept = wandb.Artifact(f"{artifact}-config", type="config")
            with kept.new_file("config.yaml", mode="w") as file:
                yaml.safe_dump(redact(config), file, sort_keys=False)
            self._run.log_artifact(kept)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One step; W&B itself drops steps that it has seen before a resume."""
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        """Wait until everything is written (and sent, when online)."""
        self._run.finish()


def send_models(folder: Path, *, project: str, run_id: str, name: str, models: Sequence[Path], step: int) -> str:
    """Keep exported model folders as one artifact of the run on Weights & Biases; where it went (online or offline)."""
    import wandb

    mode = _wandb_mode()
    run = wandb.init(
        dir=str(folder), project=project, id=run_id, resume="allow", mode=mode, job_type="export", settings=_discreet()
    )
    artifact = wandb.Artifact(f"{name}-models", type="model", metadata={"step": step})
    for model in models:
        artifact.add_dir(str(model), name=model.name)
    run.log_artifact(artifact)
    run.finish()
    return mode


def _discreet() -> Any:
    """Settings that send neither the command line (where a key may have been typed) nor code, console or machine."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        x_disable_meta=True,
        x_disable_machine_info=True,
        disable_git=True,
        disable_code=True,
        save_code=False,
    )


def _wandb_mode() -> str:
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (FileNotFoundError, netrc.NetrcParseError):
        return "offline"
    return "online" if "api.wandb.ai" in known else "offline"


def _keep_through(path: Path, step: int) -> None:
    partial = path.with_name(path.name + ".tmp")
    with path.open(encoding="utf-8") as old, partial.open("w", encoding="utf-8") as new:
        for line in old:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that was being written when the run ended; nothing comes after it
            if row["step"] <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(partial, path)
