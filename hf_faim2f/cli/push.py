"""`faim2f push`: checks a model's folder and publishes it on the Hub in one commit."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants

from ..download import size_in_words
from ..errors import FolderError, redacted
from ..hub.publish import Change, Plan, check_folder, make_plan, publish
from ..zoo import own_folder
from .card import OWN_HELP
from .output import DONE, MISTAKE, MISTAKES, interrupted, one_document, say, sentence, use_weights_url
from .parser import OneSentenceParser

PROGRAM = "faim2f push"
DESCRIPTION = (
    "Publishes a model's folder on the Hub in one commit. The folder must be complete; other files on the Hub are kept."
)
EXAMPLES = (
    ("Check the folder, and list what would be sent", "my-model me/my-model --dry-run"),
    ("A new private repository, for a program", "my-model me/my-model --private --json"),
)
DOCUMENT = {
    "repository, revision": "the destination",
    "url": "address of the repository",
    "exists, private": "whether the repository existed before, and whether it is private",
    "files": "the folder's files: name, bytes, lfs, and state (new, changed or same)",
    "others": "files that are only on the Hub; they are kept",
    "notes": "notes for the user",
    "dry_run": "whether --dry-run was given",
    "commit": "the commit with the files, or null",
    "sent": "names of the files that were sent",
}


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 if the Hub has the folder, else 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        return _run(options, program, emit)


def _run(options: argparse.Namespace, program: str, emit: Callable[[Any], None]) -> int:
    revision = options.revision or constants.DEFAULT_REVISION
    try:
        use_weights_url(options.weights_url, str(options.folder))
        # Loading the model takes a while; offline, `make_plan` says that nothing can be sent.
        load = not constants.HF_HUB_OFFLINE
        contents, notes = check_folder(own_folder(options.folder, FolderError), load=load)
        plan = make_plan(HfApi(), contents, options.repository, revision, private=options.private)
        for line in [*_lines(plan, options.private), *notes]:
            say(redacted(line))
        if options.dry_run:
            say("Nothing was sent (--dry-run).")
            emit(_document(plan, options, notes, None, []))
            return DONE
        commit, sent = publish(contents, options.repository, private=options.private, revision=options.revision)
    except MISTAKES as error:
        print(f"{program}: {redacted(sentence(error))}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        return interrupted(program, "the same command continues from here.")
    what = f"{_files(sent)} sent in one commit" if sent else "nothing had changed"
    say(redacted(f"{constants.ENDPOINT}/{options.repository} at {commit[:8]}: {what}; all hashes match."))
    emit(_document(plan, options, notes, commit, sent))
    return DONE


def _document(
    plan: Plan, options: argparse.Namespace, notes: list[str], commit: str | None, sent: list[Change]
) -> dict[str, Any]:
    return {
        "repository": plan.repository,
        "revision": plan.revision,
        "url": redacted(f"{constants.ENDPOINT}/{plan.repository}"),
        "exists": plan.exists,
        "private": plan.private if plan.exists else options.private,
        "files": [
            {"name": change.name, "bytes": change.size, "lfs": change.lfs, "state": change.state}
            for change in plan.changes
        ],
        "others": plan.others,
        "notes": [redacted(note) for note in notes],
        "dry_run": options.dry_run,
        "commit": commit,
        "sent": [change.name for change in sent],
    }


def _lines(plan: Plan, private: bool) -> list[str]:
    """What would be sent, one line per file."""
    if plan.exists:
        kind = "private" if plan.private else "public"
    else:
        kind = f"new, {'private' if private else 'public'}"
    branch = (
        plan.revision if plan.has_branch or plan.revision == constants.DEFAULT_REVISION else f"{plan.revision} (new)"
    )
    lines = [f"{plan.repository} ({kind}), {branch}:"]
    width = max(len(change.name) for change in plan.changes)
    for change in plan.to_send:
        kept = "  LFS" if change.lfs else ""
        lines.append(f"  {change.state:<8} {change.name:<{width}} {size_in_words(change.size):>9}{kept}")
    same = len(plan.changes) - len(plan.to_send)
    if same:
        lines.append(f"  {same} {'file is' if same == 1 else 'files are'} unchanged on the Hub")
    if plan.others:
        lines.append(f"  only on the Hub, and kept: {', '.join(plan.others)}")
    total = sum(change.size for change in plan.to_send)
    large = sum(change.lfs for change in plan.to_send)
    lines.append(f"{_files(plan.to_send)} to send, {size_in_words(total)}, {large} of them in large file storage.")
    return lines


def _files(changes: list[Change]) -> str:
    return f"{len(changes)} {'file' if len(changes) == 1 else 'files'}"


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    parser.add_argument("folder", type=Path, metavar="DIR", help=OWN_HELP)
    parser.add_argument("repository", metavar="REPO_ID", help="OWNER/NAME; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to; created if it does not exist (default: main)"
    )
    parser.add_weights_url()
    parser.add_argument("--dry-run", action="store_true", help="only check the folder, and print what would be sent")
    parser.add_json()
    return parser
