"""``rlprm SUBCOMMAND key=value group=option ...``"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from rlprm.errors import RlprmError

INTERRUPTED = 130  # the shell's exit code for Ctrl-C

# Each subcommand is a module with `arguments(parser)` and `run(options) -> exit code`; only the chosen one is imported,
# so that `rlprm judge` does not wait for torch and Ray.
COMMANDS = {
    "train": "train a policy",
    "sft": "supervised fine-tuning: warm a model up",
    "evaluate": "accuracy of a model on held-out prompts",
    "judge": "grade a file of answers with a verifier",
    "export": "write policy and PRM of a run as Hugging Face folders",
    "report": "summary, table and plots of finished runs",
}


def usage() -> str:
    """The list of subcommands."""
    lines = ["rlprm SUBCOMMAND [options] [key=value | group=option ...]", ""]
    lines += [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join([*lines, "", "rlprm SUBCOMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 when it succeeded, 1 for an error the user can act on, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        print(f"rlprm: no subcommand {name!r}" + (f"; nearest is {near[0]!r}" if near else ""), file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded unless it is asked for
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = importlib.import_module(f"rlprm.cli.{name}")
    parser = argparse.ArgumentParser(prog=f"rlprm {name}", description=COMMANDS[name], add_help=command.OWN_HELP)
    command.arguments(parser)
    try:
        return command.run(parser.parse_intermixed_args(rest))
    except RlprmError as error:
        print(f"rlprm {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rlprm {name}: interrupted; what was saved is kept", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
