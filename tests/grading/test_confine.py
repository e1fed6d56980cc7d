"""What a confined process may not do, tried in one: each attempt says "refused" or "done"."""

import ctypes
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gdr_teach.grading import confine

ATTEMPTS = {
    "fork": "os.fork() or os._exit(0)",
    "vfork and exec": "subprocess.run(['true'])",
    "kill the parent": "os.kill(os.getppid(), 0)",
    "kill a group": "os.killpg(os.getppid(), 0)",
    "leave the session": "os.setsid()",
    "limit the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "read the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "read hidden": "open(HIDDEN + '/answer.py').read()",
    "read hidden by another name": "open(LINK).read()",
    "write outside": "open(OUTSIDE, 'w')",
    "append outside": "open(OUTSIDE, 'a')",
    "truncate outside": "os.truncate(OUTSIDE, 0)",
    "remove outside": "os.remove(OUTSIDE)",
    "rename outside": "os.rename(OUTSIDE, OUTSIDE + '2')",
    "make a folder outside": "os.mkdir(OUTSIDE + '3')",
    "connect": "socket.create_connection(('127.0.0.1', 9))",
}
ALLOWED = {
    "write in the scratch folder": "open('x', 'w').write('y')",
    "read what is beside the hidden": "open(OUTSIDE).read()",
    "import": "import fractions",
    "start a thread": "t = threading.Thread(target=int); t.start(); t.join()",
    "signal itself": "os.kill(os.getpid(), 0)",
    "read its own limits": "resource.getrlimit(resource.RLIMIT_CPU)",
    "write to /dev/null": "open('/dev/null', 'w').write('x')",
    "compute with numpy": "__import__('numpy').ones((300, 300)) @ __import__('numpy').ones((300, 300))",
}

PROGRAM = """
import json, os, resource, socket, subprocess, sys, threading
from pathlib import Path
from gdr_teach.grading import confine
space, attempts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
globals().update(space)
os.chdir(space["SCRATCH"])
confine.refuse(Path(SCRATCH), [Path(HIDDEN)])
result = {}
for name, code in attempts.items():
    try:
        exec(code)
        result[name] = "done"
    except PermissionError:
        result[name] = "refused"
    except OSError as error:
        result[name] = f"{type(error).__name__}"
print(json.dumps(result))
"""


def landlock_version() -> int:
    if platform.system() != "Linux":
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    number = confine.CREATE_RULESET
    return libc.syscall(number, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


pytestmark = pytest.mark.skipif(
    landlock_version() < 4 or platform.machine() not in confine.FORBIDDEN,
    reason="this system has no Landlock, or one older than TCP rules",
)


@pytest.fixture(scope="module")
def attempted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("confined")
    places = {
        "SCRATCH": str(folder / "scratch"),
        "HIDDEN": str(folder / "hidden"),
        "OUTSIDE": str(folder / "outside.txt"),
        "LINK": str(folder / "link"),
    }
    for name in ("SCRATCH", "HIDDEN"):
        Path(places[name]).mkdir()
    (folder / "hidden" / "answer.py").write_text("secret")
    (folder / "outside.txt").write_text("kept")
    (folder / "link").symlink_to(folder / "hidden" / "answer.py")
    attempts = json.dumps(ATTEMPTS | ALLOWED)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(places), attempts],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(Path(confine.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "outside.txt").read_text() == "kept"
    return json.loads(done.stdout)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_refused(attempted, attempt):
    assert attempted[attempt] == "refused"


@pytest.mark.parametrize("attempt", ALLOWED)
def test_allowed(attempted, attempt):
    assert attempted[attempt] == "done"


def test_all_but_covers_everything_else(tmp_path):
    for name in ("a/x", "a/y/z", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a" / "f.py").touch()
    shown = set(confine._all_but(tmp_path, [tmp_path / "a" / "y", tmp_path / "none"]))
    assert shown == {tmp_path / "a" / "x", tmp_path / "a" / "f.py", tmp_path / "b"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = bytearray(2**28)", "fits"),
        ("x = bytearray(2**30)", "MemoryError"),
        ("Path('large').write_bytes(bytes(2000))", "OSError"),
        ("while True: pass", "killed"),
        ("[open('/dev/null') for _ in range(300)]", "OSError"),
    ],
)
def test_limits(tmp_path, code, said):
    program = f"""
import signal
from pathlib import Path
from gdr_teach.grading import confine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
confine.limit(memory=2**29, cpu_seconds=1, file_bytes=1000)
try:
    exec({code!r})
    print("fits")
except BaseException as error:
    print(type(error).__name__)
"""
    env = {"PYTHONPATH": str(Path(confine.__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=30
    )
    assert (done.stdout.strip() if done.returncode == 0 else "killed") == said
