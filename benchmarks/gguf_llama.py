"""Do GGUF files mean the same to llama.cpp and to us?

Greedy: published files, decoded by us into transformers' model class in float32, against llama.cpp on the same file: 64
tokens on each of 10 prompts. llama.cpp rounds activations to 8 bits wherever weights are quantized, so texts part where
two tokens are close; therefore also with the same weights in a float32 GGUF of ours. Where texts part: how far apart
the two tokens are, how far llama.cpp's logits are from ours (root mean square), and how far ours move when activations
are rounded to 8 bits on our side.

Perplexity: Transformers directory -> our GGUF (16 bits, as the directory) -> llama.cpp, against transformers on the
directory: same tokens, same positions.

    python benchmarks/gguf_llama.py [--chunks 4] [--greedy NAME...] [--perplexity NAME...]
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, parser, show
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fewbits import containers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F32
from fewbits.containers.gguf import Gguf
from fewbits.qtensor import QTensor

PEER = """
import json, sys
import numpy as np
from llama_cpp import Llama
job = json.load(open(sys.argv[1]))
llama = Llama(job["model"], n_ctx=job["context"], n_batch=512, logits_all=True, type_k=0, type_v=0, flash_attn=False,
              n_threads=1, n_threads_batch=1, verbose=False)
def logits(tokens):
    llama.reset()
    llama.eval(tokens)
    return llama.scores[:len(tokens)]
out = []
for tokens in job["texts"]:
    if job["save"]:
        out.append(logits(tokens)[-1].copy())
    elif job["new"]:
        known = list(tokens)
        llama.reset()
        llama.eval(known)
        for _ in range(job["new"]):
            best = int(llama.scores[llama.n_tokens - 1].argmax())
            known.append(best)
            llama.eval([best])
        out.append(known)
    else:
        rows = logits(tokens)[:-1]
        losses = []
        for row, target in zip(rows, tokens[1:]):
            row = row.astype(np.float64)
            losses.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]))
        out.append(losses)
if job["save"]:
    np.save(job["save"], np.stack(out))
else:
    print(json.dumps(out))
"""
BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
PROMPTS = ("The capital of France is", "Once upon a time there was a little dragon who", "Water boils at",
           "def fibonacci(n):\n", "The three laws of thermodynamics are", "Dear Sir or Madam,\n\nI am writing to",
           "In 1969, Neil Armstrong", "To bake a simple bread you need", "Photosynthesis is the process by which",
           "Q: What is the largest planet of the solar system?\nA:")


def llama(python: str, model: Path, texts: Sequence[list[int]], new: int = 0, last: bool = False) -> Any:
    """What llama.cpp makes of `texts`: greedy continuations, the logits after the last token, or losses by position."""
    with tempfile.TemporaryDirectory() as scratch:
        save = f"{scratch}/logits.npy" if last else ""
        job = {"model": str(model), "context": max(map(len, texts)) + new, "texts": texts, "new": new, "save": save}
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        done = subprocess.run([python, "-c", PEER, f"{scratch}/job.json"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return torch.from_numpy(np.load(save)) if last else json.loads(done.stdout.splitlines()[-1])


def model_of(checkpoint: Checkpoint) -> torch.nn.Module:
    """Transformers' model on the checkpoint's decoded weights, in float32."""
    config = AutoConfig.for_model(**{k: v for k, v in checkpoint.config.items() if k not in ("dtype", "architectures")})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = {name: entry.load().dequantize() for name, entry in checkpoint.entries.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found
    model.tie_weights()
    return model.eval()


def round_activations(model: Any, checkpoint: Checkpoint) -> None:
    """Round what enters each quantized layer to 8 bits: by 256; by 32 with a float16 scale where blocks are of 32."""
    def hook(width: int) -> Any:
        def run(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = inputs[0].reshape(-1, width)
            if width == 256:
                peak = x.gather(1, x.abs().argmax(1, keepdim=True))
                scale = torch.where(peak == 0, 0, -127 / peak)
                codes = (x * scale).round().clamp(max=127)
                return ((codes * torch.where(peak == 0, 0, 1 / scale)).view_as(inputs[0]),)
            step = x.abs().amax(1, keepdim=True) / 127
            codes = torch.where(step == 0, 0, x / step).round()
            return ((codes * step.half().float()).view_as(inputs[0]),)
        return run

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            entry = checkpoint.entries.get(name + ".weight") or checkpoint.entries["model.embed_tokens.weight"]
            if entry.codec.family == "ggml":
                module.register_forward_pre_hook(hook(32 if entry.codec.name in BLOCKS_OF_32 else 256))


def in_float32(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights, decoded."""
    def decode(entry: Entry) -> Entry:
        return entry.as_(codec=F32, load=lambda: QTensor(F32, entry.shape, {
            "data": entry.load().dequantize().view(F32.matrix(entry.shape))}))

    facts = {k: v for k, v in checkpoint.facts.items() if k != "file_type"}
    return Checkpoint(checkpoint.path, checkpoint.container, checkpoint.config,
                      {name: decode(e) for name, e in checkpoint.entries.items()}, checkpoint.files, facts)


def tokenizer_of(checkpoint: Checkpoint, folder: Path) -> Any:
    for name, data in checkpoint.files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens one by one; no end of text, as on the other side."""
    tokens, cache, fresh = list(prompt), None, torch.tensor([prompt])
    for _ in range(new):
        out = model(fresh, past_key_values=cache, use_cache=True)
        cache, best = out.past_key_values, int(out.logits[0, -1].argmax())
        tokens.append(best)
        fresh = torch.tensor([[best]])
    return tokens


@torch.no_grad()
def row_at(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0, -1]


def compare_greedy(path: Path, peer: str, new: int) -> list[list[Any]]:
    checkpoint = containers.open(path)
    model = model_of(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tokenizer_of(checkpoint, Path(scratch))
        prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
        containers.write(Gguf(), Path(scratch) / "f32.gguf", in_float32(checkpoint))
        float32 = llama(peer, Path(scratch) / "f32.gguf", prompts, new)
    ours = [greedy(model, p, new) for p in prompts]
    theirs = llama(peer, path, prompts, new)
    parting = [_parting(a, b) for a, b in zip(ours, theirs, strict=True)]
    until = [a[:at] for a, at in zip(ours, parting, strict=True)]
    logits, peers = torch.stack([row_at(model, t) for t in until]), llama(peer, path, until, last=True)
    round_activations(model, checkpoint)
    noise = torch.stack([row_at(model, t) for t in until]) - logits
    rows = []
    for i, prompt in enumerate(PROMPTS):
        at, begin = parting[i], len(prompts[i])
        gap = float(logits[i][ours[i][at]] - logits[i][theirs[i][at]]) if at < len(ours[i]) else ""
        rows.append([repr(prompt), at - begin, _parting(ours[i], float32[i]) - begin, gap,
                     float((peers[i] - logits[i]).square().mean().sqrt()), float(noise[i].square().mean().sqrt())])
    return rows


def _parting(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@torch.no_grad()
def compare_perplexity(path: Path, text: Path, peer: str, chunks: int, length: int) -> list[Any]:
    checkpoint = containers.open(path)
    ids = AutoTokenizer.from_pretrained(path)(text.read_text(encoding="utf-8")[:chunks * length * 8],
                                              add_special_tokens=False)["input_ids"]
    bos = checkpoint.config.get("bos_token_id")
    size = length - 1
    parts = [[bos, *ids[i * size:(i + 1) * size]] for i in range(chunks)]
    model = model_of(checkpoint)
    ours = []
    for part in parts:
        logits = model(torch.tensor([part])).logits[0, :-1]
        ours += torch.nn.functional.cross_entropy(logits.double(), torch.tensor(part[1:]), reduction="none").tolist()
    with tempfile.TemporaryDirectory() as scratch:
        containers.write(Gguf(), Path(scratch) / "model.gguf", checkpoint)
        theirs = [x for losses in llama(peer, Path(scratch) / "model.gguf", parts) for x in losses]
    a, b = (float(torch.tensor(x, dtype=torch.float64).mean().exp()) for x in (ours, theirs))
    worst = max(abs(x - y) for x, y in zip(ours, theirs, strict=True))
    return [path.name, len(ours), a, b, f"{100 * (b / a - 1):+.4f} %", worst]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--greedy", nargs="*", default=["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf"])
    p.add_argument("--perplexity", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    p.add_argument("--new", type=int, default=64, help="tokens to generate")
    p.add_argument("--chunks", type=int, default=4)
    p.add_argument("--length", type=int, default=512, help="tokens of a chunk")
    p.add_argument("--peer", default=str(ROOT / ".peers" / "llama" / "bin" / "python"))
    arguments = p.parse_args()
    torch.set_num_threads(1)
    text = arguments.shared / "data" / "text" / "wikitext2-test.txt"
    header = ["prompt", "equal tokens", "the same in float32", "our gap where they part",
              "llama.cpp's logits from ours", "ours with rounded activations"]
    for name in arguments.greedy:
        rows = compare_greedy(arguments.models / name, arguments.peer, arguments.new)
        show(f"{name}: equal greedy tokens of {arguments.new}", header, rows)
    rows = [compare_perplexity(arguments.models / name, text, arguments.peer, arguments.chunks, arguments.length)
            for name in arguments.perplexity]
    show("Perplexity, transformers (float32) and llama.cpp on our 16-bit GGUF",
         ["model", "tokens", "transformers", "llama.cpp", "difference", "largest difference of one token's loss"], rows,
         arguments.json)


if __name__ == "__main__":
    main()
