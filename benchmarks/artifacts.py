"""Quantized files of ours and of the peers, and how far each is from its original: made once, measured once, kept.

A *method* says who quantizes and how. Names of the peers' methods begin with theirs; all others are fewbits'.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from baselines import GPTQMODEL, Peers, gptqmodel, llama_cpp
from cache import Cache, Row

import fewbits
from fewbits import containers, recipe
from fewbits.containers.base import remove
from fewbits.measure.windows import cut, read_text
from fewbits.runtime.build import bos_of, tokenizer_of

CONTEXT = 512  # tokens of a window, in calibrating and in measuring

# method -> arguments of fewbits.quantize; "c4" stands for the text file
OURS: dict[str, Row] = {
    "nearest": {"solver": "nearest", "calibration": "none", "finish": "off"},
    "search": {"solver": "search", "calibration": "none", "finish": "off"},
    "weighted": {"solver": "search", "calibration": "c4", "finish": "off"},
    "gptq": {"solver": "gptq", "calibration": "c4", "finish": "off"},
    "act-order": {"solver": "gptq-act-order", "calibration": "c4", "finish": "off"},
    "awq": {"transform": "awq", "solver": "search", "calibration": "c4", "finish": "off"},
    "awq+gptq": {"transform": "awq", "solver": "gptq", "calibration": "c4", "finish": "off"},
    "gptq-self": {"solver": "gptq", "calibration": "self", "finish": "off"},
}
# method -> the method whose file is finished, the level, the text
FINISHED = {"quick": ("gptq", "quick", "c4"), "thorough": ("gptq", "thorough", "c4"),
            "quick-self": ("gptq-self", "quick", "self"), "llama.cpp+quick": ("llama.cpp", "quick", "c4")}
PEERS = ("llama.cpp", "llama.cpp-plain", *(f"gptqmodel-{s}" for s in GPTQMODEL))


def is_peer(method: str) -> bool:
    return method.startswith(("llama.cpp", "gptqmodel"))


@dataclass
class Bench:
    """One model folder, one text folder, one folder of work."""

    models: Path
    texts: Path
    work: Path
    peers: Peers
    samples: int
    chunks: int
    progress: Any = None

    @classmethod
    def of(cls, args: argparse.Namespace, progress: Any) -> Bench:
        return cls(args.models, args.shared / "data" / "text", args.work, Peers(args.peers, args.work), args.samples,
                   args.chunks, progress)

    def __post_init__(self) -> None:
        (self.work / "files").mkdir(parents=True, exist_ok=True)
        self.cache = Cache(self.work / "accuracy.jsonl")
        self.texts_read: dict[tuple[str, str], torch.Tensor] = {}

    def text(self, name: str) -> Path:
        return self.texts / f"{name}.txt"

    # files ----------------------------------------------------------------------------------------------------------
    def file(self, model: str, to: str, method: str) -> tuple[Path, Row]:
        """The quantized file, and of it: bytes of its weights, seconds it took."""
        out = self.work / "files" / f"{model}-{to.replace(':', '-')}-{method}-{self.samples}.any"

        def make() -> Row:
            print(f"  {model} {to} {method}: quantizing", flush=True)
            remove(out)
            row = self._make(model, to, method, out)
            return {"bytes": weight_bytes(out)} | row

        key = {"file": [model, to, method, self.samples]}
        if not out.exists():
            self.cache.forget(lambda k: k == key)
        return out, self.cache.get(key, make)

    def _make(self, model: str, to: str, method: str, out: Path) -> Row:
        source, text = self.models / model, self.text("c4")
        if method in FINISHED:
            before, level, spec = FINISHED[method]
            path, facts = self.file(model, to, before)
            after = fewbits.finish(path, out, source, level=level, calibration=text if spec == "c4" else spec,
                                   length=CONTEXT, progress=self.progress)
            return facts | {"seconds": facts["seconds"] + after.seconds, "notes": after.notes}
        if method.startswith("llama.cpp"):
            return llama_cpp(self.peers, source, text, to, 0 if method.endswith("plain") else self.samples, out)
        if method.startswith("gptqmodel-"):
            return gptqmodel(self.peers, source, text, to, self.samples, method.removeprefix("gptqmodel-"), out)
        options = OURS[method] | {"samples": self.samples, "length": CONTEXT, "progress": self.progress}
        if options["calibration"] == "c4":
            options["calibration"] = text
        if to.startswith("pure:"):
            rule = recipe.get(to.removeprefix("pure:"), "gguf")
            done = fewbits.quantize(source, out, replace(rule, pure=True), **options,
                                    overrides={"model.embed_tokens.weight": "f16"})
        else:
            done = fewbits.quantize(source, out, to, **options)
        return {"seconds": done.seconds, "bits": done.bits_per_weight, "notes": done.notes}

    # measuring ------------------------------------------------------------------------------------------------------
    def measured(self, model: str, to: str, method: str, text: str = "wikitext2-test") -> Row:
        """Divergence of a file from its original, beside the facts of the file."""
        out, facts = self.file(model, to, method)

        def measure() -> Row:
            print(f"  {model} {to} {method}: measuring on {text}", flush=True)
            found = fewbits.evaluate(out, self.reference(model, text), text=self.text(text), chunks=self.chunks,
                                     context=CONTEXT, kernel="decoded")  # of the weights alone
            return found.to_json()

        key = {"measure": [model, to, method, self.samples], "text": text, "chunks": self.chunks}
        return self.cache.get(key, measure) | facts  # the seconds are those of quantizing

    def windows(self, model: str, text: str) -> torch.Tensor:
        """The windows that `fewbits.evaluate` takes, `[chunks, 512]`."""
        if (model, text) not in self.texts_read:
            tokenizer = tokenizer_of(containers.open(self.models / model))
            self.texts_read[model, text] = cut(read_text(self.text(text)), tokenizer, CONTEXT, self.chunks, text,
                                               bos_of(tokenizer))
        return self.texts_read[model, text]

    def reference(self, model: str, text: str) -> Remembered:
        """The original's logits, computed once."""
        file = self.work / f"reference-{model}-{text}-{self.chunks}.npy"
        windows = self.windows(model, text)
        if not file.exists():
            partial = file.with_suffix(".partial.npy")
            save_logits(fewbits.load(self.models / model), windows, partial)
            partial.rename(file)
        return Remembered(containers.open(self.models / model), windows, np.load(file, mmap_mode="r"))

    def forget(self, methods: list[str]) -> None:
        """Files and figures of these methods are made anew when they are next asked for."""
        def old(key: Row) -> bool:
            return any(key[kind][2] in methods for kind in key if isinstance(key[kind], list))

        for method in methods:
            for file in (self.work / "files").glob(f"*-{method}-{self.samples}.any"):
                remove(file)
        print(f"{self.cache.forget(old)} rows forgotten")


class Remembered:
    """In the place of the original model: its logits on windows that were computed before."""

    def __init__(self, checkpoint: Any, windows: torch.Tensor, logits: np.ndarray):
        self.checkpoint, self.logits = checkpoint, logits
        self.at = {tuple(w): i for i, w in enumerate(windows.tolist())}

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        rows = [self.logits[self.at[tuple(w)]] for w in input_ids.tolist()]
        return SimpleNamespace(logits=torch.from_numpy(np.stack(rows)))


@torch.inference_mode()
def save_logits(net: Any, windows: torch.Tensor, out: Path) -> None:
    """Logits `[windows, length, vocabulary]` as float32 in an .npy file."""
    file: np.memmap | None = None
    for i, window in enumerate(windows):
        logits = net(input_ids=window[None], use_cache=False).logits[0].float().numpy()
        if file is None:
            file = np.lib.format.open_memmap(out, "w+", np.float32, (len(windows), *logits.shape))
        file[i] = logits


def mean_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean divergence over all positions but the last of each window, in float64."""
    def rows() -> Iterator[torch.Tensor]:
        for p, q in zip(reference, logits, strict=True):
            for at in range(0, len(p) - 1, 64):
                part = slice(at, min(at + 64, len(p) - 1))
                a, b = (torch.from_numpy(np.array(x[part])).double().log_softmax(-1) for x in (p, q))
                yield (a.exp() * (a - b)).sum(-1)

    return float(torch.cat(list(rows())).mean())


def weight_bytes(path: Path) -> int:
    """A file's size, or that of a directory's safetensors: the peers put different things beside the weights."""
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.safetensors")))
