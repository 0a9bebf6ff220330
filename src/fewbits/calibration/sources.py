"""Text sources: what a model is calibrated on, by name, from a file, from the model itself, or batches ready made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from fewbits.calibration.documents import DATASETS, TEXT, excerpts, lines, named, spread, text_of
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.lazy import torch, transformers

Batch = dict[str, "torch.Tensor"]
Tokens = list[int]

LEAST_READ = 1 << 21  # bytes of a large text that are read, at least: tokenizing takes seconds a megabyte
READ_PER_TOKEN = 16  # bytes of text read for each token wanted
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT files, as chat templates call them


@dataclass(frozen=True)
class Calibration:
    """Batches that a model is run on: keyword arguments of the model. Text is {"input_ids": [1, length]}."""

    batches: list[Batch]
    description: str  # "c4, 64 x 512 tokens, seed 0"
    notes: tuple[str, ...] = ()  # what differs from what was asked

    @property
    def tokens(self) -> int:
        """Tokens in all batches, those of a decoder among them; 0 where there is no text."""
        return sum(t.numel() for b in self.batches for name, t in b.items() if name.endswith("input_ids"))

    def digest(self) -> str:
        """SHA-256 of the names, types, shapes and values of all tensors."""
        found = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                tensor = batch[name].cpu().contiguous()
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def split(self, part: float) -> tuple[Calibration, Calibration]:
        """The first batches, and the last `part` of them, at least one: for measuring on what was not learned from.

        Raises:
            FewbitsError: fewer than two batches.
        """
        held = max(1, round(len(self.batches) * part))
        if held >= len(self.batches):
            raise FewbitsError(f"{self.description}: of {len(self.batches)} sequences {part:g} cannot be held out",
                               "take more --samples or give more text")
        return (Calibration(self.batches[:-held], f"{self.description}, without the last {held}"),
                Calibration(self.batches[-held:], f"{self.description}, the last {held}"))


def calibration(spec: str | Path | Calibration | Sequence[Batch], source: Checkpoint, *, samples: int, length: int,
                seed: int = 0, progress: Progress | None = None) -> Calibration:
    """What `spec` says, for the model `source`: `samples` sequences of `length` tokens.

    `spec` is `c4` or `wikitext2` (through the `datasets` library), `self` (text sampled from the model), a text file,
    a `.jsonl` of objects with `text`, `messages` or `conversations`, a `.safetensors` or `.pt` file of named tensors
    whose first dimension counts samples, a list of dictionaries of tensors, or a `Calibration`, taken as it is.

    Sequences are spread evenly over the text; a `seed` other than 0 draws each from its share of the text.

    Raises:
        FewbitsError: nothing readable there, less text than one sequence, inputs that the model does not have.
    """
    if isinstance(spec, Calibration):
        return spec
    if not isinstance(spec, (str, Path)):
        batches = list(spec)
        _check_inputs(batches, source, "calibration")
        return Calibration(batches, f"{len(batches)} batches of {', '.join(sorted(batches[0]))}")
    path = Path(spec)
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        return _from_tensors(path, source, samples, seed)
    reads = _main_input(source)
    if source.config.get("is_encoder_decoder"):
        reads += " and the decoder's tokens"
    if reads != "input_ids":
        raise FewbitsError(f"{source.path}: {source.architecture} reads {reads}: text alone is not enough",
                           "calibrate on a .safetensors file of its inputs, samples first")
    length, notes = fitting(length, source)
    if spec == "self":
        return _sampled(source, samples, length, seed, notes, progress)
    return _Text(source, str(spec)).calibration(samples, length, seed, notes)


def _sampled(source: Checkpoint, samples: int, length: int, seed: int, notes: tuple[str, ...],
             progress: Progress | None) -> Calibration:
    from fewbits.calibration.sampling import sample

    tokens = sample(source, samples, length, seed, progress)
    return Calibration([{"input_ids": row[None]} for row in tokens],
                       f"self (text sampled from the model), {samples} x {length} tokens, seed {seed}", notes)


# text ---------------------------------------------------------------------------------------------------------------
class _Text:
    """A text source and the tokenizer that reads it."""

    def __init__(self, source: Checkpoint, spec: str):
        from fewbits.runtime.build import tokenizer_of

        self.spec, self.source, self.tokenizer = spec, source, tokenizer_of(source)
        self.before, self.after = frame(self.tokenizer)

    def calibration(self, samples: int, length: int, seed: int, notes: tuple[str, ...]) -> Calibration:
        body = length - len(self.before) - len(self.after)
        if body < 1:
            raise FewbitsError(f"sequences of {length} tokens, {length - body} of them the tokenizer's own",
                               "take a larger --length")
        tokens = self._tokens(max(LEAST_READ, samples * length * READ_PER_TOKEN), samples, seed)
        if self.before and tokens[:len(self.before)] == self.before:  # a chat template puts it too
            tokens = tokens[len(self.before):]
        if len(tokens) < body:
            raise FewbitsError(f"{self.spec}: {len(tokens)} tokens of text, one sequence needs {body}",
                               "give more text, or a smaller --length")
        starts = spread(len(tokens), samples, body, seed)
        if len(starts) < samples:
            notes += (f"{self.spec} has text for {len(starts)} sequences of {length} tokens; {samples} were asked",)
        rows = [self.before + tokens[s:s + body] + self.after for s in starts]
        return Calibration([{"input_ids": torch.tensor([row])} for row in rows],
                           f"{self.spec}, {len(rows)} x {length} tokens, seed {seed}", notes)

    def _tokens(self, budget: int, parts: int, seed: int) -> Tokens:
        """All documents that were read, one after another, as the model's own training joins them."""
        if self.spec in DATASETS:
            return joined(self.tokenizer, named(self.spec, budget))
        path = Path(self.spec)
        if path.suffix == ".json":
            raise FewbitsError(f"{path}: JSON as a whole is not read", "write one object a line to a .jsonl file")
        if path.suffix != ".jsonl":
            return joined(self.tokenizer, excerpts(path, budget, parts, seed))
        objects = list(lines(path, budget, parts, seed))
        if objects and "text" not in objects[0][1]:
            return list(chain.from_iterable(self._chat(path, *o) for o in objects))
        return joined(self.tokenizer, (text_of(path, at, line) for at, line in objects))

    def _chat(self, path: Path, at: int, line: dict[str, Any]) -> Tokens:
        messages = turns(f"{path}: at byte {at}", line)
        if not self.tokenizer.chat_template:
            raise FewbitsError(f"{self.source.path}: no chat template in it, and {path} holds chats",
                               "give texts: {\"text\": …} a line")
        try:
            return list(self.tokenizer.apply_chat_template(messages, return_dict=False))
        except Exception as error:  # a template refuses in its own words, and fails in jinja's
            raise FewbitsError(f"{path}: at byte {at}: the model's chat template refuses it: "
                               f"{str(error).splitlines()[0]}") from None


def joined(tokenizer: transformers.PreTrainedTokenizerBase, documents: Iterable[str]) -> Tokens:
    """Documents one after another with the tokens that end one and begin the next; nothing before the first."""
    texts = [text for text in documents if text]
    if not texts:
        return []
    before, after = frame(tokenizer)
    end = after or [i for i in [tokenizer.eos_token_id] if i is not None]
    between = end if after else end + before
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return list(chain(ids[0], *(between + more for more in ids[1:])))


def turns(where: str, line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a chat, those of ShareGPT files with the names that chat templates know.

    Raises:
        FewbitsError: no chat; `where` is named.
    """
    found = line.get("messages", line.get("conversations"))
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
        raise FewbitsError(f"{where}: no text, messages or conversations in it", TEXT)
    return [t if "role" in t else {"role": ROLES.get(t.get("from", ""), t.get("from")), "content": t.get("value")}
            for t in found]


def frame(tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """The tokens that a tokenizer puts before and after every text: BOS, or BERT's [CLS] and [SEP]."""
    inner, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i:i + len(inner)] == inner), 0)
    return whole[:at], whole[at + len(inner):]


# inputs of any model ------------------------------------------------------------------------------------------------
def _from_tensors(path: Path, source: Checkpoint, samples: int, seed: int) -> Calibration:
    from fewbits.containers.pickles import Pickle
    from fewbits.containers.safetensors import SafeTensors

    if not path.is_file():
        raise FewbitsError(f"{path}: no such file", "give a file of named tensors, samples first")
    file = SafeTensors(path) if path.suffix == ".safetensors" else Pickle(path)
    named = {name: raw.tensor() for name, raw in file.tensors.items()}
    counts = {name: t.shape[0] if t.ndim else 0 for name, t in named.items()}
    count = min(counts.values(), default=0)
    if not count or len(set(counts.values())) > 1:
        raise FewbitsError(f"{path}: first dimensions are {counts}, where every tensor has one sample each",
                           "give at least one sample, all tensors with as many")
    batches = [{n: t[i:i + 1].clone() for n, t in named.items()} for i in spread(count, samples, 1, seed)]
    batches = [{n: t.float() if t.is_floating_point() else t for n, t in b.items()} for b in batches]
    _check_inputs(batches, source, str(path))
    notes = () if len(batches) == samples else (f"{path} has {count} samples; {samples} were asked",)
    return Calibration(batches, f"{path}, {len(batches)} x {', '.join(sorted(named))}, seed {seed}", notes)


def _check_inputs(batches: Sequence[Batch], source: Checkpoint, where: str) -> None:
    """Refuse batches that the model cannot take.

    Raises:
        FewbitsError: none, no tensors, an input that the model does not have, values that are not finite.
    """
    if not batches:
        raise FewbitsError(f"{where}: no batches", "give at least one dictionary of tensors")
    kind = getattr(transformers, source.architecture, None)
    takes = set(signature(kind.forward).parameters) if kind else None
    for i, batch in enumerate(batches):
        if not isinstance(batch, dict) or not batch:
            raise FewbitsError(f"{where}: batch {i} is no dictionary of tensors")
        for name, tensor in batch.items():
            if not isinstance(tensor, torch.Tensor):
                raise FewbitsError(f"{where}: {name} of batch {i} is {type(tensor).__name__}, no tensor")
            if takes is not None and name not in takes:
                raise FewbitsError(f"{where}: {name} is no input of {source.architecture}",
                                   f"it reads {_main_input(source)}")
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise FewbitsError(f"{where}: {name} of batch {i} holds NaN or infinities")


def _main_input(source: Checkpoint) -> str:
    return str(getattr(getattr(transformers, source.architecture, None), "main_input_name", "input_ids"))


def fitting(length: int, source: Checkpoint) -> tuple[int, tuple[str, ...]]:
    """`length`, or what the model can read where that is less, and a note on it."""
    text = source.config.get("text_config", source.config)
    limit = next((int(text[k]) for k in ("max_position_embeddings", "n_positions") if text.get(k)), length)
    if limit >= length:
        return length, ()
    return limit, (f"sequences of {limit} tokens, all that the model reads; {length} were asked",)
