"""A model card: what the model is, how near it is to the original, and how each program loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.cli.common import size

TITLES = {"quality-size.png": "Quality against size", "speed.png": "Speed", "layers.png": "Error by layer"}
LIBRARIES = {"gguf": "gguf", "fewbits": "fewbits"}  # by container; others are Transformers'
GPTQ, AWQ = "pip install transformers gptqmodel", "pip install transformers"
# by container, in the order of the card: (program, language, how); {id}, {file}, {auto} are filled in
FEWBITS = ("fewbits", "sh", 'fewbits run {where} "Hello"')
FEWBITS_PYTHON = ("fewbits, in Python", "python", 'import fewbits\n\nmodel = fewbits.load("{where}")')
VLLM = ("vLLM", "sh", "vllm serve {id}")
TRANSFORMERS = ("Transformers{with_}", "python", "from transformers import {auto}\n\n"
                                                'model = {auto}.from_pretrained("{id}", device_map="auto")')
LOADING: dict[str, tuple[tuple[str, str, str], ...]] = {
    "gguf": (("llama.cpp", "sh", "llama-cli -hf {id} -hff {file}"), ("Ollama", "sh", "ollama run hf.co/{id}"),
             FEWBITS, FEWBITS_PYTHON,
             ("Transformers (decodes it)", "python", "from transformers import {auto}\n\n"
              'model = {auto}.from_pretrained("{id}", gguf_file="{file}")')),
    "gptq": (TRANSFORMERS, VLLM, FEWBITS, FEWBITS_PYTHON),
    "awq": (TRANSFORMERS, VLLM, FEWBITS, FEWBITS_PYTHON),
    "compressed-tensors": (VLLM, TRANSFORMERS, FEWBITS, FEWBITS_PYTHON),
    "bitsandbytes": (TRANSFORMERS, VLLM, FEWBITS, FEWBITS_PYTHON),
    "fp8": (VLLM, TRANSFORMERS, FEWBITS, FEWBITS_PYTHON),
    "mxfp4": (VLLM, TRANSFORMERS, FEWBITS, FEWBITS_PYTHON),
    "fewbits": (FEWBITS, FEWBITS_PYTHON),
    "transformers": (TRANSFORMERS, VLLM, FEWBITS, FEWBITS_PYTHON),
}
NEEDS = {"gptq": "gptqmodel", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}
WRITES = ("fewbits", "vLLM", "llama.cpp", "Ollama")  # programs for models that continue text


@dataclass(frozen=True)
class Facts:
    """What a card says."""

    repository: str
    architecture: str
    container: str
    recipe: str
    calibration: str | None
    solvers: list[str]
    quantized: bool
    parameters: int
    bits_per_weight: float
    nbytes: int
    files: list[str]
    kinds: dict[str, tuple[int, int, int]]  # codec -> tensors, weights, bytes
    base_model: str | None
    license: str | None

    @property
    def writes(self) -> bool:
        """Whether it continues text."""
        return self.architecture.endswith(("ForCausalLM", "LMHeadModel"))


def render(facts: Facts, quality: dict[str, Any] | None, pictures: list[str], report: Path | None) -> str:
    """The card as Markdown, with the hub's YAML before it. `quality` are an evaluation's figures, `report` is a
    comparison's report.md."""
    lines = ["---", _front(facts), "---", "", f"# {facts.repository.partition('/')[2]}", "", _sentence(facts), ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in _rows(facts)), ""]
    if len(facts.kinds) > 1:
        lines += ["| format | tensors | weights | size |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {count} | {weights:,} | {size(nbytes)} |" for name, (count, weights, nbytes)
                  in sorted(facts.kinds.items(), key=lambda item: -item[1][1])] + [""]
    lines += _quality(facts, quality) if quality else []
    lines += ["## How to load it", ""]
    for program, language, code in _loading(facts):
        lines += [f"{program}:", "", f"```{language}", code, "```", ""]
    if pictures or report:
        lines += ["## Beside other formats of the same model", "", *_table(report)]
        for name in pictures:
            lines += [f"![{TITLES.get(name, name)}]({name})", ""]
    lines += ["## Checksums", "", "`sha256sum -c SHA256SUMS` in the folder of the files.", ""]
    return "\n".join(lines)


def _front(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    more: dict[str, Any] = {"base_model": facts.base_model} if facts.base_model else {}
    if facts.base_model:
        more["base_model_relation"] = "quantized" if facts.quantized else "finetune"
    if facts.writes:
        more["pipeline_tag"] = "text-generation"
    tags = ["fewbits", *([facts.container, facts.recipe] if facts.quantized else [])]
    found = ModelCardData(library_name=LIBRARIES.get(facts.container, "transformers"), license=facts.license,
                          tags=list(dict.fromkeys(tags)), **more)
    return str(found.to_yaml()).strip()


def _sentence(facts: Facts) -> str:
    of = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else facts.architecture
    if not facts.quantized:
        return f"A model made from {of}, in {facts.recipe}."
    return f"{of}, quantized to {facts.bits_per_weight:.2f} bits a weight with fewbits."


def _rows(facts: Facts) -> list[tuple[str, str]]:
    found = [("recipe", f"`{facts.recipe}`"), ("layout", facts.container), ("architecture", facts.architecture),
             ("parameters", f"{facts.parameters:,}"), ("bits per weight", f"{facts.bits_per_weight:.3f}, over all"),
             ("size", size(facts.nbytes))]
    found += [("calibration", facts.calibration)] if facts.calibration else []
    return found + ([("solver", ", ".join(facts.solvers))] if facts.solvers else [])


def _quality(facts: Facts, quality: dict[str, Any]) -> list[str]:
    """Figures of a measurement; those that it does not have are left out."""
    def shown(key: str, form: str, times: float = 1) -> str | None:
        value = quality.get(key)
        return None if value is None else format(value * times, form)

    kl, error = shown("kl_mean", ".4g"), shown("kl_mean_error", ".1g")
    rows = [("KL divergence, mean", f"{kl} ± {error} nats a token" if error else kl),
            ("KL divergence, 99 %", shown("kl_99", ".4g")), ("same most likely token", shown("top1", ".2f", 100)),
            ("perplexity", shown("perplexity", ".4f")), ("perplexity of the original",
                                                         shown("reference_perplexity", ".4f"))]
    rows = [(name, f"{value} %" if name.startswith("same") else value) for name, value in rows if value is not None]
    told = quality.get("circumstances") or {}
    text, tokens, context = told.get("text"), quality.get("tokens"), quality.get("context")
    text = text.get("name") if isinstance(text, dict) else text
    on = f"{text or 'a text'}" + (f", {tokens} tokens in windows of {context}" if tokens else "")
    if not rows:
        return []
    return ["## How near it is to the original", "", "| | |", "|---|---|", *(f"| {n} | {v} |" for n, v in rows), "",
            f"Measured on {on}.", ""]


def _loading(facts: Facts) -> list[tuple[str, str, str]]:
    """Programs that read the layout, and how."""
    first = facts.files[0] if facts.files else ""
    where = f"{facts.repository}:{first}" if facts.container == "gguf" else facts.repository
    auto = "AutoModelForCausalLM" if facts.writes else facts.architecture
    need = NEEDS.get(facts.container)
    values = {"id": facts.repository, "file": first, "where": where, "auto": auto,
              "with_": f" (with {need})" if need else ""}
    return [tuple(part.format(**values) for part in row)  # type: ignore[misc]
            for row in LOADING.get(facts.container, LOADING["fewbits"]) if facts.writes or row[0] not in WRITES]


def _table(report: Path | None) -> list[str]:
    """The table of a comparison's report."""
    if report is None or not report.is_file():
        return []
    return [line for line in report.read_text(encoding="utf-8").splitlines() if line.startswith("|")] + [""]
