"""Every family that goes to GGUF: llama.cpp on our file beside Transformers on its own model, and the way back.

Small models of random weights, everything on that the family has (`tests/arch/models.py`). Error: normalised mean
squared error of the logits in float32 over 150 tokens. Back: the GGUF as a directory again, every tensor compared.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import ROOT, parser, show

sys.path.insert(0, str(ROOT))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--python", default=str(ROOT / ".peers" / "llama" / "bin" / "python"))
    args = options.parse_args()
    import torch

    from fewbits import containers, convert
    from tests.arch.models import MODELS, directory, tiny
    from tests.peers.test_arch_llama import error

    rows = []
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            model = tiny(config)
            source = containers.open(directory(model, work / "source"))
            convert(source, work / "m.gguf")
            convert(work / "m.gguf", work / "back", "f32")
            back = containers.open(work / "back").entries
            equal = sum(torch.equal(e.load().dequantize(), back[n].load().dequantize())
                        for n, e in source.entries.items())
            rows.append([name, error(args.python, work / "m.gguf", model), f"{equal} of {len(source.entries)} equal"])
            print(rows[-1], flush=True)
    show("Families of GGUF", ["model", "error of the logits", "tensors after the way back"], rows, args.json)


if __name__ == "__main__":
    main()
