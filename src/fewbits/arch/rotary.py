"""How far pairs of columns turn from one position to the next: a function for every `rope_type`, in float32.

They are what Transformers computes (`modeling_rope_utils`), in its order of operations. Settings are those that
`rope.parameters` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Config = dict[str, Any]
Array = np.ndarray


@dataclass(frozen=True)
class Rotation:
    """Radians from one position to the next, `[pairs]`; `stretched` in sequences longer than `original` positions."""

    frequencies: Array
    factor: float = 1.0  # of cosines and sines
    stretched: Array | None = None
    original: int = 0


def rotation(settings: Config, width: int, context: int) -> Rotation:
    """The rotation of heads of `width` columns, in a model of `context` positions.

    Raises:
        ValueError: a `rope_type` that is not known, or a setting that it needs is missing or makes no sense.
    """
    kind = settings["rope_type"]
    if kind not in KINDS:
        raise ValueError(f"rope type {kind!r} is not known; there are {', '.join(KINDS)}")
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            found = KINDS[kind](settings, width, context)
    except KeyError as error:
        raise ValueError(f"rope type {kind!r} needs {error}") from None
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"rope type {kind!r}: {error}") from None
    if not np.isfinite(found.frequencies).all() or not math.isfinite(found.factor):
        raise ValueError(f"rope type {kind!r}: its frequencies are not finite")
    return found


def _rotated(settings: Config, width: int) -> int:
    part = settings.get("partial_rotary_factor", 1.0)
    if not 0 <= part <= 1:
        raise ValueError(f"partial_rotary_factor is {part}")
    return int(width * part)


def _wavelengths(settings: Config, columns: int, of: int | None = None) -> Array:
    """theta^(i / width) for every second column i: positions to a turn, over 2 pi. Torch rounds it to 1 or 2 ulp."""
    exponents = np.arange(0, columns, 2).astype(np.float32) / (of or columns)
    return (float(np.float32(settings["rope_theta"])) ** exponents.astype(float)).astype(np.float32)


def _default(settings: Config, width: int, context: int) -> Rotation:
    return Rotation(1 / _wavelengths(settings, _rotated(settings, width)))


def _linear(settings: Config, width: int, context: int) -> Rotation:
    return Rotation(_default(settings, width, context).frequencies / settings["factor"])


def _proportional(settings: Config, width: int, context: int) -> Rotation:
    """Whole heads are rotated, the last pairs by nothing."""
    turning = _rotated(settings, width) // 2
    frequencies = 1 / _wavelengths(settings, 2 * turning, width)
    return Rotation(np.pad(frequencies, (0, width // 2 - turning)) / settings.get("factor", 1.0))


def _llama3(settings: Config, width: int, context: int) -> Rotation:
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    original = settings.get("original_max_position_embeddings") or context
    frequencies = _default(settings, width, context).frequencies
    lengths = 2 * math.pi / frequencies
    scaled = np.where(lengths > original / low, frequencies / factor, frequencies)
    smooth = (original / lengths - low) / (high - low)
    between = ~(lengths < original / high) & ~(lengths > original / low)
    return Rotation(np.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled))


def _yarn(settings: Config, width: int, context: int) -> Rotation:
    columns = _rotated(settings, width)
    original = settings.get("original_max_position_embeddings") or context
    factor = settings["factor"] if settings.get("factor") is not None else context / original
    attention, scale, all_scale = (settings.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is None:
        attention = _mscale(factor, scale) / _mscale(factor, all_scale) if scale and all_scale else _mscale(factor, 1)
    low, high = (_column_that_turns(settings.get(key) or turns, columns, settings["rope_theta"], original)
                 for key, turns in (("beta_fast", 32), ("beta_slow", 1)))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, columns - 1)
    if low == high:
        high += 0.001
    kept = 1 - np.clip((np.arange(columns // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    lengths = _wavelengths(settings, columns)
    return Rotation(1 / (factor * lengths) * (1 - kept) + 1 / lengths * kept, float(attention))


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _column_that_turns(turns: float, columns: int, theta: float, original: int) -> float:
    """Which column, of pairs, turns so often within the original context."""
    return columns * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _longrope(settings: Config, width: int, context: int) -> Rotation:
    original = settings.get("original_max_position_embeddings") or context
    factor, attention = settings.get("factor"), settings.get("attention_factor")
    factor = context / original if factor is None else factor
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    lengths = _wavelengths(settings, _rotated(settings, width))
    short, long = (1 / (np.array(settings[key], np.float32) * lengths) for key in ("short_factor", "long_factor"))
    return Rotation(short, float(attention), long, int(original))


KINDS: dict[str, Callable[[Config, int, int], Rotation]] = {
    "default": _default, "linear": _linear, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope,
    "dynamic": _default,  # scales in sequences that are longer than the model's context, which there are none of here
    "proportional": _proportional,
}
