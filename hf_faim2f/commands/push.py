"""`faim2f push`: a model's folder to the Hub, if it is whole, in one commit."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging

from ..hub.hub_errors import redacted
from ..hub.publish import Change, Plan, check_folder, make_plan, publish
from .settings import OneSentenceParser
from .telling import INTERRUPTED, MISTAKE, MISTAKES, say, sentence

PROGRAM = "faim2f push"
DESCRIPTION = (
    "Publishes a model's folder on the Hub; the folder has to be whole, and what is there already stays there."
)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; 0 if the Hub has the folder, 2 if not, with one sentence on standard error."""
    options = _parse(arguments, program)
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    revision = options.revision or constants.DEFAULT_REVISION
    try:
        contents, notes = check_folder(options.folder)
        plan = make_plan(HfApi(), contents, options.repository, revision)
        for line in [*_lines(plan, options.private), *notes]:
            say(redacted(line))
        if options.dry_run:
            say("Nothing was sent (--dry-run).")
            return 0
        commit, sent = publish(contents, options.repository, private=options.private, revision=options.revision)
    except MISTAKES as error:
        print(f"{program}: {redacted(sentence(error))}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from here.", file=sys.stderr, flush=True)
        return INTERRUPTED
    what = f"{_files(sent)} sent in one commit" if sent else "everything was there"
    say(redacted(f"{constants.ENDPOINT}/{options.repository} at {commit[:8]}: {what}, and has the hashes it has here."))
    return 0


def _lines(plan: Plan, private: bool) -> list[str]:
    """What would go up, a line a file."""
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
        lines.append(f"  {change.state:<8} {change.name:<{width}} {_size(change.size):>9}{kept}")
    same = len(plan.changes) - len(plan.to_send)
    if same:
        lines.append(f"  {same} {'file is' if same == 1 else 'files are'} there already")
    if plan.others:
        lines.append(f"  there, not here, and stays: {', '.join(plan.others)}")
    total = sum(change.size for change in plan.to_send)
    large = sum(change.lfs for change in plan.to_send)
    lines.append(f"{_files(plan.to_send)} to send, {_size(total)}, {large} of them in large file storage.")
    return lines


def _files(changes: list[Change]) -> str:
    return f"{len(changes)} {'file' if len(changes) == 1 else 'files'}"


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _parse(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model's folder, as conversion or training wrote it")
    parser.add_argument("repository", metavar="REPO_ID", help="OWNER/NAME; made where it is not there")
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner alone")
    parser.add_argument("--revision", metavar="BRANCH", help="made where it is not there (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be sent")
    return parser.parse_args(arguments)
