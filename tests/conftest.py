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


# Launches that are wrong on purpose, or too large to keep a record of: these tests run without the sanitizer.
UNSANITIZED = {
    "test_silent_outside_its_block": "stores past the end to show that nobody looks outside `sanitize`",
    "test_what_cannot_be_right_is_refused": "adds by atomics, which is a race: the order is anybody's guess",
    "test_poison_is_seen_when_a_store_is_missing": "leaves out a launch; the next one reads what it left out",
    "test_rows_beyond_two_to_the_31": "poison would touch 4 GB of memory that is only mapped",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Every launch of every test on the interpreter is checked, and undefined memory is full of NaN."""
    name = getattr(item, "originalname", item.name)
    if item.config.getoption("--no-sanitize") or name in UNSANITIZED:
        return (yield)
    try:
        from gdr_teach.runtime import poisoned
        from gdr_teach.sanitizer import sanitize
    except ImportError:  # no triton, no launches
        return (yield)
    with sanitize(), poisoned():
        return (yield)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-sanitize",
        action="store_true",
        help="do not check every access of every interpreted launch; saves about a tenth of the time",
    )
    parser.addoption(
        "--mutants", action="store_true", help="run every planted bug, not a sample of them"
    )
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write the golden files anew, then read the difference",
    )
