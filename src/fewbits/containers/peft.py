"""Adapters in peft's layout: adapter_config.json says rank and alpha (by pattern, if it likes), and in
adapter_model.safetensors `base_model.model.<module>.lora_A.weight` `[rank, in]` and `lora_B.weight` `[out, rank]` stand
for W + scale * B @ A; of an embedding `[vocabulary, width]` `lora_embedding_A` `[rank, vocabulary]` and
`lora_embedding_B` `[width, rank]`. A and B of a convolution have its kernel's dimensions behind these.

Beside pairs there may be `lora_magnitude_vector` (DoRA: the norms that rows are brought to), `lora_B.bias` (added to
the layer's), `base_layer.bias` and whole parameters under names of their own (trained in full, in the place of the
model's), and `base_layer.weight`, a copy of what was frozen. https://github.com/huggingface/peft
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.codecs.floats import F32
from fewbits.containers.directory import FLOATS, read_json, write_json
from fewbits.containers.safetensors import Raw, SafeTensors, Writer
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
ADDED, BIAS, COPY = ".lora_B.bias", ".base_layer.bias", ".base_layer.weight"
# settings of what is more than pairs of matrices: known here, and unknown
MORE = ("use_dora", "modules_to_save", "lora_bias")
STRANGE = ("alora_invocation_tokens", "trainable_token_indices", "target_parameters", "layer_replication",
           "megatron_config", "arrow_config", "kasa_config", "monteclora_config", "velora_config", "use_qalora",
           "use_bdlora")
# how A and B may begin without the model's own weights being changed before training
HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Pair:
    """What is added to one weight `[out, in]`: scale * b @ a."""

    a: QTensor  # [rank, in], floats
    b: QTensor  # [out, rank], floats
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> torch.Tensor:
        return self.scale * self.b.dequantize() @ self.a.dequantize()


@dataclass(frozen=True)
class Lora:
    """An adapter of nothing but pairs, by the Transformers name of their weight."""

    path: Path
    pairs: dict[str, Pair]
    base: str = ""  # what it was trained on, as the adapter calls it


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter: another in its place, or something is added. Floats all."""

    pair: Pair | None = None
    magnitude: QTensor | None = None  # DoRA: norms that the sum's rows, or an embedding's columns, are brought to
    columns: bool = False
    plus: QTensor | None = None  # scale * it is added to a bias
    scale: float = 1.0
    instead: QTensor | None = None  # as the model's module holds it

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """What `weight` becomes, float32: `[out, in, *kernel]`, an embedding's `[vocabulary, width]`, or a bias."""
        if self.instead is not None:
            return self.instead.dequantize()
        if self.plus is not None:
            return weight + self.scale * self.plus.dequantize()
        assert self.pair is not None
        found = weight + self.pair.delta().view(weight.shape)
        if self.magnitude is None:
            return found
        flat, norms = found.flatten(1), self.magnitude.dequantize().flatten()
        if self.columns:
            return flat * (norms / flat.norm(dim=0))
        return (flat * (norms / flat.norm(dim=1))[:, None]).view(weight.shape)


@dataclass(frozen=True)
class Adapter:
    """What an adapter of any model changes, by the name of the parameter in the model that was trained."""

    path: Path
    changes: dict[str, Change]
    base: str = ""  # what it was trained on, as the adapter calls it


def read(path: Path) -> Adapter:
    """Read a peft directory with a LoRA adapter of any model; a convolution's pair is flattened to two matrices.

    Raises:
        FewbitsError: no LoRA, a kind of it that adds something else, halves without the other half.
    """
    settings = read_json(path / CONFIG)
    _refuse(path, settings, STRANGE)
    begin = settings.get("init_lora_weights")
    if begin not in HARMLESS:
        raise FewbitsError(f"{path / CONFIG}: init_lora_weights is {begin!r}: the model's own weights were changed "
                           "before training", "save the adapter as a plain LoRA: save_pretrained's "
                           "path_initial_model_for_weight_conversion")
    pairs: dict[str, dict[str, QTensor]] = {}
    magnitudes: dict[str, QTensor] = {}
    changes: dict[str, Change] = {}
    added: dict[str, QTensor] = {}
    embeddings: set[str] = set()
    for name, raw in _raws(path):
        module, end = _parted(name, (*LINEAR, *EMBEDDING, *MAGNITUDE, ADDED, BIAS))
        if end in (*LINEAR, *EMBEDDING):
            pairs.setdefault(module, {}).update(_half(end, _flat(_tensor(raw))))
            embeddings |= {module} if end in EMBEDDING else set()
        elif end in MAGNITUDE:
            magnitudes[module] = _tensor(raw)
        elif end == ADDED:
            added[module] = _tensor(raw)
        elif end == BIAS:
            changes[f"{module}.bias"] = Change(instead=_tensor(raw))
        elif "lora_" in name or ".token_adapter." in name:
            raise raw.refuse("is no half of a LoRA pair", "merge it by the library that trained it")
        else:
            changes[name] = Change(instead=_tensor(raw))
    for module, pair in _paired(path, settings, pairs).items():
        changes[f"{module}.weight"] = Change(pair, magnitudes.pop(module, None), module in embeddings)
        if module in added:
            changes[f"{module}.bias"] = Change(plus=added.pop(module), scale=pair.scale)
    for module in (*magnitudes, *added):
        raise FewbitsError(f"{path / WEIGHTS}: {module} has no LoRA pair")
    if not changes:
        raise FewbitsError(f"{path / WEIGHTS}: changes nothing")
    return Adapter(path, changes, str(settings.get("base_model_name_or_path") or ""))


def read_plain(path: Path) -> Lora:
    """Read a peft directory that holds nothing but pairs of matrices.

    Raises:
        FewbitsError: it holds something else.
    """
    settings = read_json(path / CONFIG)
    _refuse(path, settings, (*MORE, *STRANGE))
    halves: dict[str, dict[str, QTensor]] = {}
    for name, raw in _raws(path):
        module, end = _parted(name, (*LINEAR, *EMBEDDING))
        if not end:
            raise raw.refuse("is no half of a LoRA pair", "merge the adapter into its base model instead")
        halves.setdefault(module, {}).update(_half(end, _tensor(raw, 2)))
    pairs = {f"{m}.weight": pair for m, pair in _paired(path, settings, halves).items()}
    return Lora(path, pairs, str(settings.get("base_model_name_or_path") or ""))


def write(lora: Lora, path: Path, embeddings: Collection[str], turned: bool) -> None:
    """Write a peft directory; `embeddings` are the weights that are one, `turned` whether the model's layers hold
    theirs as `[in, out]`."""
    path.mkdir()
    ranks = Counter(pair.rank for pair in lora.pairs.values())
    rank = ranks.most_common(1)[0][0]
    alphas = {name: pair.scale * pair.rank for name, pair in lora.pairs.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors: dict[str, QTensor] = {}
    for name, pair in lora.pairs.items():
        module, ends = PREFIX + name.removesuffix(".weight"), EMBEDDING if name in embeddings else LINEAR
        both = (transposed(pair.b), transposed(pair.a)) if name in embeddings else (pair.a, pair.b)
        tensors |= {module + end: half for end, half in zip(ends, both, strict=True)}
    with Writer(path / WEIGHTS, {k: (t.codec.name, t.shape) for k, t in tensors.items()}, {"format": "pt"}) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor.planes["data"])
    modules = {name.removesuffix(".weight"): pair for name, pair in lora.pairs.items()}
    write_json(path / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": lora.base or None, "bias": "none",
        "r": rank, "lora_alpha": _plain(alpha), "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "fan_in_fan_out": turned, "inference_mode": True, "target_modules": sorted(modules), "modules_to_save": None,
        "rank_pattern": {re.escape(m): p.rank for m, p in modules.items() if p.rank != rank},
        "alpha_pattern": {re.escape(m): _plain(alphas[f"{m}.weight"]) for m in modules
                          if alphas[f"{m}.weight"] != alpha}})


def transposed(tensor: QTensor) -> QTensor:
    """A matrix of floats, turned."""
    (data,) = tensor.planes.values()
    return QTensor(tensor.codec, tensor.shape[::-1], {"data": data.view(tensor.shape).T.contiguous()})


def float_tensor(values: torch.Tensor) -> QTensor:
    return QTensor(F32, tuple(values.shape), {"data": values})


# reading ------------------------------------------------------------------------------------------------------------
def _refuse(path: Path, settings: dict[str, Any], keys: tuple[str, ...]) -> None:
    wrong = "peft_type" if settings.get("peft_type") != "LORA" else next((k for k in keys if settings.get(k)), None)
    if wrong is None and "use_dora" in keys and settings.get("bias", "none") != "none":
        wrong = "bias"
    if wrong is not None:
        raise FewbitsError(f"{path / CONFIG}: {wrong} is {settings.get(wrong)!r}; a plain LoRA is expected",
                           "merge it into its base model instead: " + (
                               "fewbits merge" if wrong in (*MORE, "bias") else "by the library that trained it"))
    if not (path / WEIGHTS).is_file():
        raise FewbitsError(f"{path}: has no {WEIGHTS}", "save the adapter with safe_serialization=True")


def _raws(path: Path) -> Iterator[tuple[str, Raw]]:
    """The tensors that were trained, by their names in the model."""
    for name, raw in SafeTensors(path / WEIGHTS).tensors.items():
        if not name.startswith(PREFIX):
            raise raw.refuse("is no half of a LoRA pair", "merge the adapter into its base model instead")
        if not name.endswith(COPY):
            yield name[len(PREFIX):], raw


def _parted(name: str, ends: tuple[str, ...]) -> tuple[str, str]:
    end = next((e for e in ends if name.endswith(e)), "")
    return name.removesuffix(end), end


def _tensor(raw: Raw, dimensions: int | None = None) -> QTensor:
    if raw.dtype not in FLOATS or not raw.shape or 0 in raw.shape or dimensions not in (None, len(raw.shape)):
        what = "a matrix of floats is" if dimensions == 2 else "floats are"
        raise raw.refuse(f"{raw.dtype} {list(raw.shape)}; {what} expected")
    codec = FLOATS[raw.dtype]
    return QTensor(codec, raw.shape, {"data": raw.tensor().reshape(codec.matrix(raw.shape))})


def _flat(tensor: QTensor) -> QTensor:
    """As a matrix: a convolution's A is `[rank, in, *kernel]`, its B `[out, rank, 1, …]`."""
    shape = (tensor.shape[0], math.prod(tensor.shape[1:]))
    return QTensor(tensor.codec, shape, {"data": tensor.planes["data"].reshape(shape)})


def _half(end: str, tensor: QTensor) -> dict[str, QTensor]:
    """Of an embedding, what is added is turned: the transposed B stands for a, the transposed A for b."""
    half = "ab"[(*LINEAR, *EMBEDDING[::-1]).index(end) % 2]
    return {half: transposed(tensor) if end in EMBEDDING else tensor}


def _paired(path: Path, settings: dict[str, Any], halves: dict[str, dict[str, QTensor]]) -> dict[str, Pair]:
    pairs = {}
    for module, both in halves.items():
        if both.keys() != {"a", "b"}:
            raise FewbitsError(f"{path / WEIGHTS}: {module} has one half of its LoRA pair")
        pairs[module] = Pair(both["a"], both["b"], _scale(path, settings, module, both["a"].shape[0]))
    return pairs


def _scale(path: Path, settings: dict[str, Any], module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    try:
        alpha = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", module)), settings["lora_alpha"])
        scale = float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise FewbitsError(f"{path / CONFIG}: no lora_alpha for {module} ({error})") from None
    if not math.isfinite(scale):
        raise FewbitsError(f"{path / CONFIG}: the scale of {module} is {scale}")
    return scale


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
