"""`fewbits bench MODEL…`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from fewbits.cli.common import emit, progress, quiet_libraries, size
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.measure.speed import Speed
    from fewbits.measure.speed.rows import Work


def command(
    models: Annotated[list[str], typer.Argument(help="Paths in any format, or hub ids. Ratios are to the first.")],
    prompt: Annotated[str, typer.Option(help="Tokens of the prompt; several with commas.")] = "512",
    generate: Annotated[str, typer.Option(help="Tokens after it; several with commas, 0 for none.")] = "64",
    batch: Annotated[str, typer.Option(help="Texts computed at once; several with commas.")] = "1",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Also with everything computed again for each token.")] =
        False,
    kernel: Annotated[list[str] | None, typer.Option(
        help="In place of the native decoder: modules (Transformers' with the kernels that suit), native, floats, "
             "decoded or decode; `decoder` is that decoder; may be repeated.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Also a step of training, forward and backward.")] = False,
    peer: Annotated[list[str] | None, typer.Option(
        help="Another engine for the same files: llama.cpp, transformers, bitsandbytes or gptqmodel; "
             "NAME=PYTHON if it is installed for another Python; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the decoder computes: cuda, cuda:1, auto; default: the "
                                                    "CPU.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="By default as many as there are processors.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, after a warm-up.")] = 5,
    seconds: Annotated[float, typer.Option(help="No further repetition is begun after so many, but two are.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Which random tokens.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Measure speed and memory of models side by side; exit code 1 if nothing could be measured."""
    from fewbits.measure.speed import bench

    quiet_libraries()
    peers = {name: python or None for name, _, python in (p.partition("=") for p in peer or ())}
    with progress() as report:
        found = bench(models, prompts=_numbers(prompt, "--prompt"), generate=_numbers(generate, "--generate"),
                      batches=_numbers(batch, "--batch"), cache=(True, False) if no_cache else (True,),
                      kernels=kernel or ["decoder"], train=train, peers=peers,
                      device=device, threads=threads, repeats=repeats, seconds=seconds, seed=seed, progress=report)
    if json:
        emit({"rows": [row.to_json() for row in found]})
    else:
        for work in dict.fromkeys(row.work for row in found):
            _table([row for row in found if row.work == work])
        about = found[0].circumstances
        print(f"{about['machine']['processor']}, {about['machine']['cores']} processors, threads: {about['threads']}. "
              "Medians; x: how many times the first row's; memory: resident, at most, loading included.")
    if all(row.reason is not None for row in found):
        raise typer.Exit(1)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise FewbitsError(f"{option} {text!r}: no number, or several with commas", f"for example {option} 32,512") \
            from None


def _table(rows: list[Speed]) -> None:
    work, measured = rows[0].work, [row for row in rows if row.reason is None]
    lines = [["model", "engine", *_heads(work)], *([row.candidate, _engine(row), *_cells(row, rows[0])]
                                                   for row in measured)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    times = ", ".join(sorted({str(row.repeats) for row in measured})) or "no"
    print(f"{work} ({times} repetitions)")
    for line in lines if measured else ():
        print("  ".join([*(c.ljust(w) for c, w in zip(line[:2], widths, strict=False)),
                         *(c.rjust(w) for c, w in zip(line[2:], widths[2:], strict=True))]))
    for row in rows:
        if row.reason is not None:
            print(f"{row.candidate}, {_engine(row)}: not measured: {row.reason}")
    print()


def _engine(row: Speed) -> str:
    how = [row.kernel if row.kernel != "decoder" else "", row.circumstances.get("device", "")]
    return ", ".join(filter(None, [row.engine, *how]))


def _heads(work: Work) -> list[str]:
    if work.train:
        return ["forward s", "backward s", "x", "memory"]
    after = ["tokens/s", "x", "ms a token", "95th"] if work.generate else []
    return ["load s", "first token s", "prompt tokens/s", "x", *after, "memory"]


def _cells(row: Speed, first: Speed) -> list[str]:
    """A figure with half of what its repetitions differ by; how many times the first row's it is."""
    memory = "-" if row.resident_bytes is None else size(row.resident_bytes)
    if row.train:
        return [_figure(row, "forward_seconds"), _figure(row, "backward_seconds"), _times(row, first, _steps), memory]
    cells = [f"{row.load_seconds:.2f}", _figure(row, "first_token_seconds"), _figure(row, "prefill_tokens_per_second"),
             _times(row, first, lambda r: r.prefill_tokens_per_second)]
    if row.generate:
        cells += [_figure(row, "decode_tokens_per_second"), _times(row, first, lambda r: r.decode_tokens_per_second),
                  f"{1e3 * (row.token_seconds_median or 0):.1f}", f"{1e3 * (row.token_seconds_95 or 0):.1f}"]
    return [*cells, memory]


def _steps(row: Speed) -> float:
    """Training steps a second."""
    return 1 / ((row.forward_seconds or 0) + (row.backward_seconds or 0))


def _figure(row: Speed, name: str) -> str:
    least, most = row.spread[name]
    digits = max(0, 2 - int(math.floor(math.log10(getattr(row, name)))))
    return f"{getattr(row, name):.{digits}f} ± {(most - least) / 2:.{digits}f}"


def _times(row: Speed, first: Speed, rate: Callable[[Speed], float | None]) -> str:
    return "-" if first.reason else f"{(rate(row) or 0) / (rate(first) or 1):.2f}"
