"""`gdr-teach` as it is called: what is printed where, which exit code, and what happens to files."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gdr_teach import cli
from gdr_teach.grading import progress
from gdr_teach.grading.manifest import exercises

TEMPLATE = Path("exercises") / "02_delta_rule.ipynb"
OWN = Path("my") / "02_delta_rule.ipynb"
SHAPE = {
    "exercise": str, "version": str, "seed": int, "score": (int, float), "max": (int, float), "tasks": list,
}  # fmt: skip
TASK_SHAPE = {
    "id": str, "function": str, "points": (int, float), "max": (int, float), "state": str, "checks": list,
}  # fmt: skip
CHECK_SHAPE = {"id": str, "passed": bool, "reason": str}


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gdr_teach.cli", *map(str, arguments)]
    package = str(Path(cli.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": package, "GDR_LANG": "en"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=100)


def assert_shape(value: dict, shape: dict) -> None:
    assert list(value) == list(shape)
    for key, kind in shape.items():
        assert isinstance(value[key], kind), key


def test_json_is_one_object_and_alone_on_stdout(course, root):
    done = run("grade", root / "solutions" / TEMPLATE.name, "--json", "--seed", 11, cwd=course)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert_shape(report, SHAPE)
    for task in report["tasks"]:
        assert_shape(task, TASK_SHAPE)
        for check in task["checks"]:
            assert_shape(check, CHECK_SHAPE)
    assert (report["exercise"], report["seed"]) == ("02_delta_rule", 11)
    assert report["score"] == report["max"] == sum(task["points"] for task in report["tasks"])
    assert "16 of 16" in done.stderr


def test_a_learner_s_way_through_the_course(course, root):
    """my, next, grade, progress, reset: nothing of the learner's is overwritten on the way."""
    assert "new" in run("my", cwd=course).stdout
    assert OWN.read_bytes() == TEMPLATE.read_bytes()
    for own in Path("my").glob("*.ipynb"):
        own.write_bytes((root / "solutions" / own.name).read_bytes())
    solved = OWN.read_bytes()
    assert "kept" in run("my", cwd=course).stdout
    first = exercises(course)[0].tasks[0].id
    assert first in run("next", cwd=course).stdout
    assert OWN.read_bytes() == solved

    graded = run("grade", "my", cwd=course)
    assert graded.returncode == 0
    assert "02_delta_rule: 16 of 16" in graded.stdout
    assert "[x] 02.delta_kernel" in run("progress", cwd=course).stdout
    assert "Every task" in run("next", cwd=course).stdout

    assert run("reset", "02", cwd=course).returncode == 0
    assert OWN.read_bytes() == TEMPLATE.read_bytes()
    copies = list(Path("my").glob(f"{OWN.stem}.*.ipynb"))
    assert [copy.read_bytes() for copy in copies] == [solved]


def test_unusable_input_is_2_and_the_others_are_graded(course):
    Path("broken_02_delta_rule.ipynb").write_text("{")
    done = run("grade", "none.ipynb", "broken_02_delta_rule.ipynb", TEMPLATE, "--json", cwd=course)
    assert done.returncode == 2
    none, broken, graded = json.loads(done.stdout)["notebooks"]
    assert list(none) == list(broken) == ["learner", "path", "error"]
    assert graded["score"] == 0
    assert "none.ipynb cannot be opened" in done.stderr
    assert "not a notebook" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["grade", "none.ipynb"], "cannot be opened"),
        (["grade", str(TEMPLATE), "--seed", "-1"], "whole number"),
        (["hint", "02.nothing"], "no task 02.nothing"),
        (["reset", "77"], "no exercise 77"),
    ],
)
def test_unusable_words(course, capsys, arguments, said):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_hints_come_one_by_one(course, capsys):
    for _ in range(4):
        assert cli.main(["hint", "02.read"]) == 0
    assert cli.main(["hint", "02.read", "--again"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines] == [
        "Hint 1 of ", "Hint 2 of ", "Hint 3 of ", "That was t", "Hint 1 of ",
    ]  # fmt: skip


def test_two_resets_in_one_second_keep_two_copies(course, capsys):
    cli.main(["my"])
    for text in ("one", "two"):
        OWN.write_text(text)
        assert cli.main(["reset", "02_delta_rule"]) == 0
    kept = {path.read_text() for path in Path("my").glob("02_delta_rule.*.ipynb")}
    assert kept == {"one", "two"}


def test_the_doctor_is_asked(monkeypatch):
    monkeypatch.setattr("gdr_teach.doctor.run_doctor", lambda: 1)
    assert cli.main(["doctor"]) == 1


def test_native_windows_is_told_where_to_go(course, capsys, monkeypatch):
    monkeypatch.setattr(cli, "os", SimpleNamespace(name="nt"))
    assert cli.main(["grade", "x.ipynb"]) == 2
    assert "WSL2" in capsys.readouterr().err


def test_broken_progress_is_said_and_kept(course, capsys):
    cli.main(["my"])
    place = Path("my") / progress.NAME
    place.write_text("{")
    assert cli.main(["progress"]) == 2
    assert "could not be read" in capsys.readouterr().err
    assert place.read_text() == "{"


def test_a_killed_grader_leaves_no_process_and_no_folder(course, tmp_path):
    """Killed while a worker runs an endless loop: the server ends by itself, and all that it started with it."""
    psutil = pytest.importorskip("psutil")
    place = tmp_path / "scratch"
    place.mkdir()
    cell = {"cell_type": "code", "source": "def read(S, q, scale):\n    while True: pass"}
    Path("02_delta_rule.ipynb").write_text(json.dumps({"cells": [cell]}))
    command = [sys.executable, "-m", "gdr_teach.cli", "grade", "02_delta_rule.ipynb"]
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "TMPDIR": str(place)}

    def family() -> list[int]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                home = process.environ().get("HOME", "/")
                if Path(home).is_relative_to(place) and process.status() != "zombie":
                    found.append(process.pid)
        return found

    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as grader:
        until(lambda: len(family()) == 2, seconds=30)  # the server and a worker
        grader.kill()
    until(lambda: not family(), seconds=5)
    until(lambda: not list(place.iterdir()), seconds=5)


def until(true, seconds: float) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last
        time.sleep(0.05)
