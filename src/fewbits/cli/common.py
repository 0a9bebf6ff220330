"""What commands share: progress on stderr, JSON on stdout, sizes in words."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from fewbits.checkpoint import Checkpoint
    from fewbits.containers.base import Progress as Report

    console: Console
    log: Console

AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights in *.pt and *.bin; runs no code.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 …; by default the GPU, if there is one "
                                            "and the work fits into its memory.")]

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def __getattr__(name: str) -> Any:
    """`console` on stdout and `log` on stderr, made when a command imports them: rich costs what a token costs."""
    if name not in ("console", "log"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rich.console import Console

    globals()[name] = Console(stderr=name == "log")
    return globals()[name]


class Ended(SystemExit):
    """The end of a command that has said all there is to say."""


@contextmanager
def progress() -> Iterator[Report]:
    """A report function that draws a bar with the time left, one for every kind of work: `quantizing: block 3 of 30`
    is work of the kind `quantizing`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=__getattr__("log"), transient=True, disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            kind, _, detail = what.partition(": ")
            if kind not in tasks:
                tasks[kind] = bars.add_task(kind, total=total, detail="")
            bars.update(tasks[kind], completed=done, total=total, detail=detail)

        yield report


def source(model: str, allow_pickle: bool) -> str | Checkpoint:
    """What a command works on: `model`, opened here where pickles are allowed."""
    if not allow_pickle:
        return model
    from fewbits import containers, hub

    return containers.open(hub.locate(model), allow_pickle=True)


def emit(data: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False, default=str)
    print()


def quiet_libraries() -> None:
    """Keep Transformers' warnings and bars off the terminal: what matters, fewbits says itself."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "error", "1"
    if "transformers" in sys.modules:  # which has read those
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def size(nbytes: float) -> str:
    """`1.23 GB`, decimal units as file listings use them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def nbytes(text: str, option: str) -> int:
    """`6GB`, `512MiB`, `800000` in bytes.

    Raises:
        FewbitsError: no size; `option` is named.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?)B?\s*", text.upper())
    try:
        return int(float(found[1]) * UNITS[found[2]])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise FewbitsError(f"{option} {text!r} is no size", "for example 6GB or 512MiB") from None
