"""What others may know of a launch on the interpreter: observers hear every access, poison fills what is undefined.

Nothing here computes; `runtime` tells what happens, `sanitizer` listens. Part of `runtime`, and imported from there.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# -- memory that a kernel will fill ------------------------------------------------------------------------------------


filling: list[float] = []  # innermost last: what fresh memory is filled with, see `poisoned`


def new_empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a kernel's output: undefined until stored, which the sanitizer and `poisoned` make visible."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if filling:
        x.fill_(filling[-1])
    for observer in observers:
        observer.allocated(x)
    return x


@contextlib.contextmanager
def poisoned(value: float = float("nan")) -> Iterator[None]:
    """Inside, what is undefined is full of `value`, so that using it cannot hide: an output buffer until it is stored,
    and, interpreted, the lanes that a masked load without `other=` leaves out (of integers: the smallest there is).
    """
    filling.append(value)
    try:
        yield
    finally:
        filling.pop()


# -- who watches a launch ----------------------------------------------------------------------------------------------


class Observer:
    """Told of everything an interpreted launch does; override what is of interest (see `observe`)."""

    def allocated(self, tensor: torch.Tensor) -> None:
        """A buffer was made whose contents are undefined."""

    def launched(self, name: str, tensors: dict[str, torch.Tensor], grid: tuple[int, ...]) -> None:
        """A kernel starts on these arguments."""

    def loaded(self, access: "Access") -> None:
        """One program is about to read."""

    def stored(self, access: "Access") -> None:
        """One program is about to write."""

    def synchronised(self) -> None:
        """The program that is running has passed a `tl.debug_barrier()`."""

    def finished(self) -> None:
        """Every program of the launch has run, and none has raised."""


@dataclass(frozen=True)
class Access:
    """One load or store of one program: byte addresses of its active lanes, and the argument they came from."""

    program: tuple[int, int, int]
    addresses: Any  # int64 numpy array, one entry an active lane
    lanes: Any  # int64 numpy array: which lanes of the block they are, counted row by row
    itemsize: int
    argument: str | None
    values: Any = None  # of a store, one a lane
    atomic: bool = False


observers: list[Observer] = []


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[Observer]:
    """Inside, `observer` is told of every interpreted launch."""
    observers.append(observer)
    try:
        yield observer
    finally:
        observers.remove(observer)
