"""Publishes a model folder on the Hub: checks it, compares it with the repository, and uploads it in one commit."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import FolderError, HubError, hub_error, is_transient, status_of, wait_asked_for
from ..files import sha256_of
from .card import load_from
from .check import Contents, check_code, check_loading, list_files, with_code
from .results import CARD
from .sections import has_results, holes, license_note

MAIN = constants.DEFAULT_REVISION
# The Hub uses LFS for files above this size in bytes, and for files whose first bytes are not text.
LARGE = 10 << 20
SAMPLE = 512
# Seconds between attempts, unless the Hub asks for another wait. Publishing fails if the Hub asks for more than
# LONGEST_WAIT, or after PATIENCE in total.
WAITS = (1.0, 2.0, 4.0)
LONGEST_WAIT, PATIENCE = 60.0, 120.0
# Files that transformers prefers, and the files that it then ignores. An adapter names another base model.
READ_BEFORE = {
    "model.safetensors": "model.safetensors.index.json",
    "processor_config.json": "preprocessor_config.json",
    "adapter_config.json": "config.json",
}
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Change:
    """A file of the folder, compared with the repository.

    Args:
        name: its path in the repository.
        content: its local path, or its bytes.
        size: in bytes.
        lfs: whether the Hub stores it in LFS; an estimate for new and changed files.
        state: "new", "changed" or "same".
    """

    name: str
    content: Path | bytes
    size: int
    lfs: bool
    state: str


@dataclass(frozen=True)
class Plan:
    """What publishing a folder would do.

    Args:
        repository, revision: the target.
        exists, has_branch: whether the repository and the revision exist.
        private: whether the repository is private, or None if it does not exist.
        head: the current commit of the revision.
        changes: every file of the folder.
        others: files in the repository that are not in the folder; they are kept.
    """

    repository: str
    revision: str
    exists: bool
    has_branch: bool
    private: bool | None
    head: str | None
    changes: list[Change]
    others: list[str]

    @property
    def to_send(self) -> list[Change]:
        """The new and changed files."""
        return [change for change in self.changes if change.state != "same"]


def check_folder(folder: Path, *, load: bool = True) -> tuple[Contents, list[str]]:
    """Checks that a folder can be published.

    A folder without any model code, such as `examples/digits`, is published with this package's code; the folder itself
    is not changed.

    Args:
        folder: a model folder.
        load: also load the model in a clean subprocess.

    Returns:
        The folder's files, and notes for the user.

    Raises:
        FolderError: the folder cannot be published; one sentence.
        OSError: a file cannot be read.
    """
    contents = list_files(folder)
    without_code = not any(file.name.endswith(".py") for file in contents.files)
    if without_code:
        contents = with_code(contents)
    check_code(contents)
    card = (folder / CARD).read_text(encoding="utf-8-sig")
    found = holes(card, [file.name for file in contents.files])
    if found:
        more = f" And {len(found) - 1} more." if len(found) > 1 else ""
        raise FolderError(f"{folder / CARD} cannot be published yet: {found[0]}{more}")
    notes = [f"left out: {', '.join(contents.left_out)}"] if contents.left_out else []
    if without_code:
        notes.append(f"{folder} has no model code: that of hf_faim2f is published with it")
    if license := license_note(card):
        notes.append(license)
    if not has_results(card):
        notes.append("the card has no results: `faim2f evaluate` measures them")
    if load:
        check_loading(contents)
    return contents, notes


def make_plan(api: HfApi, contents: Contents, repository: str, revision: str = MAIN, *, private: bool = False) -> Plan:
    """Compares a folder with a repository, without writing to it.

    The generated snippets of the published card load `repository` (and `revision`, unless it is the main branch),
    regardless of what they load in the folder.

    Args:
        api: the Hub's client.
        contents: the files of a checked folder.
        repository: "owner/name".
        revision: a branch.
        private: whether a new repository would be made private.

    Raises:
        HubError: the Hub cannot be reached, or rejects the request; the repository's name has no owner; it has a file
            that would be loaded instead of one of the folder's; or `private` is set, and it exists and is public.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise hub_error(error, repository) from None
    if "/" not in repository:
        raise HubError(f"{repository!r} names no owner: write OWNER/{repository}, with your user name or organization.")
    remote, exists, has_branch, is_private, head = _remote(api, repository, revision)
    if exists and private and not is_private:
        raise HubError(f"{repository} exists and is public: make it private on the Hub first, or leave out --private.")
    changes = []
    for file in contents.files:
        content: Path | bytes = file.path
        if file.name == CARD:
            text = file.path.read_bytes().decode("utf-8-sig")
            content = load_from(text, repository, revision if revision != MAIN else None).encode("utf-8")
        size = len(content) if isinstance(content, bytes) else file.size
        there = remote.get(file.name)
        state = "new" if there is None else "same" if _is_same(content, size, there) else "changed"
        lfs = bool(there.lfs) if there is not None and state == "same" else _is_large(content, size)
        changes.append(Change(file.name, content, size, lfs, state))
    names = {file.name for file in contents.files} | {".gitattributes"}
    others = sorted(set(remote) - names)
    for first, own in READ_BEFORE.items():
        if first in others and own in names:
            raise HubError(
                f"{repository} has {first}, which transformers would load instead of the {own} of {contents.folder}: "
                "delete that file on the repository's page, or choose another repository."
            )
    return Plan(repository, revision, exists, has_branch, is_private, head, changes, others)


def publish(
    contents: Contents, repository: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> tuple[str, list[Change]]:
    """Uploads a folder's files in one commit, and verifies their hashes on the Hub.

    An interrupted upload creates no commit; the next attempt skips the large files that were uploaded before.

    Args:
        contents: the files of a checked folder.
        repository: "owner/name"; created if it does not exist.
        private: make a new repository private.
        revision: a branch; created if it does not exist.
        message: the commit message.

    Returns:
        The branch's commit, and the uploaded files; none if the repository was up to date.

    Raises:
        HubError: publishing failed; one sentence. The repository has no partial commit.
    """
    if get_token() is None:
        raise HubError("There is no token to write to the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    api, branch = HfApi(), revision or MAIN
    sent: list[Change] = []

    def attempt() -> Plan:
        plan = make_plan(api, contents, repository, branch, private=private)
        if not plan.exists or not plan.has_branch:
            _check_metadata(api, plan)
        if not plan.exists:
            api.create_repo(repository, private=private, exist_ok=True)
        if not plan.has_branch and branch != MAIN:
            api.create_branch(repository, branch=branch, exist_ok=True)
        if not plan.exists or not plan.has_branch:
            plan = make_plan(api, contents, repository, branch)
        if plan.to_send:
            operations = [
                CommitOperationAdd(
                    path_in_repo=change.name,
                    path_or_fileobj=change.content if isinstance(change.content, bytes) else str(change.content),
                )
                for change in plan.to_send
            ]
            sent[:] = plan.to_send  # also if the answer is lost; another attempt then has nothing to send
            # New operations for each attempt: huggingface_hub rejects those of a commit whose response was lost.
            api.create_commit(
                repository,
                operations,
                commit_message=message or f"Upload {contents.folder.resolve().name}",
                revision=branch,
                parent_commit=plan.head,
            )
        return make_plan(api, contents, repository, branch)

    after = _persist(attempt, repository)
    damaged = [change.name for change in after.to_send]
    if damaged:
        raise HubError(
            f"After the commit, {damaged[0]} has another hash on the Hub than here: it changed meanwhile, or was "
            "damaged during the upload; run the same command again."
        )
    return str(after.head), sent


def _check_metadata(api: HfApi, plan: Plan) -> None:
    """Lets the Hub check the card's metadata, as it does before a commit, so that no empty repository is left behind.

    Raises:
        ValueError: the Hub rejects it, such as a license that it does not know.
    """
    (card,) = (change.content for change in plan.changes if change.name == CARD)
    text = card.decode("utf-8") if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    # `create_commit` sends this request. `ModelCard.validate` sends it to huggingface.co in huggingface_hub before 1.0.
    api._validate_yaml(text, repo_type="model")


def _persist(attempt: Callable[[], _Result], repository: str) -> _Result:
    """Calls `attempt`, and retries after transient failures of the Hub or the network."""
    started = time.monotonic()
    waits = iter(WAITS)
    while True:
        try:
            return attempt()
        except HubError as error:
            if error.__cause__ is None or not is_transient(error.__cause__):
                raise
            cause: BaseException = error.__cause__
        # The HTTP libraries that huggingface_hub uses have no common base class.
        except Exception as error:
            if not is_transient(error):
                raise hub_error(error, repository) from error
            cause = error
        wait = next(waits, None)
        asked = wait_asked_for(cause)
        if wait is None or (asked or 0) > LONGEST_WAIT or time.monotonic() - started > PATIENCE:
            raise hub_error(cause, repository) from cause
        time.sleep(asked if asked is not None else wait)


def _remote(api: HfApi, repository: str, revision: str) -> tuple[dict[str, Any], bool, bool, bool | None, str | None]:
    """The repository's files, whether it and the revision exist, whether it is private, and the head commit."""
    try:
        try:
            info = api.repo_info(repository, revision=revision)
        except RepositoryNotFoundError as error:
            # The Hub returns 401 both for an invalid token and for a repository that does not exist. whoami raises for
            # the former.
            if status_of(error) == 401 and get_token() is not None:
                api.whoami()
            return {}, False, False, None, None
        except RevisionNotFoundError:
            main = api.repo_info(repository)
            return _tree(api, repository, MAIN), True, False, main.private, main.sha
        return _tree(api, repository, revision), True, True, info.private, info.sha
    except HubError:
        raise
    except Exception as error:
        raise hub_error(error, repository) from error


def _tree(api: HfApi, repository: str, revision: str) -> dict[str, Any]:
    entries = api.list_repo_tree(repository, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _is_same(content: Path | bytes, size: int, there: Any) -> bool:
    """Whether a file on the Hub has these contents, according to its hash."""
    if there.size != size:
        return False
    if there.lfs:
        return sha256_of(content) == there.lfs.sha256
    # For files outside LFS, the Hub lists git's blob hash.
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False).hexdigest() == there.blob_id


def _is_large(content: Path | bytes, size: int) -> bool:
    """Whether the Hub stores such a file in LFS."""
    if size > LARGE:
        return True
    if isinstance(content, bytes):
        start = content[:SAMPLE]
    else:
        with content.open("rb") as file:
            start = file.read(SAMPLE)
    return b"\0" in start or (not isinstance(content, bytes) and content.suffix in (".safetensors", ".onnx"))


__all__ = ["Change", "Plan", "check_folder", "make_plan", "publish"]
