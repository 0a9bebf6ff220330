"""Names and shapes of a model's tensors against its configuration."""

from __future__ import annotations

from fewbits import arch
from fewbits.checkpoint import Checkpoint
from fewbits.checks import Finding, error, warning
from fewbits.codecs.base import Shape
from fewbits.errors import FewbitsError


def check(checkpoint: Checkpoint) -> list[Finding]:
    """What the configuration says there would be, beside what there is.

    Of a family outside the table, Transformers' own model is asked, and only shapes are compared: its files may name
    tensors in other ways.
    """
    family = arch.lookup(checkpoint.config)
    try:
        wanted = _of_table(family, checkpoint) if family else _of_transformers(checkpoint)
    except KeyError as problem:
        return [error("config.json", f"no entry {problem}, which {checkpoint.architecture} needs")]
    except FewbitsError as problem:
        return [warning("config.json", f"shapes are not compared: {problem}")]
    except (ArithmeticError, TypeError, ValueError) as problem:
        return [error("config.json", f"does not describe a model: {problem}")]
    prefix = family.base if family and not wanted.keys() & checkpoint.entries.keys() else ""
    there = {prefix + name: entry.shape for name, entry in checkpoint.entries.items()}
    found = [error(name, f"is {list(there[name])}; by the configuration it would be {list(shape)}")
             for name, shape in wanted.items() if shape and name in there and there[name] != shape]
    if family:
        found += [error(name, "is missing") for name in wanted if name not in there]
        found += [warning(name, f"is no tensor of {family.name}") for name in there
                  if name not in wanted and not name.endswith(family.skipped)]
    elif not wanted.keys() & there.keys():
        found.append(warning("config.json", f"names none of the tensors: {next(iter(wanted), 'nothing')} in the model, "
                                            f"{next(iter(there), 'nothing')} in the files"))
    return found


def _of_table(family: arch.Architecture, checkpoint: Checkpoint) -> dict[str, Shape]:
    config = arch.complete(family, checkpoint.config, checkpoint.entries)
    return {t.hf: t.shape(config) for t in arch.tensors(family, config)}


def _of_transformers(checkpoint: Checkpoint) -> dict[str, Shape]:
    from fewbits.recipe import targets
    from fewbits.runtime.build import empty_model

    found = targets.shapes(empty_model(checkpoint.config, str(checkpoint.path)))
    renamed = targets.match({name: name for name in found}, set(checkpoint.entries))
    return {name: found[original] for name, original in renamed.items()} or found
