"""`fewbits plan MODEL --memory 6GB`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from fewbits.cli.common import console, emit, log, nbytes, size


def command(
    model: Annotated[str, typer.Argument(help="A path (config.json is enough), or a hub id.")],
    memory: Annotated[str | None, typer.Option(help="Memory to fit into, as 6GB; default: what is free.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of context.")] = 4096,
    recipe: Annotated[list[str] | None, typer.Option(help="Only these recipes; may be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Say what a model would take in every recipe, and which to take."""
    from fewbits.planning import plan

    found = plan(model, nbytes(memory, "--memory") if memory else None, context, recipe)
    if json:
        emit(found.to_json())
        return
    memory_is = "free here" if found.memory_is_this_machines else "given"
    console.print(f"{found.model}: {found.architecture}, {found.parameters / 1e6:.1f} M parameters\n"
                  f"context {found.context}: KV cache {size(found.kv_bytes)}, working memory "
                  f"{size(found.working_bytes)}; {size(found.memory_bytes)} {memory_is}",
                  highlight=False, soft_wrap=True)
    table = Table("recipe", "container", "file", "bits/weight", "in memory", "fits", box=None)
    for row in found.rows:
        if not row.reason:
            table.add_row(row.recipe, row.container, size(row.file_bytes), f"{row.bits_per_weight:.2f}",
                          size(row.total_bytes), "yes" if row.fits else "no")
    console.print(table)
    for row in found.rows:
        for note in row.notes:
            log.print(f"note: {row.recipe}: {note}", highlight=False, markup=False, soft_wrap=True)
        if row.reason:
            log.print(f"note: {row.recipe}: not possible: {row.reason}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"take {found.take}: {found.why}" if found.take else found.why, highlight=False, soft_wrap=True)
