"""What a learner has passed and which hints were shown: one small file in my/, replaced as a whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .language import say
from .manifest import UnusableInput

NAME = ".progress.json"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """{"passed": {task id: points}, "hints": {task id: number shown}}. Raises: UnusableInput when it is broken."""
    path = folder / NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {part: dict(stored[part]) for part in ("passed", "hints")}
    except FileNotFoundError:
        return {"passed": {}, "hints": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableInput(say("cli.progress_broken", path=path, error=error)) from error


def update(folder: Path, change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
    """Apply a change to what is stored. Raises: UnusableInput, OSError."""
    with _alone(folder):
        stored = load(folder)
        change(stored)
        write_whole(folder / NAME, json.dumps(stored, indent=1, sort_keys=True).encode() + b"\n")


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file so that at every moment it is the old or the new one. Raises: OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def write_new(path: Path, data: bytes) -> bool:
    """Write a file that is not there yet; False, and nothing touched, when it is. Raises: OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        os.link(name, path)  # unlike a rename, this never replaces
    except FileExistsError:
        return False
    finally:
        Path(name).unlink()
    return True


@contextmanager
def _alone(folder: Path):
    """One writer at a time; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # native Windows
        yield
        return
    with (folder / f"{NAME}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
