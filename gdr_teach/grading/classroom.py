"""Grading many notebooks: which there are, several at a time, and a bad one costs nothing but its own row.

A class hands in folders, `DIR/<learner>/*.ipynb`. Every worker thread has a server of its own; a thread only waits for
processes and judges small arrays, so threads are enough to keep all cores busy.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .client import Server
from .grade import Report, grade_file
from .language import printable, say
from .manifest import UnusableInput


@dataclass(frozen=True)
class Submission:
    """One notebook of one learner; without a path, a learner who handed in none."""

    learner: str
    path: Path | None


@dataclass(frozen=True)
class Graded:
    """A submission and what came of it: a report, or why there is none."""

    submission: Submission
    report: Report | None = None
    error: str = ""


def submissions(paths: Sequence[Path]) -> list[Submission]:
    """The notebooks that some files and folders stand for, in a fixed order. Raises: UnusableInput.

    A folder stands for the notebooks in it, whose learner it names, and for those of its subfolders, one a learner.
    Hidden files and folders, such as Jupyter's checkpoints, are passed over.
    """
    found = []
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises for a name that is too long
            found.append(Submission(_folder_name(path.parent), path))
            continue
        own = [Submission(_folder_name(path), notebook) for notebook in _notebooks(path)]
        for folder in _listed(path):
            if folder.is_dir():
                theirs = [Submission(folder.name, notebook) for notebook in _notebooks(folder)]
                own += theirs or [Submission(folder.name, None)]
        if not own:
            raise UnusableInput(say("class.no_submissions", path=path))
        found += own
    return found


def grade_all(
    listed: Sequence[Submission],
    root: Path,
    seed: int,
    jobs: int,
    done: Callable[[Graded], None] = lambda _: None,
) -> list[Graded]:
    """Grade every submission, `jobs` at a time, and tell `done` of each as it is ready; the list is in their order.

    Ctrl-C ends the running ones and raises KeyboardInterrupt; `done` has heard of all that were ready.
    """
    telling, stopped = threading.Lock(), threading.Event()
    own, servers = threading.local(), []

    def begin() -> None:
        own.server = Server()
        servers.append(own.server)

    def one(submission: Submission) -> Graded:
        graded = _grade(submission, root, seed, own.server)
        with telling:
            if (
                not stopped.is_set()
            ):  # else its worker was killed, and the report holds that against the learner
                done(graded)
        return graded

    pool = ThreadPoolExecutor(jobs, "grade", initializer=begin)
    try:
        return list(pool.map(one, listed))
    finally:
        with telling:
            stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for server in servers:
            server.stop()
        pool.shutdown()


def _grade(submission: Submission, root: Path, seed: int, server: Server) -> Graded:
    if submission.path is None:
        return Graded(
            submission, error=say("class.no_notebook", learner=printable(submission.learner))
        )
    try:
        return Graded(submission, grade_file(submission.path, root, seed, server))
    except UnusableInput as error:
        return Graded(submission, error=str(error))
    except Exception as error:  # noqa: BLE001  a fault of the grader on one file must not cost the others
        said = say("class.trouble", path=submission.path, error=f"{type(error).__name__}: {error}")
        return Graded(submission, error=said)


def _folder_name(folder: Path) -> str:
    return folder.resolve().name


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UnusableInput(say("cli.unreadable", path=folder, error=error.strerror)) from error


def _notebooks(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if path.suffix == ".ipynb"]
