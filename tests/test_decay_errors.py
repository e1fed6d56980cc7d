"""The table of errors under decay can be made, and the stored one has the rows of today."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "decay_errors.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("decay_errors", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", (1, 5, 1, 4, 3))  # the rows are the same
    return module


def rows(text: str) -> list[list[str]]:
    """The heads of the tables, and what stands before the figures of every row."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    head = [" dtype " in row for row in cells]
    return [row if whole else row[:3] for row, whole in zip(cells, head, strict=True)]


def test_the_table_is_made_and_the_stored_one_has_its_rows(script, monkeypatch, tmp_path, capsys):
    stored = script.stored(script.PAGE.read_text())
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["decay_errors.py", "--write"])
    assert script.main() == 0
    made = script.stored(page.read_text())
    assert made == capsys.readouterr().out.strip()
    assert page.read_text() == f"before\n{script.BEGIN}\n\n{made}\n\n{script.END}\nafter\n"
    assert "nan" not in made
    if stored is not None:
        assert rows(stored) == rows(made)


def test_a_page_without_markers_is_left_alone(script, monkeypatch, tmp_path, capsys):
    page = tmp_path / "kernels.md"
    page.write_text("nothing here\n")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["decay_errors.py", "--write"])
    with pytest.raises(SystemExit):
        script.main()
    assert script.BEGIN in capsys.readouterr().err
    assert page.read_text() == "nothing here\n"
