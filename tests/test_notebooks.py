"""The notebooks are in the one format, and the tool that says so notices when they are not.

Running them is nbval's part: see tools/test.sh.
"""

import base64
import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the course extra is not installed")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "tools" / "notebooks.py").exists(), reason="not in the course's repository"
)


def load_tool():
    spec = importlib.util.spec_from_file_location("course_notebooks", ROOT / "tools/notebooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tool = load_tool()
COURSE = tool.notebooks()
IDS = [path.stem for path in COURSE]


def test_the_course_is_there():
    assert IDS[0] == "00_start_here"
    assert "02_delta_rule" in IDS


@pytest.mark.parametrize("path", COURSE, ids=IDS)
def test_notebook_has_no_fault(path):
    assert tool.faults(path) == []


@pytest.mark.parametrize("path", COURSE, ids=IDS)
def test_every_figure_has_alt_text(path):
    for i, output in tool.outputs(tool.load(path)):
        for kind in output.get("data", {}):
            if kind.startswith("image/"):
                alt = output.metadata[kind]["alt"]
                assert len(alt) > 60, f"cell {i}"


@pytest.mark.parametrize("path", COURSE, ids=IDS)
def test_opens_in_both_languages(path):
    first = tool.load(path).cells[0].source
    assert re.search(r"[\u4e00-\u9fff]{6}", first)
    assert len(re.findall(r"[A-Za-z]+", first)) > 40


@pytest.mark.parametrize("path", COURSE[1:], ids=IDS[1:])
def test_equation_numbers_in_code_are_equations_of_the_text(path):
    nb = tool.load(path)
    prose = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    tags = re.findall(r"\\tag\{([\d.]+[a-z]?)\}", prose)
    used = {
        n for c in tool.code_cells(nb) for n in re.findall(r"#.*?\((\d+\.\d+[a-z]?)\)", c.source)
    }
    assert len(tags) == len(set(tags))
    assert used
    assert used <= set(tags)


def test_chapter_02_numbers_what_the_reference_numbers():
    prose = "\n".join(c.source for c in tool.load(ROOT / "notebooks/02_delta_rule.ipynb").cells)
    reference = (ROOT / "gdr_teach/delta/reference.py").read_text(encoding="utf-8")
    for number in (f"2.{n}" for n in range(1, 9)):
        assert f"\\tag{{{number}}}" in prose
        assert f"({number})" in reference


# -- the tool itself -----------------------------------------------------------------------------


PIXEL = base64.b64encode(b"\x89PNG not really").decode()


def small():
    """A notebook without fault, built by hand and not executed."""
    v4 = nbformat.v4
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), v4.new_code_cell("print(1)")])
    nb.cells[1].outputs = [v4.new_output("stream", name="stdout", text="1\n")]
    nb.metadata["gdr_teach"] = {"source_hash": tool.source_hash(nb)}
    return tool.canonical(nb)


def faults_of(nb, tmp_path, canonical=True):
    path = tmp_path / "00_small.ipynb"
    path.write_text(tool.dumps(tool.canonical(nb) if canonical else nb), encoding="utf-8")
    return tool.faults(path)


def test_small_notebook_has_no_fault(tmp_path):
    assert faults_of(small(), tmp_path) == []


def shown(kind, content, **metadata):
    def plant(nb):
        data = {kind: content}
        nb.cells[1].outputs.append(
            nbformat.v4.new_output("display_data", data=data, metadata=metadata)
        )

    return plant


def stderr(nb):
    nb.cells[1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="oh\n"))


def says(text):
    def plant(nb):
        nb.cells[1].outputs[0].text = text

    return plant


def markdown(text):
    def plant(nb):
        nb.cells[0].source = text
        nb.metadata["gdr_teach"] = {"source_hash": tool.source_hash(nb)}

    return plant


def code(text):
    def plant(nb):
        nb.cells[1].source = text
        nb.metadata["gdr_teach"] = {"source_hash": tool.source_hash(nb)}

    return plant


LIVE = "gdr_teach.memory:read"
FAULTS = {
    "picture without alt text": shown("image/png", PIXEL),
    "has a picture without alt text": shown("text/html", '<img src="x.png">'),
    "cell 0 has a picture without alt text": markdown("![](x.png)"),
    "PNG of more than": shown("image/png", "A" * 60_000, **{"image/png": {"alt": "much"}}),
    "needs a widget": shown("application/vnd.jupyter.widget-view+json", {}),
    "fetches something from outside": shown(
        "text/html", '<script src="https://a.b/c.js"></script>'
    ),
    "must not write to stderr": stderr,
    "of this machine or moment: '/home/'": says("/home" + "/me/x\n"),
    "of this machine or moment: '12 ms'": says("took 12 ms\n"),
    "somebody's progress": says("☑ 2\n"),
    "links to nowhere.md": markdown("[x](nowhere.md)"),
    "links to ../my/99_none.ipynb": markdown("[x](../my/99_none.ipynb)"),
    "carries a picture in its source": markdown("![x](data:image/png;base64,AAAA)"),
    "at most 25 lines, got 26": code("\n".join("1" for _ in range(26))),
    "has changed in the package": shown("text/html", "old", **{"text/html": {"source": LIVE}}),
    "must have at most 400000 bytes": says("x" * 400_000),
}


@pytest.mark.parametrize("words", FAULTS)
def test_fault_is_noticed(words, tmp_path):
    nb = small()
    FAULTS[words](nb)
    for _, output in tool.outputs(nb):
        if "text/html" in output.get("metadata", {}):
            output.data["text/plain"] = "old"
    assert any(words in fault for fault in faults_of(nb, tmp_path))


def test_edited_after_execution(tmp_path):
    nb = small()
    nb.cells[1].source = "print(2)"
    assert faults_of(nb, tmp_path) == ["was edited after it was executed"]
    assert tool.stale(nb)


def test_long_cell_may_show_a_source(tmp_path):
    nb = small()
    nb.cells[1].metadata["tags"] = [tool.SHOWN]
    code("\n".join("1" for _ in range(60)))(nb)
    assert faults_of(nb, tmp_path) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda nb: nb.metadata["language_info"].update(version="3.12.1"),
        lambda nb: nb.cells[0].metadata.update(collapsed=True),
        lambda nb: nb.cells[1].update(id="random-id"),
        lambda nb: nb.cells[1].update(execution_count=17),
        lambda nb: nb.cells[1].metadata.update(execution={"iopub.execute_input": "2026-01-01"}),
    ],
    ids=["version", "collapsed", "id", "count", "timing"],
)
def test_format_is_one(spoil, tmp_path):
    nb = small()
    clean = tool.dumps(nb)
    spoil(nb)
    assert faults_of(nb, tmp_path, canonical=False) == ["is not in the canonical format"]
    assert tool.dumps(tool.canonical(nb)) == clean


def test_canonical_is_idempotent_and_names_cells_by_their_source():
    nb = small()
    nb.cells += [copy.deepcopy(nb.cells[1]), nbformat.v4.new_markdown_cell("end")]
    once = tool.canonical(nb)
    assert tool.dumps(tool.canonical(once)) == tool.dumps(once)
    ids = [cell.id for cell in once.cells]
    assert len(set(ids)) == 4
    assert ids[2] == f"{ids[1]}-2"
    once.cells.insert(0, nbformat.v4.new_markdown_cell("new"))
    assert [cell.id for cell in tool.canonical(once).cells][1:] == ids


def test_hash_sees_sources_and_order_but_not_outputs():
    nb = small()
    kept = tool.source_hash(nb)
    nb.cells[1].outputs = []
    assert tool.source_hash(nb) == kept
    nb.cells.reverse()
    assert tool.source_hash(nb) != kept


def test_words_count_prose_only():
    nb = small()
    nb.cells[
        0
    ].source = "Two words $a + b$ and `code here` [link](x.md)\n$$x\ny$$\n```\nno no\n```\n中文"
    assert tool.words(nb) == 4


def test_package_source_is_what_inspect_gives():
    import inspect

    from gdr_teach.delta import reference

    plain = inspect.unwrap(reference.start_state)
    wanted = inspect.getsource(plain).rstrip()
    assert tool.package_source("gdr_teach.delta.reference:start_state") == wanted
    assert tool.package_source("gdr_teach.delta.reference:nothing") == ""
    assert tool.package_source("gdr_teach.nothing:nothing") == ""


@pytest.mark.filterwarnings("ignore")  # of the kernel's client: not ours to repair
def test_execution_is_reproducible(tmp_path):
    pytest.importorskip("nbclient")
    nb = small()
    code("import sys\nprint(6 * 7)\nprint('more')\n6 * 7")(nb)
    runs = [tool.dumps(tool.execute(nb, tmp_path)) for _ in range(2)]
    assert runs[0] == runs[1]
    done = nbformat.reads(runs[0], as_version=4)
    assert [o.output_type for o in done.cells[1].outputs] == ["stream", "execute_result"]
    assert done.cells[1].outputs[0].text == "42\nmore\n"
    assert not tool.stale(done)
    assert faults_of(done, tmp_path) == []
