"""``rlprm check``: the contract tests of `conf/`, run on pieces of your own. No GPU, no Ray, no model."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlprm.cli.compose import composed, options_in
from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError
from rlprm.paths import conf_dir

OWN_HELP = True
STREAM_PIECES = ("normalizer", "estimator", "gate", "merge", "source")
# Where the callable is in options that hold more than one.
INSIDE = {"verifier": "function", "keep": "rule", "policy_loss": "surrogate", "source": "kind"}
BASE = ["method=prime_as_written", "model.path=somewhere"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm check`."""
    parser.add_argument("--config-dir", type=Path, required=True, help="the folder of your own groups and options")
    parser.add_argument("--gold", default="7", help="a gold answer that your verifiers can read (default: 7)")


def run(options: argparse.Namespace) -> int:
    """Try every option of the folder; 1 if one breaks the promises of its group."""
    if not options.config_dir.is_dir():
        raise ConfigError(f"--config-dir {options.config_dir} is no folder; expected one of YAML groups, as conf/ is")
    found = own_options(options.config_dir)
    if not found:
        raise ConfigError(
            f"{options.config_dir} holds no GROUP/OPTION.yaml; expected for example {options.config_dir}/normalizer/mine.yaml"
        )
    failed = 0
    for group, option in found:
        verdict, said = tried(group, option, options.config_dir, options.gold)
        failed += verdict == "failed"
        print(f"{verdict:<10} {group}/{option}" + (f": {said}" if said else ""))
    print(f"{len(found) - failed} of {len(found)} keep the promises of their groups")
    return 1 if failed else 0


def own_options(folder: Path) -> list[tuple[str, str]]:
    """(group, option) of every YAML in the folder.

    Raises:
        ConfigError: a folder inside it is no group of rlprm.
    """
    mine = {
        (str(file.parent.relative_to(folder)), file.stem) for file in folder.rglob("*.yaml") if file.parent != folder
    }
    known = {str(path.relative_to(conf_dir())) for path in conf_dir().iterdir() if path.is_dir()}
    unknown = sorted({group for group, _ in mine} - known)
    if unknown:
        raise ConfigError(f"{folder / unknown[0]} is no group; expected one of {', '.join(sorted(known))}")
    assert mine <= {(group, option) for group, every in options_in([folder]).items() for option in every}
    return sorted(mine)


def tried(group: str, option: str, folder: Path, gold: str) -> tuple[str, str]:
    """("ok" | "failed" | "not tried", why)."""
    from rlprm.contract.sources import NotWithoutModel

    try:
        check(group, option, folder, gold)
    except NotWithoutModel as reason:
        return "not tried", f"{reason}; run it for a step or two: rlprm train ... steps=2 --config-dir {folder}"
    except (ConfigError, ValueError) as error:
        return "failed", str(error)
    except AssertionError as error:
        return "failed", _words(error)
    except Exception as error:  # noqa: BLE001 - somebody else's code: whatever it raises is what is reported
        return "failed", f"{type(error).__name__}: {error} ({_place(error)})"
    return "ok", ""


def check(group: str, option: str, folder: Path, gold: str) -> None:
    """Compose the option as a run would, and hold its callable to the promises of the group."""
    from rlprm.parts import check_part, locate, made

    package = f"streams.process.{group}" if group in STREAM_PIECES else group
    choice = f"{group}@{package}={option}" if group in STREAM_PIECES else f"{group}={option}"
    values = composed("train", [*BASE, choice], folder).values
    checker = _checkers(gold).get(group)
    if checker is None:
        validated(TrainConfig, values)
        return
    node: Any = values
    for key in package.split("."):
        node = node[key]
    part = node[INSIDE[group]] if group in INSIDE else node
    check_part(part)
    if group == "source":
        from rlprm.contract.sources import check_source

        settings = {key: value for key, value in part.items() if not key.startswith("_")}
        kind: Any = locate(part["_target_"])
        check_source(kind, model=node["model"], settings=settings, made={k: made(v) for k, v in settings.items()})
        return
    checker(made(part))


def _checkers(gold: str) -> Mapping[str, Callable[[Any], None]]:
    from rlprm.contract.checks import (
        CHECKS,
        check_keep,
        check_normalizer,
        check_normalizer_is_global,
        check_surrogate,
        is_local,
    )
    from rlprm.contract.sources import check_verifier

    def normalizer(piece: Any) -> None:
        check_normalizer(piece)
        if not is_local(piece):
            check_normalizer_is_global(piece)

    return {
        **CHECKS,
        "normalizer": normalizer,
        "keep": check_keep,
        "policy_loss": check_surrogate,
        "verifier": lambda verify: check_verifier(verify, gold=gold),
        "source": lambda piece: None,
    }


def _words(error: AssertionError) -> str:
    """The promise that was broken: in words where there are some, else the line that says it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else _place(error)


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}: {last.line}"
