"""`fewbits tune --shapes MODEL --codecs int4-g128,nf4`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.common import emit, progress, quiet_libraries
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.runtime.triton.configs import Key, Tuned


def command(
    shapes: Annotated[str, typer.Option(help="A model, whose products are meant; or OUTxIN, several with commas.")] =
        "4096x4096,28672x4096,4096x14336",
    codecs: Annotated[str, typer.Option(help="As int4-g128,nf4,Q4_K; several with commas.")] = "int4-g128",
    rows: Annotated[str, typer.Option(help="Tokens computed at once; several with commas.")] = "1,16,32,64,128,256",
    device: Annotated[str | None, typer.Option(help="Which GPU; by default the first.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write this file, and not the cache's.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also what was measured before.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Find the fastest configurations of the GPU's kernels; a run that was stopped goes on where it was."""
    from fewbits import codecs as known
    from fewbits import devices
    from fewbits.runtime.triton import configs
    from fewbits.runtime.triton.available import unavailable
    from fewbits.runtime.triton.tuning import tune

    quiet_libraries()
    found = devices.find(device)
    reason = unavailable(found)
    if reason is not None:
        raise FewbitsError(f"nothing to tune: {reason}", "it needs a GPU")
    with progress() as report:
        tuned = tune(_shapes(shapes), [known.get(name) for name in codecs.split(",")], device=found,
                     rows=_numbers(rows), out=out, again=again, progress=report)
    file = out or configs.own_file(tuned.device)
    if json:
        emit({"file": str(file), **configs.to_json(tuned)})
    else:
        print(_said(tuned, file))


def _shapes(text: str) -> list[tuple[int, int]]:
    if re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        return [(int(out), int(columns)) for out, columns in (shape.split("x") for shape in text.split(","))]
    from fewbits import containers, hub
    from fewbits.runtime.triton.tuning import shapes_of

    return shapes_of(containers.open(hub.locate(text)))


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise FewbitsError(f"--rows {text!r}: no number, or several with commas", "for example --rows 1,16,64")
    return [int(number) for number in text.split(",")]


def _said(tuned: Tuned, file: Path) -> str:
    lines = []
    for key, config, microseconds in tuned.entries:
        how = ", ".join(f"{name} {value}" for name, value in vars(config).items())
        lines.append(f"{_about(key)}, {key.kernel}, {key.rows} rows: {microseconds:.1f} us with {how}")
    lines += [f"{_about(key)}: decoded from {key.rows} rows on" for key in tuned.dense]
    return "\n".join([*lines, f"{tuned.device}, triton {tuned.triton}: {file}"])


def _about(key: Key) -> str:
    return f"{key.bits} bits, groups of {key.group}, {key.out}x{key.columns}"
