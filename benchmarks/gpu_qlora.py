"""Part of gpu.py: a step of QLoRA on a model of 8 billion nf4 weights, beside bitsandbytes and peft.

Both train the same adapters on the same tokens, through Transformers' modules in bfloat16, with torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_llama
import torch
from gpu import Bench

from fewbits.finetuning.adapters import Lora, attach
from fewbits.finetuning.loss import CausalLoss
from fewbits.finetuning.saving import halved
from fewbits.loading import load

LENGTH, BATCHES = 512, (1, 4)  # tokens of an example, examples of a step
LEAST_TIMES = 1.3  # as fast as bitsandbytes with peft
RATE = 2e-4

Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def run(bench: Bench) -> None:
    dtype = torch.float32 if bench.rehearsed else torch.bfloat16
    net = load(gpu_llama.checkpoint(bench, "nf4"), dtype=dtype, device=bench.device, kernel="triton")
    sides = {"fewbits": attach(net, Lora(), None, "random")}
    try:
        sides["bitsandbytes + peft"] = with_bitsandbytes(bench, dtype)
    except ImportError:
        bench.row("qlora", "bitsandbytes + peft", {}, note="not installed")
    losses: list[Loss] = [own_loss(CausalLoss()), lambda net, inputs: net(**inputs, use_cache=False).loss]
    length = 8 if bench.rehearsed else LENGTH
    layers = gpu_llama.config(bench)["num_hidden_layers"]
    for batch in BATCHES[:1] if bench.rehearsed else BATCHES:
        ids = torch.randint(0, 300, (batch, length), device=bench.device)
        steps = [step(net, loss, ids) for net, loss in zip(sides.values(), losses, strict=False)]
        seconds = bench.wall(steps)
        for name, taken in zip(sides, seconds, strict=True):
            figures = {"steps/s": 1 / taken, "tokens/s": batch * length / taken}
            compared = name == "fewbits" and len(seconds) > 1
            if compared:
                figures["x bitsandbytes"] = seconds[1] / taken
            bench.row("qlora", f"{name}, {layers} layers, {batch} x {length} tokens", figures,
                      {"x bitsandbytes": LEAST_TIMES} if compared else {})


def own_loss(loss: CausalLoss) -> Loss:
    def found(net: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with halved(net):  # as `fewbits finetune` does
            return loss(net, inputs)

    return found


def step(net: Any, loss: Loss, ids: torch.Tensor) -> Callable[[], object]:
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    net.train()

    def work() -> float:
        found = loss(net, {"input_ids": ids, "labels": ids})
        found.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return found.item()

    return work


def with_bitsandbytes(bench: Bench, dtype: torch.dtype) -> Any:
    """Transformers' model whose blocks hold nf4 layers of bitsandbytes, and peft's adapters as ours have them."""
    import bitsandbytes as bnb
    import peft
    import transformers
    from accelerate import init_empty_weights

    settings = transformers.AutoConfig.for_model(**gpu_llama.config(bench))
    settings.dtype = dtype
    with init_empty_weights(include_buffers=False):
        net = transformers.LlamaForCausalLM(settings)
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype,
                                      quant_type="nf4", compress_statistics=False, device="meta")
            values = torch.randn(module.weight.shape, dtype=dtype, device=bench.device) * 0.02
            layer.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=False)
            net.set_submodule(name, layer.to(bench.device))
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.randn(parameter.shape, dtype=dtype, device=bench.device) * 0.02
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    net.to(bench.device)
    lora = Lora()
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
                             target_modules=lora.targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(net, config)
