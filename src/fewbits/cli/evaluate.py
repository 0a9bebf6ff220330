"""`fewbits eval MODEL --against REFERENCE --perplexity TEXT --tasks NAMES`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.common import console, emit, progress, quiet_libraries
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.measure import Divergence


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    perplexity: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    against: Annotated[str | None, typer.Option(help="Reference model, usually the original.")] = None,
    chunks: Annotated[int, typer.Option(min=0, help="Windows of the text to use; 0: all.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    kernel: Annotated[str | None, typer.Option(help="native, decoded (exact) or decode (exact, small).")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, auto; default: the CPU.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Names in lm-evaluation-harness: arc_easy,hellaswag,mmlu")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Folder with the tasks' files; else the hub's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task: the first ones.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the questions.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what was answered before.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Measure a model's perplexity, its divergence from a reference, and its answers to tasks."""
    if perplexity is None and tasks is None:
        raise FewbitsError("nothing to measure", "ask for --perplexity TEXT, --tasks NAMES or both")
    quiet_libraries()
    told: dict[str, Any] = {}
    if perplexity is not None:
        from fewbits.measure import evaluate

        with progress() as report:
            found = evaluate(model, against, text=perplexity, chunks=chunks or None, context=context, kernel=kernel,
                             device=device, progress=report)
        told |= found.to_json()
        if not json:
            console.print("\n".join(described(found)), highlight=False, soft_wrap=True)
    if tasks is not None:
        from fewbits.cli.tasks import table
        from fewbits.measure.tasks import run

        with progress() as report:
            answers = run(model, against, names=[name.strip() for name in tasks.split(",")], folder=task_files,
                          limit=limit, seed=seed, kernel=kernel, device=device, fresh=fresh,
                          progress=report)
        told["tasks"] = [one.to_json() for one in answers]
        if not json:
            console.print(table(answers), highlight=False, soft_wrap=True)
    if json:
        emit(told)


def described(found: Divergence) -> list[str]:
    """The figures, a line each."""
    error, llama = found.perplexity_error, found.perplexity_llama
    lines = [f"perplexity        {found.perplexity:.4f} +- {error:.4f} over all {found.tokens} tokens (as GPTQ papers)",
             f"                  {llama:.4f} +- {found.perplexity_llama_error:.4f} over second halves (as llama.cpp)"]
    if found.reference_perplexity is not None:
        lines += [f"of the reference  {found.reference_perplexity:.4f}, {found.reference_perplexity_llama:.4f}",
                  f"ratio             {found.perplexity_ratio:.5f} +- {found.perplexity_ratio_error:.5f}",
                  f"KL divergence     {found.kl_mean:.5f} +- {found.kl_mean_error:.5f} mean, {found.kl_median:.5f} "
                  f"median, {found.kl_99:.5f} 99 %, {found.kl_999:.5f} 99.9 %",
                  f"same top token    {100 * (found.top1 or 0):.2f} %"]
    chunks, kernel = found.circumstances["chunks"], found.circumstances["kernels"][0]
    return [*lines, f"over              {chunks} chunks of {found.context} tokens, {kernel}, {found.seconds:.1f} s"]
