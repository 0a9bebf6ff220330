"""Perplexity and divergence of the same GGUF files here and in llama.cpp's own tool, over the same text.

    python benchmarks/quality.py --tool llama-perplexity [--model smollm2-135m] [--types Q4_K_M …] [--chunks 20]

The tool is llama.cpp's (built from the sources that llama-cpp-python carries). Its perplexity is over the second half
of every window of 512 tokens, and its --kl-divergence is from the logits of the F16 file, in 16 bits. Ours: the native
decoder, which rounds activations to 8 bits 32 at a time, and Transformers on decoded weights with activations rounded
as llama.cpp rounds them (256 at a time for K-quants): once as they are, and once with embeddings off by 1e-7, which
tells how far two programs may be apart that round alike but add in another order.
"""

from __future__ import annotations

import re
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from baselines import f16_gguf
from common import ROOT, parser, show
from cpu import TYPES
from gguf_llama import model_of, round_activations

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.measure import evaluate

HEADER = ("type", "llama.cpp", "rounded alike", "difference, %", "off by 1e-7", "difference, %", "native",
          "difference, %", "KL llama.cpp", "rounded alike", "native", "same top %, llama.cpp", "rounded alike")


def tool(path: Path, model: Path, text: Path, *more: str) -> str:
    done = subprocess.run([path, "-m", model, "-f", text, "-t", str(torch.get_num_threads()), *more],
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout + done.stderr


def number(said: str, label: str) -> float:
    return float(re.search(rf"{label}\s*[:=]\s*([-\d.]+)", said)[1])  # type: ignore[index]


def rounded_alike(file: Path, off: float = 0) -> Any:
    """The file's model in Transformers, with activations rounded as llama.cpp does; embeddings `off` by a factor."""
    checkpoint = containers.open(file)
    net = model_of(checkpoint)
    round_activations(net, checkpoint)
    random = torch.Generator().manual_seed(0)
    net.get_input_embeddings().register_forward_hook(
        lambda _, __, out: out * (1 + off * torch.randn(out.shape, generator=random)))
    vars(net)["checkpoint"] = checkpoint
    return net


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--tool", type=Path, default=ROOT / ".peers/llama/native/llama-perplexity")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--types", nargs="*", default=[*TYPES, "F16"])
    p.add_argument("--chunks", type=int, default=20)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    if not args.tool.exists():
        raise SystemExit(f"quality.py: no {args.tool}: give llama.cpp's llama-perplexity with --tool")
    quiet_libraries()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    source, rows = f16_gguf(args.models / args.model, args.work), []
    text, logits = args.shared / "data/text/wikitext2-test.txt", args.work / f"{args.model}.kld"
    settings: dict[str, Any] = {"text": text, "chunks": args.chunks, "context": 512}
    tool(args.tool, source, text, "--chunks", str(args.chunks), "--kl-divergence-base", str(logits))
    for name in args.types:
        file = source if name == "F16" else args.work / f"{args.model}-{name}-plain.gguf"
        if not file.exists():
            fewbits.quantize(source, file, name, calibration="none", finish="off")
        said = tool(args.tool, file, text, "--kl-divergence", "--kl-divergence-base", str(logits))
        native, alike, off = (evaluate(x, source, **settings)
                              for x in (file, rounded_alike(file), rounded_alike(file, 1e-7)))
        theirs = number(said, r"Mean PPL\(Q\)")
        pairs = [(x.perplexity_llama, 100 * (x.perplexity_llama / theirs - 1)) for x in (alike, off, native)]
        rows.append((name, theirs, *chain(*pairs), number(said, "Mean +KLD"), alike.kl_mean, native.kl_mean,
                     number(said, "Same top p"), 100 * (alike.top1 or 0)))
        print(*(f"{v:.6g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    logits.unlink()
    show(f"{args.model}, {args.chunks} x 512 tokens of wikitext2-test", HEADER, rows, args.json)


if __name__ == "__main__":
    main()
