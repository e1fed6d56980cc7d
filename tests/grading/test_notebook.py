"""`check` and `hint` as a learner calls them: they answer quickly, change nothing and never raise."""

import linecache
import time
from importlib.util import find_spec

import nbformat
import pytest
import torch

from gdr_teach.grading import check, hint
from gdr_teach.grading import notebook as grading_notebook
from gdr_teach.grading.cells import read_cells

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="kernels need triton")


@pytest.fixture
def cells():
    """Run cells as Jupyter does: in one namespace, each with a source that inspect finds."""
    space: dict = {"__name__": "__main__"}

    def run(*sources: str) -> dict:
        for number, source in enumerate(sources):
            name = f"<notebook {len(linecache.cache)} {number}>"
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
            exec(compile(source, name, "exec"), space)
        return space

    return run


@pytest.fixture
def out(capsys):
    return lambda: capsys.readouterr().out


@pytest.fixture(scope="module", autouse=True)
def _one_server():
    yield
    grading_notebook._server().close()


def test_a_right_answer(out):
    def read(S, q, scale):
        return scale * (S.T @ q)

    check("02.read", read)
    first, *rest = out().splitlines()
    assert first == "✓ 02.read  Read the memory: passed"
    assert [line[:5] for line in rest] == ["  ✓ c", "  ✓ s", "  ✓ u"]


def test_a_wrong_answer_has_its_reason(out):
    def delta_step(S, k, v, beta):
        return S + beta * torch.outer(k, v)

    check("02.delta_step", delta_step)
    said = out()
    assert said.startswith("✗ 02.delta_step")
    assert "✗ overwrite: This is the Hebbian write" in said
    assert "✓ write_rate" in said


def test_array_tasks_answer_at_once(out, cells, root):
    solved = cells(*read_cells(root / "solutions" / "02_delta_rule.ipynb"))
    out()
    for task, function in (("02.read", "read"), ("02.delta_loop", "delta_loop")):
        took = []
        for _ in range(3):
            began = time.perf_counter()
            check(task, solved[function])
            took.append(time.perf_counter() - began)
        assert min(took) < 0.1
    assert out().count("passed") == 6


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('here')", "ValueError: here"),
        ("raise SystemExit", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return read(S, q, scale)", "RecursionError"),
        ("return object()", "of type object"),
        ("S.zero_()\nreturn scale * (S.T @ q)", "✗"),
        ("from gdr_teach.memory import read as r\nreturn r(S, q)", "calls the library"),
        ("...", "not attempted"),
    ],
)
def test_never_raises(out, cells, body, said):
    lines = "\n".join("    " + line for line in body.split("\n"))
    check("02.read", cells(f"def read(S, q, scale):\n{lines}")["read"])
    assert said in out()


@pytest.mark.parametrize("thing", [None, 3, print, torch.Tensor, type, lambda *_: 1])
def test_never_raises_for_other_things(out, thing):
    check("02.read", thing)
    assert "✗ 02.read" in out()


def test_unknown_names_are_said(out, monkeypatch):
    check("02.nothing", print)
    check(None, None)
    hint("02.nothing")
    assert out().count("could not be run: there is no task") == 3
    monkeypatch.setattr(grading_notebook, "find_root", lambda: 1 / 0)
    check("02.read", print)
    assert "could not be run: division by zero" in out()


def test_hints_step_through(out, monkeypatch):
    monkeypatch.setattr(grading_notebook, "_hints_shown", {})
    for _ in range(5):
        hint("02.delta_step")
    lines = out().splitlines()
    assert [line[:9] for line in lines[:3]] == ["Hint 1 of", "Hint 2 of", "Hint 3 of"]
    assert lines[3] == lines[4] != lines[2]


def test_run_all_on_an_untouched_exercise(out, cells, exercise, root):
    cells(*read_cells(root / "exercises" / f"{exercise.id}.ipynb"))
    said = out()
    for task in exercise.tasks:
        assert f"· {task.id}" in said
    assert "✗" not in said


def test_run_all_where_triton_is_missing(out, cells, exercise, root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gdr_teach.runtime", None)
    cells(*read_cells(root / "exercises" / f"{exercise.id}.ipynb"))
    assert out().count(": not attempted") == len(exercise.tasks)


def test_the_examples_are_true(capsys, cells, root):
    """What the solved notebook prints is what its comments want."""
    sources = read_cells(root / "solutions" / "02_delta_rule.ipynb")
    wanted = [
        line.split("# wanted: ")[1] for s in sources for line in s.split("\n") if "wanted" in line
    ]
    assert len(wanted) >= 7
    cells(*[source for source in sources if "check(" not in source])
    printed = capsys.readouterr().out.split("def launch_delta")[0]  # which is shown after them
    assert printed.split() == " ".join(wanted).split()


@needs_triton
def test_in_a_real_jupyter_kernel(root):
    """Sources are found, kernels are checked in a process of their own, and every line is a passed one."""
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(root / "solutions" / "02_delta_rule.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=60).execute()
    said = "".join(
        output.get("text", "")
        for cell in book.cells
        if cell.cell_type == "code" and "check(" in cell.source
        for output in cell.outputs
    )
    assert said.count("✓ 02.") == 5
    assert "✗" not in said


# -- kernels: in a process of their own ------------------------------------------------------------


def kernel_cells(root) -> list[str]:
    sources = read_cells(root / "solutions" / "02_delta_rule.ipynb")
    return [source for source in sources if "check(" not in source]


@needs_triton
def test_a_kernel_is_checked_in_another_process(out, cells, root):
    solved = cells(*kernel_cells(root))
    out()
    check("02.delta_kernel", solved["delta_kernel"])
    assert out().startswith("✓ 02.delta_kernel")


@needs_triton
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("b_o, mask=i_v < V", "b_o", "store outside p_o in program (0, 0, 0)"),
        ("b_o = scale", "__import__('ctypes').string_at(0); b_o = scale", "segmentation fault, exit 139"),
        ("b_o = scale", "__import__('os')._exit(0); b_o = scale", "exit code 0"),
        ("b_o = scale", "b_o = np.pi * scale", "NameError"),
    ],
)  # fmt: skip
def test_a_bad_kernel_costs_only_its_check(out, cells, root, old, new, said):
    sources = [source.replace(old, new) for source in kernel_cells(root)]
    solved = cells(*sources)
    out()
    check("02.delta_kernel", solved["delta_kernel"])
    report = out()
    assert report.startswith("✗ 02.delta_kernel")
    assert said in " ".join(report.split())


@needs_triton
def test_a_kernel_takes_its_helpers_along(out, cells, root):
    """Helpers, constants and other imports of the notebook reach the process that runs the kernel."""
    helper = (
        "import math as m\nZERO = 0.0\nWIDE: tl.constexpr = tl.constexpr(1)\n"
        "@kernel\ndef held_by(b_S, b_k):\n    return tl.sum(b_S * b_k[:, None], axis=0)"
    )
    sources = kernel_cells(root)
    place = next(i for i, source in enumerate(sources) if "def delta_kernel" in source)
    sources[place] = sources[place].replace(
        "tl.sum(b_S * b_k[:, None], axis=0)", "held_by(b_S, b_k)"
    )
    sources.insert(place, helper)
    solved = cells(*sources)
    out()
    check("02.delta_kernel", solved["delta_kernel"])
    assert out().startswith("✓ 02.delta_kernel")


@needs_triton
def test_the_solved_kernel_compiles(cells, root, out):
    from gdr_teach.aot import compile_launch
    from gdr_teach.grading.launch import launch_delta
    from gdr_teach.runtime import recorded

    solved = cells(*kernel_cells(root))
    shape = (2, 3, 2)
    with recorded() as launches:
        k, v = torch.zeros(*shape, 8), torch.zeros(*shape, 5)
        launch_delta(solved["delta_kernel"], k, k, v, k[..., 0], 0.5, torch.zeros(2, 2, 8, 5))
    assert compile_launch(launches[0], "sm_90").spilled == 0
