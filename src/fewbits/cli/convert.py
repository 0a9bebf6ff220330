"""`fewbits convert SRC -o DST [--to CONTAINER]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewbits.cli.common import AllowPickle, console, emit, log, nbytes, progress, quiet_libraries, size, source


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File or directory to write.")],
    to: Annotated[str | None, typer.Option("--to", help="A container (gguf, gptq, awq, transformers, …) or f16, bf16, "
                                                        "f32; left out, it follows from the name of OUT.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Quantize again what cannot keep its values.")] = False,
    split: Annotated[str | None, typer.Option(help="GGUF in files of at most this size, for example 2GB; OUT is a "
                                                   "directory.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that a LoRA adapter belongs to.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for every tensor.")] = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Move a model to another layout, keeping its codes wherever both layouts can hold them."""
    from fewbits.converting import MEANING, convert, summary

    quiet_libraries()
    with progress() as report:
        result = convert(source(model, allow_pickle), out, to, lossy=lossy,
                         split=None if split is None else nbytes(split, "--split"), base=base, progress=report)
    if json:
        emit(result.to_json())
        return
    for note in result.notes:
        log.print(f"note: {note}", highlight=False, markup=False)
    table = Table("tensors", "was", "is", "lossless", "", box=None, pad_edge=False)
    if verbose:
        for s in result.tensors:
            table.add_row(s.name, s.before, s.after, _verdict(s.lossless, s.error), MEANING[s.how])
    else:
        for before, after, how, count, error in summary(result):
            table.add_row(str(count), before, after, _verdict(how != "rounded", error), MEANING[how])
    console.print(table)
    console.print(f"{out}: {result.source} → {result.container}, {size(result.nbytes)}, "
                  f"{result.seconds:.1f} s, {'lossless' if result.lossless else 'not lossless'}",
                  highlight=False, soft_wrap=True)


def _verdict(lossless: bool, error: float) -> str:
    return "yes" if lossless else f"no: {error:.2%} off"
