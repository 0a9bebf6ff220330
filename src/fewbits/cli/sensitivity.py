"""`fewbits sensitivity MODEL --to Q2_K,Q4_K`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.common import console, emit, progress, quiet_libraries

if TYPE_CHECKING:
    from fewbits.measure.sensitivity import Loss


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    to: Annotated[str | None, typer.Option("--to", help="Codecs, as Q2_K,Q4_K or int4-g128,nf4.")] = None,
    text: Annotated[str, typer.Option(help="c4, wikitext2, self (the model's own text), or a file.")] = "self",
    samples: Annotated[int, typer.Option(min=1, help="Sequences of text.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Which sequences are taken.")] = 0,
    imatrix: Annotated[Path | None, typer.Option(help="An importance matrix, to weigh the search by.")] = None,
    estimate: Annotated[bool, typer.Option(
        "--estimate", help="Linear layers from one backward pass: all codecs at once, to a third or so.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Measure what each tensor loses in each codec, it alone being quantized."""
    from rich.table import Table

    from fewbits.measure.sensitivity import USUAL, sensitivity

    quiet_libraries()
    with progress() as report:
        found = sensitivity(model, to.split(",") if to else USUAL, text=text, samples=samples, length=length, seed=seed,
                            imatrix=imatrix, estimate=estimate, progress=report)
    if json:
        emit(found.to_json())
        return
    table = Table("KL, nats a token", *found.codecs, box=None)
    for name, row in found.table().items():
        table.add_row(name, *(_said(row.get(codec)) for codec in found.codecs))
    console.print(table, soft_wrap=True)
    console.print(f"~ is an estimate; others over {found.tokens} tokens of {found.text}, {found.seconds:.1f} s",
                  highlight=False, soft_wrap=True)


def _said(loss: Loss | None) -> str:
    if loss is None:
        return "-"
    return f"~{loss.kl:.2g}" if loss.error is None else f"{loss.kl:.2g} +- {loss.error:.1g}"
