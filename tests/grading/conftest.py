"""What the tests of the grader share: one server, answers put into a notebook's cells, and quick limits."""

import dataclasses
import json
import re
import shutil
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gdr_teach.grading.build import BEGIN, END, notebook
from gdr_teach.grading.cells import read_cells
from gdr_teach.grading.client import Server
from gdr_teach.grading.grade import Report, TaskReport, grade_sources, template_cells
from gdr_teach.grading.job import Limits
from gdr_teach.grading.manifest import Exercise, exercises, find_root

PATIENT = Limits(cell=2.0, cells=10.0, task=15.0, notebook=60.0)  # also when the machine is busy
ROOT = find_root(Path(__file__).parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`exercise` stands for every exercise, `wrong_answer` and `right_answer` for every one that is written down."""
    if "exercise" in metafunc.fixturenames:
        known = exercises(ROOT)
        metafunc.parametrize("exercise", known, ids=[exercise.id for exercise in known])
    for kind in ("wrong", "right"):
        if f"{kind}_answer" in metafunc.fixturenames:
            listed = [(e, a) for e in exercises(ROOT) for a in answers(e)[kind]]
            ids = [f"{a['task']}: {a['name']}" for _, a in listed]
            metafunc.parametrize(f"{kind}_answer", listed, ids=ids)


def answers(exercise: Exercise) -> dict[str, list[dict]]:
    number = exercise.id.split("_")[0]
    file = Path(__file__).parent / "answers" / f"exercise_{number}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def source(exercise: Exercise) -> str:
    return (ROOT / "solutions" / f"{exercise.id}.py").read_text(encoding="utf-8")


def answered(exercise: Exercise, given: dict) -> str:
    """The exercise's source with one solution changed as an answer of answers/*.toml says."""
    pattern = rf'(# %% task="{re.escape(given["task"])}"\n.*?\n)( *){BEGIN}\n(.*?)\n *{END}'
    found = re.search(pattern, source(exercise), re.DOTALL)
    assert found, given
    body = given.get("body") or textwrap.dedent(found[3])
    for old, new in given.get("edits", ()):
        assert old in body, f"{given['name']}: nothing to edit: {old}"
        body = body.replace(old, new)
    lines = textwrap.indent(f"{BEGIN}\n{body.strip()}\n{END}", found[2])
    return source(exercise).replace(found[0], found[1] + lines)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all servers of this test run have their folders; what their processes call home is inside."""
    place = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(place))
        yield place


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch, Server(PATIENT) as server:
        patch.setenv("GDR_SECRET", "what is in the grader's environment")
        server.start()
        yield server


@pytest.fixture(scope="session")
def exercise_02() -> Exercise:
    return next(e for e in exercises(ROOT) if e.id == "02_delta_rule")


@pytest.fixture
def grade(server: Server) -> Callable[..., Report]:
    """Grade code cells, all tasks of an exercise or one."""

    def graded(cells: list[str], exercise: Exercise, only: str = "", seed: int = 3) -> Report:
        tasks = tuple(task for task in exercise.tasks if only in ("", task.id))
        chosen = dataclasses.replace(exercise, tasks=tasks)
        return grade_sources(cells, chosen, template_cells(ROOT, exercise), seed, server)

    return graded


@pytest.fixture
def solved() -> Callable[[Exercise], list[str]]:
    """The code cells of a solved exercise."""
    return lambda exercise: read_cells(ROOT / "solutions" / f"{exercise.id}.ipynb")


@pytest.fixture
def grade_answer(tmp_path: Path, grade) -> Callable[..., TaskReport]:
    """Grade one answer of answers/*.toml within a notebook that is built and read as a learner's is."""

    def graded(exercise: Exercise, given: dict, seed: int) -> TaskReport:
        path = tmp_path / f"{exercise.id}.ipynb"
        text = notebook(answered(exercise, given), exercise, solved=True)
        path.write_text(text, encoding="utf-8")
        return grade(read_cells(path), exercise, only=given["task"], seed=seed).tasks[0]

    return graded


@pytest.fixture
def built() -> Callable[..., bytes]:
    """A learner's file: the solved notebook with one answer changed and a cell in front.

    Without the examples, which would call the answer once more for every task: attacks take seconds.
    """

    def file(exercise: Exercise, given: dict, cell: str = "") -> bytes:
        changed = given | {"body": textwrap.dedent(given["body"])}
        whole = json.loads(notebook(answered(exercise, changed), exercise, solved=True))
        whole["cells"] = [c for c in whole["cells"] if not c["id"].endswith("-example")]
        code = {"cell_type": "code", "id": "extra", "metadata": {}, "outputs": []}
        whole["cells"].insert(0, code | {"execution_count": None, "source": cell})
        return json.dumps(whole).encode()

    return file


@pytest.fixture(scope="session")
def answers_of() -> Callable[[Exercise], dict[str, list[dict]]]:
    return answers


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with nothing but exercises, and the working directory in it."""
    place = tmp_path / "course"
    shutil.copytree(ROOT / "exercises", place / "exercises")
    monkeypatch.chdir(place)
    return place
