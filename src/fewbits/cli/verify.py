"""`fewbits verify MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import console, emit, progress, size


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    quick: Annotated[bool, typer.Option("--quick", help="Structure and checksums; no value is decoded.")] = False,
    checksums: Annotated[Path | None, typer.Option(help="Write the checksums to this file, as sha256sum does.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with the checksums in this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Check that a model is whole and sound; exit code 1 if it isn't."""
    from fewbits.verifying import verify

    with progress() as report:
        found = verify(model, decode=not quick, checksum_file=checksums, against=against, progress=report)
    if json:
        emit(found.to_json())
    else:
        for finding in found.findings:
            console.print(str(finding), highlight=False, markup=False, soft_wrap=True)
        errors = f"{found.errors or 'no'} error{'' if found.errors == 1 else 's'}"
        warnings = f"{found.warnings or 'no'} warning{'' if found.warnings == 1 else 's'}"
        files = f"{len(found.sha256)} file{'' if len(found.sha256) == 1 else 's'}"
        console.print(f"{found.path}: {errors}, {warnings} in {found.tensors} tensors, {files}, {size(found.nbytes)}, "
                      f"{found.seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)
