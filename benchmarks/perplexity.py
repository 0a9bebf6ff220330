"""Perplexity of the same GGUF files in the native decoder and in llama.cpp, over the same tokens.

    python benchmarks/perplexity.py [--model smollm2-135m] [--types Q4_K_M …] [--chunks 8]

Windows of 512 tokens of wikitext2-test, every token of one but the first; one thread each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from baselines import Peers, f16_gguf
from common import ROOT, parser, show
from cpu import TYPES

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.measure.windows import cut, read_text
from fewbits.runtime import decoder
from fewbits.runtime.build import bos_of, tokenizer_of

CONTEXT = 512


def log_probabilities(logits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(logits)).float().log_softmax(-1)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--types", nargs="*", default=[*TYPES, "F16"])
    p.add_argument("--chunks", type=int, default=8)
    args = p.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    peers, rows = Peers(args.peers.absolute(), args.work.absolute()), []
    source = f16_gguf(args.models / args.model, args.work)
    text, tokenizer = args.shared / "data/text/wikitext2-test.txt", tokenizer_of(containers.open(source))
    windows = cut(read_text(text), tokenizer, CONTEXT, args.chunks, str(text), bos_of(tokenizer))
    for name in args.types:
        file = source if name == "F16" else args.work / f"{args.model}-{name}-plain.gguf"
        if not file.exists():
            fewbits.quantize(source, file, name, calibration="none", finish="off")
        out = args.work / "logits.npy"
        peers.run("llama", "peer_llama.py", "logits", job={"model": str(file), "tokens": windows.tolist(),
                                                           "out": str(out)})
        model, sums, divergence = decoder.compile(containers.open(file)), np.zeros(2), 0.0
        for window, theirs in zip(windows, np.load(out, mmap_mode="r"), strict=True):
            q, r = log_probabilities(model.logits(window.tolist()))[:-1], log_probabilities(theirs)[:-1]
            sums += [-float(v.gather(1, window[1:, None]).double().sum()) for v in (q, r)]
            divergence += float((r.exp() * (r - q)).sum())
        out.unlink()
        count = len(windows) * (CONTEXT - 1)
        ours, llama = np.exp(sums / count)
        rows.append((name, ours, llama, 100 * (ours / llama - 1), divergence / count))
        print(*(f"{v:.6g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    show(f"{args.model}, {args.chunks} x {CONTEXT} tokens of wikitext2-test",
         ("type", "perplexity", "llama.cpp", "difference, %", "KL from llama.cpp's"), rows, args.json)


if __name__ == "__main__":
    main()
