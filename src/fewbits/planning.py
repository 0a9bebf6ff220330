"""What a model would take in every recipe, from its configuration or header alone, and which recipe to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewbits import containers, hub
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.containers import experts
from fewbits.containers.directory import CARRIED, read_json
from fewbits.errors import FewbitsError
from fewbits.memory import available_bytes, gb
from fewbits.qtensor import CHUNK, QTensor
from fewbits.recipe import PRESETS, Choice, ModelFacts, Overrides, get
from fewbits.recipe.facts import LINEAR
from fewbits.sizes import Sizes

MENTIONED = 3  # recipes that would fit
PROMPT = 512  # tokens of a prompt that are computed together
FLOATS = ("F32", "F16", "BF16")
FULL_EVERY = {"gemma2": 2, "gemma3": 6}  # layers to each that sees all positions, where a configuration is silent
KV_BYTES = 2  # a key or value in the cache, float16


@dataclass(frozen=True)
class Row:
    """A model in one recipe. Sizes are 0 where `reason` says why it cannot be."""

    recipe: str
    container: str
    file_bytes: int = 0  # all files: weights, tokenizer, configuration
    weight_bytes: int = 0
    bits_per_weight: float = 0.0  # of all tensors
    linear_bits: float = 0.0  # of the linear layers: what quality follows
    total_bytes: int = 0  # of memory: weights, KV cache and working memory
    fits: bool = False
    notes: tuple[str, ...] = ()  # fallbacks, each with the number of tensors
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """A model in every recipe, from few bits to many, beside the memory there is."""

    model: str
    architecture: str
    parameters: int
    context: int
    memory_bytes: int
    memory_is_this_machines: bool  # nothing was said of memory: what is free here
    kv_bytes: int
    working_bytes: int
    rows: tuple[Row, ...]
    take: str | None
    why: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(model: str | Path | Checkpoint, memory_bytes: int | None = None, context: int = 4096,
         recipes: Sequence[str] | None = None, overrides: Overrides = None) -> Plan:
    """Size in every recipe, KV cache and working memory of `model`, what fits into `memory_bytes`, and what to take.

    `model` is a path in any format, a directory with only a config.json, or a hub id (its weights aren't fetched).
    Memory is what the model takes, not what the interpreter and its libraries take before it is loaded.

    Raises:
        FewbitsError: nothing readable there, or an unknown recipe.
    """
    if context < 1:
        raise FewbitsError(f"context is {context}; at least 1 token is needed")
    source = model if isinstance(model, Checkpoint) else _open(hub.locate(model, weights=False))
    if not source.entries:
        raise FewbitsError(f"{source.path}: holds no weights")
    facts = ModelFacts.of(source)
    kv, working = kv_bytes(facts, context), working_bytes(facts, context)
    memory = memory_bytes if memory_bytes is not None else available_bytes()
    sizes = Sizes(source)
    rows = [_row(name, source, facts, overrides, sizes, memory - kv - working) for name in recipes or PRESETS]
    rows.sort(key=lambda r: (bool(r.reason), r.linear_bits, r.weight_bytes))
    rows = [r if r.reason else replace(r, total_bytes=r.total_bytes + kv + working) for r in rows]
    take, why = _take(rows, source, facts, memory, kv + working)
    return Plan(str(source.path), source.architecture, facts.parameters, context, memory, memory_bytes is None, kv,
                working, tuple(rows), take, why)


def fitting(source: Checkpoint, memory_bytes: int) -> list[str]:
    """The best recipes, a few, that make a model smaller than it is as it is loaded, and fit into so much memory, with
    their sizes; none for a model that no recipe knows."""
    try:
        rows = plan(source, memory_bytes).rows
    except FewbitsError:
        return []
    found = [r for r in rows if r.fits and r.weight_bytes < source.nbytes and _for_loading(r.recipe)]
    return [f"{r.recipe} ({gb(r.total_bytes)})" for r in sorted(found, key=lambda r: -r.total_bytes)[:MENTIONED]]


def _for_loading(recipe: str) -> bool:
    """Whether its codec does without anything that only calibration knows."""
    codec = get(recipe).codec
    return codec is None or (codec.family != "float" and codec.blind == codec)


def _open(path: Path) -> Checkpoint:
    """The checkpoint at `path`; of a directory without weights, what its configuration says there would be."""
    if not path.is_dir() or any(path.glob("*.safetensors*")) or not (path / "config.json").is_file():
        return containers.open(path)
    config = read_json(path / "config.json")
    config.pop("quantization_config", None)
    facts = ModelFacts.from_config(config, str(path / "config.json"))
    files = {name: (path / name).read_bytes() for name in CARRIED if (path / name).is_file()}
    entries = {f.name: Entry(f.name, f.shape, f.codec, _absent) for f in facts.tensors}
    return Checkpoint(path, "transformers", config, entries, files)


def _absent() -> QTensor:
    raise FewbitsError("a plan has no weights to load")


def _row(name: str, source: Checkpoint, facts: ModelFacts, overrides: Overrides, sizes: Sizes, room: int) -> Row:
    recipe = get(name)
    try:
        choices = recipe.resolve(facts, overrides)
        goal = _goal(source, choices)
        container = containers.by_name(recipe.container)
        refusal = container.refusal(goal)
        if refusal:
            raise FewbitsError(f"{refusal[0].name}: {refusal[1]}")
        size = sizes.of(container, goal)
    except FewbitsError as error:
        return Row(recipe.name, recipe.container, reason=str(error))
    held = goal.nbytes + _decoded(goal)
    return Row(recipe.name, recipe.container, size, goal.nbytes, goal.nbytes * 8 / max(1, goal.parameters),
               _linear(goal, facts)[0], held, held <= room, notes=_notes(choices))


def _decoded(checkpoint: Checkpoint) -> int:
    """What experts take in memory beyond their packed size: they are decoded to float32 when a model is loaded."""
    packed = [e for e in checkpoint.entries.values() if e.codec.family != "float"]
    return sum(4 * e.parameters - e.nbytes for e in packed if len(e.shape) == 3 or experts.ONE.fullmatch(e.name))


def _goal(source: Checkpoint, choices: list[Choice]) -> Checkpoint:
    return replace(source, entries={c.name: Entry(c.name, c.shape, c.codec, _absent) for c in choices})


def _notes(choices: list[Choice]) -> tuple[str, ...]:
    """Each fallback once, with the number of tensors it happens to."""
    found = [c.note for c in choices if c.note]
    return tuple(f"{note} ({found.count(note)} tensors)" for note in dict.fromkeys(found))


# memory ---------------------------------------------------------------------------------------------------------------
def kv_bytes(facts: ModelFacts, context: int) -> int:
    """Keys and values of `context` tokens in float16; a sliding layer holds no more than its window."""
    if not _generates(facts):
        return 0
    per_token = 2 * facts.kv_heads * facts.head_dim * KV_BYTES
    return per_token * sum(min(context, window or context) for window in windows(facts))


def _generates(facts: ModelFacts) -> bool:
    """Whether it is a decoder: what writes text keeps a cache."""
    named = (facts.config.get("architectures") or [""])[0]
    return named.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def windows(facts: ModelFacts) -> list[int | None]:
    """The window of every layer that attends, None where it sees all positions."""
    config = facts.config.get("text_config") or facts.config
    window = config.get("sliding_window") if config.get("use_sliding_window") is not False else None
    kinds = config.get("layer_types")
    if kinds is None and facts.arch in FULL_EVERY:
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or FULL_EVERY[facts.arch]
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(facts.layers)]
    if kinds is None:
        return [window] * facts.layers
    sliding = {"sliding_attention": config.get("sliding_window"), "full_attention": None}
    return [sliding[k] for k in kinds if k in sliding]


def working_bytes(facts: ModelFacts, context: int) -> int:
    """Activations of 512 tokens through the widest layer, their attention scores, the largest weight decoded (often
    the output head), what decoding it holds besides, and the logits of one token, all in float32."""
    tokens = min(PROMPT, context)
    wide = [f.shape[-2] for f in facts.tensors if f.role in LINEAR and f.role.startswith("ffn")]
    inner = max(wide or [4 * facts.hidden])
    queries = (facts.heads + 2 * facts.kv_heads) * facts.head_dim
    activations = tokens * (3 * facts.hidden + max(queries + facts.heads * context, 3 * inner))
    head = "output" if facts.has_output else "token_embd"
    largest = max([f.shape[-2] * f.shape[-1] for f in facts.tensors if f.role in LINEAR or f.role == head] or [0])
    return 4 * (activations + largest + 4 * CHUNK + facts.number("vocab_size"))


# choosing -------------------------------------------------------------------------------------------------------------
def _take(rows: list[Row], source: Checkpoint, facts: ModelFacts, memory: int, beside: int) -> tuple[str | None, str]:
    """The recipe of most bits in its linear layers that fits; the smaller of two that are equal.

    No more bits than the source has, and no other float type of as many: they would hold nothing new.
    """
    bits, own = _linear(source, facts)
    total = source.nbytes + beside
    if own not in FLOATS and total <= memory:
        return None, (f"it is quantized already, to {bits:.2f} bits in its linear layers, and takes {_gb(total)} of "
                      f"{_gb(memory)} as it is: quantizing again would only add error")
    useful = [r for r in rows if not r.reason and (r.linear_bits < bits - 0.01 or _float(r.recipe) == own)]
    fitting = [r for r in useful if r.fits]
    if not useful:
        return None, "no recipe takes this model" if rows[0].reason else f"none has less than its {bits:.2f} bits"
    if not fitting:
        least = min(useful, key=lambda r: r.total_bytes)
        return None, f"nothing fits into {_gb(memory)}: the smallest, {least.recipe}, takes {_gb(least.total_bytes)}"
    best = max(fitting, key=lambda r: (r.linear_bits, -r.total_bytes))
    above = [r for r in useful if r.linear_bits > best.linear_bits]
    why = f"{best.linear_bits:.2f} bits in the linear layers, {_gb(best.total_bytes)} of {_gb(memory)}"
    if above:
        following = min(above, key=lambda r: r.linear_bits)
        return best.recipe, f"{why}; the next better, {following.recipe}, takes {_gb(following.total_bytes)}"
    return best.recipe, f"{why}; nothing asked for is better for this source"


def _linear(checkpoint: Checkpoint, facts: ModelFacts) -> tuple[float, str]:
    """Bits per weight of the linear layers (of all tensors where none is known to be one), and their main codec."""
    linear = {f.name for f in facts.tensors if f.role in LINEAR}
    found = [e for n, e in checkpoint.entries.items() if experts.stack_of(n) in linear] or list(
        checkpoint.entries.values())
    kinds: Counter[str] = Counter()
    for entry in found:
        kinds[entry.codec.name] += entry.parameters
    return 8 * sum(e.nbytes for e in found) / max(1, kinds.total()), kinds.most_common(1)[0][0]


def _float(recipe: str) -> str | None:
    """The float type that a recipe puts everything into, or None."""
    codec = get(recipe).codec
    return codec.name if codec and codec.family == "float" else None


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
