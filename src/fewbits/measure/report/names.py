"""What the names of formats say, for those who never met them."""

from __future__ import annotations

import re
from pathlib import Path

from fewbits.explaining import READERS
from fewbits.measure.compare.candidates import Candidate

# pattern of a recipe's name -> what it is
MEANINGS = (
    (r"Q8_0", "8 bits in blocks of 32 weights, each block with a scale of its own"),
    (r"Q(\d)_[01]", "{0} bits in blocks of 32 weights, each block with a scale of its own; simple and quick"),
    (r"Q(\d)_K_([SML])", "a mix of llama.cpp's: mostly {0} bits, more for tensors that need them ({1}: {size} mix)"),
    (r"Q(\d)_K", "a mix of llama.cpp's: mostly {0} bits in super-blocks of 256 weights"),
    (r"IQ4_(NL|XS)", "4 bits whose 16 levels lie closer together near zero, where most weights are"),
    (r"TQ[12]_0", "three levels, -1, 0 and 1: for models that were trained so"),
    (r"Q1_0", "two levels: for models that were trained so"),
    (r"MXFP4.*", "4-bit floating point numbers in blocks of 32, as gpt-oss was trained in"),
    (r"nf4-dq.*", "bitsandbytes' 4 bits: 16 levels made for normally distributed weights, scales in 8 bits; of QLoRA"),
    (r"nf4.*", "bitsandbytes' 4 bits: 16 levels made for normally distributed weights; of QLoRA"),
    (r"fp4.*", "bitsandbytes' 4 bits: a tiny floating point number"),
    (r"int8", "8 bits, one scale a row: LLM.int8() of bitsandbytes"),
    (r"int(\d)-row.*", "whole numbers of {0} bits, a scale for each row"),
    (r"int(\d)-g(\d+)-asym", "whole numbers of {0} bits, a scale and a zero point for each {1} weights"),
    (r"int(\d)-g(\d+)", "whole numbers of {0} bits, a scale for each {1} weights (GPTQ-{0}bit-{1}g)"),
    (r"fp8.*", "8-bit floating point numbers, for graphics processors that multiply them"),
    (r"kmeans(\d)", "{0} bits: a table of levels for every row, fitted to it"),
    (r"b?f(16|32)", "no quantizing: {0}-bit floating point numbers"),
    (r"[\d.]+bpw", "a format chosen for each tensor, so that the average is as many bits as it says"),
)
SIZES = {"S": "small", "M": "medium", "L": "large"}


def meaning(c: Candidate) -> str:
    """What the candidate is, and what opens it."""
    if c.kind == "original":
        what = "the model as it was given"
    elif c.kind == "file":
        what = f"{Path(c.path).name}, as it was given"
    else:
        what = _recipe(c.name)
    if c.nbytes:
        what += f"; of this model {c.bits_per_weight:.2f} bits a weight in all"
    if c.calibration:
        what += f"; calibrated on {c.calibration}"
    return f"{what}; opens in {READERS[c.container]}" if c.container in READERS else what


def _recipe(name: str) -> str:
    for pattern, words in MEANINGS:
        if found := re.fullmatch(pattern, name, re.IGNORECASE):
            groups = found.groups(default="")
            return words.format(*groups, size=SIZES.get(groups[-1].upper(), "") if groups else "")
    return "a recipe of its own"
