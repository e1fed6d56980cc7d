"""How a notebook's cells become answers: order, errors, overruns, stubs, and what counts as calling the library."""

import dataclasses
import time

import pytest

from gdr_teach.grading.client import Server
from gdr_teach.grading.grade import grade_sources, template_cells
from gdr_teach.grading.job import Limits

READ = "import torch\ndef read(S, q, scale):\n    return scale * (S.T @ q)"
RIGHT, WRONG = READ, READ.replace("scale * ", "")


@pytest.fixture
def state(grade, exercise_02):
    """The state of 02.read and its first reason, for these cells."""

    def of(*cells: str) -> tuple[str, str]:
        report = grade(list(cells), exercise_02, only="02.read").tasks[0]
        failed = [verdict.reason for verdict in report.verdicts if not verdict.passed]
        return report.state, (failed or [""])[0]

    return of


@pytest.mark.parametrize(
    "cells",
    [
        [RIGHT],
        [WRONG, RIGHT],
        ["import torch", RIGHT.replace("import torch\n", "")],
        ["raise ValueError", RIGHT],
        [RIGHT + "\nraise ValueError"],
        ["%matplotlib inline\n!ls\n" + RIGHT + "\ntorch.einsum?"],
        ["%%bash\nexit 1", RIGHT],
        ["%timeit 1", RIGHT],
        ["import torch\nread = lambda S, q, scale: scale * (S.T @ q)"],
        ["import torch\ndef inner(S, q, scale):\n    return scale * (S.T @ q)\nread = inner"],
        ["input('name? ')", RIGHT],
        ["print('x' * 10**7)", RIGHT],
        ["import gdr_teach.grading\nfrom gdr_teach.grading import check, hint\ncheck(1)\nhint(2)", RIGHT],
        ["from gdr_teach import delta_rule, Output\nimport gdr_teach.delta.reference as r\n" + RIGHT],
        ["import os\nassert 'GDR_SECRET' not in os.environ\n" + RIGHT],
        ["open('notes.txt', 'w').write('mine')\n" + RIGHT],
        [RIGHT, "x = 1 +"],
        [RIGHT.replace("    return", "    ...  # your code here\n    return")],
        ["import warnings\nwarnings.warn('x')\n" + RIGHT],
    ],
    ids=lambda cells: cells[0][:40],
)  # fmt: skip
def test_passed(state, cells):
    assert state(*cells) == ("passed", "")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([RIGHT, WRONG], "without `scale`"),
        (["def read(S, q):\n    return S"], "TypeError"),
        (["def read(S, q, scale):\n    return undefined"], "`return undefined`: NameError"),
        (["read = 3"], "Wanted a function, got an object of type int"),
        (["1 / 0\ndef read(S, q, scale): ..."], "did not finish: ZeroDivisionError"),
        (["import time\ntime.sleep(99)\ndef read(S, q, scale): ..."], "did not finish: It ran out of time"),
        (["def read(S, q, scale):\n    return S.to_sparse()"], "ordinary float32"),
        (["def read(S, q, scale):\n    return S.bfloat16()"], "torch.bfloat16"),
    ],
)  # fmt: skip
def test_failed(state, cells, said):
    answer, reason = state(*cells)
    assert answer == "failed"
    assert said in reason


@pytest.mark.parametrize(
    "cells",
    [
        [],
        ["x = 1"],
        ["def read(S, q, scale):\n    pass"],
        ["def read(S, q, scale):\n    '''Text.'''"],
        ["def read(S, q, scale):\n    raise NotImplementedError"],
        ["def read(S, q, scale):\n    return None  # later"],
        [RIGHT, "def read(S, q, scale):\n    ..."],
        ["def another():\n    def read(S, q, scale):\n        return 1"],
    ],
)
def test_not_attempted(state, cells):
    assert state(*cells)[0] == "not attempted"


@pytest.mark.parametrize(
    "cell",
    [
        "from gdr_teach import delta_rule\ndef read(S, q, scale):\n    return delta_rule(S, q)",
        "import gdr_teach\ndef read(S, q, scale):\n    return gdr_teach.delta_rule(S, q)",
        "import gdr_teach as g\nf = g.delta_rule\ndef read(S, q, scale):\n    return f(S, q)",
        "def read(S, q, scale):\n    from gdr_teach.memory import read as r\n    return r(S, q)",
        """from gdr_teach.delta import reference as r
def h(x):
    return r.delta_recurrence(x)
def read(S, q, scale):
    return h(S)""",
        "def read(S, q, scale):\n    import gdr_teach.delta.op\n    return gdr_teach.delta.op.delta_rule(S)",
        """import importlib
def read(S, q, scale):
    try:
        return importlib.import_module('gdr_teach.delta').recurrent.delta(S)
    except Exception:
        return S""",
        "import fla.ops\ndef read(S, q, scale):\n    return fla.ops.delta_rule(S)",
    ],
)
def test_calls_the_library(state, cell):
    answer, reason = state(cell)
    assert answer == "failed"
    assert reason.startswith("calls the library")


def test_the_library_where_the_manifest_permits_it(grade, exercise_02):
    tasks = tuple(dataclasses.replace(task, may_call_operators=True) for task in exercise_02.tasks)
    cell = (
        "from gdr_teach.memory import read as recall\n"
        "from gdr_teach import delta_rule\n"
        "def read(S, q, scale):\n    return delta_rule and recall(S, q) * scale"
    )
    exercise = dataclasses.replace(exercise_02, tasks=tasks)
    assert grade([cell], exercise, only="02.read").tasks[0].state == "passed"


def test_kernels_are_not_verified_without_triton(grade, solved, exercise_02, server, monkeypatch):
    server.start()
    monkeypatch.setattr(server, "has_triton", False)
    report = grade(solved(exercise_02), exercise_02)
    assert [task.state for task in report.tasks] == ["passed"] * 4 + ["not verified"]
    assert report.score == 11
    assert "not installed" in report.tasks[-1].verdicts[0].reason


def test_the_same_seed_gives_the_same_report(grade, exercise_02):
    one, two = (grade([WRONG], exercise_02, only="02.read", seed=9) for _ in range(2))
    assert one == two


def test_a_notebook_of_slow_cells_ends_in_time(grade, exercise_02, root):
    """Every cell overruns or takes nearly all it may: the time for the notebook holds, and an answer is still found."""
    limits = Limits(cell=0.4, cells=0.8, task=1.0, notebook=6.0)
    slow = ["import time\ntime.sleep(99)"] * 2 + ["import time\ntime.sleep(0.3)"] * 6
    with Server(limits) as server:
        server.start()
        two = dataclasses.replace(exercise_02, tasks=exercise_02.tasks[:2])
        began = time.monotonic()
        report = grade_sources([*slow, RIGHT], two, template_cells(root, two), 1, server)
        took = time.monotonic() - began
    assert took < limits.notebook + 3
    assert report.tasks[0].state == "passed"


def test_no_time_left(exercise_02, root):
    with Server(Limits(notebook=0.0)) as server:
        report = grade_sources([RIGHT], exercise_02, template_cells(root, exercise_02), 1, server)
    assert {task.state for task in report.tasks} == {"failed"}
    assert "was used up" in report.tasks[0].verdicts[0].reason


def test_memory_is_watched(exercise_02, root):
    """By resident size, where the system's own limit does not count: here it allows far more than is there."""
    sleeper = "import time\ndef read(S, q, scale):\n    time.sleep(99)"
    exercise = dataclasses.replace(exercise_02, tasks=exercise_02.tasks[:1])
    with Server(Limits(memory=2**26)) as server:
        report = grade_sources([sleeper], exercise, template_cells(root, exercise), 1, server)
    assert "more than 64 MiB" in report.tasks[0].verdicts[0].reason


def test_a_dead_server_is_replaced(grade, exercise_02, server):
    server.start()
    before = server.pid
    server._process.kill()
    assert grade([RIGHT], exercise_02, only="02.read").score == 2
    assert server.pid != before


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("gdr_teach.grading.client.sys.executable", "/bin/false")
    with Server() as server, pytest.raises(RuntimeError, match="did not start"):
        server.start()
