"""The values of one tensor: whether it loads and decodes, and whether the numbers make sense. A few rows at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fewbits.checkpoint import Entry
from fewbits.checks import Finding, error, warning
from fewbits.codecs.base import decode_units
from fewbits.codecs.floats import Float
from fewbits.errors import FewbitsError
from fewbits.qtensor import CHUNK, QTensor

ABSURD = 1e4  # no weight of a trained model is near it; float16 ends at 65504


def check(entry: Entry) -> list[Finding]:
    """Load and decode a tensor, and count what is not finite."""
    try:
        tensor = entry.load()
        reason = _differs(entry, tensor)
        return [error(entry.name, reason)] if reason else list(_numbers(entry, tensor))
    except FewbitsError as problem:
        return [error(entry.name, str(problem))]
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        return [error(entry.name, f"cannot be decoded as {entry.codec.name}: {problem}")]


def _differs(entry: Entry, tensor: QTensor) -> str | None:
    """How the planes are not what the codec says, or None."""
    if tensor.shape != entry.shape or tensor.codec != entry.codec:
        return (f"is {tensor.codec.name} {list(tensor.shape)} once loaded, announced as {entry.codec.name} "
                f"{list(entry.shape)}")
    wanted = entry.codec.planes(entry.shape)
    if wanted.keys() != tensor.planes.keys():
        return f"has the parts {', '.join(tensor.planes)}; {', '.join(wanted)} are expected"
    for name, (dtype, shape) in wanted.items():
        plane = tensor.planes[name]
        if str(plane.dtype) != f"torch.{dtype}" or tuple(plane.shape) != tuple(shape):
            return f"{name} is {plane.dtype} {list(plane.shape)}; {dtype} {list(shape)} is expected"
    return None


def _parts(tensor: QTensor) -> Iterator[QTensor]:
    if not tensor.codec.rows_apart(tensor.shape) or not tensor.shape:
        yield tensor
        return
    rows, columns = tensor.codec.matrix(tensor.shape)
    step = max(1, CHUNK // max(1, columns))
    for at in range(0, rows, step):
        yield tensor.part(slice(at, at + step))


def _numbers(entry: Entry, tensor: QTensor) -> Iterator[Finding]:
    bad: Counter[str] = Counter()
    low, high = float("inf"), float("-inf")
    for part in _parts(tensor):
        codes, params = part.unpack()
        if not isinstance(entry.codec, Float):
            for name, values in params.items():
                if values.is_floating_point():
                    bad[name] += int((~values.isfinite()).sum())
        decoded = decode_units(codes, entry.codec, params)
        finite = decoded.isfinite()
        if not bool(finite.all()):
            bad["NaN"] += int(decoded.isnan().sum())
            bad["infinite"] += int(decoded.isinf().sum())
            decoded = decoded[finite]
        if decoded.numel():
            smallest, largest = decoded.aminmax()
            low, high = min(low, float(smallest)), max(high, float(largest))
    total = entry.parameters
    for kind in ("NaN", "infinite"):
        if bad[kind]:
            yield error(entry.name, f"{bad[kind]} of {total} values are {kind}")
    for name in sorted(bad.keys() - {"NaN", "infinite"}):
        if bad[name]:
            yield error(entry.name, f"{bad[name]} of the {name} values of {entry.codec.name} are NaN or infinite")
    if max(high, -low) > ABSURD:
        yield warning(entry.name, f"its largest value is {high if high > -low else low:.4g}")
    if len(entry.shape) > 1 and total > 1 and low == high:
        yield warning(entry.name, f"every value is {low:g}")
