"""Before anything imports transformers: no network, and remote code cached in a folder of this run alone."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="faim2f-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

# Two test processes share the two cores (pytest -n 2): a thread each is faster than two that wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, in whatever order they run."""
    torch.manual_seed(0)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """And so does what several tests share, which is made before the seed of the first of them."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)
