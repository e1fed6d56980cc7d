"""The process that runs a learner's code: cells first, then one task's calls. It returns values, never a verdict.

Forked from the server for one task of one notebook. Nothing here or in the modules it inherits knows a right
answer, so the learner's code may look at, change or break all of it: it can only lose its own points.

Frames to the grader, in order:
    {"kind": "ran", "index", "error"}             for each cell, in order
    {"kind": "ready", "state"}                    all cells are done; state as in STATES
    {"kind": "result", "failure", "detail", "outputs"} + arrays      one for each call asked for
"""

import importlib.abc
import importlib.machinery
import linecache
import os
import signal
import socket
import sys
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import answer, confine
from .calling import LibraryCalled, Outcome, call, call_kernel, describe
from .protocol import Ended, receive, send

STATES = ("missing", "stub", "library", "written")
DETAIL = 400  # characters of an error that are passed on


def run(
    channel: socket.socket, scratch: Path, library: Sequence[Path], own: Sequence[Path]
) -> None:
    """Do one job and leave the process. `library` and `own` are files that hold answers."""
    _leave_everything_behind(channel)
    job, _ = receive(channel)
    confine.limit(job["memory"], job["cpu_seconds"])
    if job["confined"]:
        confine.signal_when_parent_ends(signal.SIGKILL)
        confine.refuse(scratch, own if job["library"] else [*own, *library])
    os.chdir(scratch)
    if not job["library"]:
        _close_library()
    namespace = _new_main()
    for cell in job["cells"]:
        error = _run_cell(cell["source"], cell["index"], namespace)
        send(channel, {"kind": "ran", "index": cell["index"], "error": error[:DETAIL]})
    send(channel, {"kind": "ready", "state": _state(job, namespace)})
    with suppress(Ended):
        while True:
            _answer_one(channel, job, namespace)
    os._exit(0)


def _answer_one(channel: socket.socket, job: dict[str, Any], namespace: dict[str, Any]) -> None:
    header, arrays = receive(channel)
    queue = list(arrays)
    values = [queue.pop(0) if value == "array" else value for value in header["values"]]
    function = namespace[job["function"]]
    if job["kind"] == "kernel":
        outcome = call_kernel(job["task"], function, values)
    else:
        outcome = call(function, values)
    try:
        _send_outcome(channel, outcome)
    except ValueError:
        _send_outcome(channel, Outcome("too_large"))


def _send_outcome(channel: socket.socket, outcome: Outcome) -> None:
    header = {
        "kind": "result",
        "failure": outcome.failure,
        "detail": outcome.detail[:DETAIL],
        "outputs": len(outcome.outputs),
    }
    send(channel, header, (*outcome.outputs, *outcome.arguments))


def _run_cell(source: str, index: int, namespace: dict[str, Any]) -> str:
    """Run one cell as Jupyter would: what it defined before an error stays. Returns the error, if any."""
    name = f"<cell {index + 1}>"
    if answer.parse(source) is None:
        source = answer.plain(source)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    try:
        exec(compile(source, name, "exec"), namespace)
    except BaseException as error:  # noqa: BLE001  SystemExit too: later cells still count
        return describe(error) or "error"
    return ""


def _state(job: dict[str, Any], namespace: dict[str, Any]) -> str:
    sources = [cell["source"] for cell in job["cells"]]
    trees = [tree for tree in map(answer.parse, map(answer.plain, sources)) if tree]
    definition = answer.find(trees, job["function"])
    if job["function"] not in namespace:
        return "missing"
    if definition is None:  # made in another way: a lambda, a partial, an alias
        return "written"
    template = answer.parse(job["template"])
    if answer.untouched(definition, answer.find([template], job["function"]) if template else None):
        return "stub"
    if not job["library"] and answer.uses_library(trees, job["function"]):
        return "library"
    return "written"


def _new_main() -> dict[str, Any]:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return vars(module)


def _leave_everything_behind(channel: socket.socket) -> None:
    """A session of its own, no descriptor but the channel, no signal handler."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # what is printed is not looked at, so it costs nothing
        os.dup2(nowhere, standard)
    os.closerange(3, channel.fileno())
    os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))


class _Closed:
    """Stands where an operator of the library would be; calling it, or looking inside, ends the task."""

    def __call__(self, *_: object, **__: object) -> None:
        raise LibraryCalled

    def __getattr__(self, name: str) -> "_Closed":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Closed()


class _ClosedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports of closed modules succeed, so that a cell with other imports beside them goes on."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        if answer.closed(fullname):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(_Closed(), name)  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def _close_library() -> None:
    import gdr_teach
    import gdr_teach.grading

    sys.meta_path.insert(0, _ClosedModules())
    for name in [name for name in sys.modules if answer.closed(name) and not _needed(name)]:
        del sys.modules[name]
    for name in gdr_teach.__all__:
        if answer.closed(f"gdr_teach.{name}"):
            setattr(gdr_teach, name, _Closed())
    for (
        name
    ) in gdr_teach.grading.__all__:  # check and hint speak to a learner, and there is none here
        setattr(gdr_teach.grading, name, lambda *_, **__: None)


def _needed(name: str) -> bool:
    return name.startswith("gdr_teach.grading.")
