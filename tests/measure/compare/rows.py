"""Candidates and comparisons made by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fewbits.measure.compare import choosing
from fewbits.measure.compare.candidates import Candidate, Comparison
from fewbits.measure.compare.settings import Settings


def row(name: str, megabytes: float, kl: float | None, top1: float = 0.99, decode: float | None = None,
        **fields: Any) -> Candidate:
    speed = ({"decode_tokens_per_second": decode, "prefill_tokens_per_second": 100.0, "first_token_seconds": 0.5,
              "resident_bytes": int(megabytes * 1e6) + 10**7},) if decode else ()
    quality = None if kl is None else {"kl_mean": kl, "kl_99": 10 * kl, "top1": top1, "tokens": 126,
                                       "perplexity_ratio": 1 + kl, "perplexity_ratio_error": 0.001}
    return Candidate(**{"name": name, "kind": "recipe", "container": "gguf", "nbytes": int(megabytes * 1e6),
                        "bits_per_weight": 4.0, "quality": quality, "speed": speed,
                        "estimated_bytes": int(megabytes * 1e6) + 10**7, **fields})


ORIGINAL = row("model", 1000, None, kind="original", container="transformers", decode=10)


def comparison(*rows: Candidate, original: Candidate = ORIGINAL, memory_bytes: int | None = None) -> Comparison:
    settings = Settings(memory_bytes=memory_bytes)
    told = {"machine": {"processor": "a processor", "cores": 2, "threads": 2, "memory_bytes": 10**9, "gpu": None,
                        "system": "a system"}, "versions": {"fewbits": "0"}, "models": [{"sha256": "0123"}],
            "text": {"name": "text.txt", "sha256": "4567"}}
    measured = [c for c in rows if c.kl is not None]
    return Comparison(original.name, "LlamaForCausalLM", 10**9, (original, *rows),
                      tuple(c.name for c in choosing.frontier(measured)),
                      tuple(choosing.advise(original, measured, memory_bytes)), asdict(settings), ("fewbits compare",),
                      told, "2025-01-01T00:00:00+00:00")
