"""Every planted bug is caught, by whom it should be; and nothing is caught where nothing is planted."""

import ast
import collections
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gdr_teach

from .battery import CALLS, ROOMS, fault_of
from .planted import BUGS, CAUGHT_BY
from .swap import planted

NAMED = {f"{bug.module.partition('.')[2]}: {bug.name}": bug for bug in BUGS}

# Run by `make test`, a few of every kind and family; `make mutants` runs all.
SAMPLE = [
    "delta.recurrent: <= in the mask of K",
    "delta.recurrent: dq of all tiles in one place",
    "delta.recurrent: the walks exchanged",
    "gated.recurrent: erased before it fades",
    "gated.recurrent: no barrier between writing and reading",
    "dplr.recurrent: the gradient of the decay not stored",
    "chunkwise.place: documents share a slot",
    "chunkwise.scan: the last chunk is full",
    "chunkwise.grads: dbeta of all tiles in one place",
    "chunkwise.triangular: one doubling too few",
]


def first_fault(bug) -> tuple[str, str, str]:
    """Who catches what is planted, what kind of bug it is, and in which words; ("", "", "") when nobody does."""
    for call in CALLS[ROOMS[bug.module]]:
        try:
            call()
        except Exception as error:  # noqa: BLE001  a wrong kernel may raise anything
            return (*fault_of(error), str(error))
    return "", "", ""


@pytest.mark.parametrize("family", CALLS)
def test_the_battery_passes_where_nothing_is_planted(family):
    for call in CALLS[family]:
        call()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", NAMED if metafunc.config.getoption("--mutants") else SAMPLE)


def test_a_planted_bug_is_caught(name, tmp_path: Path):
    bug = NAMED[name]
    with planted(bug.module, bug.function, bug.old, bug.new, tmp_path):
        by, kind, words = first_fault(bug)
    print(f"{name}: {by or 'nobody'}: {words.splitlines()[0] if words else ''}")
    kinds = {"unwritten": "uninitialised", "equivalent": ""}
    assert (by, kind) == (CAUGHT_BY[bug.kind], kinds.get(bug.kind, bug.kind)), words


def test_a_bug_leaves_nothing_behind(tmp_path: Path):
    bug = NAMED[SAMPLE[0]]
    with planted(bug.module, bug.function, bug.old, bug.new, tmp_path):
        assert first_fault(bug)[0] == "sanitizer"
    assert first_fault(bug)[0] == ""


def test_a_bug_that_no_longer_fits_the_source_is_an_error(tmp_path: Path):
    bug = NAMED[SAMPLE[0]]
    for old in ("no such text", "i"):
        with pytest.raises(AssertionError, match=r"found \d+ times, wanted once"):
            planted(bug.module, bug.function, old, "", tmp_path).__enter__()


def test_every_kind_and_every_module_has_bugs():
    assert len(NAMED) == len(BUGS), "two bugs of one name"
    kinds = collections.Counter(bug.kind for bug in BUGS)
    assert set(kinds) == set(CAUGHT_BY)
    assert kinds.total() - kinds["equivalent"] >= 40
    assert {bug.module for bug in BUGS} == set(ROOMS)
    assert all(bug.why for bug in BUGS)


def test_every_kernel_and_every_helper_has_a_bug():
    package = Path(gdr_teach.__file__).parent
    kernels = set()
    for path in package.rglob("*.py"):
        module = ".".join(("gdr_teach", *path.relative_to(package).with_suffix("").parts))
        for x in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(x, ast.FunctionDef) and "kernel" in map(ast.unparse, x.decorator_list):
                kernels.add((module, x.name))
    assert len(kernels) > 20
    assert kernels <= {(bug.module, bug.function) for bug in BUGS}


def test_the_sample_is_in_the_list():
    assert set(SAMPLE) <= set(NAMED)
