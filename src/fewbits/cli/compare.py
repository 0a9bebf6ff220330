"""`fewbits compare MODEL --to int8,nf4,Q4_K_M -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.common import console, emit, log, nbytes, progress, quiet_libraries
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.measure.compare import Comparison

BRIEF = ("format", "size", "KL mean", "same token", "writing", "memory")
ROOMY = 110  # columns of a terminal that has room for the others
MORE = ("bits", "loss", "reading")


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the report; what was measured is kept there.")],
    to: Annotated[str | None, typer.Option(
        help="Recipes and existing files, with commas between; default: a dozen recipes that suit the model.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory that it must fit into, as 2GB.")] = None,
    text: Annotated[str | None, typer.Option(help="UTF-8 text to measure on; default: wikitext2's test part.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Windows of the text to use.")] = 20,
    context: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    solver: Annotated[str | None, typer.Option(help="As of quantize, for every recipe.")] = None,
    calibration: Annotated[str | None, typer.Option(help="As of quantize, for every recipe.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Which sequences are taken.")] = 0,
    tasks: Annotated[str | None, typer.Option(help="Tasks to measure too, with commas between: arc_easy,piqa")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Directory of the tasks' files, where no hub is.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 200,
    speed: Annotated[bool, typer.Option(help="Whether speed is measured.")] = True,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for speed.")] = 512,
    generate: Annotated[int, typer.Option(min=1, help="Tokens that are generated, for speed.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, for speed.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, for speed.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the quantized files, in DIR/models.")] = True,
    json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
) -> None:
    """Quantize a model in many ways, measure each, and say which to take: report.html."""
    from fewbits.measure.compare import compare

    quiet_libraries()
    with progress() as report:
        found = compare(model, _names(to), out=out, keep=keep, progress=report, text=text, chunks=chunks,
                        context=context, solver=solver, calibration=calibration, samples=samples, seed=seed,
                        tasks=tuple(_names(tasks) or ()), task_files=str(task_files) if task_files else None,
                        limit=limit, speed=speed, prompt=prompt, generate=generate, repeats=repeats, threads=threads,
                        memory_bytes=nbytes(memory, "--memory") if memory else None)
    if json:
        emit(found.to_json())
    else:
        _show(found)
    if not found.measured:
        raise FewbitsError("nothing could be measured", f"{out / 'report.html'} says why")


def _names(given: str | None) -> list[str] | None:
    names = [name.strip() for name in (given or "").split(",")]
    return [name for name in names if name] or None


def _show(found: Comparison) -> None:
    from rich.table import Table

    from fewbits.measure import report
    from fewbits.measure.report import words
    from fewbits.measure.report.columns import columns

    shown = [c for c in columns(found) if c.title in BRIEF or (c.title in MORE and console.width >= ROOMY)]
    table = Table(box=None)
    table.add_column("format", overflow="fold")
    for column in shown[1:]:
        table.add_column(column.title, justify="right" if column.number else "left", no_wrap=True)
    for c in found.candidates:
        if not c.reason:
            table.add_row(*(column.show(c) for column in shown))
    console.print(table)
    for note in words.notes(found):
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if not report.has_matplotlib():
        log.print("note: no PNG files: pip install 'fewbits[report]'", highlight=False, markup=False)
    answer = found.advice[0]
    console.print(f"{answer.question} {words.headline(answer)} {answer.why}", highlight=False, markup=False,
                  soft_wrap=True)
    console.print(f"{found.out / 'report.html'}: table, pictures, and what to take otherwise", highlight=False,
                  markup=False, soft_wrap=True)
