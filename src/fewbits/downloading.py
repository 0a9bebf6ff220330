"""Downloads that continue where a killed one stopped, into the cache that huggingface_hub keeps.

huggingface_hub drops what it has of a file when it is interrupted (1.x and later). So a file's bytes are fetched here
beside the place that its cache has for them, `blobs/<etag>`; what is there, it links and does not fetch again.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import urlparse

from fewbits.errors import FewbitsError

LEAST = 1 << 18  # bytes of a file that is worth continuing
MOST = 50 * 10**9  # larger ones the hub serves to its own client alone


def download(repository: str, name: str) -> Path:
    """The local path of a file of a hub repository.

    Raises:
        FewbitsError: what arrived has another checksum than the hub says.
        OSError: the network, the hub or the disk fails.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.file_download import repo_folder_name

    if not HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(repository, name), str):
        url = hf_hub_url(repository, name)
        found = get_hf_file_metadata(url)
        if found.etag and found.etag.isalnum() and found.size and LEAST <= found.size <= MOST:
            blobs = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
            _fetch(blobs / found.etag, found.location, found.size, urlparse(url).netloc, f"{repository}: {name}")
    return Path(hf_hub_download(repository, name))


def _fetch(blob: Path, url: str, size: int, hub: str, what: str) -> None:
    from filelock import FileLock
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.partial")
    with FileLock(f"{partial}.lock"):
        if blob.exists():
            return
        headers = build_hf_headers()
        if urlparse(url).netloc != hub:
            headers.pop("authorization", None)  # signed by its own address
        have = partial.stat().st_size if partial.exists() else 0
        if have > size:
            partial.unlink()
            have = 0
        with open(partial, "ab") as file:
            http_get(url, file, resume_size=have, headers=headers, expected_size=size)
        if re.fullmatch(r"[0-9a-f]{64}", blob.name) and _sha256(partial) != blob.name:  # others are git's own ids
            partial.unlink()
            raise FewbitsError(f"{what}: arrived with another checksum than the hub says", "try again")
        os.replace(partial, blob)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()
