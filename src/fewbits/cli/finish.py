"""`fewbits finish QUANTIZED --original MODEL -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import console, emit, log, progress, quiet_libraries


def command(
    model: Annotated[str, typer.Argument(help="A quantized model in any format that fewbits writes, or a hub id.")],
    original: Annotated[str, typer.Option(help="The model that it was made from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File or directory to write.")],
    level: Annotated[str, typer.Option(help="quick (100 steps) or thorough (400).")] = "quick",
    calibration: Annotated[str, typer.Option(help="c4, wikitext2, self (text of the model's own), or a file.")] =
        "self",
    samples: Annotated[int | None, typer.Option(min=2, help="Calibration sequences; as many as steps, to 200.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens a calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Which sequences are taken.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Bring a quantized file nearer to its original: scales and norms tuned, codes and size as they are."""
    from fewbits.finishing.files import finish

    quiet_libraries()
    with progress() as report:
        found = finish(model, out, original, level=level, calibration=calibration, samples=samples, length=length,
                       seed=seed, progress=report)
    if json:
        emit(found.to_json())
        return
    for note in found.notes:
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{out}: {found.container}, tuned on {found.calibration}, {found.seconds:.1f} s", highlight=False,
                  markup=False, soft_wrap=True)
