"""`fewbits quantize MODEL -o OUT --to RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.common import AllowPickle, Device, console, emit, log, nbytes, progress, quiet_libraries, source
from fewbits.cli.common import size as in_words
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.recipe.allocation import Target


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File or directory to write.")],
    to: Annotated[str | None, typer.Option(
        "--to", help="Recipe: Q4_K_M, Q8_0, nf4, int8, int4-g128, …; or a target as 4.25bpw: each tensor then gets the "
                     "codec that serves the whole best.")] = None,
    size: Annotated[str | None, typer.Option(help="Instead of --to: the bytes of the file, as 2.5GB.")] = None,
    solver: Annotated[str | None, typer.Option(
        help="nearest, search, gptq or gptq-act-order. With calibration gptq, else search.")] = None,
    calibration: Annotated[str | None, typer.Option(
        help="c4, wikitext2, self (the model's own text), none, or a file of text, chats or inputs. "
             "self for int2 to int4 directories, where no solver is named, else none.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Which sequences are taken.")] = 0,
    imatrix: Annotated[Path | None, typer.Option(help="An importance matrix, to weigh a search by.")] = None,
    transform: Annotated[str | None, typer.Option(
        help="awq or smoothquant: scale channels before anything is rounded.")] = None,
    finish: Annotated[str, typer.Option(
        help="Tune scales and norms towards the original's logits: off, quick (100 steps) or thorough (400).")] = "off",
    override: Annotated[list[str] | None, typer.Option(help="PATTERN=CODEC, may be repeated.")] = None,
    container: Annotated[str | None, typer.Option(help="Another layout than the recipe's own.")] = None,
    keep_nonfinite: Annotated[bool, typer.Option(help="Leave tensors with NaN or infinities unquantized.")] = False,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Quantize a model into a recipe."""
    from fewbits.jobs.distributed import speaks
    from fewbits.quantizing import quantize

    quiet_libraries()
    with progress() as report:
        result = quantize(source(model, allow_pickle), out, _target(to, size), solver=solver, calibration=calibration,
                          samples=samples, length=length, seed=seed, imatrix=imatrix, transform=transform,
                          finish=finish, overrides=override, container=container, keep_nonfinite=keep_nonfinite,
                          device=device, progress=report)
    if not speaks():
        return
    if json:
        emit(result.to_json())
        return
    for note in result.notes:
        log.print(f"note: {note}", highlight=False, markup=False)
    error = f", mean error of {result.error[1]} {result.error[0]:.3g}" if result.error else ""
    console.print(f"{out}: {result.recipe} ({result.container}), {in_words(result.nbytes)}, "
                  f"{result.bits_per_weight:.3f} bits a weight{error}, {result.seconds:.1f} s",
                  highlight=False, soft_wrap=True)


def _target(to: str | None, size: str | None) -> str | Target:
    """What is asked for: a recipe's name, or a target.

    Raises:
        FewbitsError: neither or both were given, or no size.
    """
    from fewbits.recipe.allocation import Target

    if to is not None and size is None:
        return to
    if size is None:
        raise FewbitsError("quantize into what?", "say it with --to Q4_K_M, --to 4.25bpw or --size 2.5GB")
    if to is not None:
        raise FewbitsError(f"--to {to} and --size {size}: one of them", "a recipe has the size that it has")
    return Target(nbytes=nbytes(size, "--size"))
