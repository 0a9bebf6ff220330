"""Do our GGUF mixes load in llama.cpp, in the types that llama-quantize chooses, and how near is each to the original?

For each mix: our file and the one that llama.cpp's own quantizer makes of our F16 GGUF; tensors whose types differ;
bytes; perplexity of both files *in llama.cpp*, and of ours as `fewbits eval` counts it (activations not rounded); KL of
both from the original as `fewbits eval` counts it. Text: wikitext2-test.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

from common import ROOT, parser, show
from gguf_llama import llama

import fewbits
from fewbits import containers
from fewbits.cli.common import quiet_libraries
from fewbits.containers.base import remove
from fewbits.loading import tokenizer
from fewbits.measure.windows import cut, read_text

MIXES = {"Q8_0": 7, "Q6_K": 18, "Q4_K_M": 15, "Q4_0": 2}
QUANTIZE = """
import ctypes, sys, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.ftype, p.nthread = int(sys.argv[3]), 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def types(path: Path) -> dict[str, str]:
    return {e.name: e.codec.name for e in containers.open(path).entries.values()}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", nargs="*", default=["smollm2-135m-wide", "smollm2-135m"])
    p.add_argument("--chunks", type=int, default=4)
    p.add_argument("--peer-python", default=str(ROOT / ".peers/llama/bin/python"))
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.shared / "data/text/wikitext2-test.txt"
    rows = []
    for name in args.model:
        reference = fewbits.load(args.models / name)
        windows = cut(read_text(text), tokenizer(reference), 512, args.chunks, str(text), None).tolist()
        f16 = args.work / f"{name}-F16.gguf"
        remove(f16)
        fewbits.quantize(args.models / name, f16, "f16", container="gguf")
        for mix, number in MIXES.items():
            ours, theirs = (args.work / f"{name}-{mix}-{who}.gguf" for who in ("ours", "theirs"))
            remove(ours)
            fewbits.quantize(args.models / name, ours, mix)
            subprocess.run([args.peer_python, "-c", QUANTIZE, str(f16), str(theirs), str(number)], check=True,
                           capture_output=True)
            a, b = types(ours), types(theirs)
            differ = sum(a[k] != b[k] for k in a | b)
            inside = [math.exp(sum(map(sum, losses)) / sum(map(len, losses)))
                      for losses in (llama(args.peer_python, path, windows) for path in (ours, theirs))]
            found = [fewbits.evaluate(path, reference, text=text, chunks=args.chunks, kernel="decoded")
                     for path in (ours, theirs)]
            sizes = [path.stat().st_size for path in (ours, theirs)]
            rows.append([name, mix, differ, len(a), sizes[0] / sizes[1], found[0].kl_mean, found[1].kl_mean,
                         found[0].perplexity, inside[0], inside[1]])
            print(*rows[-1], flush=True)
            remove(ours)
            remove(theirs)
        remove(f16)
    show(f"GGUF mixes beside llama-quantize, {args.chunks} x 512 tokens of wikitext2-test",
         ["model", "mix", "types that differ", "tensors", "size / theirs", "KL ours", "KL theirs",
          "perplexity, fewbits", "in llama.cpp", "theirs in llama.cpp"], rows, args.json)


if __name__ == "__main__":
    main()
