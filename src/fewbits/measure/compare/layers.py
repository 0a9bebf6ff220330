"""How far each weight of a quantized model is from the original's: relative squared error by layer and kind."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import Float
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts

# role -> what a row is called
KINDS = {"token_embd": "embedding", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_qkv": "qkv", "attn_output": "o",
         "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "output": "head", "linear": "linear",
         "conv1d": "linear"}
ENDS = ("embedding", "head")  # not of a layer
ROWS = 1 << 21  # weights compared at a time


def errors(model: Checkpoint, original: Checkpoint, progress: Progress | None = None) -> list[dict[str, Any]]:
    """|W - Q|² / |W|² of the matrices of each kind in each layer (the experts of a layer together), in the order of
    KINDS: `{"kind": "q", "layer": 3, "error": 0.0021}`; `layer` is None of embedding and head. Tensors that are floats
    in both are left out.

    Raises:
        FewbitsError: a matrix of the original is missing, or has another shape.
    """
    facts = {f.name: f for f in ModelFacts.of(original).tensors}
    sums: dict[tuple[str, int | None], list[float]] = defaultdict(lambda: [0.0, 0.0])
    done, total = 0, sum(e.nbytes for e in original.entries.values())
    for entry in original.entries.values():
        done += entry.nbytes
        fact = facts.get(entry.name)
        kind = KINDS.get(fact.role) if fact else None
        if fact is None or kind is None or len(entry.shape) < 2:
            continue
        for a, b in _pairs(entry, model):
            error, size = _squares(a, b)
            found = sums[kind, fact.layer if kind not in ENDS else None]
            found[0] += error
            found[1] += size
        if progress:
            progress("comparing weights", done, total)
    order = list(dict.fromkeys(KINDS.values()))
    return [{"kind": kind, "layer": layer, "error": error / size if size else 0.0}
            for (kind, layer), (error, size) in sorted(
                sums.items(), key=lambda item: (order.index(item[0][0]), -1 if item[0][1] is None else item[0][1]))]


def _pairs(entry: Entry, model: Checkpoint) -> list[tuple[Entry, Entry]]:
    """The entry beside what it became, expert by expert where the model has them apart."""
    parts = [entry] if entry.name in model.entries else experts.unstacked([entry]).values()
    out = []
    for part in parts:
        found = model.entries.get(part.name)
        if found is None:
            raise FewbitsError(f"{model.path}: no tensor {part.name}", "compare a model with what was made from it")
        if found.shape != part.shape:
            raise FewbitsError(f"{model.path}: {part.name} is {list(found.shape)}, the original's {list(part.shape)}",
                               "compare a model with what was made from it")
        if not (isinstance(found.codec, Float) and isinstance(part.codec, Float) and found.codec == part.codec):
            out.append((part, found))
    return out


def _squares(a: Entry, b: Entry) -> tuple[float, float]:
    """Sum of the squared differences, and of the squares of the first."""
    one, other = a.load().dequantize().reshape(-1), b.load().dequantize().reshape(-1)
    error = size = 0.0
    for at in range(0, len(one), ROWS):
        w, q = one[at:at + ROWS], other[at:at + ROWS]
        error += float((w - q).square().sum())
        size += float(w.square().sum())
    return error, size
