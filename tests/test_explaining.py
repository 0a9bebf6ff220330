"""What `explain` says of numbers and codecs, against computations by hand and the codecs themselves."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from fewbits import codecs, explain
from fewbits.cli import drawing
from fewbits.codecs import table
from fewbits.errors import FewbitsError
from fewbits.explaining import PAGES, READERS, SHOWN, neighbours
from fewbits.recipe import CONTAINERS

DOCS = Path(__file__).resolve().parents[1]


# numbers --------------------------------------------------------------------------------------------------------------
def test_a_number():
    got = explain("0.1")
    assert [s.format for s in got.formats] == ["fp32", "tf32", "bf16", "fp16", "fp8-e5m2", "fp8-e4m3"]
    assert got.value == 0.1 and {x.codec for x in got.levels} == {codecs.get(n).name for n in SHOWN}
    assert "standard deviation 1;" in got.block
    for x in got.levels:
        around = [v for v in (x.below, x.above) if v is not None]
        assert x.stored in around and x.error == x.stored - 0.1
        assert abs(x.error) == min(abs(v - 0.1) for v in around), f"{x.codec}: there is a nearer level"
    errors = {x.codec: x.block_error for x in got.levels}
    assert errors["Q8_0"] < errors["Q6_K"] < errors["Q4_0"] < errors["Q2_K"] < errors["Q1_0"]


def test_a_block_by_hand():
    got = explain("0.5", block=[1.0, -1.0, 0.25])
    assert got.block == "the 4 numbers given, again and again to fill 256 columns"
    by = {x.codec: x for x in got.levels}
    nf4 = by["nf4"]  # the absmax is searched for: the levels around are neighbours in the table, times the same number
    absmax = nf4.stored / table.TABLES["nf4"][nf4.code]
    own = sorted(v * absmax for v in table.TABLES["nf4"])  # absmax may be negative
    assert 0.8 < abs(absmax) < 1.2
    at = next(i for i in range(15) if own[i] <= 0.5 <= own[i + 1])
    assert (nf4.below, nf4.above) == pytest.approx((own[at], own[at + 1]))
    assert by["int8"].stored == pytest.approx(0.5, abs=1e-6), "the scale is searched for: 1, 0.5 and 0.25 all fit"
    assert by["MXFP4"].stored == 0.5 and by["MXFP4"].below == by["MXFP4"].above == 0.5
    assert by["kmeans4"].error == 0, "four numbers need four levels"


def test_neighbours():
    row, words = neighbours(0.3, largest=0.5)
    assert len(row) == 256 and row[17] == 0.3 and row[18] == max(row) == 0.5 and "largest, 0.5," in words
    assert abs(sum(row) - 0.3) < 1e-9 and neighbours(0.3, largest=0.5) == (row, words)
    own, _ = neighbours(2.0, [1.0, 2.0])
    assert own[:3] == [1.0, 2.0, 1.0] and len(own) == 256
    long, _ = neighbours(2.0, [1.0] * 300)
    assert len(long) == 512
    for wrong in ({"block": []}, {"block": [math.nan]}, {"largest": 0.0}, {"largest": -1.0}, {"largest": math.inf}):
        with pytest.raises(FewbitsError):
            neighbours(1.0, **wrong)


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "0x7f80"])
def test_numbers_that_are_not_finite(text):
    got = explain(text)
    assert got.levels == [] and got.block == "" and not math.isfinite(got.value)
    assert json.loads(json.dumps(got.to_json(), allow_nan=False))["value"] in ("inf", "-inf", "nan")


def test_zero_and_bits():
    got = explain("-0.0", block=[1.0, -0.5])
    assert got.formats[0].hex == "0x80000000"
    assert next(x for x in got.levels if x.codec == "nf4").stored == 0
    got = explain("0x3dcc", reading="fp16", block=[1.0])
    assert got.value == 1.44921875 and got.read_as == "0x3dcc read as the bits of fp16"


def test_neither_a_number_nor_a_codec():
    with pytest.raises(FewbitsError, match="'Q9' is neither a number nor a codec"):
        explain("Q9")
    with pytest.raises(FewbitsError, match="0xzz"):
        explain("0xzz")


# codecs ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*SHOWN, "nf4-dq", "fp8-e4m3-b128", "int4-row", "bf16", "IQ2_XXS"])
def test_codecs(name):
    codec, got = codecs.get(name), explain(name)
    assert got.codec == codec.name and json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert dict((s, b) for s, b, _ in got.bits)[4096, 4096] == codec.bits_per_weight((4096, 4096))
    assert all((bits is None) == bool(reason) for _, bits, reason in got.bits)
    assert got.containers and set(got.containers) <= set(CONTAINERS[codec.family]) and len(got.readers) == \
        len(got.containers)
    if got.levels:
        assert got.levels == sorted(got.levels) and max(map(abs, got.levels)) == 1
        assert len(got.levels) <= 1 << codec.integer_bits


@pytest.mark.parametrize(("name", "count"), [("Q4_0", 16), ("int8", 255), ("nf4", 16), ("fp4", 15), ("MXFP4", 15),
                                             ("TQ2_0", 3), ("Q1_0", 2), ("Q6_K", 64), ("kmeans3", 8),
                                             ("fp8-e4m3", 253), ("fp8-e5m2", 247)])
def test_levels_are_all_that_can_be_stored(name, count):
    assert len(explain(name).levels) == count


def test_types_that_are_only_read():
    got = explain("IQ2_XXS")
    assert not got.writes and got.levels == [] and got.layout is None and "never written" in got.notes[0]


def test_pages_and_readers_exist():
    assert PAGES.keys() == CONTAINERS.keys()
    assert {name for names in CONTAINERS.values() for name in names} <= READERS.keys()
    for page in {*PAGES.values(), "k-quants.md"}:
        assert (DOCS / "docs" / "formats" / page).is_file(), page


# pictures -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("adjoining", [True, False])
def test_boxes(width, adjoining):
    fields = [("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)]
    lines = drawing.boxes(fields, width, adjoining)
    assert all(len(line) <= width for line in lines) and len(lines) % 4 == 0
    text = "".join(lines)
    assert all(name in text for name, _ in fields) and text.count("2 bytes") == 3
    if width == 80:
        assert len(lines) == 4 and len(lines[0]) >= 77
        widths = [len(part) for part in lines[1].strip("│").split("│") if part]
        assert widths[0] < widths[-1]


def test_levels_on_a_line():
    marks, axis, labels = drawing.line([-1, 0, 0.001, 1], 41)
    assert marks == "╷" + " " * 19 + "│" + " " * 19 + "╷"
    assert axis[0] == axis[20] == axis[40] == "┴" and labels.split() == ["-1", "-0.5", "0", "0.5", "1"]
    assert labels.index("0.5", 10) == 29 and max(map(len, (marks, axis, labels))) == 41
    dense, _, _ = drawing.line([i / 1000 for i in range(-1000, 1001)], 40)
    assert set(dense) == {"█"}


def test_torch_threads_do_not_matter():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = explain("0.3", block=[1.0, 0.2]).levels
        torch.set_num_threads(max(2, (os.cpu_count() or 2) // 2))
        assert explain("0.3", block=[1.0, 0.2]).levels == one
    finally:
        torch.set_num_threads(before)
