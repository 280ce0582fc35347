"""Put the selected files into a repository of the hub, in one commit, and send nothing twice."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import disable_progress_bars

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.share.hub import explain_hub_errors
from obliteratus.share.selection import Selection, Upload

MB = 10**6


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    repo: str
    url: str
    """Of the repository."""
    commit: str
    private: bool
    created: bool
    """Whether the repository was made for it."""


def check_name(repo: str) -> None:
    """Raise UserError unless a repository may be called so."""
    owner, slash, name = repo.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise UserError(f"{repo}: this is no name of a repository; give owner/name")
    with explain_hub_errors(repo):
        validate_repo_id(repo)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, which may not be there yet."""

    name: str
    api: HfApi
    private: bool | None
    """None if there is no such repository."""


def find_repository(repo: str) -> Repository:
    """Look the repository up. Raises UserError without a token, and if the hub refuses, fails or is out of reach."""
    with explain_hub_errors(repo):
        token = get_token()
        if not token:
            raise LocalTokenNotFoundError
        api = HfApi(token=token)
        return Repository(repo, api, find_visibility(api, repo))


def push_files(place: Repository, selection: Selection, public: bool) -> Pushed:
    """Upload the files, and return where they are. A repository that is not there is made first.

    Files whose content is on the hub already, such as those of an interrupted push, are not sent again, and the
    repository shows them only once all are there. public: of a repository that is made. Raises UserError if the hub
    refuses, fails or is out of reach.
    """
    disable_progress_bars()  # the client's own would stand in the middle of ours
    repo, created = place.name, place.private is None
    if place.private == public:
        note("push", f"{repo} exists and is {'private' if place.private else 'public'}; it stays so")
    with explain_hub_errors(repo):
        if created:
            place.api.create_repo(repo, private=not public, exist_ok=True)
        commit = send_files(place.api, repo, selection)
    private = not public if place.private is None else place.private
    return Pushed(repo, f"{place.api.endpoint}/{repo}", commit, private, created)


def find_visibility(api: HfApi, repo: str) -> bool | None:
    """Return whether the repository is private, or None if there is none.

    A token that the hub refuses raises, although the client then speaks of a missing repository too.
    """
    try:
        return bool(api.repo_info(repo).private)
    except RepositoryNotFoundError as error:
        if error.response is not None and error.response.status_code == 404:
            return None
        raise


def send_files(api: HfApi, repo: str, selection: Selection) -> str:
    """Send large files one by one, then commit all, and return the commit."""
    operations = [CommitOperationAdd(upload.name, upload.path) for upload in selection.uploads]
    with progress("PUSH sent, MB", sum(map(_count, selection.uploads))) as advance:
        for upload, operation in zip(selection.uploads, operations, strict=True):
            api.preupload_lfs_files(repo, [operation], free_memory=False)
            advance(_count(upload))
        made = api.create_commit(repo, operations, commit_message=_describe(selection))
    return str(made.oid)


def _count(upload: Upload) -> int:
    return -(-upload.bytes // MB)


def _describe(selection: Selection) -> str:
    run = selection.run
    return f"{run.recipe.name or 'A recipe'} on {run.source['id']}, by OBLITERATUS {run.versions['obliteratus']}"
