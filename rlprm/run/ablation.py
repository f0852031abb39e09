"""An ablation's runs: what is finished is never run again, what fails is written down, and what may not mix does not."""

from __future__ import annotations

import os
import pickle
import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import psutil
import yaml
from pydantic import Field
from ray.exceptions import RayError
from safetensors import SafetensorError

from rlprm.cli.compose import Composed, flat_leaves
from rlprm.config import Count, NonNegative, Section, TrainConfig
from rlprm.errors import ConfigError, RlprmError, Stopped
from rlprm.report.ablation import FAILED, FINISHED, write_json
from rlprm.run.folder import HEADER, last_config
from rlprm.run.redact import redact_text

# Whatever ends one run must not end the others; Ctrl-C and the like are none of these.
CAN_END_A_RUN = (
    *(RlprmError, RayError, OSError, RuntimeError, ValueError, TypeError, LookupError),
    *(ArithmeticError, AssertionError, AttributeError, NameError, ImportError, MemoryError),
    *(EOFError, BufferError, SyntaxError, SystemError, StopIteration, ReferenceError),
    # of libraries, with no class above among their bases; what torch and Ray raise is RuntimeError, OSError or RayError
    *(pickle.PickleError, subprocess.SubprocessError, CancelledError),
    *(yaml.YAMLError, jinja2.TemplateError, SafetensorError, psutil.Error),
)
# What may differ between two starts of a run without touching its numbers.
FREE = ("resume", "tracker", "checkpoint")

Share = Annotated[float, Field(gt=0, lt=1)]


class CollapseSection(Section):
    share_of_best: Annotated[float, Field(ge=0, le=1)]
    entropy: NonNegative  # nats a token


class AblationConfig(Section):
    """The keys of ``conf/ablate.yaml``."""

    name: Annotated[str, Field(pattern=r"^\w[\w.+=,-]*$")]
    seeds: Count | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    stream: str
    level: Annotated[float, Field(ge=0, le=1)] | None
    confidence: Share
    resamples: Count
    last_steps: Count
    collapse: CollapseSection
    checkpoints: Literal["none", "last"]

    def seed_list(self) -> list[int]:
        """Every seed.

        Raises:
            ConfigError: a list that names one twice.
        """
        if isinstance(self.seeds, int):
            return list(range(self.seeds))
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds is {self.seeds}, which names a seed twice; give each once")
        return list(self.seeds)

    def report_settings(self) -> dict[str, Any]:
        """What the report is made with, as ``ablation.json`` holds it."""
        return {
            "stream": self.stream,
            "level": self.level,
            "confidence": self.confidence,
            "resamples": self.resamples,
            "last_steps": self.last_steps,
            "share_of_best": self.collapse.share_of_best,
            "entropy": self.collapse.entropy,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of the ablation."""

    cell: str
    seed: int
    config: TrainConfig
    composed: Composed

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / self.config.name / f"seed{self.config.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).is_file()

    @property
    def label(self) -> str:
        return f"{self.cell}, seed {self.seed}"


def refuse_changed(runs: Sequence[Planned], ignored: Sequence[str]) -> None:
    """What a folder holds must have been started with the configuration that it would be started with now.

    ``ignored`` are keys or sections that may differ all the same.

    Raises:
        ConfigError: every run that differs, with the first key that does.
    """
    wrong = [line for run in runs if (line := _changed(run, (*FREE, *ignored)))]
    if wrong:
        raise ConfigError(
            "\n".join(wrong)
            + "\nNumbers of different configurations must not stand in one table: choose another name, "
            "undo the change, move the folder away, or accept the key with --ignore KEY"
        )


def _changed(run: Planned, free: Sequence[str]) -> str:
    if not (run.folder / HEADER).is_file():
        return ""
    before = dict(flat_leaves(last_config(run.folder)))
    now = dict(flat_leaves(yaml.safe_load(redact_text(run.composed.yaml()))))
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{one}.") for one in free)
    ]
    if not differing:
        return ""
    key = differing[0]
    others = f" (and {len(differing) - 1} other keys)" if len(differing) > 1 else ""
    return f"{run.folder} was started with {key} = {before.get(key)!r} and now has {now.get(key)!r}{others}"


def in_order(runs: Sequence[Planned], key: Callable[[TrainConfig], str]) -> list[Planned]:
    """Runs that share engines stand together; among them all cells have a seed before the next seed begins.

    So an ablation that is cut off has compared every cell on the seeds that it got to.
    """
    engines = list(dict.fromkeys(key(run.config) for run in runs))
    cells = list(dict.fromkeys(run.cell for run in runs))
    seeds = list(dict.fromkeys(run.seed for run in runs))
    return sorted(runs, key=lambda run: (engines.index(key(run.config)), seeds.index(run.seed), cells.index(run.cell)))


def run_one(run: Planned, train: Callable[[TrainConfig, Composed], Path], *, checkpoints: str) -> str | None:
    """Run it to its end; None when it is finished, else what went wrong, which is written into its folder too.

    Raises:
        Stopped: it was asked to end, so it is neither finished nor failed.
    """
    begin = time.monotonic()
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / FAILED).unlink(missing_ok=True)
        train(run.config, run.composed)
        if checkpoints == "none":
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        write_json(run.folder / FINISHED, {"time": _now(), "seconds": round(time.monotonic() - begin, 1)})
    except Stopped:
        raise
    except CAN_END_A_RUN as error:
        return write_failure(run, error)
    return None


def write_failure(run: Planned, error: BaseException | str) -> str:
    """``failed.json`` in the run's folder, with the traceback where the error is not one of this program's own."""
    if isinstance(error, str):
        text, trace = error, ""
    else:
        text = str(error) if isinstance(error, RlprmError) else f"{type(error).__name__}: {error}"
        trace = "" if isinstance(error, RlprmError) else "".join(traceback.format_exception(error))
    with suppress(OSError):  # where nothing can be written, the error is at least said
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / FAILED, {"error": redact_text(text), "traceback": redact_text(trace), "time": _now()})
    return text


def machine() -> Mapping[str, str]:
    """What the runs ran on, without its name."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
        "memory_gb": f"{psutil.virtual_memory().total / 1e9:.0f}",
        "gpus": ", ".join(gpus) or "none",
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
