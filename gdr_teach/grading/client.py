"""The server seen from the grader: started when first needed, asked for workers, replaced when it dies."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from .job import Job, Limits, Lost
from .language import say
from .protocol import Ended, Garbled, receive

KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
START_SECONDS = 60  # the first import of torch on a cold disk


class Server:
    """A process with torch imported, started when first needed and again when it has died."""

    def __init__(self, limits: Limits | None = None, *, confined: bool = True):
        self.limits = limits or Limits()
        self.confined = confined  # False: as on a system that has neither Landlock nor seccomp
        self.has_triton = False
        self._stopped = False
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self.scratch = Path()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The server's process id, when one was started."""
        return self._process.pid if self._process else None

    def start(self) -> socket.socket:
        """The control channel of a running server. Raises: RuntimeError when none can be started, Lost when stopped."""
        if self._stopped:
            raise Lost(say("reason.killed"))
        if self._control and self._process and self._process.poll() is None:
            return self._control
        self.close()
        self.scratch = Path(tempfile.mkdtemp(prefix="gdr-teach-"))
        ours, theirs = socket.socketpair()
        log = self.scratch / "log"
        with theirs, log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd=self.scratch,
                env=_environment(self.scratch),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control = ours
        try:
            hello, _ = receive(ours, time.monotonic() + START_SECONDS)
        except (Ended, Garbled, TimeoutError) as error:
            said = log.read_text(errors="replace")[-2000:]
            self.close()
            raise RuntimeError(f"the grading server did not start: {said}") from error
        self.has_triton = hello.get("triton") is True
        if self._stopped:  # while it started
            self.close()
            raise Lost(say("reason.killed"))
        return ours

    @contextmanager
    def job(self, header: dict[str, Any]) -> Iterator[Job]:
        """One worker for one task; it and all it started are gone afterwards."""
        ours, pid = self._fork()
        job = Job(ours, pid, self.limits, self.wait_for_end)
        try:
            job.send(
                {
                    **header,
                    "memory": self.limits.memory,
                    "cpu_seconds": int(self.limits.notebook),
                    "confined": self.confined,
                }
            )
            yield job
        finally:
            job.end()

    def _fork(self) -> tuple[socket.socket, int]:
        """The channel to a new worker, and its process id. Raises: Lost when two servers died of it."""
        for _ in range(2):
            control = self.start()  # a server that was killed a moment ago may still look alive
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(control, [b"j"], [theirs.fileno()])
                started, _ = receive(control, time.monotonic() + START_SECONDS)
                return ours, started["pid"]
            except (Ended, OSError):
                ours.close()
                self.close()
        raise Lost(say("reason.killed"))

    def wait_for_end(self) -> int | None:
        """How the worker just ended, or None when the server itself is gone."""
        try:
            assert self._control is not None
            ended, _ = receive(self._control, time.monotonic() + START_SECONDS)
            return ended["code"]
        except (Ended, Garbled, TimeoutError):
            self.close()
            return None

    def stop(self) -> None:
        """End the server for good, while another thread may be waiting for it: that one is told Lost."""
        self._stopped = True
        self.close()

    def close(self) -> None:
        """End the server. What it forked ends with it."""
        if self._control:
            self._control.close()
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.5)
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            shutil.rmtree(self.scratch, ignore_errors=True)
        self._control = self._process = None


def _environment(scratch: Path) -> dict[str, str]:
    """What the server sees of the environment: enough to start, nothing that is the grader's business."""
    package = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    places = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), str(scratch))
    fixed = {"PYTHONPATH": package, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return {**kept, **places, **fixed}
