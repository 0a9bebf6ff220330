"""Where a model is: a path, or an id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from fewbits.errors import FewbitsError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DESCRIPTIONS = ["*.json", "*.model", "*.txt", "*.jinja"]


def locate(model: str | Path, weights: bool = True) -> Path:
    """The local path of `model`; a hub id is downloaded, without its weights if they are not wanted.

    Raises:
        FewbitsError: neither a path nor an id, or an id that cannot be downloaded.
    """
    path = Path(model)
    if path.exists():
        return path
    if not isinstance(model, str) or not _ID.fullmatch(model) or model.startswith("."):
        raise FewbitsError(f"{model}: no such file or directory", "give a path, or a hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        patterns = [*_DESCRIPTIONS, "*.safetensors"] if weights else _DESCRIPTIONS
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise FewbitsError(f"{model}: no such path here, and it could not be downloaded: {first}",
                           "check the spelling and the network, or give a local path") from error
