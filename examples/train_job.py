# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "accelerate",
#     "cityscapesscripts>=2.3",
#     "datasets",
#     "evaluate>=0.4.6",
#     "faster-coco-eval>=1.8",
#     "hotcoco>=1.3,<2",
#     "huggingface-hub",
#     "matplotlib",
#     "numpy",
#     "pillow>=12.3",
#     "psutil",
#     "pyyaml",
#     "safetensors",
#     "scipy",
#     "supervision>=0.31",
#     "tensorboard",
#     "torch>=2.10",
#     "transformers>=4.57,<6,!=5.0.*,!=5.1.*,!=5.2.*",
# ]
# ///
"""Trains a model on a dataset of the Hub and pushes it there: one file for `uv run` and for a job of Hugging Face.

    uv run --with "hf-faim2f @ SOURCE" examples/train_job.py DATASET OWNER/NAME --license LICENSE [OPTION ...]

In a job it is `hf jobs uv run --flavor a10g-small --timeout 6h --secrets HF_TOKEN --with ...` instead of
`uv run --with ...`. By default a job ends after 30 minutes, and what it has not pushed is lost.

uv installs what the block above lists. SOURCE is where to get hf-faim2f, which is not on PyPI yet: the URL of a wheel
or of a git repository, or the path of a checkout. DATASET is a Hub id, or a folder of Parquet files. Other options are
those of `faim2f train`, such as `--labels road,car,sky --steps 2000 --class-weights balanced`.
"""

import argparse
import sys
from collections.abc import Sequence

from huggingface_hub import HfApi

from hf_faim2f.cli import main as faim2f


def refusal(repository: str) -> str | None:
    """Why the token cannot write to a repository; None if the Hub names no reason (it tells only some of them)."""
    remedy = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
    try:
        user = HfApi().whoami()
    except Exception as error:
        return f"No access to the Hub ({error}): {remedy}"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return f"The token of {user['name']} may only read: {remedy}"
    owner, _, name = repository.rpartition("/")
    owners = [user["name"], *(one["name"] for one in user.get("orgs", ()) if one.get("roleInOrg") != "read")]
    if not name or owner not in owners:
        return f"{repository} is not OWNER/NAME, with an OWNER where {user['name']} may write: {', '.join(owners)}."
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and pushes; returns the exit status of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(description="All other options are passed on to `faim2f train`.")
    parser.add_argument("dataset", help="a dataset of the Hub, or a folder of Parquet files")
    parser.add_argument("repository", help="OWNER/NAME of the model; created if it does not exist")
    parser.add_argument("--license", required=True, help="Hub license id of the weights, such as apache-2.0")
    parser.add_argument("--model", default="fai-m2f-s-ade", help="model to start from (default: %(default)s)")
    parser.add_argument("--out", default="run", help="folder of the run (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options, more = parser.parse_known_args(arguments)
    if reason := refusal(options.repository):  # not only after hours of training
        print(reason, file=sys.stderr)
        return 2
    trained = faim2f(
        ["train", "--model", options.model, "--new-labels", "--data", options.dataset, "--format", "hub",
         "--out", options.out, "--license", options.license, "--batch-size", "auto",
         "--precision", "auto", *more]
    )  # fmt: skip
    if trained != 0:
        return trained
    private = ["--private"] if options.private else []
    return faim2f(["push", f"{options.out}/final", options.repository, *private])


if __name__ == "__main__":
    sys.exit(main())
