"""The `gdr-teach` command: doctor, my, next, grade, assign, hint, progress, reset.

Exit codes: 0 done, whatever the score; 1 the doctor found a fault; 2 the input cannot be used.
"""

import argparse
import errno
import json
import os
import secrets
import sys
from collections.abc import Container, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from .grading import progress
from .grading.language import pick, printable, say
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
        _complain(error)
        return 2
    except PermissionError as error:
        _complain(say("cli.unreadable", path=error.filename, error=error.strerror))
        return 2
    except BrokenPipeError:  # the reader of our output went away: `gdr-teach grade ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(words: object) -> None:
    print(f"gdr-teach: {printable(str(words))}", file=sys.stderr)


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
    grade.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help=say("class.paths_help"))
    grade.add_argument("--seed", type=int, help=say("cli.seed_help"))
    grade.add_argument("--json", action="store_true", help=say("cli.json_help"))
    grade.add_argument("--jobs", type=int, metavar="N", help=say("class.jobs_help"))
    grade.add_argument("--csv", type=Path, metavar="FILE", help=say("class.csv_help"))
    grade.add_argument("--junit", type=Path, metavar="FILE", help=say("class.junit_help"))
    grade.add_argument("--feedback", type=Path, metavar="DIR", help=say("class.feedback_help"))
    assign = command("assign", _assign)
    assign.add_argument("out", type=Path, metavar="OUT")
    assign.add_argument(
        "--exercises", required=True, metavar="02,03", help=say("class.exercises_help")
    )
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
    if options.jobs is not None and options.jobs < 1:
        raise UnusableInput(say("class.bad_jobs", jobs=options.jobs))
    from .grading import classroom, exports

    for path in (options.csv, options.junit, options.feedback):
        if path is not None:
            exports.check_place(path, folder=path is options.feedback)
    root = find_root()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    if "" in options.notebooks:  # Path("") would be this folder
        raise UnusableInput(say("cli.unreadable", path='""', error=os.strerror(errno.ENOENT)))
    listed = classroom.submissions([Path(name) for name in options.notebooks])
    if len(listed) == 1 and listed[0].path is None:
        raise UnusableInput(say("class.no_submissions", path=options.notebooks[0]))
    many = len(listed) > 1
    jobs = min(options.jobs or os.cpu_count() or 1, len(listed))
    words = sys.stderr if options.json else sys.stdout
    results: list[classroom.Graded] = []
    with _bar(len(listed)) as step:

        def done(graded: classroom.Graded) -> None:
            results.append(graded)
            step(lambda: _tell(graded, words, many))
            if graded.report and graded.submission.path:
                _remember(root, graded.submission.path, graded.report)

        try:
            results = classroom.grade_all(listed, root, seed, jobs, done)
        except KeyboardInterrupt:  # what is done is kept
            print(say("class.interrupted", done=len(results), all=len(listed)), file=sys.stderr)
            options.interrupted = True
    _write_results(options, root, results)
    if options.json and results:
        found = [_as_json(result, many) for result in results if many or result.report]
        if found:
            print(json.dumps({"notebooks": found} if many else found[0], ensure_ascii=False))
    if getattr(options, "interrupted", False):
        return 130
    return 2 if any(result.error for result in results) else 0


def _as_json(result, many: bool) -> dict:
    if result.report is None:
        path = str(result.submission.path or "")
        return {"learner": result.submission.learner, "path": path, "error": result.error}
    return ({"learner": result.submission.learner} if many else {}) | result.report.as_json()


def _write_results(options: argparse.Namespace, root: Path, results) -> None:
    from .grading import exports

    if options.csv:
        progress.write_whole(options.csv, exports.csv_text(results, exercises(root)).encode())
    if options.junit:
        progress.write_whole(options.junit, exports.junit_text(results).encode())
    if options.feedback:
        pages = exports.write_feedback(results, options.feedback)
        said = say("class.pages", number=len(pages), folder=options.feedback)
        print(said, file=sys.stderr)


@contextmanager
def _bar(total: int):
    """Steps of a progress bar on a terminal's stderr; elsewhere, and for one notebook, nothing but what is told."""
    if total == 1 or not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda tell: tell()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=True) as bar:
        task = bar.add_task("", total=total)

        def step(tell) -> None:
            tell()
            bar.advance(task)

        yield step


def _tell(graded, stream, many: bool) -> None:
    """All of one notebook; of each of many its total, or why there is none."""
    from .grading.notebook import report_lines

    report = graded.report
    if report is None:
        _complain(graded.error)
        return
    total = say("cli.total", exercise=report.exercise.id, score=report.score,
                max=report.exercise.points, seed=report.seed)  # fmt: skip
    if many:
        print(f"{printable(graded.submission.learner)}  {total}", file=stream, flush=True)
        return
    for task in report.tasks:
        print(*report_lines(task), sep="\n", file=stream)
    print(total, file=stream)


def _remember(root: Path, path: Path, report) -> None:
    """Note what was passed, when the notebook is the learner's own, in my/."""
    folder = root / "my"
    if not path.resolve().is_relative_to(folder.resolve()):
        return
    passed = {task.task.id: task.points for task in report.tasks if task.points}
    if passed:
        with suppress(OSError):  # a read-only folder costs the tick, not the grade
            progress.update(folder, lambda stored: stored["passed"].update(passed))


def _assign(options: argparse.Namespace) -> int:
    from .grading.assign import assign

    names = [name.strip() for name in options.exercises.split(",") if name.strip()]
    for path in assign(find_root(), options.out, names):
        print(path)
    return 0


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
    if sys.stdout.isatty() and find_spec("rich"):
        _draw_progress(exercises(root), passed)
        return 0
    for exercise in exercises(root):
        print(f"{exercise.id}  {pick(exercise.title)}")
        for task in exercise.tasks:
            mark = "x" if task.id in passed else " "
            print(say("cli.progress_line", mark=mark, id=task.id, title=pick(task.title)))
    print(say("cli.progress_total", **_points(exercises(root), passed)))
    return 0


def _points(known: Sequence[Exercise], passed: Container[str]) -> dict[str, int]:
    tasks = [task for exercise in known for task in exercise.tasks]
    score = sum(task.points for task in tasks if task.id in passed)
    return {"score": score, "max": sum(task.points for task in tasks)}


def _draw_progress(known: Sequence[Exercise], passed: Container[str]) -> None:
    """For a terminal: a bar an exercise, and what is left of it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for exercise in known:
        points = _points([exercise], passed)
        bar = ProgressBar(total=points["max"], completed=points["score"], width=20)
        said = say("cli.progress_total", **points)
        table.add_row(f"[bold]{escape(exercise.id)}", escape(pick(exercise.title)), bar, said)
        for task in exercise.tasks:
            mark = "[green]✓" if task.id in passed else "[dim]·"
            minutes = say("cli.minutes", minutes=task.minutes)
            table.add_row(f"  {mark} {escape(task.id)}", escape(pick(task.title)), minutes, "")
    console = Console(highlight=False)
    console.print(table)
    console.print(say("cli.progress_total", **_points(known, passed)))


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
