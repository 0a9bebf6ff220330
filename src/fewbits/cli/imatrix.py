"""`fewbits imatrix MODEL -o imatrix.gguf --calibration TEXT`, and `fewbits imatrix FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.common import console, emit, log, progress, quiet_libraries
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.imatrix import Imatrix


def command(
    model: Annotated[str, typer.Argument(help="A model in any format or a hub id; or an importance matrix, to look at "
                                              "it or to write it as the other kind.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; the old kind if it ends in .dat.")] =
        None,
    calibration: Annotated[str, typer.Option(help="c4, wikitext2, self (text of the model's own), or a file.")] =
        "self",
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens a calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Same seed, same file.")] = 0,
    head: Annotated[bool, typer.Option("--head", help="Of an untied output head, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Collect an importance matrix for llama-quantize, or show one."""
    from fewbits import imatrix

    if imatrix.is_imatrix(model):
        found = imatrix.read(model)
    elif out is None:
        raise FewbitsError(f"{model}: where should its importance matrix go?", "say it with -o imatrix.gguf")
    else:
        found = _collect(model, out, calibration, samples, length, seed, head)
    if out is not None:
        imatrix.write(out, found)
    show(out or Path(model), found, json)


def _collect(model: str, out: Path, calibration: str, samples: int, length: int, seed: int, head: bool) -> Imatrix:
    from fewbits import containers, hub, imatrix
    from fewbits.calibration import sources
    from fewbits.containers.base import check_output

    quiet_libraries()
    path = hub.locate(model)
    check_output(out.resolve(), path)
    source = containers.open(path)
    with progress() as report:
        text = sources.calibration(calibration, source, samples=samples, length=length, seed=seed, progress=report)
        found = imatrix.collect(source, text, report, head=head)
    for note in text.notes:
        log.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for name in found.unseen:
        counts = found.entries[name].counts
        log.print(f"note: {name}: {int((counts == 0).sum())} of {len(counts)} experts saw no token",
                  highlight=False, markup=False, soft_wrap=True)
    return found


def show(path: Path, found: Imatrix, json: bool) -> None:
    """Say what an importance matrix holds."""
    tensors: list[dict[str, Any]] = [
        {"name": name, "matrices": s.sums.shape[0], "inputs": s.sums.shape[1], "counts": s.counts.tolist()}
        for name, s in found.entries.items()]
    if json:
        emit({"path": str(path), "datasets": found.datasets, "chunks": found.chunks, "chunk_size": found.chunk_size,
              "tensors": tensors})
        return
    text = f", from {', '.join(found.datasets)}" if found.datasets else ""
    console.print(f"{path}: importance matrix of {len(tensors)} tensors, {found.chunks} chunks of {found.chunk_size} "
                  f"tokens{text}", highlight=False, markup=False, soft_wrap=True)
