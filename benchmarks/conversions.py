"""The matrix of conversions: rows from, columns to. Lossless, or the KL divergence that a lossy one costs, or refused.

Every source is made from one model. A cell first asks for a lossless conversion and compares every decoded value with
the source's; where that is refused, `--lossy` is asked for, and the result is measured against its source on a text.

By default the model is stories260k made wider (256 columns, so that every codec takes every matrix) by channels, heads
and inner units of zeros: the same function. `--model .models/smollm2-135m-wide` takes far longer.
"""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from common import parser, show

# name of the row -> recipe and container
SOURCES: dict[str, tuple[str, str]] = {
    "f16 directory": ("f16", "transformers"), "GGUF F16": ("f16", "gguf"), "GGUF Q4_0": ("Q4_0", "gguf"),
    "GGUF Q8_0": ("Q8_0", "gguf"), "GGUF Q4_K_M": ("Q4_K_M", "gguf"), "GGUF IQ4_XS": ("IQ4_XS", "gguf"),
    "GPTQ int4-g128": ("int4-g128", "gptq"), "GPTQ int3-g32-asym": ("int3-g32-asym", "gptq"),
    "AWQ int4-g128-asym": ("int4-g128-asym", "awq"), "compressed int4-g32": ("int4-g32", "compressed-tensors"),
    "bitsandbytes nf4": ("nf4", "bitsandbytes"), "bitsandbytes int8": ("int8", "bitsandbytes"),
    "fp8 tiles": ("fp8-e4m3-b128", "fp8"), "fewbits kmeans4": ("kmeans4", "fewbits"),
}
TARGETS = ("transformers", "gguf", "gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "fewbits")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="a full-precision directory; by default a wide stories260k")
    options.add_argument("--text", type=Path, help="by default the stories that stories260k knows")
    options.add_argument("--chunks", type=int, default=8, help="windows of 512 tokens to measure on")
    options.add_argument("--rows", nargs="*", help="only these sources")
    args = options.parse_args()
    text = args.text or args.shared / "data" / "text" / "tinystories.txt"
    work = args.work / "conversions"
    work.mkdir(parents=True, exist_ok=True)
    model = args.model or widened(args.shared / "data" / "models" / "stories260k", work / "wide")
    rows = []
    for name, (recipe, container) in SOURCES.items():
        if args.rows and name not in args.rows:
            continue
        source = made(model, work, recipe, container)
        against = Reference(source)
        rows.append([name, *(cell(source, work, target, against, text, args.chunks) for target in TARGETS)])
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    show("From rows to columns", ["from \\ to", *TARGETS], rows, args.json)


def widened(model: Path, out: Path, width: int = 256) -> Path:
    """The Llama in `model` with all widths four times as large, filled with zeros; norms see the same ratio."""
    import torch
    from safetensors.torch import load_file, save_file

    if out.exists():
        return out
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    times = width // config["hidden_size"]
    config |= {"hidden_size": width, "intermediate_size": width, "rms_norm_eps": config["rms_norm_eps"] / times,
               "num_attention_heads": config["num_attention_heads"] * times,
               "num_key_value_heads": config["num_key_value_heads"] * times,
               "head_dim": width // times // config["num_attention_heads"]}
    (out / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, w in load_file(model / "model.safetensors").items():
        inner = "mlp" in name
        rows = w.shape[0] if w.ndim == 2 and w.shape[0] == config["vocab_size"] else \
            width if inner or w.ndim == 1 else w.shape[0] * times
        shape = (rows, width) if w.ndim == 2 else (rows,)
        tensors[name] = torch.zeros(shape, dtype=w.dtype)
        tensors[name][tuple(slice(n) for n in w.shape)] = w if w.ndim == 2 else w / times ** 0.5
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def made(model: Path, work: Path, recipe: str, container: str) -> Path:
    from fewbits import quantize

    out = work / f"{container}-{recipe}{'.gguf' if container == 'gguf' else ''}"
    if not out.exists():
        quantize(model, out, recipe, container=container)
    return out


class Reference:
    """The source as a model, loaded once, when a cell of its row first needs it."""

    def __init__(self, source: Path):
        self.source = source

    @cached_property
    def model(self) -> Any:
        from fewbits import load

        return load(self.source)


def cell(source: Path, work: Path, target: str, against: Reference, text: Path, chunks: int) -> str:
    from fewbits import FewbitsError, convert

    out = work / ("cell.gguf" if target == "gguf" else "cell")
    remove(out)
    try:
        result = convert(source, out, target)
        compare(source, out)
        floats = sum(s.how == "decoded" and s.before not in ("F32", "F16", "BF16") for s in result.tensors)
        return "lossless" + (f", {floats} as floats" if floats else "")
    except FewbitsError as refusal:
        if "would change" not in str(refusal):
            return "refused: " + str(refusal).removeprefix(f"{source}: ")
    finally:
        remove(out)
    try:
        convert(source, out, target, lossy=True)
        return f"KL {divergence(out, against.model, text, chunks):.4f}"
    except FewbitsError as refusal:
        return "refused: " + str(refusal).removeprefix(f"{source}: ")
    finally:
        remove(out)


def compare(source: Path, out: Path) -> None:
    """Every value of both, bit for bit; raises where a lossless conversion was none."""
    import torch

    from fewbits import containers

    new = containers.open(out).entries
    for name, entry in containers.open(source).entries.items():
        assert torch.equal(entry.load().dequantize(), new[name].load().dequantize()), f"{out}: {name} differs"


def divergence(out: Path, source: Any, text: Path, chunks: int) -> float:
    from fewbits import evaluate

    found = evaluate(out, source, text=text, chunks=chunks, kernel="decoded")
    assert found.kl_mean is not None
    return found.kl_mean


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
