"""The command line: one file a command, each only parses and calls a public function."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import typer

from fewbits.cli.common import Ended
from fewbits.errors import Elsewhere, FewbitsError

# command -> its settings; `eval` is a name of Python's
COMMANDS: dict[str, dict[str, Any]] = {name: {} for name in (
    "quantize", "finish", "finetune", "merge", "convert", "imatrix", "info", "plan", "verify", "explain", "eval",
    "bench", "tune", "compare", "sensitivity", "run", "chat", "push")}
COMMANDS["explain"] = {"context_settings": {"ignore_unknown_options": True}}  # a negative number is no option
MODULES = {"eval": "evaluate"}


def application(asked: str = "") -> typer.Typer:
    """The command that is asked for, where it is one; else all, to list them. Others are not even imported."""
    app = typer.Typer(name="fewbits", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_fewbits)
    for name in [asked] if asked in COMMANDS else COMMANDS:
        module = import_module(f"fewbits.cli.{MODULES.get(name, name)}")
        app.command(name, **COMMANDS[name])(module.command)
    return app


def _fewbits() -> None:
    """Put any language model into few bits: quantize, run, measure."""


def main() -> None:
    """Entry point: errors become one line and a hint on stderr, and an exit code."""
    try:
        application(sys.argv[1] if len(sys.argv) > 1 else "")()
    except Ended:
        raise
    except Elsewhere:
        sys.exit(1)
    except FewbitsError as error:
        _say(f"error: {error}")
        if error.hint:
            _say(f"hint: {error.hint}")
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            _say("interrupted: nothing half-written is left; the same command resumes")
        raise
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what is left to say goes nowhere
        sys.exit(141)
    except MemoryError:
        _say("error: out of memory")
        sys.exit(1)
    except OSError as error:
        _say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)


def _say(line: str) -> None:
    print(line.replace("\n", " "), file=sys.stderr)
