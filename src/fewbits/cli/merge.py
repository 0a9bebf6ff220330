"""`fewbits merge ADAPTER BASE -o OUT [--to RECIPE]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fewbits.cli.common import console, emit, log, progress, quiet_libraries
from fewbits.cli.common import size as in_words

if TYPE_CHECKING:
    from fewbits.merging import Merged


def command(
    adapter: Annotated[str, typer.Argument(help="A directory of peft's, a llama.cpp LoRA file, or a hub id.")],
    base: Annotated[str, typer.Argument(help="The model to merge into: a path in any format, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory, or file *.gguf, to write.")],
    to: Annotated[str | None, typer.Option("--to", help="Quantize the sum by this recipe: Q4_K_M, int4-g128.")] = None,
    dtype: Annotated[str | None, typer.Option(help="f16, bf16 or f32 for the sum; else the base's own.")] = None,
    trained_on: Annotated[str | None, typer.Option(
        help="The model that the adapter was trained on, to measure from; else what the adapter names.")] = None,
    text: Annotated[str | None, typer.Option(
        help="What divergence is measured on: c4, wikitext2, self, a file, or none; else as --calibration.")] = None,
    solver: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    calibration: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens a calibration sequence.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Which sequences are taken.")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="As for quantize.")] = None,
    transform: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    finish: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="PATTERN=CODEC, may be repeated.")] = None,
    container: Annotated[str | None, typer.Option(help="Another layout than the recipe's own.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Merge a LoRA adapter into its base model, and quantize the sum if asked."""
    from fewbits.merging import merge

    quiet_libraries()
    options: dict[str, Any] = {"solver": solver, "calibration": calibration, "samples": samples, "length": length,
                               "seed": seed, "imatrix": imatrix, "transform": transform, "finish": finish,
                               "overrides": override, "container": container}
    with progress() as report:
        found = merge(adapter, base, out, to=to, dtype=dtype, trained_on=trained_on, text=text, progress=report,
                      **{name: value for name, value in options.items() if value is not None})
    if json:
        emit(found.to_json())
        return
    for note in found.notes:
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    say(found)


def say(found: Merged) -> None:
    """What each step cost, and what was written."""
    if found.distances:
        table = Table(f"divergence from {found.tuned}", "nats a token", "", box=None, pad_edge=False)
        for d in found.distances:
            table.add_row(d.what, f"{d.kl:.3g}", f"+- {d.kl_error:.2g}")
        console.print(table)
        console.print(f"on {found.text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{found.path}: {found.recipe} ({found.container}), {found.changed} tensors changed, rank "
                  f"{found.rank}, {in_words(found.nbytes)}, {found.bits_per_weight:.3f} bits a weight, "
                  f"{found.seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)
