"""Exercises and solved notebooks come from one source, byte for byte the same, in the canonical form."""

import json

import nbformat
import pytest

from gdr_teach.grading import build
from gdr_teach.grading.build import BEGIN, END, STUB, built, notebook, stubbed
from gdr_teach.grading.manifest import UnusableInput


def test_nothing_is_out_of_date(root):
    for path, text in built(root):
        assert path.read_text(encoding="utf-8") == text, f"run: python -m {build.__name__}"


def test_check_finds_what_is_out_of_date(root, tmp_path, monkeypatch, capsys):
    stale = [(root / "exercises" / "x.ipynb", "new")]
    monkeypatch.setattr(build, "built", lambda _: iter(stale))
    assert build.main(["--check"]) == 1
    assert "out of date: exercises/x.ipynb" in capsys.readouterr().out
    assert not stale[0][0].exists()


def test_canonical_form(root):
    for path, text in built(root):
        whole = json.loads(text)
        nbformat.validate(nbformat.from_dict(whole))
        assert (whole["nbformat"], whole["nbformat_minor"]) == (4, 5)
        assert whole["metadata"] == {"kernelspec": build.KERNELSPEC}
        assert text.endswith("}\n")
        names = [cell["id"] for cell in whole["cells"]]
        assert len(set(names)) == len(names)
        for cell in whole["cells"]:
            assert cell["metadata"] == {}
            if cell["cell_type"] == "code":
                assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert (BEGIN in text, END in text) == (False, False)
        assert (STUB in text) == (path.parent.name == "exercises")


def test_each_task_has_text_answer_and_check(root, exercise):
    whole = json.loads((root / "exercises" / f"{exercise.id}.ipynb").read_text())
    cells = {cell["id"]: "".join(cell["source"]) for cell in whole["cells"]}
    order = list(cells)
    for task in exercise.tasks:
        slug = task.id.replace(".", "-").replace("_", "-")
        text, answer, check = f"{slug}-text", f"{slug}-answer", f"{slug}-check"
        assert order.index(text) < order.index(answer) < order.index(check)
        assert f"{task.minutes} minutes, {task.points} points" in cells[text]
        assert "**Example**" in cells[text]
        assert f"def {task.function}(" in cells[answer]
        assert f'check("{task.id}", {task.function})' in cells[check]
        assert set(task.title) >= {"en", "zh"}
        assert len(task.hints["en"]) >= 2


def test_stubs():
    code = f"def f(x):\n    if x:\n        {BEGIN}\n        return 1\n        {END}\n    return 2"
    assert stubbed(code) == f"def f(x):\n    if x:\n        {STUB}\n    return 2"


@pytest.mark.parametrize("code", [BEGIN, END, f"{BEGIN}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}"])
def test_markers_that_do_not_pair(code):
    with pytest.raises(UnusableInput):
        stubbed(code)


def test_source_and_manifest_must_agree(exercise):
    with pytest.raises(UnusableInput, match="no answer cell"):
        notebook('# %% name="a"\nx = 1', exercise, solved=True)
    with pytest.raises(UnusableInput, match="no task 99.none"):
        notebook('# %% task="99.none"\nx = 1', exercise, solved=True)
