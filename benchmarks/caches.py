"""What keeping keys and values in fewer bits costs: divergence from a float16 cache, the same weights, the same tokens.

    python benchmarks/caches.py [--model smollm2-135m] [--chunks 8] [--context 512]

Text: wikitext2-test. The decoder takes each window at once, so attention sees nothing but the cache.
"""

from __future__ import annotations

import torch
from baselines import f16_gguf
from common import parser, show

from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.measure.windows import cut, read_text
from fewbits.runtime import decoder
from fewbits.runtime.build import bos_of, tokenizer_of
from fewbits.runtime.sequences import CACHES


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="smollm2-135m", help="a folder of --models")
    p.add_argument("--chunks", type=int, default=8)
    p.add_argument("--context", type=int, default=512)
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = containers.open(f16_gguf(args.models / args.model, args.work))
    text, tokenizer = args.shared / "data/text/wikitext2-test.txt", tokenizer_of(checkpoint)
    windows = cut(read_text(text), tokenizer, args.context, args.chunks, str(text), bos_of(tokenizer)).tolist()
    model, rows = decoder.compile(checkpoint), []
    divergence, same = dict.fromkeys(CACHES, 0.0), dict.fromkeys(CACHES, 0)
    for window in windows:
        found = {cache: torch.from_numpy(model.sequence(len(window), cache).append(window, last_only=False))
                 .log_softmax(-1) for cache in CACHES}
        for cache, q in found.items():
            divergence[cache] += float((found["f16"].exp() * (found["f16"] - q)).sum())
            same[cache] += int((q.argmax(-1) == found["f16"].argmax(-1)).sum())
    count = len(windows) * args.context
    for cache in CACHES:
        bits = 16 * model.plan.cache_bytes(args.context, cache) / model.plan.cache_bytes(args.context, "f16")
        rows.append((cache, bits, divergence[cache] / count, 100 * same[cache] / count))
    show(f"{args.model}, {args.chunks} x {args.context} tokens of wikitext2-test: caches",
         ("cache", "bits", "KL from f16", "same top token, %"), rows, args.json)


if __name__ == "__main__":
    main()
