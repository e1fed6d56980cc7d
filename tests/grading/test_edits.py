"""Notebooks as learners really leave them: no random edit crashes the grader, or costs more than its own task."""

import copy
import json
import os
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from gdr_teach import cli
from gdr_teach.grading import answer
from gdr_teach.grading.cells import read_cells, which_exercise
from gdr_teach.grading.grade import defining, grade_file
from gdr_teach.grading.manifest import UnusableInput

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the grader needs POSIX limits")
NAME = "02_delta_rule.ipynb"
JUNK = [
    "", "\n\n", "x = 1", "x = (", "1 / 0", "return 5", "%matplotlib inline", "!ls", "%%bash\nexit 1", "def f():",
    "\t x", "'''", "\ud800", "\x00", "é = 1", "print('" + "a" * 10_000 + "')", "# only words", "raise SystemExit",
    "class A:\n  pass", "if True:\nx", "await f()", "check(", "?", "import nowhere", "del torch", "\\",
    "lambda: (yield)", "f'{", "[" * 300, "x" * 3000 + " = 1", "from __future__ import braces",
]  # fmt: skip


def edited(rng: random.Random, notebook: dict, allowed) -> None:
    """One edit, in place, of a cell that `allowed` allows, or one that adds something anywhere."""
    cells = notebook["cells"]
    places = [n for n, cell in enumerate(cells) if allowed(cell)]
    what = rng.choice(
        [
            "junk",
            "delete",
            "duplicate",
            "split",
            "retype",
            "move",
            "characters",
            "indent",
            "list",
            "odd",
        ]
    )
    if what == "junk" or not places:
        cells.insert(rng.randrange(len(cells) + 1), code(rng.choice(JUNK)))
        return
    place = rng.choice(places)
    cell = cells[place]
    text = source(cell)
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(text) + 1)
    if what == "delete":
        del cells[place]
    elif what == "duplicate":
        cells.insert(place, copy.deepcopy(cell))
    elif what == "split":
        cut = rng.randrange(len(lines) + 1)
        cells[place : place + 1] = [code("".join(lines[:cut])), code("".join(lines[cut:]))]
    elif what == "retype":
        cell["cell_type"] = rng.choice(["markdown", "raw", "code", "", None, 7])
    elif what == "move":
        cells.insert(rng.randrange(len(cells)), cells.pop(place))
    elif what == "characters":
        cell["source"] = (
            text[:at]
            + rng.choice([*JUNK, "", "return", ":", "(", "  "])
            + text[at + rng.randrange(5) :]
        )
    elif what == "indent":
        cell["source"] = "".join(" " * rng.randrange(3) + line for line in lines)
    elif what == "list":
        cell["source"] = lines
    else:
        cell["source"] = rng.choice([None, 5, {}, [1, "x"], [[text]], True])


def code(text: str) -> dict:
    return {
        "cell_type": "code",
        "id": "new",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": text,
    }


def source(cell: dict) -> str:
    given = cell.get("source")
    return (
        "".join(x for x in given if isinstance(x, str)) if isinstance(given, list) else str(given)
    )


def broken(rng: random.Random, text: str) -> bytes:
    """The file itself, damaged."""
    data = text.encode("utf-8", "surrogatepass")
    at = rng.randrange(len(data))
    return rng.choice(
        [
            data[:at],
            data[at:],
            data[:at] + bytes(rng.randrange(256) for _ in range(4)) + data[at + 4 :],
            data.replace(b"cells", b"Cells", 1),
            data.replace(b'"code"', b"null"),
            text.encode("utf-16", "surrogatepass"),
            b"\xef\xbb\xbf" + data,
            b"[" + data + b"]",
        ]
    )


@pytest.mark.parametrize("part", range(4))
def test_a_thousand_edits_are_parsed_or_refused_in_words(part, tmp_path, root):
    rng = random.Random(part)
    original = json.loads((root / "solutions" / NAME).read_text(encoding="utf-8"))
    function = "delta_loop"
    read = refused = 0
    for number in range(250):
        notebook = copy.deepcopy(original)
        for _ in range(rng.randrange(1, 6)):
            edited(rng, notebook, lambda _: True)
        text = json.dumps(notebook)
        path = tmp_path / f"{rng.choice(['02_delta_rule', 'homework'])}{number}.ipynb"
        path.write_bytes(broken(rng, text) if rng.random() < 0.2 else text.encode())
        try:
            sources = read_cells(path)
            belongs = which_exercise(root, path, sources)
        except UnusableInput as error:
            refused += path.name in str(error)
            continue
        read += belongs.id == "02_delta_rule"
        trees = [tree for tree in map(answer.parse, map(answer.plain, sources)) if tree]
        found = answer.find(trees, function)
        if found is not None:
            assert defining(function, sources)
            assert not answer.untouched(found, None) or len(found.body) < 3
            assert answer.uses_library(trees, function) in (True, False)
    assert read + refused == 250
    assert min(read - 150, refused) > 5


@pytest.mark.parametrize("part", range(5))
def test_fifty_edited_notebooks_cost_only_the_edited_task(
    part, tmp_path, root, exercise_02, server, monkeypatch
):
    """The four array tasks; one of them is edited, and junk is put anywhere."""
    rng = random.Random(100 + part)
    arrays = replace(exercise_02, tasks=exercise_02.tasks[:4])
    monkeypatch.setattr("gdr_teach.grading.grade.which_exercise", lambda *_: arrays)
    original = json.loads((root / "solutions" / NAME).read_text(encoding="utf-8"))
    harmless = [
        junk for junk in JUNK if junk != "del torch"
    ]  # the answers need torch when they are called
    monkeypatch.setattr(f"{__name__}.JUNK", harmless)
    for number in range(10):
        victim = rng.choice(arrays.tasks)
        notebook = copy.deepcopy(original)
        for _ in range(rng.randrange(1, 5)):
            edited(rng, notebook, lambda cell, name=victim.function: f"def {name}(" in source(cell))
        path = tmp_path / f"{part}-{number}.ipynb"
        path.write_text(json.dumps(notebook), encoding="utf-8")
        before, when = path.read_bytes(), path.stat()
        report = grade_file(path, root, number, server)
        states = {task.task.id: task.state for task in report.tasks}
        del states[victim.id]
        assert set(states.values()) == {"passed"}, (number, victim.id, states)
        assert path.read_bytes() == before
        assert path.stat().st_mtime_ns == when.st_mtime_ns
    assert len(list(tmp_path.iterdir())) == 10  # nothing beside them


HOSTILE = {
    "nothing there": lambda d: d / "none.ipynb",
    "a folder called a notebook": lambda d: made(d / "x.ipynb", Path.mkdir),
    "an empty folder": lambda d: made(d / "empty", Path.mkdir),
    "a pipe": lambda d: made(d / "pipe.ipynb", os.mkfifo),
    "a socket": lambda d: made(d / "socket.ipynb", bound),
    "a link to itself": lambda d: made(d / "loop.ipynb", lambda p: p.symlink_to(p)),
    "a link to nothing": lambda d: made(d / "dead.ipynb", lambda p: p.symlink_to(d / "none")),
    "a link to a device": lambda d: made(d / "zero.ipynb", lambda p: p.symlink_to("/dev/zero")),
    "a link to the password file": lambda d: made(
        d / "p.ipynb", lambda p: p.symlink_to("/etc/passwd")
    ),
    "a link to a pipe": lambda d: made(
        d / "lp.ipynb", lambda p: p.symlink_to(made(d / "q", os.mkfifo))
    ),
    "/dev/zero": lambda _: "/dev/zero",
    "/dev/null": lambda _: "/dev/null",
    "/dev/random": lambda _: "/dev/random",
    "/dev/stdin": lambda _: "/dev/stdin",
    "/dev/tty": lambda _: "/dev/tty",
    "/proc/self/mem": lambda _: "/proc/self/mem",
    "/proc/self/environ": lambda _: "/proc/self/environ",
    "/proc/self/fd/99": lambda _: "/proc/self/fd/99",
    "a zero byte": lambda d: f"{d}/a\0b.ipynb",
    "a name too long": lambda d: d / ("x" * 300 + ".ipynb"),
    "a path too long": lambda d: d / ("x/" * 5000),
    "no name at all": lambda _: "",
    "a dash": lambda _: "./-",
    "a home that is not expanded": lambda _: "~/x.ipynb",
    "a pattern": lambda d: d / "*.ipynb",
    "a web address": lambda _: "https://example.invalid/x.ipynb",
    "a path through a file": lambda d: made(d / "file", Path.touch) / "x.ipynb",
    "many steps up": lambda d: d / ("../" * 50 + "none/x.ipynb"),
    "half a character": lambda d: f"{d}/\udcff.ipynb",
    "a line break": lambda d: d / "a\nb.ipynb",
    "an empty file": lambda d: made(d / "e.ipynb", Path.touch),
    "a file of 1 TiB of nothing": lambda d: made(d / "big.ipynb", lambda p: sparse(p, 2**40)),
    "a program": lambda _: "/bin/sh",
}


def made(path: Path, make) -> Path:
    make(path)
    return path


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(10)
def test_thirty_hostile_paths_are_refused_in_words(name, tmp_path, capsys, root, monkeypatch):
    place = HOSTILE[name](tmp_path)
    monkeypatch.chdir(root)
    assert cli.main(["grade", str(place)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gdr-teach: ")
