"""Is the grader right? Solved, untouched, wrong and differently right answers, graded as learners' notebooks are."""

import re

import pytest

from gdr_teach.grading.cells import read_cells
from gdr_teach.grading.language import say
from gdr_teach.grading.tasks import checks_of

pytest.importorskip("triton")


def test_solved_gets_every_point(exercise, solved, grade):
    report = grade(solved(exercise), exercise)
    assert [task.state for task in report.tasks] == ["passed"] * len(exercise.tasks)
    assert report.score == exercise.points > 0


def test_untouched_gets_nothing(exercise, root, grade):
    report = grade(read_cells(root / "exercises" / f"{exercise.id}.ipynb"), exercise)
    assert {task.state for task in report.tasks} == {"not attempted"}
    assert report.score == 0
    assert not any(verdict.passed for task in report.tasks for verdict in task.verdicts)


def test_wrong_answer_loses_what_it_should(wrong_answer, grade_answer):
    exercise, given = wrong_answer
    for seed in seeds(given):
        report = grade_answer(exercise, given, seed)
        lost = [verdict for verdict in report.verdicts if not verdict.passed]
        assert (report.state, report.points) == ("failed", 0)
        assert [verdict.id for verdict in lost] == given["loses"]
        assert says(given["says"], lost[0].reason), lost[0].reason


def test_right_answer_loses_nothing(right_answer, grade_answer):
    exercise, given = right_answer
    for seed in seeds(given):
        report = grade_answer(exercise, given, seed)
        assert [verdict for verdict in report.verdicts if not verdict.passed] == []
        assert report.points == report.task.points > 0


def test_every_task_has_wrong_and_right_answers(exercise, answers_of):
    listed = answers_of(exercise)
    for task in exercise.tasks:
        assert sum(answer["task"] == task.id for answer in listed["wrong"]) >= 3, task.id
        assert sum(answer["task"] == task.id for answer in listed["right"]) >= 1, task.id


def test_every_check_is_the_first_that_some_wrong_answer_loses(exercise, answers_of):
    first = {(answer["task"], answer["loses"][0]) for answer in answers_of(exercise)["wrong"]}
    assert first == {(task.id, check.id) for task in exercise.tasks for check in checks_of(task.id)}


def test_every_reason_of_a_check_is_told_to_some_wrong_answer(exercise, answers_of):
    told = {answer["says"] for answer in answers_of(exercise)["wrong"]}
    for task in exercise.tasks:
        for check in checks_of(task.id):
            own = f"checks.{task.id}.{check.id}.wrong"
            assert own in told or check.id == "untouched", own


def seeds(given: dict) -> tuple[int, ...]:
    """Several, but one for kernels: an interpreted kernel takes as long as ten array tasks."""
    return (1,) if given["task"].endswith("_kernel") else (0, 1, 2**32 - 1)


def says(key: str, reason: str) -> bool:
    """Whether a reason is the sentence under a key, whatever was filled in."""
    pattern = re.escape(say(key, **dict.fromkeys(FILLED, "\0"))).replace("\0", ".*")
    return re.fullmatch(pattern, reason) is not None


FILLED = ("got", "want", "bad", "all", "detail", "function")
