"""Answers that try to win points without being right, or to take the grader down. None may; the rest is graded."""

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gdr_teach.grading.cells import read_cells
from gdr_teach.grading.client import Server
from gdr_teach.grading.grade import Report, grade_sources, template_cells
from gdr_teach.grading.job import Limits

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the grader needs POSIX limits")

QUICK = Limits(cell=1.5, cells=4.0, task=2.0, notebook=30.0, memory=3 * 2**29, processes=8)

# bodies of 02.read: read(S, q, scale)
ANSWERS = {
    "prints a verdict": """
        line = '{"exercise": "02_delta_rule", "score": 16, "max": 16, "tasks": []}'
        print(line, flush=True)
        import os, sys
        sys.__stderr__.write("02.read: passed")
        for fd in (1, 2):
            os.write(fd, line.encode())
        return torch.zeros(S.shape[1])
    """,
    "rebinds comparisons": """
        import numpy as np
        np.allclose = np.array_equal = torch.allclose = torch.equal = lambda *a, **k: True
        np.isfinite = lambda *a, **k: np.ones(1, dtype=bool)
        np.testing.assert_allclose = torch.testing.assert_close = lambda *a, **k: None
        return torch.zeros(S.shape[1])
    """,
    "is equal to everything": """
        class Yes:
            shape, dtype = (S.shape[1],), torch.float32
            def __eq__(self, other): return True
            def __le__(self, other): return True
            def __array__(self, *a, **k): return S.numpy()[0]
            def __getattr__(self, name): return lambda *a, **k: self
        return Yes()
    """,
    "a tensor of another class": """
        class Liar(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return True
        return torch.zeros(S.shape[1]).as_subclass(Liar)
    """,
    "os._exit(0)": "import os; os._exit(0)",
    "sys.exit(0)": "raise SystemExit(0)",
    "raises KeyboardInterrupt": "raise KeyboardInterrupt",
    "endless loop": "while True: pass",
    "sleeps and ignores signals": """
        import signal, time
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass
    """,
    "fork bomb": """
        import os
        for _ in range(6):
            try:
                os.fork()
            except OSError:
                pass
        while True: pass
    """,
    "leaves a daemon behind": """
        import os, subprocess, time
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        return torch.zeros(S.shape[1])
    """,
    "memory bomb of lists": """
        held = []
        while True:
            held.append(bytearray(2**24))
    """,
    "memory bomb of tensors": """
        held = []
        while True:
            held.append(torch.ones(2**22))
    """,
    "a tensor too large": "return torch.zeros(1).expand(10**10)",
    "pickles an exploit": """
        class Exploit:
            def __reduce__(self):
                return (__import__("os").system, ("touch MARKER",))
        return Exploit()
    """,
    "walks the stack and the heap for the reference": """
        import gc, sys
        frame = sys._getframe()
        while frame:
            for value in list(frame.f_locals.values()):
                if isinstance(value, dict) and "want" in value:
                    return value["want"]
            frame = frame.f_back
        for module in list(sys.modules.values()):
            for name in ("CHECKS", "READ", "walk"):
                if name in vars(module) and "exercise" in module.__name__:
                    return torch.tensor(vars(module)["read"](S.numpy(), q.numpy(), scale)[0])
        for thing in gc.get_objects():
            if type(thing).__name__ in ("Check", "Verdict"):
                return torch.tensor(thing.want(S.numpy(), q.numpy(), scale)[0])
        return torch.zeros(S.shape[1])
    """,
    "imports the reference of the grader": """
        from gdr_teach.grading.tasks.exercise_02 import read as right
        return torch.tensor(right(S.numpy(), q.numpy(), scale)[0]).float()
    """,
    "reads the solution from the disk": """
        import gdr_teach.runtime, pathlib
        root = pathlib.Path(gdr_teach.runtime.__file__).resolve().parents[1]
        space = {}
        exec((root / "solutions" / "02_delta_rule.py").read_text().split("# %% name=\\"read-example")[0], space)
        return space["read"](S, q, scale)
    """,
    "calls the library under another name": """
        from gdr_teach.delta.reference import delta_recurrence as f
        one = torch.zeros(1, 1, 1, len(q))
        o, _ = f(q[None, None, None], one, torch.zeros(1, 1, 1, S.shape[1]), one[..., 0], scale=scale,
                 initial_state=S[None, None])
        return o.reshape(-1)
    """,
    "calls the library by its path": """
        import importlib
        f = getattr(importlib.import_module("gdr_" + "teach.delta"), "reference").delta_recurrence
        one = torch.zeros(1, 1, 1, len(q))
        o, _ = f(q[None, None, None], one, torch.zeros(1, 1, 1, S.shape[1]), one[..., 0], scale=scale,
                 initial_state=S[None, None])
        return o.reshape(-1)
    """,
    "monkeypatches the grader": """
        import sys
        for name, module in list(sys.modules.items()):
            if name.startswith("gdr_teach.grading"):
                for key, value in list(vars(module).items()):
                    if callable(value) and not key.startswith("__") and key not in ("send", "receive"):
                        try:
                            setattr(module, key, lambda *a, **k: {"passed": True, "state": "passed"})
                        except Exception:
                            pass
        return torch.zeros(S.shape[1])
    """,
    "kills its parent": """
        import os, signal
        try:
            os.kill(os.getppid(), signal.SIGKILL)
        except OSError:
            pass
        return torch.zeros(S.shape[1])
    """,
    "kills its parent and leaves a child": """
        import os, signal, time
        try:
            if os.fork() == 0:
                time.sleep(1000)
            os.kill(os.getppid(), signal.SIGKILL)
        except OSError:
            pass
        return torch.zeros(S.shape[1])
    """,
    "writes to every descriptor": """
        import os
        for fd in range(64):
            try:
                os.write(fd, b'{"passed": true, "points": 16}' * 100)
            except OSError:
                pass
        return torch.zeros(S.shape[1])
    """,
    "sends frames of its own": """
        import gc, json, socket, struct
        head = json.dumps({"kind": "result", "failure": "", "detail": "", "outputs": 1, "passed": True,
                           "arrays": [["float32", [S.shape[1]]]]}).encode()
        frame = struct.pack(">I", len(head)) + head + bytes(4 * S.shape[1])
        for thing in gc.get_objects():
            if isinstance(thing, socket.socket):
                thing.sendall(frame * 10)
        return torch.zeros(S.shape[1])
    """,
    "claims an endless array": """
        import gc, json, socket, struct
        head = json.dumps({"kind": "result", "outputs": 1, "arrays": [["float64", [2**24, 2**24]]]}).encode()
        for thing in gc.get_objects():
            if isinstance(thing, socket.socket):
                thing.sendall(struct.pack(">I", len(head)) + head)
        return torch.zeros(S.shape[1])
    """,
    "closes every descriptor": """
        import os, time
        os.closerange(0, 256)
        time.sleep(1000)
    """,
    "raises in __str__ and __repr__": """
        class Sly(Exception):
            def __str__(self): raise SystemExit(0)
            __repr__ = __str__
        raise Sly
    """,
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "recursion without end": """
        import sys
        sys.setrecursionlimit(10**9)
        return read(S, q, scale)
    """,
    "a generator": "yield from S",
    "NaN": "return torch.full((S.shape[1],), float('nan'))",
}  # fmt: skip

# cells of their own, in front of a notebook whose 02.read is not written
CELLS = {
    "os._exit(0)": "import os; os._exit(0)",
    "endless loop": "while True: pass",
    "kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "import sys; sys.exit(0)",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "syntax error": "def read(S, q, scale) return S",
    "nested without end": "(" * 50_000,
    "a lone surrogate": "x = '\ud800'",
    "rebinds builtins": "import builtins; builtins.exec = builtins.isinstance = builtins.float = None",
    "an import hook": "import sys; sys.meta_path.clear(); sys.modules.pop('gdr_teach.grading', None)",
    "a thread that ends the process": (
        "import os, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.001), os._exit(0)), daemon=True).start()\ntime.sleep(0.1)"
    ),
    "an exit handler": "import atexit, sys; atexit.register(print, 'passed'); sys.settrace(lambda *a: 1 / 0)",
    "writes to the notebook": "open(NOTEBOOK, 'w').write('{}')",
    "removes the notebook": "import os; os.remove(NOTEBOOK)",
    "writes next to the notebook": "open(NOTEBOOK + '.progress', 'w').write('passed')",
}
HARM_ONESELF = (
    "rebinds builtins",
    "an import hook",
)  # what a process needs is gone: its answers are lost
UNCONFINED = (
    "os._exit(0)", "fork bomb", "leaves a daemon behind", "kills its parent", "memory bomb of lists",
    "kills its parent and leaves a child",
    "sleeps and ignores signals", "closes every descriptor",
)  # fmt: skip


@pytest.mark.parametrize("attack", ANSWERS)
def test_answer(attack, attacked, closed_server):
    report = attacked(closed_server, body=ANSWERS[attack])
    assert states(report)[0] == "failed"
    assert set(states(report)[1:]) == {"passed"}


@pytest.mark.parametrize("attack", CELLS)
def test_cell(attack, attacked, closed_server):
    report = attacked(closed_server, body="...", cell=CELLS[attack])
    expected = "failed" if attack == "syntax error" else "not attempted"
    assert states(report)[0] in (expected, "not attempted")
    if attack not in HARM_ONESELF:
        assert set(states(report)[1:]) == {"passed"}


@pytest.mark.parametrize("attack", UNCONFINED)
def test_answer_where_the_system_refuses_nothing(attack, attacked, open_server):
    report = attacked(open_server, body=ANSWERS[attack])
    assert states(report)[0] == "failed"
    assert set(states(report)[1:]) == {"passed"}


@pytest.fixture(scope="session")
def closed_server():
    with Server(QUICK) as closed_server:
        yield closed_server


@pytest.fixture(scope="session")
def open_server():
    with Server(QUICK, confined=False) as open_server:
        yield open_server


@pytest.fixture
def attacked(tmp_path, exercise_02, built, root, scratch, server, closed_server, open_server):
    """Grade a file with an attack in it; the file stays, nothing appears beside it, no process is left.

    Without the kernel task, which takes longer than the others together.
    """
    arrays = replace(exercise_02, tasks=exercise_02.tasks[:4])

    def graded(by: Server, body: str, cell: str = "") -> Report:
        path = tmp_path / "02_delta_rule.ipynb"
        cell = cell.replace("NOTEBOOK", repr(str(path)))
        path.write_bytes(built(exercise_02, {"task": "02.read", "body": body}, cell))
        before = path.read_bytes()
        report = grade_sources(read_cells(path), arrays, template_cells(root, arrays), 5, by)
        assert path.read_bytes() == before
        assert list(tmp_path.rglob("*")) == [path]
        assert left_behind(scratch, server.pid, closed_server.pid, open_server.pid) == []
        assert report.tasks[0].points == 0
        return report

    return graded


def states(report: Report) -> list[str]:
    return [task.state for task in report.tasks]


def left_behind(scratch: Path, *known: int | None) -> list[int]:
    """Processes that began under the scratch folder of this test run, but for those that are known."""
    found = []
    time.sleep(0.02)
    for process in psutil.process_iter():
        try:
            inside = Path(process.environ().get("HOME", "/")).is_relative_to(scratch)
        except psutil.Error:
            continue
        if inside and process.pid not in known and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def test_left_behind_sees_what_is_left(scratch):
    env = {"HOME": str(scratch / "x"), "PATH": os.environ["PATH"]}
    before = left_behind(scratch)
    with psutil.Popen(["sleep", "20"], env=env) as process:
        try:
            assert left_behind(scratch, *before) == [process.pid]
        finally:
            process.kill()
