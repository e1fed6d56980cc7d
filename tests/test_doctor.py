"""The doctor's verdicts, with parts of the machine taken away."""

import io
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gdr_teach import doctor

STATES = ("ok", "missing", "fault")


def consult(monkeypatch, **replaced) -> tuple[int, dict[str, str], str]:
    """Exit code, line by check and closing line, with some checks replaced and the slow ones fixed."""
    for name in ("delta", "kernel", "my"):
        replaced.setdefault(name, lambda words: doctor.Finding("ok"))
    for name, check in replaced.items():
        monkeypatch.setitem(doctor.CHECKS, name, check)
    stream = io.StringIO()
    code = doctor.run_doctor(stream)
    *lines, closing = stream.getvalue().splitlines()
    return code, dict(zip(doctor.CHECKS, lines, strict=True)), closing


def test_one_line_a_check_with_state_and_purpose(monkeypatch):
    monkeypatch.delenv("GDR_LANG", raising=False)
    _, lines, _ = consult(monkeypatch)
    words = doctor.load_words()
    for name, line in lines.items():
        state, found, *_ = line.split()
        assert state in STATES
        assert found == name
        assert words[name]["purpose"] in line
        assert ("To do:" in line) == (state != "ok")


def test_inside_jupyter_the_lines_still_go_to_the_stream(monkeypatch):
    # rich, seeing Jupyter, would show them in the notebook and leave the stream empty
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    _, lines, closing = consult(monkeypatch)
    assert all(lines.values())
    assert closing


def test_this_machine_computes_what_a_hand_does():
    words = doctor.load_words()
    assert doctor.CHECKS["delta"](words).state == "ok"


def test_a_kernel_runs_here():
    pytest.importorskip("triton")
    assert doctor.CHECKS["kernel"](doctor.load_words()).state == "ok"


def test_a_wrong_value_is_a_fault(monkeypatch):
    op = pytest.importorskip("gdr_teach.delta.op")
    real = op.delta_rule
    monkeypatch.setattr(op, "delta_rule", lambda q, k, v, beta, **kw: real(q, k, v, beta * 0, **kw))
    finding = doctor.CHECKS["delta"](doctor.load_words())
    assert finding.state == "fault"
    assert "[2.0, 3.0, 3.0, 0.0]" in finding.found


@pytest.mark.parametrize(
    ("finding", "code"),
    [
        (doctor.Finding("ok"), 0),
        (doctor.Finding("missing", needed=False), 0),
        (doctor.Finding("missing", needed=True), 1),
        (doctor.Finding("fault", needed=False), 1),
    ],
)
def test_exit_code(monkeypatch, finding, code):
    fine = {name: lambda words: doctor.Finding("ok") for name in doctor.CHECKS}
    got, lines, closing = consult(monkeypatch, **fine | {"disk": lambda words: finding})
    assert got == code
    assert lines["disk"].startswith(finding.state)
    assert ("disk" in closing) == bool(code)


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken(words):
        raise OSError("no such\ndevice")

    code, lines, _ = consult(monkeypatch, disk=broken)
    assert code == 1
    assert lines["disk"].startswith("fault")
    assert "OSError: no such device" in lines["disk"]


BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from gdr_teach.doctor import run_doctor
sys.exit(run_doctor())
"""


@pytest.mark.parametrize(
    ("blocked", "missing"),
    [
        (["triton"], ["triton", "kernel"]),
        (["torch"], ["torch", "delta", "kernel"]),
        (["rich"], []),
    ],
)
def test_without_a_package_it_says_what_to_install(blocked, missing):
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked)], capture_output=True, text=True
    )
    assert run.stderr == ""
    lines = {line.split()[1]: line for line in run.stdout.splitlines()[:-1]}
    for name in missing:
        assert lines[name].startswith("missing"), lines[name]
    for name in blocked:
        assert name not in missing or f"pip install -c constraints.txt {name}" in lines[name]
    assert run.returncode == (1 if missing else 0), run.stdout


def test_my_is_looked_for_upwards(monkeypatch, tmp_path):
    words = doctor.load_words()
    monkeypatch.chdir(tmp_path)
    assert doctor.my(words).state == "missing"
    (tmp_path / "exercises").mkdir()
    (tmp_path / "exercises" / "manifest.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert doctor.my(words) == doctor.Finding("ok", str(tmp_path / "my"))
    (tmp_path / "my").write_text("a file where the folder should be")
    assert doctor.my(words).state == "fault"


def test_both_languages_say_everything(monkeypatch):
    with (Path(doctor.__file__).parent / "doctor.toml").open("rb") as file:
        tables = tomllib.load(file)
    assert set(tables["en"]) == set(tables["zh"]) >= set(doctor.CHECKS)
    for name in doctor.CHECKS:
        assert set(tables["en"][name]) == set(tables["zh"][name]) == {"purpose", "advice"}
    monkeypatch.setenv("GDR_LANG", "zh")
    assert doctor.load_words()["ok"] == "正常"
    monkeypatch.setenv("GDR_LANG", "eo")  # a language that is not there is said in English
    assert doctor.load_words()["ok"] == "ok"
