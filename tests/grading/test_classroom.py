"""Grading a class: folders in, a table, a report and pages out; and bundles for it. A bad file costs its own row."""

import csv
import io
import json
import os
import shutil
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from gdr_teach import cli
from gdr_teach.grading import classroom, exports
from gdr_teach.grading.build import BEGIN
from gdr_teach.grading.manifest import UnusableInput, exercises, find_exercise

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the grader needs POSIX limits")
NAME = "02_delta_rule.ipynb"


@pytest.fixture
def class_folder(tmp_path, root):
    """ada solved it, ben left it as it was, eve's file is broken and she has a second, dan handed in nothing."""
    folder = tmp_path / "class"
    for learner in ("ada", "ben", "dan", "eve", ".git"):
        (folder / learner).mkdir(parents=True)
    shutil.copy(root / "solutions" / NAME, folder / "ada" / NAME)
    shutil.copy(root / "exercises" / NAME, folder / "ben" / NAME)
    (folder / "eve" / NAME).write_text("{")
    shutil.copy(root / "solutions" / NAME, folder / "eve" / f"again {NAME}")
    shutil.copy(root / "solutions" / NAME, folder / ".git" / NAME)
    (folder / "ada" / ".ipynb_checkpoints").mkdir()
    shutil.copy(root / "exercises" / NAME, folder / "ada" / ".ipynb_checkpoints" / NAME)
    (folder / "readme.txt").write_text("no learner")
    return folder


def grade(*arguments: object) -> int:
    return cli.main(["grade", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_a_class_and_its_table(class_folder, tmp_path, capsys, course):
    before = {path: path.read_bytes() for path in class_folder.rglob("*") if path.is_file()}
    places = (
        "--csv",
        tmp_path / "out.csv",
        "--junit",
        tmp_path / "out.xml",
        "--feedback",
        tmp_path / "pages",
    )
    assert grade(class_folder, "--seed", 3, "--jobs", 2, *places) == 2  # one file could not be used
    said = capsys.readouterr()
    assert "ada  02_delta_rule: 16 of 16 points (seed 3)" in said.out
    assert "ben  02_delta_rule: 0 of 16 points" in said.out
    assert "is not a notebook" in said.err
    assert before == {path: path.read_bytes() for path in class_folder.rglob("*") if path.is_file()}

    table = rows(tmp_path / "out.csv")
    tasks = [task.id for task in find_exercise(course, "02").tasks]
    assert list(table[0]) == ["learner", "exercise", *tasks, "score", "max", "error"]
    assert [(row["learner"], row["score"]) for row in table] == [
        ("ada", "16"), ("ben", "0"), ("dan", ""), ("eve", ""), ("eve", "16"),
    ]  # fmt: skip
    assert [table[0][task] for task in tasks] == ["2", "3", "2", "4", "5"]
    assert table[0]["error"] == table[1]["error"] == table[4]["error"] == ""
    assert "handed in no notebook" in table[2]["error"]
    assert "is not a notebook" in table[3]["error"]
    assert table[3]["exercise"] == NAME

    suites = ET.parse(tmp_path / "out.xml").getroot()
    found = {suite.get("name"): suite for suite in suites}
    assert (
        found["ada.02_delta_rule"].get("failures")
        == found["ada.02_delta_rule"].get("skipped")
        == "0"
    )
    assert found["ben.02_delta_rule"].get("skipped") == found["ben.02_delta_rule"].get("tests")
    assert found["eve"].get("errors") == "1"

    pages = sorted(path.name for path in (tmp_path / "pages").iterdir())
    assert pages == ["ada.html", "ben.html", "dan.html", "eve.html"]
    page = (tmp_path / "pages" / "eve.html").read_text(encoding="utf-8")
    assert "16 of 16" in page
    assert "is not a notebook" in page
    assert "//" not in page  # it loads nothing from anywhere
    assert grade(class_folder / "ada", "--feedback", tmp_path / "pages", "--seed", 3) == 0  # again


def test_json_of_many_names_the_learners(class_folder, capsys, course):
    assert grade(class_folder, "--seed", 3, "--json") == 2
    said = capsys.readouterr()
    listed = json.loads(said.out)["notebooks"]
    assert [entry["learner"] for entry in listed] == ["ada", "ben", "dan", "eve", "eve"]
    assert [entry.get("score") for entry in listed] == [16, 0, None, None, 16]
    assert listed[3]["error"]
    assert "ada" in said.err


def test_the_order_is_that_of_the_names_however_many_run_at_once(class_folder, course):
    listed = classroom.submissions([class_folder])
    told = []
    three = classroom.grade_all(listed, course, 5, 3, told.append)
    assert [result.submission for result in three] == listed
    assert sorted(map(id, told)) == sorted(map(id, three))
    alone = classroom.grade_all(listed, course, 5, 1)
    assert [r.report and r.report.as_json() for r in three] == [
        r.report and r.report.as_json() for r in alone
    ]


def test_a_fault_of_the_grader_costs_one_row(class_folder, course, monkeypatch):
    real = classroom.grade_file

    def fails_for_ben(path, *rest):
        if path.parent.name == "ben":
            raise ZeroDivisionError("planted")
        return real(path, *rest)

    monkeypatch.setattr(classroom, "grade_file", fails_for_ben)
    results = classroom.grade_all(classroom.submissions([class_folder]), course, 5, 2)
    assert "ZeroDivisionError: planted" in results[1].error
    assert results[0].report.score == results[4].report.score == 16


def test_ctrl_c_keeps_what_is_done_and_leaves_no_thread(
    class_folder, course, tmp_path, monkeypatch, capsys
):
    real, first = classroom.grade_file, threading.Event()

    def slow_but_for_ada(path, *rest):
        if path.parent.name != "ada":
            assert first.wait(60)
            time.sleep(0.3)
        return real(path, *rest)

    def told(graded, stream, many):
        if graded.report and graded.submission.learner == "ada":
            first.set()
            raise KeyboardInterrupt

    monkeypatch.setattr(classroom, "grade_file", slow_but_for_ada)
    monkeypatch.setattr(cli, "_tell", told)
    assert grade(class_folder, "--jobs", 2, "--csv", tmp_path / "out.csv") == 130
    table = rows(tmp_path / "out.csv")
    assert ("ada", "16") in [(row["learner"], row["score"]) for row in table]
    assert f"interrupted: {len(table)} of 5" in capsys.readouterr().err
    assert len(table) < 5
    assert not [t for t in threading.enumerate() if t.name.startswith("grade")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["CLASS", "--jobs", "0"], "from 1 on"),
        (["CLASS", "--csv", "CLASS"], "no place for a result"),
        (["CLASS", "--csv", f"CLASS/ada/{NAME}"], "no place for a result"),
        (["CLASS", "--csv", "CLASS/nowhere/x.csv"], "there is no folder"),
        (["CLASS", "--feedback", "CLASS/readme.txt"], "no place for a result"),
        (["CLASS/dan"], "holds no notebook"),
    ],
)
def test_unusable_words(class_folder, capsys, arguments, said, course):
    assert grade(*(word.replace("CLASS", str(class_folder)) for word in arguments)) == 2
    assert said in capsys.readouterr().err


def test_a_page_that_is_not_ours_is_kept(class_folder, course, tmp_path, capsys):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "ben.html").write_text("my own notes")
    assert grade(class_folder, "--feedback", tmp_path / "pages", "--csv", tmp_path / "out.csv") == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["ben.html"]
    assert (tmp_path / "pages" / "ben.html").read_text() == "my own notes"
    assert len(rows(tmp_path / "out.csv")) == 5  # the work is not lost


@pytest.mark.parametrize(
    "name", ["=1+1", "@x", "-2", "+3", "<b>", "é 学生", "a\nb", "..\\x", "\udcff", '"']
)
def test_odd_names(tmp_path, name):
    """No formula in the table, no tag in the page, no two learners in one page, and nothing outside the folder."""
    result = classroom.Graded(classroom.Submission(name, Path("x.ipynb")), error=f"<i>{name}")
    table = list(csv.reader(io.StringIO(exports.csv_text([result], []))))
    assert len(table) == 2
    assert table[1][0][0] not in "=+-@"
    ET.fromstring(exports.junit_text([result]).encode())
    page, *more = exports.write_feedback([result], tmp_path / "pages")
    assert not more
    assert page.parent == tmp_path / "pages"
    assert "<b>" not in page.read_text(encoding="utf-8")
    assert "<i>" not in page.read_text(encoding="utf-8")


def test_a_bundle_holds_no_answer(course, root, tmp_path, capsys):
    out = tmp_path / "bundle"
    (course / "notebooks").mkdir()
    shutil.copy(root / "notebooks" / NAME, course / "notebooks" / NAME)
    assert cli.main(["assign", str(out), "--exercises", "02"]) == 0
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    assert sorted(files) == [
        "README.md", f"exercises/{NAME}", "exercises/manifest.toml", "notebooks/02_delta_rule.ipynb",
    ]  # fmt: skip
    assert [exercise.id for exercise in exercises(out)] == ["02_delta_rule"]
    assert exercises(out)[0] == find_exercise(course, "02")
    text = "".join(path.read_text(encoding="utf-8") for path in (out / "exercises").iterdir())
    source = (root / "solutions" / "02_delta_rule.py").read_text(encoding="utf-8")
    solutions = [part.split("# END")[0] for part in source.split(BEGIN)[1:]]
    lines = {
        line.strip() for part in solutions for line in part.splitlines() if len(line.strip()) > 20
    }
    assert lines
    assert not [line for line in lines if line in text.replace("\\n", "\n")]
    assert f"    {NAME}" in (out / "README.md").read_text(encoding="utf-8")

    assert cli.main(["assign", str(out), "--exercises", "02"]) == 2  # never over a file
    assert cli.main(["assign", str(tmp_path / "b"), "--exercises", "17"]) == 2
    assert cli.main(["assign", str(tmp_path / "b"), "--exercises", ","]) == 2
    assert not (tmp_path / "b").exists()
    assert capsys.readouterr().err.count("gdr-teach:") == 3


def test_a_bundle_is_a_course_of_its_own(course, tmp_path, monkeypatch, root, capsys):
    out = tmp_path / "bundle"
    cli.main(["assign", str(out), "--exercises", "02_delta_rule"])
    monkeypatch.chdir(out)
    assert cli.main(["my"]) == 0
    shutil.copy(root / "solutions" / NAME, out / "my" / NAME)
    assert grade("my", "--seed", 1) == 0
    assert "16 of 16" in capsys.readouterr().out
    assert cli.main(["progress"]) == 0
    assert "16 of 16" in capsys.readouterr().out


def test_no_learner_folder_at_all(tmp_path):
    with pytest.raises(UnusableInput, match="holds no notebook"):
        classroom.submissions([tmp_path])
