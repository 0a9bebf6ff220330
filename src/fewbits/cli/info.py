"""`fewbits info PATH`, `fewbits info --cpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewbits.cli import imatrix
from fewbits.cli.common import AllowPickle, console, emit, size, source
from fewbits.errors import FewbitsError


def command(
    model: Annotated[str | None, typer.Argument(help="A path in any format, or a hub id.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="What this CPU can do, and which kernels are used.")] = False,
) -> None:
    """Say what a model file holds, from its header alone; of what an imatrix was made; or what the CPU can do."""
    if cpu:
        _cpu(json)
        return
    if model is None:
        raise FewbitsError("info: no model", "a path, a hub id, or --cpu")
    from fewbits.imatrix import is_imatrix, read
    from fewbits.inspection import inspect

    if is_imatrix(model):
        imatrix.show(Path(model), read(model), json)
        return
    found = inspect(source(model, allow_pickle))
    if json:
        emit(found.to_json())
        return
    console.print(f"{found.path}: {found.architecture} ({found.container}), {found.parameters / 1e6:.1f} M parameters, "
                  f"{size(found.nbytes)}, {found.bits_per_weight:.3f} bits a weight", highlight=False, soft_wrap=True)
    console.print(f"tokenizer: {'yes' if found.tokenizer else 'no'}, chat template: "
                  f"{'yes' if found.chat_template else 'no'}", highlight=False)
    kinds = Table("codec", "tensors", "parameters", "size", box=None)
    for kind in found.codecs:
        kinds.add_row(kind.codec, str(kind.tensors), f"{kind.parameters / 1e6:.2f} M", size(kind.nbytes))
    console.print(kinds)
    if tensors:
        listing = Table("tensor", "shape", "codec", "size", box=None)
        for tensor in found.tensors:
            listing.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.codec, size(tensor.nbytes))
        console.print(listing)


def _cpu(json: bool) -> None:
    from fewbits import _native, instructions

    here = [name for name, has in _native.features() if has]
    missing = [name for name, has in _native.features() if not has]
    if json:
        emit({"instructions": here, "missing": missing, "kernels": _native.usable(), "used": instructions.current()})
        return
    console.print(f"instructions: {' '.join(here) or '-'}", highlight=False, soft_wrap=True)
    console.print(f"missing:      {' '.join(missing) or '-'}", highlight=False, soft_wrap=True)
    usable = ", ".join(_native.usable())
    console.print(f"kernels:      {instructions.current()} of {usable} ({instructions.VARIABLE} names another)",
                  highlight=False, soft_wrap=True)
