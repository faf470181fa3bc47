"""A model's folder to the Hub: checked, compared with what is there, and sent in one commit."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import FolderError, HubError
from ..hub_errors import is_transient, status_of, told, wait_asked_for
from ..model.remote_code_faim2f import copy_remote_code
from .card import load_from
from .check import Contents, check_code, check_loading, list_files
from .results import CARD
from .sections import has_results, holes

MAIN = constants.DEFAULT_REVISION
# The Hub keeps what is larger, or no text, beside git.
LARGE = 10 << 20
SAMPLE = 512
# Between attempts, in seconds, unless the Hub names another time; below huggingface_hub's own, which it has for some.
WAITS = (1.0, 2.0, 4.0)
LONGEST_WAIT, PATIENCE = 60.0, 120.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Change:
    """A file and what it is to the repository.

    Args:
        name: its path there.
        content: where it is here, or its bytes.
        size: in bytes.
        lfs: whether the Hub keeps it beside git, as far as can be known before.
        state: "new", "changed" or "same".
    """

    name: str
    content: Path | bytes
    size: int
    lfs: bool
    state: str


@dataclass(frozen=True)
class Plan:
    """What a push would do.

    Args:
        repository, revision: where to.
        exists, has_branch: whether they are there.
        private: whether the repository is private, if it is there.
        head: the commit that the revision is at.
        changes: every file of the folder.
        others: files of the repository that the folder does not have; they stay.
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
        """What is not there yet as it is here."""
        return [change for change in self.changes if change.state != "same"]


def check_folder(folder: Path, *, load: bool = True) -> tuple[Contents, list[str]]:
    """The folder's files, if it may be published, and notes for the person.

    A folder without any model code gets this package's; `examples/digits` is kept without it.

    Args:
        folder: a model's.
        load: whether to load it in a process without this package, too.

    Raises:
        FolderError: it may not; one sentence.
        OSError: a file cannot be read.
    """
    contents = list_files(folder)
    if not any(file.name.endswith("_faim2f.py") for file in contents.files):
        copy_remote_code(folder)
        contents = list_files(folder)
    check_code(contents)
    card = (folder / CARD).read_text(encoding="utf-8-sig")
    found = holes(card, [file.name for file in contents.files])
    if found:
        more = f" And {len(found) - 1} more." if len(found) > 1 else ""
        raise FolderError(f"{folder / CARD} has holes: {found[0]}{more}")
    notes = [f"left out: {', '.join(contents.left_out)}"] if contents.left_out else []
    if not has_results(card):
        notes.append("the card has no results: `faim2f evaluate` measures them")
    if load:
        check_loading(folder)
    return contents, notes


def make_plan(api: HfApi, contents: Contents, repository: str, revision: str = MAIN) -> Plan:
    """Compares the folder with the repository; nothing is written there.

    The card's snippets load `repository` there, whatever they load here.

    Raises:
        HubError: the Hub cannot be asked, or will not answer.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise told(error, repository) from None
    remote, exists, has_branch, private, head = _remote(api, repository, revision)
    changes = []
    for file in contents.files:
        content: Path | bytes = file.path
        if file.name == CARD:
            content = load_from(file.path.read_bytes().decode("utf-8-sig"), repository).encode("utf-8")
        size = len(content) if isinstance(content, bytes) else file.size
        there = remote.get(file.name)
        state = "new" if there is None else "same" if _is_same(content, size, there) else "changed"
        lfs = bool(there.lfs) if there is not None and state == "same" else _is_large(content, size)
        changes.append(Change(file.name, content, size, lfs, state))
    names = {file.name for file in contents.files} | {".gitattributes"}
    others = sorted(set(remote) - names)
    return Plan(repository, revision, exists, has_branch, private, head, changes, others)


def publish(
    contents: Contents, repository: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> tuple[str, list[Change]]:
    """Sends the folder's files in one commit, and sees that they arrived.

    What was sent by an attempt that broke off is not sent again, and such an attempt leaves no commit.

    Args:
        contents: of a checked folder.
        repository: "owner/name"; made where it is not there.
        private: whether a new repository is private.
        revision: a branch, made where it is not there.
        message: of the commit.

    Returns:
        the commit, and what was sent; no new one where everything was there.

    Raises:
        HubError: it did not work; one sentence. The repository has no half commit.
    """
    if get_token() is None:
        raise HubError("There is no token to write to the Hub: log in by `hf auth login`, or set HF_TOKEN.")
    api, branch = HfApi(), revision or MAIN
    sent: list[Change] = []

    def attempt() -> Plan:
        plan = make_plan(api, contents, repository, branch)
        if plan.exists and private and not plan.private:
            raise HubError(
                f"{repository} is there already and public: make it private on the Hub first, or leave --private."
            )
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
            # The same objects would be refused after a commit whose answer was lost, so they are made anew.
            api.create_commit(
                repository,
                operations,
                commit_message=message or f"Upload {contents.folder.resolve().name}",
                revision=branch,
                parent_commit=plan.head,
            )
            sent[:] = plan.to_send
        return make_plan(api, contents, repository, branch)

    after = _persist(attempt, repository)
    damaged = [change.name for change in after.to_send]
    if damaged:
        raise HubError(
            f"After the commit {damaged[0]} has another hash on the Hub than here: it changed meanwhile, or was "
            "damaged on its way; run the same command again."
        )
    return str(after.head), sent


def _persist(attempt: Callable[[], _Result], repository: str) -> _Result:
    """What `attempt` gives, after some tries where the Hub or the network fails for a moment."""
    started = time.monotonic()
    waits = iter(WAITS)
    while True:
        try:
            return attempt()
        except HubError as error:
            if error.__cause__ is None or not is_transient(error.__cause__):
                raise
            cause: BaseException = error.__cause__
        # Whatever HTTP libraries, the file system and the Hub's answers make of a request.
        except Exception as error:
            if not is_transient(error):
                raise told(error, repository) from error
            cause = error
        wait = next(waits, None)
        asked = wait_asked_for(cause)
        if wait is None or (asked or 0) > LONGEST_WAIT or time.monotonic() - started > PATIENCE:
            raise told(cause, repository) from cause
        time.sleep(asked if asked is not None else wait)


def _remote(api: HfApi, repository: str, revision: str) -> tuple[dict[str, Any], bool, bool, bool | None, str | None]:
    """The files that are there, whether repository and revision are, whether it is private, and its head."""
    try:
        try:
            info = api.repo_info(repository, revision=revision)
        except RepositoryNotFoundError as error:
            # Without a token, or with a wrong one, the Hub says the same of what is not there and of what is hidden.
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
        raise told(error, repository) from error


def _tree(api: HfApi, repository: str, revision: str) -> dict[str, Any]:
    entries = api.list_repo_tree(repository, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _is_same(content: Path | bytes, size: int, there: Any) -> bool:
    """Whether a file of the Hub has these contents, by the hash that it tells."""
    if there.size != size:
        return False
    if there.lfs:
        return _digest(hashlib.sha256(), content) == there.lfs.sha256
    return _digest(hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), content) == there.blob_id


def _digest(digest: Any, content: Path | bytes) -> str:
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest()
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_large(content: Path | bytes, size: int) -> bool:
    """Whether the Hub keeps such a file beside git."""
    if size > LARGE:
        return True
    if isinstance(content, bytes):
        start = content[:SAMPLE]
    else:
        with content.open("rb") as file:
            start = file.read(SAMPLE)
    return b"\0" in start or (not isinstance(content, bytes) and content.suffix in (".safetensors", ".onnx"))


__all__ = ["Change", "Plan", "check_folder", "make_plan", "publish"]
