"""Where a model is: a path, an id on the Hugging Face hub (`org/name`), or one GGUF file of such a repository
(`org/name:Q4_K_M`, `org/name:file.gguf`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fewbits.downloading import download
from fewbits.errors import FewbitsError

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")
_DESCRIPTIONS = ["*.json", "*.model", "*.txt", "*.jinja"]
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")
SHOWN = 30  # names in an error
T = TypeVar("T")


def locate(model: str | Path, weights: bool = True, code: bool = False) -> Path:
    """The local path of `model`; a hub id is downloaded, without its weights if they are not wanted, and with Python
    files only if its `code` is.

    `org/name:TAG` is the GGUF file of the repository whose name holds TAG (all parts of a split one; the first is
    returned), `org/name:FILE.gguf` that file. Downloads resume where they were cut off.

    Raises:
        FewbitsError: neither a path nor an id, an id that cannot be downloaded, or one that leaves a choice open.
    """
    path = Path(model)
    if path.exists():
        return path
    match = _ID.fullmatch(model) if isinstance(model, str) else None
    if match is None or match[1].startswith("."):
        raise FewbitsError(f"{model}: no such file or directory",
                           "give a path, or a hub id such as org/name or org/name:Q4_K_M")
    repository, tag = match.groups()
    if tag:
        return _fetch(repository, choose(repository, tag, _files(repository)))
    return _snapshot(repository, weights, code)


def choose(repository: str, tag: str, files: list[str]) -> list[str]:
    """The GGUF file that `tag` means, of the names in a repository: itself, or all its parts in order.

    A quantization's name must stand in the file's name as a word: Q4_K is not in `model-Q4_K_M.gguf`.

    Raises:
        FewbitsError: none, several, or one of which parts are missing; the message or the hint lists the choices.
    """
    models = _models(files)
    if tag.lower().endswith(".gguf"):
        found = [name for name, parts in models.items() if tag in (name, *parts)]
        found = [tag] if not found and tag in files else found  # one that is no model by its name
    else:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [name for name in models if word.search(name)]
    if not models:
        raise FewbitsError(f"{repository}: holds no GGUF files", f"for the whole repository leave out :{tag}")
    if len(found) != 1:
        choices = found or list(models)
        raise FewbitsError(f"{repository}: {len(found) or 'no'} GGUF files are {tag!r}", _choices(repository, choices))
    parts = models.get(found[0], found)
    last = _PART.search(parts[-1])
    if last and [f"{i:05}" for i in range(1, int(last[2]) + 1)] != [m[1] for m in map(_PART.search, parts) if m]:
        raise FewbitsError(f"{repository}: {found[0]} has {len(parts)} of {int(last[2])} parts there")
    return parts


def _models(files: list[str]) -> dict[str, list[str]]:
    """GGUF models by name, each with its files; projectors of images and importance matrices are none."""
    out: dict[str, list[str]] = {}
    for name in sorted(files):
        plain = PurePosixPath(name).name.lower()
        if plain.endswith(".gguf") and not plain.startswith("mmproj") and "imatrix" not in plain:
            out.setdefault(_PART.sub("", name), []).append(name)
    return out


def _choices(repository: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "name one: " + ", ".join(f"{repository}:{name}" for name in names[:SHOWN]) + more


def _snapshot(repository: str, weights: bool, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_DESCRIPTIONS, *(["*.py"] if code else [])]
    folder = _try(repository, lambda: Path(snapshot_download(repository, allow_patterns=wanted)))
    files = _files(repository) if weights or not (folder / "config.json").exists() else []
    tensors = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    if weights and tensors:
        return _fetch(repository, tensors).parent
    if weights or not (folder / "config.json").exists():
        models = _models(files)
        if len(models) == 1:
            return _fetch(repository, next(iter(models.values())))
        if models:
            raise FewbitsError(f"{repository}: holds {len(models)} GGUF models and no safetensors",
                               _choices(repository, list(models)))
    return folder


def _files(repository: str) -> list[str]:
    """Names of all files of a repository; without a network, of those that are here already."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _try(repository, lambda: list_repo_files(repository))
    except FewbitsError as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # the hub has answered
            raise
        try:
            folder = Path(snapshot_download(repository, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            raise error from None
        return [str(f.relative_to(folder).as_posix()) for f in folder.rglob("*") if f.is_file()]


def _fetch(repository: str, names: list[str]) -> Path:
    """The local path of the first of some files, all of which are downloaded."""
    return [_try(repository, lambda name=name: download(repository, name)) for name in names][0]  # type: ignore[misc]


def failures() -> tuple[type[BaseException], ...]:
    """What a request to the hub may raise."""
    from huggingface_hub.errors import HfHubHTTPError

    client = HfHubHTTPError.__mro__[1]  # the base of all errors of the client that huggingface_hub works with
    return client, OSError, ValueError


def _try(repository: str, ask: Callable[[], T]) -> T:
    """What the hub answers.

    Raises:
        FewbitsError: it refuses, or cannot be reached.
    """
    try:
        return ask()
    except FewbitsError:
        raise
    except Exception as error:
        if not isinstance(error, failures()):
            raise
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise FewbitsError(f"{repository}: no such path here, and it could not be downloaded: {first}",
                           "check the spelling and the network, or give a local path") from error
