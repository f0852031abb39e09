"""``rlprm SUBCOMMAND key=value group=option ...``"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rlprm.errors import ConfigError, RlprmError, Stopped
from rlprm.run.stopping import sigterm_interrupts

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
ENDED = 143  # ... for SIGTERM

# Each subcommand is a module with `arguments(parser)` and `run(options) -> exit code`; only the chosen one is imported,
# so that `rlprm judge` does not wait for torch and Ray.
COMMANDS = {
    "train": "train a policy",
    "ablate": "compare configurations over seeds at equal rollouts",
    "sft": "supervised fine-tuning: warm a model up",
    "dpo": "preference optimisation on the rollouts that runs have stored",
    "prm": "train a process reward model on labelled steps",
    "evaluate": "accuracy of a model on held-out prompts",
    "check": "contract tests for pieces of your own",
    "judge": "grade a file of answers with a verifier",
    "export": "write policy and PRM of a run as Hugging Face folders",
    "report": "summary, table and plots of finished runs",
    "prepare": "fetch or convert the data and models that a recipe names",
    "plan": "what a configuration needs, before anything starts",
    "doctor": "is this environment fit to run it? each finding with its cure",
    "launch": "start a run: here, on hosts, Slurm, Kubernetes or a Ray cluster",
    "status": "what was launched, and how it stands",
    "logs": "what a launched run prints",
    "stop": "end a launched run",
}


class Parser(argparse.ArgumentParser):
    """Bad options are errors like all others: one sentence, with the nearest option, and exit code 1."""

    def error(self, message: str) -> NoReturn:
        """Raises:
        ConfigError: always.
        """
        words = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        near = [found for word in words for found in difflib.get_close_matches(word.partition("=")[0], known, n=1)]
        raise ConfigError(f"{message} (see {self.prog} --help)" + (f"; nearest is {near[0]!r}" if near else ""))


def usage() -> str:
    """The list of subcommands."""
    lines = ["rlprm SUBCOMMAND [options] [key=value | group=option ...]", ""]
    lines += [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join([*lines, "", "rlprm SUBCOMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 when it succeeded, 1 for an error the user can act on.

    130 after Ctrl-C, and after SIGTERM where nothing is to be saved; 143 where a run was asked to end and has saved.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"rlprm: no subcommand {name!r}" + (f"; nearest is {near[0]!r}" if near else ""), file=sys.stderr)
        return 2
    if name != "prepare":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded unless it is asked for
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = importlib.import_module(f"rlprm.cli.{name}")
    parser = Parser(prog=f"rlprm {name}", description=COMMANDS[name], add_help=command.OWN_HELP, allow_abbrev=False)
    command.arguments(parser)
    try:
        with sigterm_interrupts():
            return command.run(parser.parse_intermixed_args(rest))
    except Stopped as error:
        again = "" if name == "ablate" else " with resume=auto"
        print(f"rlprm {name}: {error}; the same command{again} continues", file=sys.stderr)
        return ENDED
    except RlprmError as error:
        print(f"rlprm {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rlprm {name}: interrupted; what was saved is kept", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
