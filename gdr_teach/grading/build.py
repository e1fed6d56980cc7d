"""Build exercises/NN.ipynb and solutions/NN.ipynb from solutions/NN.py: `python -m gdr_teach.grading.build [--check]`.

The source is in jupytext's percent format. A cell carries `task="02.read"` (its text, or its answer) or `name="..."`.
The lines between `# BEGIN SOLUTION` and `# END SOLUTION` become a stub in the exercise; headings and check cells are
made from the manifest. The same source gives the same bytes, so `--check` can tell what is out of date.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .manifest import Exercise, Task, UnusableInput, exercises, find_root

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
STUB = "...  # your code here"
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}

Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or check every exercise; the exit code is 1 when --check finds a notebook out of date."""
    parser = argparse.ArgumentParser(prog="python -m gdr_teach.grading.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, report what is stale")
    options = parser.parse_args(arguments)
    root, stale = find_root(), 0
    for path, text in built(root):
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(root)}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


def built(root: Path) -> Iterator[tuple[Path, str]]:
    """Every generated notebook and its text. Raises: UnusableInput when a source and the manifest disagree."""
    for exercise in exercises(root):
        source = (root / "solutions" / f"{exercise.id}.py").read_text(encoding="utf-8")
        for folder, solved in (("exercises", False), ("solutions", True)):
            yield root / folder / f"{exercise.id}.ipynb", notebook(source, exercise, solved)


def notebook(source: str, exercise: Exercise, solved: bool) -> str:
    """The notebook's text, solved or stripped to stubs. Raises: UnusableInput."""
    import jupytext

    cells: list[Cell] = []
    asked: list[Cell] = []  # the check of the task above: after its example, before the next text
    waiting = {task.id: task for task in exercise.tasks}
    for number, cell in enumerate(jupytext.reads(source, fmt="py:percent").cells):
        text, kind = cell.source, cell.cell_type
        task = _task(cell.metadata, exercise)
        if kind == "markdown":
            cells += asked
            asked = []
        else:
            text = without_markers(text) if solved else stubbed(text)
        if task is None:
            text = f"{_title(exercise)}\n\n{text}" if number == 0 else text
            cells.append(_cell(kind, f"{exercise.id}-{cell.metadata['name']}", text))
            continue
        slug = task.id.replace(".", "-")
        if kind == "markdown":
            cells.append(_cell(kind, f"{slug}-text", f"{_heading(task)}\n\n{text}"))
        else:
            waiting.pop(task.id, None)
            ask = f'check("{task.id}", {task.function})  # stuck? hint("{task.id}")'
            cells.append(_cell(kind, f"{slug}-answer", text))
            asked = [_cell(kind, f"{slug}-check", ask)]
    cells += asked
    if waiting:
        raise UnusableInput(f"{exercise.id}: no answer cell for {', '.join(waiting)}")
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": KERNELSPEC},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def stubbed(code: str) -> str:
    """Code with each solution replaced by a stub. Raises: UnusableInput when the markers do not pair."""
    lines: list[str] = []
    inside = False
    for line in code.split("\n"):
        mark = line.strip()
        if mark in (BEGIN, END) and inside == (mark == BEGIN):
            raise UnusableInput(f"{mark} where the other was wanted")
        if mark == BEGIN:
            lines.append(line.replace(BEGIN, STUB))
        if not inside and mark not in (BEGIN, END):
            lines.append(line)
        inside = mark == BEGIN or (inside and mark != END)
    if inside:
        raise UnusableInput(f"{BEGIN} without {END}")
    return "\n".join(lines)


def without_markers(code: str) -> str:
    """Code as it is, without the two marker lines."""
    return "\n".join(line for line in code.split("\n") if line.strip() not in (BEGIN, END))


def _task(metadata: dict[str, Any], exercise: Exercise) -> Task | None:
    if "task" not in metadata:
        return None
    for task in exercise.tasks:
        if task.id == metadata["task"]:
            return task
    raise UnusableInput(f"{exercise.id}: the manifest has no task {metadata['task']}")


def _title(exercise: Exercise) -> str:
    number = exercise.id.split("_")[0]
    return f"# Exercise {number}: {exercise.title['en']} · {exercise.title['zh']}"


def _heading(task: Task) -> str:
    return f"## {task.id}: {task.title['en']} · {task.title['zh']}\n\n*{task.minutes} minutes, {task.points} points*"


def _cell(kind: str, name: str, text: str) -> Cell:
    cell: Cell = {
        "cell_type": kind,
        "id": name.replace("_", "-"),
        "metadata": {},
        "source": text.splitlines(keepends=True),
    }
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell


if __name__ == "__main__":
    sys.exit(main())
