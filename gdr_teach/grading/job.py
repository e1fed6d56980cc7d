"""One worker while it lives: what is sent to it, what is taken from it, and how it ends.

What a worker sends is taken as data whose form is checked, and only the outputs of calls matter for the verdict.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checks import Result, Value
from .language import say
from .manifest import Task
from .protocol import Ended, Frame, Garbled, receive, send

FAILURES = "nothing not_a_tensor odd_tensor fault operator raised not_a_function not_a_kernel outside too_large".split()


@dataclass(frozen=True)
class Limits:
    """Seconds of wall time and bytes, for one notebook."""

    cell: float = 5.0
    cells: float = 8.0  # all cells together, each time they are run
    task: float = 10.0
    notebook: float = 110.0
    memory: int = 2 * 2**30
    processes: int = 16


class Lost(Exception):
    """A worker did not finish; the message is the reason for the learner, `cells` the cells that are to blame."""

    def __init__(self, reason: str, *cells: int):
        super().__init__(reason)
        self.cells = cells


class Job:
    """One worker while it lives."""

    def __init__(
        self,
        channel: socket.socket,
        pid: int,
        limits: Limits,
        wait_for_end: Callable[[], int | None],
    ):
        self.channel, self.pid, self.limits = channel, pid, limits
        self._wait_for_end = wait_for_end  # the server's word on how the worker ended
        self._looked = 0.0
        self._code: int | None = None
        self._ended = False

    def run_cells(
        self, cells: Sequence[int], one: float, together: float
    ) -> tuple[dict[int, str], str]:
        """Let the worker run these cells; the errors by cell, and what it says of the answer.

        Raises: Lost with the cell that ended the process or took more than `one` second, or, when they all took more
        than `together`, with the slowest.
        """
        errors: dict[int, str] = {}
        took: dict[int, float] = {}
        last = time.monotonic() + together
        for index in cells:
            began = time.monotonic()
            if began > last:
                slow = max(took.values(), default=0.0) / 2
                raise Lost(say("reason.overran"), *(i for i, t in took.items() if t >= slow))
            ran = self._expect("ran", began + one, index)
            took[index] = time.monotonic() - began
            if ran.get("error"):
                errors[index] = _text(ran["error"])
        return errors, str(self._expect("ready", time.monotonic() + one).get("state"))

    def call(self, task: Task, values: Sequence[Value], deadline: float) -> Result:
        """What the answer returns for these values. Raises: Lost when the worker does not finish."""
        arrays = [x for x in values if isinstance(x, np.ndarray)]
        plan = ["array" if isinstance(x, np.ndarray) else x for x in values]
        self.send({"kind": "call", "values": plan}, arrays)
        header, received = self._next(deadline)
        failure, count = header.get("failure"), header.get("outputs")
        if header.get("kind") != "result" or type(count) is not int or not 0 <= count:
            raise Lost(say("reason.garbled"))
        if failure:
            known = failure if failure in FAILURES else "raised"
            detail = _text(header.get("detail"))
            return Result(failure=say(f"reason.{known}", detail=detail, function=task.function))
        return Result(tuple(received[:count]), tuple(received[count:]))

    def send(self, header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Send a frame. Raises: Lost when the worker does not take it."""
        try:
            self.channel.settimeout(self.limits.task)
            send(self.channel, header, arrays)
        except OSError as error:
            raise Lost(self._why_ended()) from error

    def end(self) -> None:
        """Kill the worker with its process group, and wait until the server has seen to the rest."""
        if self._ended:
            return
        self._ended = True
        self.channel.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)  # killed before it had a group of its own
        self._code = self._wait_for_end()

    def _expect(self, kind: str, deadline: float, *cell: int) -> dict[str, Any]:
        header, _ = self._next(deadline, *cell)
        if header.get("kind") != kind or (cell and header.get("index") != cell[0]):
            raise Lost(say("reason.garbled"), *cell)
        return header

    def _next(self, deadline: float, *cell: int) -> Frame:
        try:
            return receive(self.channel, deadline, self._watch)
        except Lost as lost:
            raise Lost(str(lost), *cell) from lost
        except TimeoutError as error:
            raise Lost(say("reason.overran"), *cell) from error
        except Garbled as error:
            raise Lost(say("reason.garbled"), *cell) from error
        except Ended as error:
            raise Lost(self._why_ended(), *cell) from error

    def _why_ended(self) -> str:
        self.end_gently()
        if self._code is None or self._code == -signal.SIGKILL:
            return say("reason.killed")
        if self._code in (-signal.SIGSEGV, -signal.SIGBUS):
            return say("reason.segfault", code=128 - self._code)
        if self._code < 0:
            return say("reason.signal", signal=-self._code)
        return say("reason.exited", code=self._code)

    def end_gently(self) -> None:
        """Give a worker that closed its channel a moment to end by itself, so that its exit code is its own."""
        import psutil

        with suppress(psutil.Error, psutil.TimeoutExpired):
            process = psutil.Process(self.pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                process.wait(timeout=0.3)
        self.end()

    def _watch(self) -> None:
        """Look at memory and number of processes now and then. Raises: Lost when a limit is passed."""
        import psutil

        if time.monotonic() - self._looked < 0.05:
            return
        self._looked = time.monotonic()
        limits = self.limits
        with suppress(psutil.Error):
            worker = psutil.Process(self.pid)
            family = [worker, *worker.children(recursive=True)]
            if len(family) > limits.processes:
                raise Lost(say("reason.processes", limit=limits.processes))
            used = 0
            for process in family:
                with suppress(psutil.Error):
                    used += process.memory_info().rss
            if used > limits.memory:
                raise Lost(say("reason.memory", limit=limits.memory // 2**20))


def _text(said: Any) -> str:
    """A learner's error text, made fit for one line of a report."""
    words = said if isinstance(said, str) else ""
    line = " ".join(words.split())[:400]
    return "".join(c if c.isprintable() else "?" for c in line)
