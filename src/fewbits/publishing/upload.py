"""Files to the hub, by huggingface_hub: what is there already is not sent again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fewbits import hub
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError

File = tuple[str, Path | bytes]  # its name in the repository, and what it holds
T = TypeVar("T")


def check(repository: str, token: bool = True) -> None:
    """Refuse what is no id, and an upload without a token.

    Raises:
        FewbitsError: either of these.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise FewbitsError(f"{repository}: no id of the hub: {str(error).splitlines()[0]}",
                           "give one as org/name") from None
    if "/" not in repository:
        raise FewbitsError(f"{repository}: no id of the hub", "give one as org/name")
    if token and get_token() is None:
        raise FewbitsError(f"{repository}: no token to write to the hub with",
                           "set HF_TOKEN, or run: hf auth login")


def upload(repository: str, files: Sequence[File], *, private: bool = False, revision: str | None = None,
           message: str, progress: Progress | None = None) -> str:
    """Send files in one commit, to a repository that is made if it isn't there; the commit's address.

    Large ones go first, one by one: an upload that is cut off leaves those on the hub, and the next sends the rest.

    Raises:
        FewbitsError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, ask = HfApi(library_name="fewbits"), _Asking(repository)
    ask(lambda: api.create_repo(repository, private=private, exist_ok=True))
    if revision is not None:
        ask(lambda: api.create_branch(repository, branch=revision, exist_ok=True))
    additions = [CommitOperationAdd(name, data) for name, data in files]
    sizes = [data.stat().st_size if isinstance(data, Path) else len(data) for _, data in files]
    done, total = 0, sum(sizes)
    for addition, nbytes in zip(additions, sizes, strict=True):
        if progress:
            progress(f"uploading: {addition.path_in_repo}", done, total)
        ask(lambda addition=addition: api.preupload_lfs_files(  # type: ignore[misc]
            repository, [addition], revision=revision, free_memory=False))
        done += nbytes
    if progress:
        progress("uploading: commit", done, total)
    return str(ask(lambda: api.create_commit(repository, additions, commit_message=message,
                                             revision=revision)).commit_url)


class _Asking:
    """Asks the hub; its errors become one line."""

    def __init__(self, repository: str):
        self.repository = repository

    def __call__(self, ask: Callable[[], T]) -> T:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return ask()
        except FewbitsError:
            raise
        except Exception as error:
            if not isinstance(error, (*hub.failures(), RuntimeError)):
                raise
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            first = (str(cause) or type(cause).__name__).strip().splitlines()[0]
            hint = ("does the token allow to write there?" if isinstance(cause, HfHubHTTPError)
                    else "check the network: the same command sends what is missing")
            raise FewbitsError(f"{self.repository}: not published: {first}", hint) from error
