"""A learner's notebook file, read as data: its code cells, in order, and nothing else of it."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from .language import say
from .manifest import Exercise, UnusableInput, exercises

FILE_LIMIT = 32 * 2**20  # bytes; outputs with pictures make notebooks large
CODE_LIMIT = 500_000  # characters of all code cells together
CELL_LIMIT = 1000


def read_cells(path: Path) -> list[str]:
    """The sources of the code cells. The file is opened for reading only. Raises: UnusableInput."""
    try:
        notebook = json.loads(_read(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UnusableInput(say("cli.not_json", path=path)) from error
    listed = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(listed, list):
        raise UnusableInput(say("cli.not_notebook", path=path))
    sources = [_source(cell) for cell in listed if _is_code(cell)]
    if len(sources) > CELL_LIMIT or sum(map(len, sources)) > CODE_LIMIT:
        raise UnusableInput(say("cli.too_much_code", path=path))
    return sources


def which_exercise(root: Path, path: Path, sources: list[str]) -> Exercise:
    """The exercise a notebook belongs to: by its file name, else by the task names in it. Raises: UnusableInput."""
    known = exercises(root)
    for exercise in known:
        if exercise.id in path.name:
            return exercise
    text = "\n".join(sources)
    named = {exercise.id: sum(task.id in text for task in exercise.tasks) for exercise in known}
    best = max(known, key=lambda exercise: named[exercise.id], default=None)
    if best is None or not named[best.id]:
        names = ", ".join(exercise.id for exercise in known)
        raise UnusableInput(say("cli.which_exercise", path=path, known=names))
    return best


def _read(path: Path) -> bytes:
    """The bytes of a regular file. A pipe or a device is refused before it could block or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or error
        raise UnusableInput(say("cli.unreadable", path=path, error=detail)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnusableInput(say("cli.not_a_file", path=path))
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(FILE_LIMIT + 1)
    if len(data) > FILE_LIMIT:
        raise UnusableInput(say("cli.too_large", path=path, limit=FILE_LIMIT // 2**20))
    return data


def _is_code(cell: Any) -> bool:
    return isinstance(cell, dict) and cell.get("cell_type") == "code"


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", "")
    if isinstance(source, list):
        return "".join(line for line in source if isinstance(line, str))
    return source if isinstance(source, str) else ""
