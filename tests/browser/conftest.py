"""A learner at a screen: JupyterLab started as `make lab` starts it, and a headless Chromium that looks at it.

Each test has a course, a server and a browser of its own, so tests can run in any order and side by side. Nothing
sleeps until a thing has probably happened: every wait is for something that can be seen, and has a limit.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from gdr_teach.grading.build import STUB

try:
    from playwright.sync_api import Error, expect, sync_playwright
except ImportError:  # `chromium` below skips or fails
    Error = expect = sync_playwright = None

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no network
)  # fmt: skip
TOKEN = "a-learner"  # of a server that lives for one test and listens on this machine only
PATIENCE = 40  # seconds for one thing to be seen, also when the machine is busy

# Lab asks once whether it may fetch news of Jupyter. Answered beforehand: the question is not the course's.
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}
}
DONE = re.compile(r"^\[(\d+)\]:$")  # what stands beside a cell that has run


def missing(what: str) -> NoReturn:
    """Skip the test; where a browser is required, fail it."""
    if os.environ.get("GDR_BROWSER") == "required":
        pytest.fail(f"GDR_BROWSER=required, but {what}")
    pytest.skip(what.splitlines()[0])


@pytest.fixture
def chromium() -> str:
    for package, extra in (("playwright", "test"), ("jupyterlab", "course")):
        if find_spec(package) is None:
            missing(f"the Python package {package} is not installed: it is in the extra `{extra}`")
    for command in COMMANDS:
        if found := shutil.which(command):
            return found
    missing(f"no Chromium is installed: looked for {', '.join(COMMANDS)}")


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """What Lab needs of the course, in a folder of its own: nobody's my/ is touched."""
    place = tmp_path / "course"
    for folder in ("exercises", "notebooks", "tools"):
        ignored = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(ROOT / folder, place / folder, ignore=ignored)
    (place / ".venv").mkdir()
    (place / ".venv" / "bin").symlink_to(sysconfig.get_path("scripts"))
    return place


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which no setting of the user who runs the tests is read, and nothing of theirs is written."""
    home = tmp_path / "home"
    for name, values in SETTINGS.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    own = {
        "HOME": home,
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "JUPYTER_TOKEN": TOKEN,
    }
    foreign = re.compile("JUPYTER|IPYTHON|XDG_|PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return kept | {name: str(value) for name, value in own.items()}


@pytest.fixture
def server(
    chromium: str, course: Path, environment: dict[str, str], tmp_path: Path
) -> Iterator[str]:
    """The address of a JupyterLab that tools/lab.sh started, as `make lab LAB_ARGS=--no-browser` does."""
    log = tmp_path / "lab.log"
    with log.open("w") as file:
        lab = subprocess.Popen(
            ["sh", "tools/lab.sh", "--no-browser", "--ServerApp.ip=127.0.0.1"],
            cwd=course,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield address(lab, Path(environment["JUPYTER_RUNTIME_DIR"]), log)
    finally:
        end(lab)


def address(lab: subprocess.Popen, runtime: Path, log: Path) -> str:
    """Where a starting server can be reached. It takes the first free port and writes down which."""
    note = runtime / f"jpserver-{lab.pid}.json"  # lab.sh becomes the server, with the same number
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and lab.poll() is None:
        try:
            return json.loads(note.read_text())["url"]
        except (OSError, ValueError):  # not there yet, or not whole
            time.sleep(0.05)
    pytest.fail(f"JupyterLab did not start (exit code {lab.poll()}):\n{log.read_text()}")


def end(lab: subprocess.Popen) -> None:
    """Ask the server to end, which ends its kernels; then see that nothing of its family is left."""
    try:
        family = psutil.Process(lab.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    lab.terminate()
    try:
        lab.wait(10)
    except subprocess.TimeoutExpired:
        lab.kill()
        lab.wait()
    for process in psutil.wait_procs(family, timeout=3)[1]:
        process.kill()


class Screen:
    """What a learner does and sees in JupyterLab, in one notebook."""

    def __init__(self, page: Any, course: Path, server: str):
        self.page, self.course, self.server = page, course, server
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.prompts = self.panel.locator(".jp-CodeCell .jp-InputPrompt")
        self.keys = page.keyboard

    def open(self, name: str) -> None:
        """Follow the first page's link to a notebook in my/, and wait for its kernel."""
        self.file = self.course / "my" / name
        self.ids = [cell["id"] for cell in self.saved()["cells"]]
        self.panel.get_by_role("link", name=f"my/{name}").first.click()
        expect(self.page.locator(".lm-DockPanel-tabBar .lm-mod-current")).to_have_text(name)
        expect(self.panel.locator(".jp-Cell")).to_have_count(len(self.ids))
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        # the status bar knows whether there is a kernel yet; without one the notebook's own sign says idle as well
        expect(self.page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
        state = self.panel.locator(".jp-Notebook-ExecutionIndicator")
        expect(state).to_have_attribute("data-status", "idle")

    def cell(self, cell_id: str) -> Any:
        return self.panel.locator(".jp-Cell").nth(self.ids.index(cell_id))

    def expect_output(self, cell_id: str, wanted: str | re.Pattern) -> None:
        """Wait until a cell shows this and nothing else. Line breaks and indents count as blanks."""
        output = self.cell(cell_id).locator(".jp-OutputArea-output")
        output.scroll_into_view_if_needed()
        expect(output).to_have_text(wanted)

    def run_all(self) -> None:
        """The menu's Run All Cells, and wait until nothing runs."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        self.page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
        expect(self.prompts.first).to_have_text(DONE)
        expect(self.prompts.filter(has_text="*")).to_have_count(0)
        self.wait_until_idle()

    def run(self, cell_id: str) -> None:
        """Shift+Enter in a cell, and wait until it has run. Fails when the kernel was lost: a new one counts from 1."""
        before = self.count()
        self.cell(cell_id).locator(".cm-content").click()
        self.keys.press("Shift+Enter")
        expect(self.cell(cell_id).locator(".jp-InputPrompt")).to_have_text(f"[{before + 1}]:")

    def count(self) -> int:
        """How many cells the kernel has run."""
        texts = self.prompts.all_text_contents()  # also of cells that are scrolled away
        return max((int(found[1]) for text in texts if (found := DONE.match(text))), default=0)

    def type(self, cell_id: str, code: str) -> None:
        """Select all of a cell and type over it."""
        self.cell(cell_id).locator(".cm-content").click()
        self.keys.press("ControlOrMeta+a")
        self.type_lines(code)
        self.wait_for_text(cell_id, code)

    def fill(self, cell_id: str, code: str) -> None:
        """Type what `code` has in the place of the cell's stub."""
        before, stub, after = "".join(
            self.saved()["cells"][self.ids.index(cell_id)]["source"]
        ).partition(STUB)
        assert stub
        assert code.startswith(before)
        assert code.endswith(after)
        self.cell(cell_id).locator(".cm-line", has_text=STUB).click()
        for key in ("End", "Home", "Shift+End"):  # Home stops at the indent
            self.keys.press(key)
        self.type_lines(code.removeprefix(before).removesuffix(after))
        self.wait_for_text(cell_id, code)

    def type_lines(self, code: str) -> None:
        first, *rest = code.split("\n")
        self.keys.type(first)
        for line in rest:
            self.keys.press("Enter")
            self.keys.press("Shift+Home")  # the editor indents by itself: type over that
            if line:
                self.keys.type(line)
            else:
                self.keys.press("Delete")

    def wait_for_text(self, cell_id: str, code: str) -> None:
        """Wait until the editor has taken in what was typed: every blank of it."""
        editor = self.cell(cell_id).locator(".cm-content").element_handle()
        shown = "editor => [...editor.querySelectorAll('.cm-line')].map(line => line.textContent)"
        script = f"([editor, code]) => ({shown})(editor).join('\\n') === code"
        try:
            self.page.wait_for_function(script, arg=[editor, code], timeout=5000)
        except Error:
            assert "\n".join(editor.evaluate(shown)) == code
            raise

    def save(self) -> dict:
        """Ctrl+S, and what is on the disk then."""
        path = f"/api/contents/my/{self.file.name}"
        with self.page.expect_response(
            lambda answer: answer.request.method == "PUT" and path in answer.url
        ) as answer:
            self.keys.press("ControlOrMeta+s")
        assert answer.value.ok, answer.value.status
        return self.saved()

    def saved(self) -> dict:
        return json.loads(self.file.read_text(encoding="utf-8"))

    def kernel(self) -> str:
        """The number by which the server knows this notebook's kernel."""
        answer = self.page.request.get(f"{self.server}api/sessions?token={TOKEN}")
        path = f"my/{self.file.name}"
        (found,) = (session["kernel"] for session in answer.json() if session["path"] == path)
        return found["id"]

    def picture(self, name: str) -> Path:
        path = self.course.parent / f"{name}.png"
        self.page.screenshot(path=path)
        return path


@pytest.fixture
def lab(
    chromium: str, server: str, environment: dict[str, str], course: Path
) -> Callable[[], AbstractContextManager[Screen]]:
    """A browser with the course's first page, for a `with` block. A failure leaves a picture of the screen."""
    limit = PATIENCE * 1000
    expect.set_options(timeout=limit)

    @contextmanager
    def opened() -> Iterator[Screen]:
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
            sync_playwright() as playwright,
        ):
            try:
                browser = playwright.chromium.launch_persistent_context(
                    profile,
                    executable_path=chromium,
                    args=FLAGS,
                    env=environment,
                    viewport={"width": 1280, "height": 1000},
                    timeout=limit,
                )
            except Error as error:
                missing(f"{chromium} does not start: {error}")
            with browser:
                page = browser.pages[0]
                page.set_default_timeout(limit)
                asked: list[str] = []
                page.on("request", lambda request: asked.append(request.url))
                screen = Screen(page, course, server)
                try:
                    page.goto(f"{server}?token={TOKEN}")
                    yield screen
                except BaseException as error:
                    error.add_note(f"The screen at that time: {screen.picture('failure')}")
                    raise
                outside = [
                    url for url in asked if url.startswith("http") and not url.startswith(server)
                ]
                assert not outside, "JupyterLab or the course asked for something of the network"

    return opened
