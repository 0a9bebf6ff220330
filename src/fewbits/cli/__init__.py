"""The command line: one file a command, each only parses and calls a public function."""

from __future__ import annotations

import sys

import typer

from fewbits.cli import chat, convert, evaluate, explain, finish, imatrix, info, plan, quantize, run, verify
from fewbits.errors import Elsewhere, FewbitsError

app = typer.Typer(name="fewbits", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Put any language model into few bits: quantize, run, measure.")
app.command("quantize")(quantize.command)
app.command("finish")(finish.command)
app.command("convert")(convert.command)
app.command("imatrix")(imatrix.command)
app.command("info")(info.command)
app.command("plan")(plan.command)
app.command("verify")(verify.command)
# a negative number is no option
app.command("explain", context_settings={"ignore_unknown_options": True})(explain.command)
app.command("eval")(evaluate.command)
app.command("run")(run.command)
app.command("chat")(chat.command)


def main() -> None:
    """Entry point: errors become one line and a hint on stderr, and an exit code."""
    try:
        app()
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
    except BrokenPipeError:
        sys.exit(141)
    except MemoryError:
        _say("error: out of memory")
        sys.exit(1)
    except OSError as error:
        _say(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)


def _say(line: str) -> None:
    print(line.replace("\n", " "), file=sys.stderr)
