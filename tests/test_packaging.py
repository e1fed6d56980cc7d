"""What stands around the code: metadata that must agree, the Makefile, and the scripts behind it."""

import ast
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import gdr_teach

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]


def constraints() -> dict[str, str]:
    lines = [
        line.partition("#")[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line)


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# -- metadata ------------------------------------------------------------------------------------


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"] == gdr_teach.__version__
    assert citation["license"] == PROJECT["license"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == PROJECT["version"]


def test_the_ops_need_four_packages_only():
    core = [Requirement(line) for line in PROJECT["dependencies"]]
    assert {r.name for r in core} == {"torch", "triton", "numpy", "jaxtyping"}
    marker = next(r.marker for r in core if r.name == "triton")
    assert marker.evaluate({"sys_platform": "linux"})
    assert not marker.evaluate({"sys_platform": "darwin"})


def test_every_named_package_is_pinned_within_its_range():
    pins = constraints()
    for line in chain(PROJECT["dependencies"], *EXTRAS.values()):
        wanted = Requirement(line)
        assert wanted.name in pins, f"constraints.txt lacks {wanted.name}"
        assert wanted.specifier.contains(pins[wanted.name]), (
            f"{line} does not admit {pins[wanted.name]}"
        )


def test_constraints_are_exact_portable_versions():
    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    bad = [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line)]
    # A local version such as 2.13.0+cpu, a path or an option would hold on one machine only.
    assert not bad
    assert len(lines) == len(constraints())
    assert "fla-core" in constraints()


def test_pins_are_for_the_oldest_python():
    oldest = Version(PROJECT["requires-python"].removeprefix(">=") + ".0")
    refused = []
    for name, version in constraints().items():
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        admits = SpecifierSet(about["Requires-Python"] or "")
        if about["Version"].split("+")[0] == version and oldest not in admits:
            refused.append(f"{name}=={version} wants Python {admits}")
    assert not refused


def test_conda_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    *conda, last = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    pins, package = last["pip"]
    assert (ROOT / pins.removeprefix("-c ")).samefile(ROOT / "constraints.txt")
    extras = re.fullmatch(r"-e \.\[(.*)\]", package)[1].split(",")
    assert set(extras) == set(EXTRAS)
    assert f"--editable '.[{','.join(extras)}]'" in (ROOT / "tools/setup.sh").read_text()


def test_wheel_holds_every_file_of_the_package(tmp_path):
    build = "from hatchling.build import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gdr_teach/")}
    package = ROOT / "gdr_teach"
    wanted = {str(path.relative_to(ROOT)) for path in tracked() if path.is_relative_to(package)}
    assert wanted <= held
    assert "gdr_teach/doctor.toml" in held


def test_entry_point_is_named():
    assert PROJECT["scripts"] == {"gdr-teach": "gdr_teach.cli:main"}


# -- text that holds on every machine ------------------------------------------------------------

# [x] for one letter, so that this file does not contain what it looks for.
ONE_MACHINE = [
    r"(?<![\w.~-])/(wor[k]|op[t]|roo[t])/",
    r"/(home|Users)/\w",
    r"/tmp/ipykerne[l]",
    r"(?<!\w)\.librar[y]\b",
    r"pypi\.or[g]",
    r"pythonhosted\.or[g]",
    r"registry\.npmj[s]",
    r"index-url\s+http",
]


def test_no_file_names_one_machine_or_a_registry():
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in ONE_MACHINE:
            found += [f"{path.relative_to(ROOT)}: {hit[0]}" for hit in re.finditer(pattern, text)]
    assert not found


# -- Makefile ------------------------------------------------------------------------------------


def make(*args: str, **environment: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("no make")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(
        ["make", "--no-print-directory", *args],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_make_alone_prints_a_map_with_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(phony) == set(rules)
    shown = make()
    assert shown == make("help")
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("make ")} == set(
        phony
    )


def test_make_passes_its_variables_on():
    assert "tools/lab.sh --no-browser --port=1" in make(
        "-n", "lab", "LAB_ARGS=--no-browser --port=1"
    )
    assert "tools/test.sh -k delta" in make("-n", "test", "TEST_ARGS=-k delta")


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "make test" in script.read_text()


# -- tools/setup.sh, with a stand-in for Python --------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
echo "python $*" >>"$LOG"
case "$*" in
--version) echo "Python $FAKE_VERSION"; exit 0 ;;
*sys.version_info*) [ "$FAKE_VERSION" = 3.12.0 ]; exit ;;
*ensurepip*) exit "$FAKE_VENV_MISSING" ;;
"-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 0 ;;
"-m pip install"*) [ -z "$FAKE_KILL" ] || kill -9 $PPID; exit "$FAKE_PIP" ;;
esac
exit 1
"""


class Setup:
    """A folder with the files that setup.sh reads and a Python that writes down how it was called."""

    def __init__(self, folder: Path):
        self.folder = folder / "a course"  # a folder's name may hold a space
        (self.folder / "tools").mkdir(parents=True)
        for name in ("pyproject.toml", "constraints.txt", "tools/setup.sh"):
            shutil.copy(ROOT / name, self.folder / name)
        self.python = folder / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.log = folder / "log"

    def run(self, **environment: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        settings = {
            "PATH": os.environ["PATH"], "PYTHON": str(self.python), "LOG": str(self.log), "FAKE_VERSION": "3.12.0",
            "FAKE_VENV_MISSING": "0", "FAKE_PIP": "0", "FAKE_KILL": "",
        }  # fmt: skip
        return subprocess.run(
            ["sh", "tools/setup.sh"],
            cwd=self.folder,
            env=settings | environment,
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> str:
        return self.log.read_text()

    def write_leftover(self) -> Path:
        leftover = self.folder / ".venv" / "leftover"
        leftover.write_text("")
        return leftover


@pytest.fixture
def setup(tmp_path) -> Setup:
    return Setup(tmp_path)


def test_setup_installs_once(setup):
    assert setup.run(PIP_ARGS="--one --two").returncode == 0
    lines = [line for line in setup.calls.splitlines() if "pip install" in line]
    assert len(lines) == 2
    assert all("--constraint constraints.txt --one --two" in line for line in lines)
    assert lines[0].endswith("--editable .[course,test,bench]")
    assert lines[1].endswith("--no-deps fla-core")
    assert setup.run().returncode == 0
    assert setup.calls == ""


def test_setup_installs_on_top_when_a_version_changed(setup):
    setup.run()
    leftover = setup.write_leftover()
    with (setup.folder / "constraints.txt").open("a") as file:
        file.write("one-more==1.0\n")
    assert setup.run().returncode == 0
    assert "pip install" in setup.calls
    assert leftover.exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_VERSION": "3.10.4"}, ["3.11 or newer", "got 'Python 3.10.4'", "PYTHON="]),
        ({"PYTHON": "no-such-python"}, ["3.11 or newer", "no command 'no-such-python'"]),
        ({"FAKE_VENV_MISSING": "1"}, ["no venv module", "python3-venv"]),
        ({"FAKE_PIP": "1"}, ["pip could not install"]),
    ],
)
def test_setup_says_what_is_wrong(setup, environment, words):
    run = setup.run(**environment)
    assert run.returncode == 1
    assert all(word in run.stderr for word in words), run.stderr
    assert setup.run().returncode == 0  # and goes on once that is repaired
    assert "pip install" in setup.calls


def test_setup_starts_over_after_a_kill(setup):
    assert setup.run(FAKE_KILL="1").returncode != 0
    leftover = setup.write_leftover()
    run = setup.run()
    assert run.returncode == 0
    assert "cut short" in run.stdout
    assert not leftover.exists()


def test_setup_starts_over_in_a_moved_folder(setup):
    setup.run()
    leftover = setup.write_leftover()
    setup.folder = setup.folder.rename(setup.folder.parent / "moved")
    run = setup.run()
    assert run.returncode == 0
    assert "was moved" in run.stdout
    assert not (setup.folder / ".venv" / leftover.name).exists()


# -- tools/lab.sh and tools/test.sh, with stand-ins ----------------------------------------------


def stand_in(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def script(name: str, folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["sh", str(ROOT / "tools" / name), *args]
    env = os.environ | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_lab_copies_exercises_then_opens_the_course(tmp_path):
    stand_in(tmp_path / ".venv/bin/gdr-teach", 'echo "gdr-teach $*"')
    stand_in(
        tmp_path / ".venv/bin/jupyter", 'echo "PATH=$PATH"; for word in "$@"; do echo "$word"; done'
    )
    run = script("lab.sh", tmp_path, "--no-browser")
    copied, path, lab, *words = run.stdout.splitlines()
    assert copied == "gdr-teach my"
    assert path.startswith(f"PATH={tmp_path}/.venv/bin:")
    assert lab == "lab"
    assert words[-1] == "--no-browser"
    assert f"--ServerApp.root_dir={tmp_path}" in words
    assert ("--allow-root" in words) == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("shell", "wanted"),
    [
        ("/bin/dash", ["/bin/dash"]),
        ("/bin/bash", ["/bin/bash", "--rcfile", "{}/tools/terminal.sh"]),
    ],
)
def test_terminals_of_lab_are_not_login_shells(tmp_path, shell, wanted):
    folder = tmp_path / "reader's course"
    stand_in(folder / ".venv/bin/gdr-teach", "")
    stand_in(folder / ".venv/bin/jupyter", 'for word in "$@"; do echo "$word"; done')
    words = script("lab.sh", folder, SHELL=shell).stdout.splitlines()
    (setting,) = (word for word in words if "terminado" in word)
    settings = ast.literal_eval(setting.partition("=")[2])
    assert settings == {"shell_command": [word.format(folder) for word in wanted]}


def test_terminals_find_the_environment_first(tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    (tmp_path / ".bashrc").write_text("PATH=/elsewhere:$PATH\n")
    run = subprocess.run(
        ["bash", "-c", f"source '{ROOT}/tools/terminal.sh'; echo $PATH"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "COURSE_BIN": "/course/bin"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith("/course/bin:/elsewhere:")


@pytest.mark.parametrize(
    ("notebooks", "tests", "wanted"), [(0, 0, 0), (1, 0, 1), (5, 0, 5), (0, 1, 1), (1, 2, 2)]
)
def test_either_failing_run_fails_the_target(tmp_path, notebooks, tests, wanted):
    body = f'case "$*" in *nbval*) echo first; exit {notebooks} ;; *) echo "last $*"; exit {tests} ;; esac'
    stand_in(tmp_path / ".venv/bin/python", body)
    run = script("test.sh", tmp_path, "-k", "delta")
    assert run.returncode == wanted
    assert run.stdout.startswith("first\nlast ")
    assert "-k delta" in run.stdout


# -- pages ---------------------------------------------------------------------------------------


def test_links_between_pages_lead_somewhere():
    links = [
        (page, target)
        for page in tracked()
        if page.suffix == ".md"
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target
    ]
    broken = [f"{page.name}: {to}" for page, to in links if not (page.parent / to).exists()]
    assert links
    assert not broken


def test_readme_code_runs():
    pytest.importorskip("triton")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].o.shape == (2, 100, 3, 32)
    assert names["out"].state.shape == (2, 3, 16, 32)
    assert names["same"].o.allclose(names["out"].o[:, :8], atol=1e-6)
    assert names["beta"].grad is not None


def test_readme_names_no_chapter_that_is_not_there():
    table, _, planned = (ROOT / "README.md").read_text().partition("Planned, not written yet:")
    chapters = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert set(re.findall(r"^\| (\d\d) ", table, re.MULTILINE)) == chapters
    listed = set(re.findall(r"\b(\d\d) ", planned.partition(".")[0]))
    assert chapters | listed == {f"{n:02}" for n in range(12)}
    assert not chapters & listed


# -- the test run itself -------------------------------------------------------------------------


def test_shapes_in_signatures_are_executed():
    from gdr_teach.delta.reference import delta_recurrence

    x = torch.zeros(1, 2, 1, 3)
    with pytest.raises(TypeCheckError):
        delta_recurrence(x, x, x, torch.zeros(1, 1, 2))  # beta must be [B, T, H]
