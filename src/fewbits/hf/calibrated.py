"""A model that Transformers is about to load, quantized on calibration text first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from fewbits import containers
from fewbits.checkpoint import Checkpoint
from fewbits.hf.config import FewbitsConfig
from fewbits.notes import tell
from fewbits.quantizing import quantize
from fewbits.recipe import ModelFacts
from fewbits.recipe.patterns import parse
from fewbits.runtime.build import tokenizer_of
from fewbits.zeroshot import is_asked, recipe_of, skipped

LENGTH = 2048  # tokens of a text that are taken


def calibrated(source: Checkpoint, asked: FewbitsConfig, out: Path, device: str) -> Checkpoint:
    """What `fewbits.quantize` makes of `source`, at the path `out`."""
    assert asked.recipe is not None
    facts = ModelFacts.of(source)
    recipe = recipe_of(asked.recipe, facts)
    overrides = [f"{o.pattern}={o.codec.name}" for o in parse(asked.overrides)]
    matrices = {n: e.codec for n, e in source.entries.items() if len(e.shape) > 1}
    overrides += [f"{name}={matrices[name].name}" for name in sorted(skipped(asked.skip, matrices))]
    container = None if recipe.container != "gguf" else "fewbits"
    result = quantize(source, out, recipe, solver=asked.solver, calibration=_calibration(source, asked),
                      overrides=overrides, container=container, device=device)
    tell(note for note in result.notes if not is_asked(note))
    return containers.open(result.path)


def _calibration(source: Checkpoint, asked: FewbitsConfig) -> Any:
    """Texts as batches of tokens; anything else as it is."""
    spec = asked.calibration
    if not isinstance(spec, list) or not all(isinstance(text, str) for text in spec):
        return spec
    named = asked.tokenizer
    tokenizer: Any = (tokenizer_of(source) if named is None else
                      transformers.AutoTokenizer.from_pretrained(named) if isinstance(named, str | Path) else named)
    return [{"input_ids": tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)["input_ids"]}
            for text in spec]
