"""What every test of the package shares. Nothing here needs triton: the torch half is tested without it."""

import os

# Before torch is imported: two workers on two cores gain nothing from threads of their own, and sums
# split over a varying number of threads would round differently from machine to machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

# The shapes written in these modules' signatures are checked on every call a test makes. Modules that hold
# kernels cannot be listed: the hook rewrites their source, and triton reads it.
SHAPE_CHECKED = ["gdr_teach.memory", "gdr_teach.lifts"]
SHAPE_CHECKED += [f"gdr_teach.{rule}.reference" for rule in ("delta", "gated", "iplr", "dplr")]

install_import_hook(SHAPE_CHECKED, "beartype.beartype")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write the golden files anew, then read the difference",
    )
