"""Exercise 02 as a learner does it: JupyterLab in a real browser, answers typed into its cells."""

import json
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

from gdr_teach.grading.build import STUB
from gdr_teach.grading.grade import FAILED, NOT_ATTEMPTED, PASSED
from gdr_teach.grading.language import pick, say
from gdr_teach.grading.manifest import exercises
from gdr_teach.grading.notebook import MARKS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]  # 15 s on two idle cores

TOKEN = "a-learner"  # conftest.py's
ROOT = Path(__file__).resolve().parents[2]
EXERCISE = next(e for e in exercises(ROOT) if e.id == "02_delta_rule")
FILE = f"{EXERCISE.id}.ipynb"
ANSWERS = ROOT / "tests" / "grading" / "answers" / "exercise_02.toml"  # the grader's own tests


def source(notebook: dict, cell_id: str) -> str:
    (cell,) = (cell for cell in notebook["cells"] if cell["id"] == cell_id)
    return "".join(cell["source"])


def stored(folder: str, cell_id: str) -> str:
    return source(json.loads((ROOT / folder / FILE).read_text(encoding="utf-8")), cell_id)


def wrong_answer(task_id: str, name: str, cell_id: str) -> tuple[str, str]:
    """The cell of a wrong answer that the grader is tested with, and the key of what its learner must be told."""
    listed = tomllib.loads(ANSWERS.read_text(encoding="utf-8"))["wrong"]
    (given,) = (a for a in listed if (a["task"], a["name"]) == (task_id, name))
    if "body" in given:
        before, _, after = stored("exercises", cell_id).partition(f"    {STUB}")
        return before + textwrap.indent(given["body"], "    ") + after, given["says"]
    code = stored("solutions", cell_id)
    for old, new in given["edits"]:
        assert old in code
        code = code.replace(old, new)
    return code, given["says"]


def head(task_id: str, state: str) -> str:
    (task,) = (task for task in EXERCISE.tasks if task.id == task_id)
    said = {"title": pick(task.title), "state": say(f"state.{state}")}
    return say("notebook.head", mark=MARKS[state], task=task_id, **said)


def line(state: str, check: str, reason: str) -> str:
    return say("notebook.line", mark=MARKS[state], id=check, reason=reason)


def not_attempted(task_id: str) -> str:
    return f"{head(task_id, NOT_ATTEMPTED)}\n{say('reason.not_attempted')}"


def test_a_right_and_a_wrong_answer_typed_into_an_exercise(lab):
    template = ROOT / "exercises" / FILE
    before = template.read_bytes()
    right = stored("solutions", "02-read-answer")
    wrong, key = wrong_answer("02.read", "scale forgotten", "02-read-answer")
    columns = line(PASSED, "columns", say("checks.02.read.columns.right"))
    untouched = line(PASSED, "untouched", say("reason.untouched"))
    with lab() as screen:
        screen.open(FILE)
        kernel = screen.kernel()

        screen.run_all()
        for task in EXERCISE.tasks:
            cell_id = f"{task.id}-check".replace(".", "-").replace("_", "-")
            screen.expect_output(cell_id, not_attempted(task.id))
        cells = [cell for cell in screen.save()["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert {output.get("name", output["output_type"]) for output in outputs} == {"stdout"}

        screen.type("02-read-answer", right)
        screen.run("02-read-answer")
        screen.run("02-read-check")
        scale = line(PASSED, "scale", say("checks.02.read.scale.right"))
        wanted = [head("02.read", PASSED), columns, scale, untouched]
        screen.expect_output("02-read-check", "\n".join(wanted))
        screen.picture("right")

        screen.type("02-read-answer", wrong)
        screen.run("02-read-answer")
        screen.run("02-read-check")
        scale = line(FAILED, "scale", say(key))
        wanted = [head("02.read", FAILED), columns, scale, untouched]
        screen.expect_output("02-read-check", "\n".join(wanted))
        screen.picture("wrong")

        screen.wait_until_idle()
        assert screen.kernel() == kernel
        assert screen.count() == len(cells) + 4  # the same process from beginning to end
        assert source(screen.save(), "02-read-answer") == wrong
    assert (screen.course / "exercises" / FILE).read_bytes() == before == template.read_bytes()


def test_a_kernel_that_reads_out_of_bounds_harms_nothing(lab):
    pytest.importorskip("triton")
    wrong, key = wrong_answer("02.delta_kernel", "no mask on the key", "02-delta-kernel-answer")
    with lab() as screen:
        screen.open(FILE)
        screen.run_all()
        before = screen.count()
        screen.fill("02-delta-kernel-answer", wrong)
        screen.run("02-delta-kernel-answer")
        screen.run("02-delta-kernel-check")
        place = r"load\s+outside\s+p_k\s+in\s+program\s+\(\d+,\s+\d+,\s+\d+\)"
        told = re.escape(line(FAILED, "masks", say(key, detail="PLACE")).strip())
        told = told.replace(r"\ ", r"\s+").replace("PLACE", f"{place}(.|\n)*")  # it is wrapped
        screen.expect_output("02-delta-kernel-check", re.compile(told))
        screen.picture("kernel")

        screen.run("02-read-check")
        screen.expect_output("02-read-check", not_attempted("02.read"))
        assert screen.count() == before + 3  # the same process still
        assert source(screen.save(), "02-delta-kernel-answer") == wrong


def test_a_chapter_can_be_run_but_not_saved_over(lab):
    with lab() as screen:
        first = screen.course / "notebooks" / "00_start_here.ipynb"
        before, when = first.read_bytes(), first.stat().st_mtime_ns
        screen.wait_until_idle()
        screen.run_all()
        screen.panel.locator(".jp-MarkdownCell").first.dblclick()
        screen.keys.type("my own words ")
        with screen.page.expect_response(
            lambda answer: "/api/contents/notebooks/00_start_here.ipynb" in answer.url
        ):
            screen.page.reload()  # Lab asks the server again
        assert first.read_bytes() == before
        assert first.stat().st_mtime_ns == when
        address = f"{screen.server}api/contents/notebooks/00_start_here.ipynb?token={TOKEN}"
        assert screen.page.request.get(f"{address}&content=0").json()["writable"] is False
        model = {"type": "notebook", "format": "json", "content": json.loads(before)}
        answer = screen.page.request.put(
            address, data=model, headers={"Authorization": f"token {TOKEN}"}
        )
        assert not answer.ok
        assert "Save Notebook As" in answer.json()["message"]
        assert first.read_bytes() == before
