"""The `gdr-teach` command: doctor, my, next, grade, hint, progress, reset.

Exit codes: 0 done, whatever the score; 1 the doctor found a fault; 2 the input cannot be used.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from .grading import progress
from .grading.language import pick, say
from .grading.manifest import (
    Exercise,
    UnusableInput,
    exercises,
    find_exercise,
    find_root,
    find_task,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UnusableInput as error:
        print(f"gdr-teach: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away: `gdr-teach grade ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gdr-teach", description=say("cli.description"))
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=say(f"cli.{name}_help"))
        added.set_defaults(run=run)
        return added

    command("doctor", _doctor)
    command("my", _my)
    command("next", _next)
    grade = command("grade", _grade)
    grade.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    grade.add_argument("--seed", type=int, help=say("cli.seed_help"))
    grade.add_argument("--json", action="store_true", help=say("cli.json_help"))
    hint = command("hint", _hint)
    hint.add_argument("task", metavar="TASK")
    hint.add_argument("--again", action="store_true", help=say("cli.again_help"))
    command("progress", _progress)
    command("reset", _reset).add_argument("exercise", metavar="EXERCISE")
    return parser


def _doctor(_: argparse.Namespace) -> int:
    from .doctor import run_doctor

    return run_doctor()


def _my(_: argparse.Namespace) -> int:
    root = find_root()
    for exercise in exercises(root):
        new = _copy_if_missing(root, exercise)
        print(say("cli.copied" if new else "cli.kept", path=_own(root, exercise)))
    print(say("cli.my_done", folder=root / "my"))
    return 0


def _next(_: argparse.Namespace) -> int:
    root = find_root()
    passed = progress.load(root / "my")["passed"]
    for exercise in exercises(root):
        for task in exercise.tasks:
            if task.id in passed:
                continue
            _copy_if_missing(root, exercise)
            said = {"task": task.id, "title": pick(task.title), "minutes": task.minutes}
            print(say("cli.next_task", path=_own(root, exercise), **said))
            return 0
    print(say("cli.all_done"))
    return 0


def _grade(options: argparse.Namespace) -> int:
    if os.name != "posix":
        raise UnusableInput(say("cli.windows"))
    if find_spec("psutil") is None:
        raise UnusableInput(say("cli.no_psutil"))
    if options.seed is not None and options.seed < 0:
        raise UnusableInput(say("cli.bad_seed", seed=options.seed))
    from .grading.client import Server
    from .grading.grade import grade_file

    root = find_root()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    reports, bad = [], 0
    with Server() as server:
        for path in options.notebooks:
            try:
                reports.append(grade_file(path, root, seed, server))
            except UnusableInput as error:
                print(f"gdr-teach: {error}", file=sys.stderr)
                bad = 2
                continue
            _tell(reports[-1], sys.stderr if options.json else sys.stdout)
            _remember(root, path, reports[-1])
    if options.json and reports:
        found = [report.as_json() for report in reports]
        several = len(options.notebooks) > 1
        print(json.dumps({"notebooks": found} if several else found[0], ensure_ascii=False))
    return bad


def _tell(report, stream) -> None:
    from .grading.notebook import report_lines

    for task in report.tasks:
        print(*report_lines(task), sep="\n", file=stream)
    total = {"score": report.score, "max": report.exercise.points, "seed": report.seed}
    print(say("cli.total", exercise=report.exercise.id, **total), file=stream)


def _remember(root: Path, path: Path, report) -> None:
    """Note what was passed, when the notebook is the learner's own, in my/."""
    folder = root / "my"
    if not path.resolve().is_relative_to(folder.resolve()):
        return
    passed = {task.task.id: task.points for task in report.tasks if task.points}
    if passed:
        with suppress(OSError):  # a read-only folder costs the tick, not the grade
            progress.update(folder, lambda stored: stored["passed"].update(passed))


def _hint(options: argparse.Namespace) -> int:
    from .grading.notebook import hint_text

    root = find_root()
    _, task = find_task(root, options.task)
    folder = root / "my"
    shown = 0 if options.again else progress.load(folder)["hints"].get(task.id, 0)
    print(hint_text(task, shown))
    folder.mkdir(exist_ok=True)
    progress.update(folder, lambda stored: stored["hints"].update({task.id: shown + 1}))
    return 0


def _progress(_: argparse.Namespace) -> int:
    root = find_root()
    passed = progress.load(root / "my")["passed"]
    score = 0
    for exercise in exercises(root):
        print(f"{exercise.id}  {pick(exercise.title)}")
        for task in exercise.tasks:
            mark = "x" if task.id in passed else " "
            score += task.points if task.id in passed else 0
            print(say("cli.progress_line", mark=mark, id=task.id, title=pick(task.title)))
    most = sum(exercise.points for exercise in exercises(root))
    print(say("cli.progress_total", score=score, max=most))
    return 0


def _reset(options: argparse.Namespace) -> int:
    root = find_root()
    exercise = find_exercise(root, options.exercise)
    own = _own(root, exercise)
    if _copy_if_missing(root, exercise):
        print(say("cli.reset_fresh", path=own))
        return 0
    stamp = datetime.now().astimezone().strftime("%Y-%m-%dT%H%M%S")
    number = 0
    while True:  # two resets in one second still keep two copies
        copy = own.with_name(f"{own.stem}.{stamp}{f'-{number}' if number else ''}{own.suffix}")
        if progress.write_new(copy, own.read_bytes()):
            break
        number += 1
    progress.write_whole(own, _template(root, exercise).read_bytes())
    print(say("cli.reset_done", path=own, copy=copy.name))
    return 0


def _own(root: Path, exercise: Exercise) -> Path:
    return root / "my" / f"{exercise.id}.ipynb"


def _template(root: Path, exercise: Exercise) -> Path:
    """The tracked template. Raises: UnusableInput when it is missing."""
    path = root / "exercises" / f"{exercise.id}.ipynb"
    if not path.is_file():
        raise UnusableInput(say("cli.template_missing", path=path))
    return path


def _copy_if_missing(root: Path, exercise: Exercise) -> bool:
    (root / "my").mkdir(exist_ok=True)
    return progress.write_new(_own(root, exercise), _template(root, exercise).read_bytes())


if __name__ == "__main__":
    sys.exit(main())
