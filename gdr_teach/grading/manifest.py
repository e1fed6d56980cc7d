"""exercises/manifest.toml, the one order of exercises and tasks, and where the repository is."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from .language import say

PLACE = Path("exercises") / "manifest.toml"


class UnusableInput(Exception):
    """Something the command was given cannot be used; the message is for the user."""


@dataclass(frozen=True)
class Task:
    """One idea on one screen: `function` is what the learner writes."""

    id: str
    function: str
    kind: str  # "array": called with tensors; "kernel": launched by `launch`
    title: Mapping[str, str]
    minutes: int
    points: int
    hints: Mapping[str, Sequence[str]]
    may_call_operators: bool = False  # the package's own, in an answer


@dataclass(frozen=True)
class Exercise:
    """One notebook of tasks, `exercises/<id>.ipynb`, that belongs to a chapter."""

    id: str
    version: str
    chapter: str
    title: Mapping[str, str]
    tasks: tuple[Task, ...]

    @property
    def points(self) -> int:
        """The most an answer can get."""
        return sum(task.points for task in self.tasks)


def find_root(start: Path | None = None) -> Path:
    """The repository: the first folder from `start` (default: here) upward that holds the manifest, else the package's.

    Raises: UnusableInput when there is none.
    """
    start = (start or Path.cwd()).resolve()
    package = Path(__file__).resolve().parents[2]
    for folder in (start, *start.parents, package):
        if (folder / PLACE).is_file():
            return folder
    raise UnusableInput(say("cli.no_repository", place=PLACE, start=start))


@cache
def exercises(root: Path) -> tuple[Exercise, ...]:
    """Every exercise in order. Raises: UnusableInput when the manifest cannot be read."""
    try:
        table = tomllib.loads((root / PLACE).read_text(encoding="utf-8"))
        return tuple(_exercise(entry) for entry in table["exercise"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise UnusableInput(say("cli.bad_manifest", place=root / PLACE, error=error)) from error


def find_task(root: Path, task_id: str) -> tuple[Exercise, Task]:
    """The task with this id and its exercise. Raises: UnusableInput when there is none."""
    known = []
    for exercise in exercises(root):
        for task in exercise.tasks:
            if task.id == task_id:
                return exercise, task
            known.append(task.id)
    raise UnusableInput(say("cli.no_task", task=task_id, known=", ".join(known)))


def find_exercise(root: Path, name: str) -> Exercise:
    """The exercise called `name`, in full or by its number. Raises: UnusableInput when there is none."""
    for exercise in exercises(root):
        if name in (exercise.id, exercise.id.split("_")[0]):
            return exercise
    known = ", ".join(exercise.id for exercise in exercises(root))
    raise UnusableInput(say("cli.no_exercise", name=name, known=known))


def part_of(root: Path, ids: Sequence[str]) -> str:
    """The manifest's text with the exercises of these ids only."""
    text = (root / PLACE).read_text(encoding="utf-8")
    head, *entries = re.split(r"(?m)^(?=\[\[exercise\]\]$)", text)
    kept = [entry for entry in entries if tomllib.loads(entry)["exercise"][0]["id"] in ids]
    return head + "".join(kept)


def _exercise(entry: dict) -> Exercise:
    tasks = tuple(Task(**task) for task in entry["task"])
    rest = {f.name: entry[f.name] for f in fields(Exercise) if f.name != "tasks"}
    return Exercise(tasks=tasks, **rest)
