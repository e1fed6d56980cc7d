"""What JupyterLab may do to the course's files, without a browser (tests/browser has one)."""

import asyncio
import shutil
from pathlib import Path

import pytest

pytest.importorskip("jupyter_server")
from tornado.web import HTTPError

from gdr_teach.lab import CourseFiles

ROOT = Path(__file__).resolve().parents[1]
NAME = "00_start_here.ipynb"


@pytest.fixture
def files(tmp_path):
    for folder in ("notebooks", "my"):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / "notebooks" / NAME, tmp_path / folder / NAME)
    (tmp_path / "notebooks" / "notes.txt").write_text("mine")
    return CourseFiles(root_dir=str(tmp_path))


def writable(files, path):
    return asyncio.run(files.get(path, content=False))["writable"]


def test_only_notebooks_of_tracked_folders_are_read_only(files):
    assert not writable(files, f"notebooks/{NAME}")
    assert writable(files, f"my/{NAME}")
    assert writable(files, "notebooks/notes.txt")
    assert writable(files, "notebooks")
    listed = asyncio.run(files.get("notebooks"))["content"]
    assert {entry["name"]: entry["writable"] for entry in listed} == {
        NAME: False,
        "notes.txt": True,
    }


def test_a_tracked_notebook_is_not_saved_over_and_a_copy_is_saved(files, tmp_path):
    original = tmp_path / "notebooks" / NAME
    before = original.read_bytes()
    model = asyncio.run(files.get(f"notebooks/{NAME}"))
    model["content"]["cells"] = []
    for path in (f"notebooks/{NAME}", f"/notebooks/{NAME}"):
        with pytest.raises(HTTPError, match="Save Notebook As"):
            asyncio.run(files.save(model, path))
    assert original.read_bytes() == before
    asyncio.run(files.save(model, "my/copy.ipynb"))
    assert '"cells": []' in (tmp_path / "my" / "copy.ipynb").read_text(encoding="utf-8")
