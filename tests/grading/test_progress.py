"""Progress is the old file or the new one, whenever the process ends, and two writers lose nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gdr_teach.grading import progress

WRITER = """
import sys
from pathlib import Path
from gdr_teach.grading import progress
n = 0
print("ready", flush=True)
while True:
    n += 1
    progress.update(Path(sys.argv[1]), lambda stored: stored["passed"].update({str(i): n for i in range(2000)}))
"""


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    dice = random.Random(1)
    env = {**os.environ, "PYTHONPATH": str(Path(progress.__file__).parents[2])}
    for _ in range(8):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(0.02 + dice.random() * 0.05)
            writer.send_signal(signal.SIGKILL)
        passed = progress.load(tmp_path)["passed"]
        assert len(passed) in (0, 2000)
        assert len(set(passed.values())) <= 1
    assert len(passed) == 2000, "no writer got as far as a write: the test shows nothing"


def test_writers_at_once_lose_nothing(tmp_path):
    def note(name: str) -> None:
        for i in range(20):
            new = {f"{name}{i}": 1}
            progress.update(tmp_path, lambda stored, new=new: stored["passed"].update(new))

    threads = [threading.Thread(target=note, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(progress.load(tmp_path)["passed"]) == 60


def test_a_new_file_never_replaces(tmp_path):
    place = tmp_path / "x"
    assert progress.write_new(place, b"one")
    assert not progress.write_new(place, b"two")
    assert place.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_is_replaced_and_not_written_over(tmp_path):
    progress.update(tmp_path, lambda stored: stored["hints"].update(a=1))
    with (tmp_path / progress.NAME).open() as reader:
        progress.update(tmp_path, lambda stored: stored["hints"].update(a=2))
        assert json.load(reader)["hints"] == {"a": 1}
    assert progress.load(tmp_path)["hints"] == {"a": 2}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    place = tmp_path / "x"
    place.write_bytes(b"old")
    monkeypatch.setattr(progress.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        progress.write_whole(place, b"new")
    assert place.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [place]


def test_what_is_stored_is_plain(tmp_path):
    progress.update(tmp_path, lambda stored: stored["hints"].update({"02.read": 2}))
    stored = json.loads((tmp_path / progress.NAME).read_text())
    assert stored == {"passed": {}, "hints": {"02.read": 2}}
