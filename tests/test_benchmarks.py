"""The benchmark script runs; what it measures is not judged here."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def run():
    spec = importlib.util.spec_from_file_location("benchmarks_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_is_timed(run, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(run, "REPEATS", 1)
    rows = run.measure({"B": 1, "T": 3, "H": 1, "K": 4, "V": 5}, "cpu", torch.float32)
    got = [(row["rule"], row["backend"], row["mode"]) for row in rows]
    assert got == [(rule, *way) for rule in run.RULES for way in run.WAYS["cpu"]]
    assert all(0 < row["forward_ms"] and 0 < row["both_ms"] for row in rows)
    assert "triton" not in {
        row["backend"]
        for row in run.measure(
            {"B": 1, "T": run.INTERPRETED_TOKENS + 1, "H": 1, "K": 4, "V": 4}, "cpu", torch.float32
        )
    }


def test_shapes_are_whole():
    for shapes in tomllib.loads((HERE / "shapes.toml").read_text()).values():
        assert all(set(shape) == set("BTHKV") for shape in shapes)


def test_a_result_is_saved_from_a_gpu_only(run, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run.py", "--save"])
    with pytest.raises(SystemExit):
        run.main()
    assert "wants a CUDA device" in capsys.readouterr().err
