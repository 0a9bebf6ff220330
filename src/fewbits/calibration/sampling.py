"""Text that a model writes by itself: calibration without a data set.

After Williams, Chrysostomou, Aletras: Self-calibration for language model quantization and pruning (2024).
Every text begins with a token drawn from the whole vocabulary, so that texts differ, and is sampled at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers

from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError

ROOM = 2 << 30  # bytes for keys and values; a fixed number, so that the same rows are always computed together


def sample(source: Checkpoint, samples: int, length: int, seed: int, progress: Progress | None = None) -> torch.Tensor:
    """`[samples, length]` tokens of text that the model generates; a text that ends is followed by another.

    A text begins with BOS where the model's tokenizer puts it, then any ordinary token. The same seed gives the same
    text on the same machine; on another one, rounding may turn a draw.

    Raises:
        FewbitsError: the model writes no text, or its logits are not finite.
    """
    from fewbits.loading import load, tokenizer
    from fewbits.planning import KV_BYTES, kv_bytes
    from fewbits.recipe import ModelFacts
    from fewbits.runtime.build import bos_of

    net = load(source)
    if not net.can_generate() or net.main_input_name != "input_ids":
        raise FewbitsError(f"{source.path}: {source.architecture} writes no text", "give text to calibrate on")
    words = tokenizer(net)
    bos, firsts, ends = bos_of(words), _firsts(words), _ends(net, words)
    draws = torch.rand(samples, length, generator=torch.Generator().manual_seed(seed))
    row_bytes = kv_bytes(ModelFacts.of(source), length) * 4 // KV_BYTES  # in float32
    together = max(1, ROOM // max(1, row_bytes))
    tokens = torch.empty(samples, length, dtype=torch.long)
    done = 0
    for rows, part in zip(tokens.split(together), draws.split(together), strict=True):
        for _ in _write(net, rows, part, bos, firsts, ends):
            done += len(rows)
            if progress:
                progress("sampling text", done, samples * length)
    return tokens


@torch.inference_mode()
def _write(net: transformers.PreTrainedModel, rows: torch.Tensor, draws: torch.Tensor, bos: int | None,
           firsts: torch.Tensor, ends: torch.Tensor) -> Iterator[None]:
    """Fill `rows` `[rows, length]` from left to right with what `draws`, uniform in [0, 1), decide."""
    length = rows.shape[1]
    cache = transformers.StaticCache(config=net.config, max_cache_len=length)  # one that grows is copied at every token
    anew = firsts[(draws * len(firsts)).long()]  # [rows, length], where a text has no token yet but BOS
    begin = anew if bos is None else torch.full_like(anew, bos)
    rows[:, 0] = begin[:, 0]
    yield
    for at in range(1, length):
        before = rows[:, at - 1]
        logits = net(input_ids=before[:, None], past_key_values=cache, use_cache=True).logits[:, -1].float()
        if not bool(logits.isfinite().all()):
            raise FewbitsError(f"logits of {type(net).__name__} are not finite at token {at}",
                               "the model is broken: fewbits info names its tensors")
        mass = logits.softmax(-1).cumsum(-1)
        chosen = torch.searchsorted(mass, draws[:, at, None] * mass[:, -1:], right=True)[:, 0]
        chosen = torch.where(torch.isin(before, ends), begin[:, at], chosen.clamp(max=mass.shape[1] - 1))
        rows[:, at] = chosen if bos is None else torch.where(before == bos, anew[:, at], chosen)
        yield


def _firsts(words: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokens that a text may begin with: all but the special ones."""
    special = set(words.all_special_ids) | {i for i, token in words.added_tokens_decoder.items() if token.special}
    return torch.tensor(sorted(set(words.get_vocab().values()) - special))


def _ends(net: transformers.PreTrainedModel, words: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """Tokens that end a text."""
    named = net.generation_config.eos_token_id
    found = set(named if isinstance(named, list) else [named]) | {words.eos_token_id}
    return torch.tensor(sorted(found - {None}), dtype=torch.long)
