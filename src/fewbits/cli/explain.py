"""`fewbits explain VALUE|CODEC`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fewbits.cli import drawing
from fewbits.cli.common import console, emit
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.explaining import CodecExplained, ValueExplained
    from fewbits.layouts import Layout

WIDEST = 100  # columns of a picture


def command(
    what: Annotated[str, typer.Argument(help="A number (0.1, -3.75e-3, inf, 0x3dcc) or a codec (Q4_K, nf4).")],
    block: Annotated[str | None, typer.Option(help="Neighbours of the number: 0.1,-0.3,0.25")] = None,
    largest: Annotated[float | None, typer.Option("--max", help="Magnitude of the largest normal neighbour.")] = None,
    reading: Annotated[str | None, typer.Option("--as", help="What hexadecimal bits are: bf16, fp16 …")] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Show the bits of a number and what every format makes of it, or what a format is."""
    from fewbits.explaining import ValueExplained, explain

    found = explain(what, block=_numbers(block) if block is not None else None, largest=largest, reading=reading)
    if json:
        emit(found.to_json())
    elif isinstance(found, ValueExplained):
        _show_value(found)
    else:
        _show_codec(found)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise FewbitsError(f"--block {text!r} is no list of numbers", "for example --block 0.1,-0.3,0.25") from None


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=False)


# a number -------------------------------------------------------------------------------------------------------------
def _show_value(found: ValueExplained) -> None:
    _say(f"{found.value!r}{': ' + found.read_as if found.read_as else ''}")
    table = _table("format", Text.assemble(("s", "red"), " ", ("exponent", "green"), " ", ("mantissa", "blue")), "bits",
                   "stored value", "off by")
    for s in found.formats:
        bits = Text.assemble((s.sign, "red"), " ", (s.exponent, "green"), " ", (s.mantissa, "blue"))
        table.add_row(s.format, bits, s.hex, f"{s.value:.8g}", _relative(s.error))
    console.print(table)
    for s in found.formats:
        if s.note or s.kind == "subnormal":
            _say(f"{s.format}: {s.note or 'subnormal: leading bits are lost'}")
    if not found.levels:
        _say("Number formats for weights hold finite numbers only.")
        return
    _say(f"\nIn a block of {found.block}:\n")
    table = _table("codec", "bits", "code", "stored as", "off by", "levels around it", "all off by")
    for x in found.levels:
        around = " … ".join("" if v is None else f"{v:.4g}" for v in (x.below, x.above))
        off = "0" if not x.error else _relative(abs(x.error / found.value)) if found.value else f"{x.error:.3g}"
        table.add_row(x.codec, f"{x.bits_per_weight:.2f}", str(x.code), f"{x.stored:.5g}", off,
                      "itself" if x.below == x.above else around, _relative(x.block_error))
    console.print(table)
    _say("\nIts neighbours set the scale: in another block (--block, --max) it is stored otherwise. The last column is "
         "the error of the whole block.")


def _relative(error: float | None) -> str:
    if error is None:
        return ""
    if not error or error >= 9.995:
        return f"{error:.3g} x" if error else "0"
    return f"{100 * error:.0f} %" if error >= 0.0995 else f"{100 * error:.2g} %"


# a codec --------------------------------------------------------------------------------------------------------------
def _show_codec(found: CodecExplained) -> None:
    width = min(console.width, WIDEST)
    _say(f"{found.codec}: a number format of the family {found.family!r}")
    for note in found.notes:
        _say(note)
    if found.layout:
        _say(f"value = {found.layout.formula}")
    _say("")
    table = _table("shape", "bits per weight")
    for shape, bits, reason in found.bits:
        table.add_row(" x ".join(map(str, shape)), f"{bits:.4g}" if bits is not None else f"not possible: {reason}")
    console.print(table)
    if found.layout:
        _show_layout(found.layout, width)
    if found.levels:
        _say(f"\nits {len(found.levels)} levels, fitted to normal weights, over the largest of them")
        for line in drawing.line(found.levels, width):
            _say(line)
    _say("\nlayouts that hold it, and programs that read them (not each takes every width)")
    for container, readers in zip(found.containers, found.readers, strict=True):
        _say(f"{container}: {readers}")
    _say(f"\nmore: {found.page}")


def _show_layout(layout: Layout, width: int) -> None:
    parts = "" if layout.adjoining else ", in arrays of their own"
    _say(f"\n{layout.unit}: {drawing.in_bytes(layout.nbytes)}{parts}")
    for line in drawing.boxes([(f.name, f.nbytes) for f in layout.fields], width, layout.adjoining):
        _say(line)
    longest, at = max(len(f.name) for f in layout.fields), 0
    for f in layout.fields:
        place = f"{at:>3}…{at + f.nbytes - 1:<4}" if layout.adjoining else ""
        begin = f"{f.name:<{longest}}  {place}"
        _say(textwrap.fill(f.text, width, initial_indent=begin, subsequent_indent=" " * len(begin)))
        at += f.nbytes


def _table(*headers: str | Text) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
