"""A learner's notebook file is data: whatever is in it, it is read or refused in words."""

import json
import os

import pytest

from gdr_teach.grading.cells import CELL_LIMIT, CODE_LIMIT, FILE_LIMIT, read_cells, which_exercise
from gdr_teach.grading.manifest import UnusableInput


def code(source):
    return {"cell_type": "code", "source": source}


def test_code_cells_in_order(tmp_path):
    cells = [
        code("a = 1"),
        {"cell_type": "markdown", "source": "b"},
        code(["c = 1\n", "d = 2"]),
        code([1, "e", None]),
        code(None),
        code({}),
        {"cell_type": "code"},
        {"source": "f"},
        "g",
        None,
    ]
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8-sig")
    assert read_cells(path) == ["a = 1", "c = 1\nd = 2", "e", "", "", ""]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"\x00\xff\xfe", "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b"[]", "no list of cells"),
        (b'{"cells": {}}', "no list of cells"),
        (b'{"worksheets": []}', "no list of cells"),
        (json.dumps({"cells": [code("x" * (CODE_LIMIT + 1))]}).encode(), "more code"),
        (json.dumps({"cells": [code("x")] * (CELL_LIMIT + 1)}).encode(), "more code"),
        (b" " * (FILE_LIMIT + 1), "larger than"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_unusable_content(tmp_path, content, said):
    path = tmp_path / "02_delta_rule.ipynb"
    path.write_bytes(content)
    with pytest.raises(UnusableInput, match=said):
        read_cells(path)


def test_unusable_places(tmp_path):
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    places = [tmp_path, fifo, loop, tmp_path / "none", tmp_path / "a\0b", "/dev/zero", "/dev/stdin"]
    for place in places:
        with pytest.raises(UnusableInput):
            read_cells(place)


def test_which_exercise(tmp_path, root):
    named = tmp_path / "ada_02_delta_rule-Copy1.ipynb"
    assert which_exercise(root, named, []).id == "02_delta_rule"
    unnamed = tmp_path / "homework.ipynb"
    assert which_exercise(root, unnamed, ["x = 1", 'check("02.read", read)']).id == "02_delta_rule"
    with pytest.raises(
        UnusableInput, match=r"homework\.ipynb belongs to no exercise.*02_delta_rule"
    ):
        which_exercise(root, unnamed, ["x = 1"])
