"""`check` and `hint`, as a learner calls them in a notebook. Neither ever raises."""

import atexit
import textwrap
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from . import answer
from .calling import call
from .checks import Result, generator
from .client import Server
from .collect import cells_of, source_of
from .grade import (
    FAILED,
    NOT_ATTEMPTED,
    NOT_VERIFIED,
    PASSED,
    NotebookRun,
    TaskReport,
    all_alike,
    defining,
    judged,
    template_cells,
)
from .language import pick, say
from .manifest import Task, find_root, find_task
from .tasks import checks_of

SEED = 0  # the same inputs each time, so that a reason can be followed up; `gdr-teach grade` draws new ones
WIDTH = 95  # characters of a printed line
MARKS = {PASSED: "✓", FAILED: "✗", NOT_ATTEMPTED: "·", NOT_VERIFIED: "?"}

_hints_shown: dict[str, int] = {}


def check(task_id: str, function: Callable) -> None:
    """Print whether a function solves a task: one line, and a line with a reason for each check."""
    try:
        root = find_root()
        _, task = find_task(root, task_id)
        for line in report_lines(_report(root, task, function)):
            print(line)
    except BaseException as error:  # noqa: BLE001  Ctrl-C too: "Run all" goes on
        stopped = isinstance(error, KeyboardInterrupt)
        print(say("reason.interrupted") if stopped else say("notebook.trouble", error=error))


def hint(task_id: str) -> None:
    """Print the next hint for a task."""
    try:
        _, task = find_task(find_root(), task_id)
        shown = _hints_shown.get(task_id, 0)
        print(hint_text(task, shown))
        _hints_shown[task_id] = shown + 1
    except BaseException as error:  # noqa: BLE001
        print(say("notebook.trouble", error=error))


def hint_text(task: Task, shown: int) -> str:
    """The hint after the first `shown` ones."""
    hints = pick(task.hints)
    if not hints:
        return say("cli.no_hints", task=task.id)
    if shown >= len(hints):
        return say("cli.no_more_hints", task=task.id)
    return say("cli.hint", number=shown + 1, all=len(hints), task=task.id, text=hints[shown])


def report_lines(report: TaskReport) -> list[str]:
    """A task's report as it is printed: Lab breaks longer lines anywhere, in the middle of a word too."""
    task, mark = report.task, MARKS[report.state]
    lines = [
        say("notebook.head", mark=mark, task=task.id, title=pick(task.title),
            state=say(f"state.{report.state}"))
    ]  # fmt: skip
    if report.state in (NOT_ATTEMPTED, NOT_VERIFIED):  # one reason stands for all checks
        return [*lines, _wrapped(f"  {report.verdicts[0].reason}")]
    for verdict in report.verdicts:
        mark = MARKS[PASSED if verdict.passed else FAILED]
        line = say("notebook.line", mark=mark, id=verdict.id, reason=verdict.reason)
        lines.append(_wrapped(line))
    return lines


def _wrapped(line: str) -> str:
    fill = partial(textwrap.fill, break_long_words=False, break_on_hyphens=False)
    return fill(line, WIDTH, subsequent_indent="    ")


def _report(root: Path, task: Task, function: Any) -> TaskReport:
    checks = checks_of(task.id)
    templates = _templates(root, task)
    state = _state(task, function, templates)
    if state == "stub":
        return all_alike(task, checks, NOT_ATTEMPTED, say("reason.not_attempted"))
    if state == "library":
        said = say("reason.operator", function=task.function)
        return all_alike(task, checks, FAILED, said)
    if task.kind == "kernel":  # a wrong kernel is a wrong memory access: not in this process
        cells = dict(enumerate(cells_of(function)))
        return NotebookRun(cells, templates, _server()).grade_task(task, checks, SEED)
    drawn = [check.draw(generator(SEED, task, check)) for check in checks]
    results = []
    for values in drawn:
        done = call(function, values)
        failure = done.failure and say(
            f"reason.{done.failure}", detail=done.detail, function=task.function
        )
        results.append(Result(done.outputs, done.arguments, failure))
    return judged(task, checks, drawn, results)


def _state(task: Task, function: Any, templates: list[str]) -> str:
    """As `worker.STATES`; a function whose source cannot be found counts as written."""
    try:
        trees = [tree for tree in map(answer.parse, cells_of(function)) if tree]
        own = answer.parse(source_of(function))
    except (OSError, TypeError, SyntaxError):
        return "written"
    definition = own.body[0] if own else None
    if not isinstance(definition, answer.Function):
        return "written"
    template = answer.parse(defining(task.function, templates))
    expected = answer.find([template], task.function) if template else None
    if answer.untouched(definition, expected):
        return "stub"
    if not task.may_call_operators and answer.uses_library(trees, definition.name):
        return "library"
    return "written"


def _templates(root: Path, task: Task) -> list[str]:
    return template_cells(root, find_task(root, task.id)[0])


@cache
def _server() -> Server:
    """One server for the life of this kernel; it starts when a kernel task is first checked."""
    server = Server()
    atexit.register(server.close)
    return server
