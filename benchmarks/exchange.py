"""Quantized directories exchanged with bitsandbytes and GPTQModel: do both sides compute the same logits?

Ours go through `from_pretrained(…, quantization_config=FewbitsConfig(…))` and `save_pretrained` to the peer's
Transformers; theirs from their `save_pretrained` to ours, by `fewbits.hf.enable` and `fewbits.load`. Both sides decode
the weights and multiply in float32, so that only the order of sums differs; GPTQModel decodes to float16 on the way.
In the last row of each recipe our native kernel computes, which rounds activations to bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from baselines import Peers
from common import ROOT, parser, show

import fewbits
from fewbits import containers, hf
from fewbits.containers.base import remove
from fewbits.measure.windows import cut, read_text
from fewbits.runtime.build import bos_of, tokenizer_of

# the recipe, and what their side is asked for
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
GPTQ: dict[str, dict[str, Any]] = {
    "int4-g64": {"sym": True},
    "int4-g64-asym": {"sym": False, "desc_act": True},
}


class Exchange:
    """One model, some windows of text, a folder of work."""

    def __init__(self, model: Path, windows: torch.Tensor, work: Path, peers: Peers):
        self.model, self.windows, self.work, self.peers = model, windows, work, peers
        self.rows: list[Sequence[Any]] = []

    def ours(self, method: str, recipe: str) -> None:
        """We save, they load."""
        folder = self._fresh(f"ours-{recipe}")
        config = fewbits.FewbitsConfig(recipe, kernel="decoded")
        net = self._loaded(self.model, quantization_config=config)
        net.save_pretrained(folder)
        self._row(f"ours in {method}", recipe, self._logits(net), self._theirs(method, folder))

    def theirs(self, method: str, recipe: str, options: dict[str, Any]) -> None:
        """They save, we load in both ways."""
        folder = self._fresh(f"theirs-{recipe}")
        if method == "gptq":
            bits, group = 4, 64
            text = [row.tolist() for row in self.windows]
            self.peers.run("gptq", "peer_gptqmodel.py", job={"model": str(self.model), "out": str(folder), "bits": bits,
                                                           "group_size": group, "tokens": text, "settings": options})
            meant = self._theirs(method, folder)
        else:
            meant = self._theirs(method, self.model, quantize=options, save=str(folder))
        hf.enable(force=True, kernel="decoded")
        net = self._loaded(folder)
        hf.disable()
        self._row(f"{method}'s in from_pretrained", recipe, self._logits(net), meant)
        for kernel in ("decoded", None):
            found = self._logits(fewbits.load(folder, kernel=kernel))
            self._row(f"{method}'s in fewbits.load" + ("" if kernel else ", native kernel"), recipe, found, meant)

    def _fresh(self, name: str) -> Path:
        remove(self.work / name)
        return self.work / name

    def _loaded(self, path: Path, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)

    @torch.inference_mode()
    def _logits(self, net: Any) -> np.ndarray:
        return np.stack([net(input_ids=w[None], use_cache=False).logits[0].float().numpy() for w in self.windows])

    def _theirs(self, method: str, model: Path, **more: Any) -> np.ndarray:
        out = self.work / "theirs.npy"
        peer = {"gptq": "gptq", "bitsandbytes": "bnb"}[method]
        self.peers.run(peer, "peer_exchange.py", job={"method": method, "model": str(model), "out": str(out),
                                                    "tokens": [w.tolist() for w in self.windows], **more})
        found: np.ndarray = np.load(out)
        return found

    def _row(self, direction: str, recipe: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        agree = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        self.rows.append([direction, recipe, f"{difference:.1e}", agree])
        print(*self.rows[-1], flush=True)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--windows", type=int, default=4)
    p.add_argument("--length", type=int, default=256, help="tokens in each")
    p.add_argument("--recipes", nargs="*", default=[*BITSANDBYTES, *GPTQ])
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    model = args.models / args.model
    text, tokenizer = args.shared / "data" / "text" / "wikitext2-test.txt", tokenizer_of(containers.open(model))
    windows = cut(read_text(text), tokenizer, args.length, args.windows, str(text), bos_of(tokenizer))
    run = Exchange(model, windows, args.work, Peers(args.peers, args.work))
    for recipe in args.recipes:
        method = "gptq" if recipe in GPTQ else "bitsandbytes"
        run.ours(method, recipe)
        run.theirs(method, recipe, (GPTQ | BITSANDBYTES)[recipe])
    show(f"{args.model} exchanged with bitsandbytes and GPTQModel, {len(windows)} x {args.length} tokens",
         ["direction", "recipe", "largest difference / largest logit", "top-1 agreement"], run.rows, args.json)


if __name__ == "__main__":
    main()
