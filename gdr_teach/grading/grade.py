"""Grading one notebook: a worker per task, values back from it, and the verdict taken here."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cells import read_cells, which_exercise
from .checks import Check, Result, Verdict, generator
from .client import Server
from .job import Lost
from .language import say
from .manifest import Exercise, Task
from .tasks import checks_of

PASSED, FAILED, NOT_ATTEMPTED, NOT_VERIFIED = "passed", "failed", "not attempted", "not verified"
SHORTEST = 0.2  # seconds a cell gets when many others have overrun


@dataclass(frozen=True)
class TaskReport:
    """What is said of one task."""

    task: Task
    state: str
    verdicts: tuple[Verdict, ...] = ()

    @property
    def points(self) -> int:
        """All points or none: a wrong answer can pass a check or two by luck."""
        return self.task.points if self.state == PASSED else 0


@dataclass(frozen=True)
class Report:
    """What is said of one notebook."""

    exercise: Exercise
    seed: int
    tasks: tuple[TaskReport, ...]

    @property
    def score(self) -> int:
        """The sum of the tasks' points."""
        return sum(task.points for task in self.tasks)

    def as_json(self) -> dict[str, Any]:
        """The object that `gdr-teach grade --json` prints."""
        return {
            "exercise": self.exercise.id,
            "version": self.exercise.version,
            "seed": self.seed,
            "score": self.score,
            "max": self.exercise.points,
            "tasks": [
                {
                    "id": report.task.id,
                    "function": report.task.function,
                    "points": report.points,
                    "max": report.task.points,
                    "state": report.state,
                    "checks": [vars(verdict) for verdict in report.verdicts],
                }
                for report in self.tasks
            ],
        }


def grade_file(path: Path, root: Path, seed: int, server: Server) -> Report:
    """Grade a notebook file. Raises: UnusableInput."""
    sources = read_cells(path)
    exercise = which_exercise(root, path, sources)
    return grade_sources(sources, exercise, template_cells(root, exercise), seed, server)


def template_cells(root: Path, exercise: Exercise) -> list[str]:
    """The code cells of the untouched exercise, by which an unattempted answer is known. Raises: UnusableInput."""
    return read_cells(root / "exercises" / f"{exercise.id}.ipynb")


def grade_sources(
    sources: Sequence[str], exercise: Exercise, templates: Sequence[str], seed: int, server: Server
) -> Report:
    """Grade the code cells of one notebook."""
    run = NotebookRun(dict(enumerate(sources)), templates, server)
    reports = []
    for place, task in enumerate(exercise.tasks):
        run.tasks_left = len(exercise.tasks) - place
        reports.append(run.grade_task(task, checks_of(task.id), seed))
    return Report(exercise, seed, tuple(reports))


@dataclass
class NotebookRun:
    """What is known of a notebook's cells while its tasks are graded one after the other."""

    cells: dict[int, str]
    templates: Sequence[str]
    server: Server
    lost: dict[int, str] = field(default_factory=dict)  # cells that are not run again, and why
    tasks_left: int = 1

    def __post_init__(self) -> None:
        self.limits = self.server.limits
        self.deadline = time.monotonic() + self.limits.notebook
        self.loss_budget = self.limits.notebook / 3  # seconds that attempts in vain may take

    def grade_task(self, task: Task, checks: Sequence[Check], seed: int) -> TaskReport:
        """One task in a fresh worker; cells that overrun or end the process are left out and the rest replayed."""
        if os.name != "posix":
            return all_alike(task, checks, NOT_VERIFIED, say("cli.windows"))
        self.server.start()
        if task.kind == "kernel" and not self.server.has_triton:
            return all_alike(task, checks, NOT_VERIFIED, say("reason.no_triton"))
        while (began := time.monotonic()) < self.deadline:
            try:
                return self._attempt(task, checks, seed)
            except Lost as lost:
                self.loss_budget -= time.monotonic() - began
                if not lost.cells:
                    return all_alike(task, checks, FAILED, str(lost))
                self.lost.update(dict.fromkeys(lost.cells, str(lost)))
        return all_alike(task, checks, FAILED, say("reason.no_time"))

    def _attempt(self, task: Task, checks: Sequence[Check], seed: int) -> TaskReport:
        good = [{"index": i, "source": s} for i, s in self.cells.items() if i not in self.lost]
        header = {
            "cells": good,
            "task": task.id,
            "function": task.function,
            "kind": task.kind,
            "library": task.may_call_operators,
            "template": defining(task.function, self.templates),
        }
        now = time.monotonic()
        my_share = now + (self.deadline - now) / self.tasks_left
        one_cell = min(self.limits.cell, max(SHORTEST, self.loss_budget / 4))
        with self.server.job(header) as job:
            errors, state = job.run_cells(
                [cell["index"] for cell in good], one_cell, min(self.limits.cells, my_share - now)
            )
            if state == "missing":
                return self._missing(task, checks, errors)
            if state == "stub":
                return all_alike(task, checks, NOT_ATTEMPTED, say("reason.not_attempted"))
            if state == "library":
                return all_alike(
                    task, checks, FAILED, say("reason.operator", function=task.function)
                )
            drawn = [check.draw(generator(seed, task, check)) for check in checks]
            deadline = min(time.monotonic() + self.limits.task, my_share)
            results = _call_all(job, task, drawn, deadline)
        return judged(task, checks, drawn, results)  # only now, with the worker gone

    def _missing(self, task: Task, checks: Sequence[Check], errors: dict[int, str]) -> TaskReport:
        """The function is not there: was it never written, or did its cell fail?"""
        for index, reason in {**errors, **self.lost}.items():
            if defining(task.function, [self.cells[index]]):
                said = say("reason.cell_lost", function=task.function, reason=reason)
                return all_alike(task, checks, FAILED, said)
        return all_alike(task, checks, NOT_ATTEMPTED, say("reason.missing", function=task.function))


def judged(task: Task, checks: Sequence[Check], drawn: Sequence, results: Sequence[Result]):
    """The report on a task whose calls are done."""
    pairs = zip(checks, drawn, results, strict=True)
    verdicts = tuple(check.judge(task, values, result) for check, values, result in pairs)
    state = PASSED if all(verdict.passed for verdict in verdicts) else FAILED
    return TaskReport(task, state, verdicts)


def _call_all(job, task: Task, drawn: Sequence, deadline: float) -> list[Result]:
    results: list[Result] = []
    for values in drawn:
        try:
            results.append(job.call(task, values, deadline))
        except Lost as lost:
            results.append(Result(failure=str(lost)))
            rest = Result(failure=say("reason.after_loss"))
            return results + [rest] * (len(drawn) - len(results))
    return results


def all_alike(task: Task, checks: Sequence[Check], state: str, reason: str) -> TaskReport:
    return TaskReport(task, state, tuple(Verdict(check.id, False, reason) for check in checks))


def defining(function: str, sources: Sequence[str]) -> str:
    """The last of some cells that defines a function, or ""."""
    pattern = re.compile(rf"^\s*def\s+{re.escape(function)}\b", re.MULTILINE)
    return next((source for source in reversed(sources) if pattern.search(source)), "")
