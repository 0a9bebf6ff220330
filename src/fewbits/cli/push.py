"""`fewbits push MODEL org/name`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import console, emit, log, progress, quiet_libraries, size


def command(
    model: Annotated[Path, typer.Argument(help="A model on this machine, in any format.")],
    repository: Annotated[str, typer.Argument(help="Where it goes on the hub: org/name.")],
    base_model: Annotated[str | None, typer.Option(help="The hub id of the model that it was made from.")] = None,
    license: Annotated[str | None, typer.Option(help="As the hub calls it: apache-2.0, mit, other, …")] = None,
    against: Annotated[str | None, typer.Option(help="Measure the divergence from this model, on --text.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    chunks: Annotated[int, typer.Option(min=0, help="Windows of the text to use; 0: all.")] = 8,
    measured: Annotated[Path | None, typer.Option(help="What fewbits eval --json printed.")] = None,
    report: Annotated[Path | None, typer.Option(help="A directory of fewbits compare: its table and pictures.")] = None,
    card: Annotated[Path | None, typer.Option(help="A README.md of your own, instead.")] = None,
    private: Annotated[bool, typer.Option("--private", help="For a repository that is made now.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, made if it isn't there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write card and checksums here, send nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where a dry run writes; else MODEL.card.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Publish a model on the Hugging Face hub, with a card and checksums."""
    from fewbits.publishing import push

    quiet_libraries()
    with progress() as show:
        found = push(model, repository, base_model=base_model, license=license, against=against, text=text,
                     chunks=chunks or None, measured=measured, report=report, own_card=card, private=private,
                     revision=revision, dry_run=dry_run, out=out, progress=show)
    if json:
        emit(found.to_json())
        return
    for note in found.notes:
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    where = found.url or f"nothing sent; the card is {found.folder}/README.md"
    count = f"{len(found.files)} file{'' if len(found.files) == 1 else 's'}"
    console.print(f"{found.repository}: {count}, {size(found.nbytes)}: {where}", highlight=False, markup=False,
                  soft_wrap=True)
