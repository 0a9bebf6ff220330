"""Part of gpu.py: a whole model of 8 billion weights, tokens a second; four bits beside the same decoder in bfloat16.

Known tokens are fed, one after the other, and the logits of each go to the CPU, as they do when it chooses a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_llama
import torch
from gpu import Bench

from fewbits.runtime import decoder
from fewbits.runtime.sequences import Decoder
from fewbits.runtime.triton.engine import Gpu

RECIPE = "int4-g128"
BATCHES = (1, 4, 16, 64)
BEFORE, STEPS, PROMPT = 64, 16, 512  # tokens in a cache before decoding, decoded in a measurement, of the long prompt
LEAST_BANDWIDTH, LEAST_PREFILL = 0.6, 0.9
SIDES = (RECIPE, "bfloat16", "Transformers bfloat16")


def run(bench: Bench) -> None:
    dtype = torch.float32 if bench.rehearsed else torch.bfloat16  # the interpreter's tl.dot is wrong for bfloat16
    sources = [gpu_llama.checkpoint(bench, recipe) for recipe in (RECIPE, "BF16")]
    models: list[Any] = [decoder.compile_for(source, Gpu(bench.device, dtype)) for source in sources]
    models.append(gpu_llama.plain_model(bench, dtype))
    nbytes = [gpu_llama.token_bytes(source) for source in (*sources, sources[1])]
    before, steps, prompt = (4, 2, 6) if bench.rehearsed else (BEFORE, STEPS, PROMPT)
    for batch in BATCHES[:2] if bench.rehearsed else BATCHES:
        seconds = bench.wall([decoding(bench, model, batch, before, steps) for model in models])
        for side, size, taken in zip(SIDES, nbytes, seconds, strict=True):
            figures = {"tokens/s": batch * steps / taken, "of bandwidth": size * steps / taken / bench.bandwidth,
                       "x bfloat16": seconds[1] / taken}
            goal = {"of bandwidth": LEAST_BANDWIDTH} if batch == 1 and side == RECIPE else {}
            bench.row("model", f"decoding, {side}, batch {batch}", figures, goal)
    seconds = bench.wall([prefill(bench, model, prompt) for model in models])
    for side, taken in zip(SIDES, seconds, strict=True):
        figures = {"tokens/s": prompt / taken, "x bfloat16": seconds[1] / taken}
        bench.row("model", f"prompt of {prompt}, {side}", figures,
                  {"x bfloat16": LEAST_PREFILL} if side == RECIPE else {})


def decoding(bench: Bench, model: Any, batch: int, before: int, steps: int) -> Callable[[], object]:
    """A function that computes `steps` tokens of each sequence, behind `before` that are there."""
    tokens = torch.arange(before + steps) % 300
    if not isinstance(model, Decoder):
        return transformers_decoding(bench, model, tokens.repeat(batch, 1), before)
    ids = tokens.tolist()
    sequences = [model.sequence(before + steps) for _ in range(batch)]
    model.step([(s, ids[:before], 0) for s in sequences])

    def work() -> None:
        for token in ids[before:]:
            model.step([(s, [token], 1) for s in sequences])
        for s in sequences:
            s.truncate(before)

    return work


def prefill(bench: Bench, model: Any, count: int) -> Callable[[], object]:
    tokens = torch.arange(count) % 300
    if not isinstance(model, Decoder):
        return lambda: logits(model, tokens[None].to(bench.device)).cpu()
    sequence = model.sequence(count)

    def work() -> None:
        model.step([(sequence, tokens.tolist(), 1)])
        sequence.truncate(0)

    return work


def transformers_decoding(bench: Bench, net: Any, tokens: torch.Tensor, before: int) -> Callable[[], object]:
    import transformers

    ids = tokens.to(bench.device)
    cache = transformers.DynamicCache()
    logits(net, ids[:, :before], cache)

    def work() -> None:
        for at in range(before, ids.shape[1]):
            logits(net, ids[:, at:at + 1], cache).cpu()
        cache.crop(before - ids.shape[1])

    return work


@torch.inference_mode()
def logits(net: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    found: torch.Tensor = net(input_ids=ids, past_key_values=cache, use_cache=cache is not None,
                              logits_to_keep=1).logits
    return found
