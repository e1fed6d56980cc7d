"""The process that learners' processes are forked from: it has imported torch and triton once, and no reference.

Started by `client.Server` as a fresh interpreter, so that a Jupyter kernel full of threads is never forked. It is
sent one end of a channel at a time, forks a worker that owns it, answers with the worker's process id, and, when
the worker has ended, with how; before that it kills whatever the worker left behind.
"""

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from .protocol import Ended, send


def serve(control: socket.socket) -> None:
    """Serve until the other side closes the control channel. Workers get a folder each in the working directory."""
    import psutil  # noqa: F401  now: `_leave` may run in the middle of anything, an import too

    from . import confine, worker

    confine.adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: _leave())
    confine.signal_when_parent_ends(signal.SIGTERM)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the grader, which then closes the channel
    has_triton = _warm_up()
    library, own = _hidden()
    send(control, {"kind": "hello", "triton": has_triton})
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            _leave()
        channel = socket.socket(fileno=descriptors[0])
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))  # one job leaves nothing for the next
        pid = os.fork()
        if pid == 0:
            _be_worker(partial(worker.run, channel, folder, library, own))
        channel.close()
        send(control, {"kind": "started", "pid": pid})
        _, status = os.waitpid(pid, 0)
        _end_descendants()
        _remove(folder)
        send(control, {"kind": "ended", "code": os.waitstatus_to_exitcode(status)})


def _leave() -> NoReturn:
    """End, with every process and file that is left, also when the grader was killed."""
    # a thread of the grader ends, then the grader: the second signal must not cut this short
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_descendants()
    _remove(Path.cwd())
    os._exit(0)


def _remove(folder: Path) -> None:
    with suppress(RecursionError):  # a tree as deep as a learner's code could make it
        shutil.rmtree(folder, ignore_errors=True)


def _be_worker(run: Callable[[], None]) -> None:
    try:
        run()
    except Ended:
        os._exit(0)
    finally:
        os._exit(1)  # never back into the server's loop


def _warm_up() -> bool:
    """Import what answers use, once. Returns whether kernels can be run."""
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    try:
        import triton  # noqa: F401

        from .. import runtime, sanitizer  # noqa: F401
        from . import launch  # noqa: F401
    except ImportError:
        return False
    return True


def _hidden() -> tuple[list[Path], list[Path]]:
    """Files that hold answers: the library but for what learners import, and the grader's and the repository's own."""
    from .answer import OPEN

    package = Path(__file__).resolve().parents[1]
    shown = {package.joinpath(*name.split(".")[1:]) for name in OPEN}

    def closed(folder: Path) -> list[Path]:
        return [
            path
            for path in folder.iterdir()
            if path.with_suffix("") not in shown and path.stem != "__init__"
        ]

    beside = [package.parent / name for name in ("solutions", "tests", ".git")]
    own = closed(package / "grading") + [path for path in beside if path.exists()]
    return closed(package), own


def _end_descendants() -> None:
    """Kill until none is left: a process that forks while it is hunted is met again in the next round."""
    import psutil

    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        found = psutil.Process().children(recursive=True)
        if not found:
            return
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.001)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
