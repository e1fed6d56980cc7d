"""What an instructor takes away from grading a class: a table, a test report, a page for each learner."""

import csv
import html
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

from .classroom import Graded
from .grade import FAILED, NOT_ATTEMPTED, NOT_VERIFIED, PASSED, TaskReport
from .language import language, pick, printable, say
from .manifest import Exercise, UnusableInput
from .notebook import MARKS
from .progress import write_whole

MADE_BY = '<meta name="generator" content="gdr-teach grade --feedback">'


def check_place(path: Path, *, folder: bool = False) -> None:
    """Look at where a result is to go before the work is done. Raises: UnusableInput."""
    if path.suffix == ".ipynb" or (path.exists() and path.is_dir() != folder):
        raise UnusableInput(say("class.bad_place", path=path))
    if not folder and not path.absolute().parent.is_dir():
        raise UnusableInput(say("class.no_folder", path=path.parent))


# -- a table -----------------------------------------------------------------------------------------------------------


def csv_text(results: Sequence[Graded], known: Iterable[Exercise]) -> str:
    """Columns learner, exercise, each task, score, max, error; a task that could not be verified here stays empty."""
    graded = {result.report.exercise.id for result in results if result.report}
    tasks = [task.id for exercise in known if exercise.id in graded for task in exercise.tasks]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["learner", "exercise", *tasks, "score", "max", "error"])
    for result in results:
        row = dict.fromkeys(tasks, "")
        learner, report = plain(result.submission.learner), result.report
        if report is None:
            name = result.submission.path.name if result.submission.path else ""
            table.writerow([learner, plain(name), *row.values(), "", "", plain(result.error)])
            continue
        row |= {
            task.task.id: "" if task.state == NOT_VERIFIED else task.points for task in report.tasks
        }
        numbers = [report.score, report.exercise.points]
        table.writerow([learner, report.exercise.id, *row.values(), *numbers, ""])
    return text.getvalue()


def plain(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# -- a test report -----------------------------------------------------------------------------------------------------


def junit_text(results: Sequence[Graded]) -> str:
    """JUnit's XML: a suite a notebook, a case a check; a task that was not attempted or not verified is skipped."""
    suites = ET.Element("testsuites")
    for result in results:
        learner = printable(result.submission.learner)
        if result.report is None:
            suite = ET.SubElement(suites, "testsuite", name=learner, tests="1", errors="1")
            case = ET.SubElement(suite, "testcase", classname=learner, name="notebook")
            ET.SubElement(case, "error", message=printable(result.error))
            continue
        name = f"{learner}.{result.report.exercise.id}"
        suite = ET.SubElement(suites, "testsuite", name=name)
        for task in result.report.tasks:
            for verdict in task.verdicts:
                case = ET.SubElement(
                    suite, "testcase", classname=f"{name}.{task.task.id}", name=verdict.id
                )
                if not verdict.passed:
                    kind = "failure" if task.state == FAILED else "skipped"
                    ET.SubElement(case, kind, message=printable(verdict.reason))
        for attribute, tag in (
            ("tests", "testcase"),
            ("failures", "failure"),
            ("skipped", "skipped"),
        ):
            suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, "unicode") + "\n"


# -- a page for each learner -------------------------------------------------------------------------------------------


def write_feedback(results: Sequence[Graded], folder: Path) -> list[Path]:
    """A page for each learner, FOLDER/<learner>.html. A page of an earlier run is replaced, no other file is.

    Raises: UnusableInput before anything is written, OSError.
    """
    by_learner: dict[str, list[Graded]] = {}
    for result in results:
        by_learner.setdefault(result.submission.learner, []).append(result)
    pages = {
        folder / f"{quote(learner, safe=' @', errors='replace')}.html": own
        for learner, own in by_learner.items()
    }
    for path in pages:
        if path.exists() and MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
            raise UnusableInput(say("class.not_ours", path=path))
    folder.mkdir(parents=True, exist_ok=True)
    for path, own in pages.items():
        write_whole(path, page(own).encode())
    return list(pages)


def page(results: Sequence[Graded]) -> str:
    """One learner's page."""
    body = []
    for result in results:
        if result.report is None:
            name = result.submission.path.name if result.submission.path else ""
            body.append(f"<h2>{_escaped(name)}</h2>\n<p>{_escaped(result.error)}</p>")
            continue
        report = result.report
        said = say("cli.total", exercise=pick(report.exercise.title), score=report.score,
                   max=report.exercise.points, seed=report.seed)  # fmt: skip
        body.append(f"<h2>{_escaped(said)}</h2>")
        body += [_task(task) for task in report.tasks]
    file = Path(__file__).parent / "text" / "feedback.html"
    template = Template(file.read_text(encoding="utf-8"))
    title = say("class.page_title", learner=printable(results[0].submission.learner))
    return template.substitute(
        language=language(), made_by=MADE_BY, title=_escaped(title), body="\n".join(body)
    )


def _task(report: TaskReport) -> str:
    head = say("notebook.head", mark=MARKS[report.state], task=report.task.id,
               title=pick(report.task.title), state=say(f"state.{report.state}"))  # fmt: skip
    colour = report.state if report.state in (PASSED, FAILED) else "other"
    points = say("class.points", points=report.points, max=report.task.points)
    lines = [f'<h3 class="{colour}">{_escaped(head)} ({_escaped(points)})</h3>', "<ul>"]
    alone = report.state in (NOT_ATTEMPTED, NOT_VERIFIED)  # one reason stands for all checks
    for verdict in report.verdicts[:1] if alone else report.verdicts:
        mark = MARKS[report.state] if alone else MARKS[PASSED if verdict.passed else FAILED]
        name = "" if alone else f"{verdict.id}: "
        lines.append(f"<li>{mark} {_escaped(name + verdict.reason)}</li>")
    return "\n".join([*lines, "</ul>"])


def _escaped(text: str) -> str:
    """HTML of one line, code between back ticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(printable(text)))
