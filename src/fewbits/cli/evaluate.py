"""`fewbits eval MODEL --against REFERENCE --perplexity TEXT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import console, emit, progress, quiet_libraries


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    perplexity: Annotated[Path, typer.Option(help="UTF-8 text to measure on.")],
    against: Annotated[str | None, typer.Option(help="Reference model, usually the original.")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Windows of the text to use.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    kernel: Annotated[str | None, typer.Option(help="native, decoded (exact) or decode (exact, small).")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Measure a model's perplexity, and its divergence from a reference."""
    from fewbits.measure import evaluate

    quiet_libraries()
    with progress() as report:
        found = evaluate(model, against, text=perplexity, chunks=chunks, context=context, kernel=kernel,
                         progress=report)
    if json:
        emit(found.to_json())
        return
    lines = [f"perplexity        {found.perplexity:.4f} +- {found.perplexity_error:.4f}"]
    if found.reference_perplexity is not None:
        lines += [f"of the reference  {found.reference_perplexity:.4f}",
                  f"KL divergence     {found.kl_mean:.5f} mean, {found.kl_median:.5f} median, "
                  f"{found.kl_99:.5f} 99th percentile",
                  f"same top token    {100 * (found.top1 or 0):.2f} %"]
    lines.append(f"over              {found.tokens} tokens, context {found.context}, {found.seconds:.1f} s")
    console.print("\n".join(lines), highlight=False)
