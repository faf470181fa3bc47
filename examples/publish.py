"""Checks a model's folder, prints what would be published, and publishes it on the Hub in one commit.

    python examples/publish.py MODEL_FOLDER OWNER/NAME [--send]

Without --send nothing is published. To publish, log in with `hf auth login` first. A new repository is private. The
command `faim2f push --private` does the same.
"""

import sys
from pathlib import Path

from huggingface_hub import HfApi

from hf_faim2f.errors import FolderError, HubError
from hf_faim2f.hub.publish import check_folder, make_plan, publish


def main(model_folder: str, repository: str, send: bool = False) -> None:
    """Prints the plan, and the commit if the folder was published."""
    try:
        contents, notes = check_folder(Path(model_folder))
        plan = make_plan(HfApi(), contents, repository, private=True)
        for change in plan.to_send:
            print(f"{change.state}: {change.name}, {change.size} bytes")
        for note in notes:
            print(note)
        if send:
            commit, sent = publish(contents, repository, private=True)
            print(f"{len(sent)} files sent in {commit[:8]}")
    except (FolderError, HubError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--send"]
    if len(words) != 2:
        sys.exit(__doc__)
    main(words[0], words[1], send="--send" in sys.argv)
