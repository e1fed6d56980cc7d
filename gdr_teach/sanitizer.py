"""A memory check for kernels on the interpreter: every lane of every load and store of every program.

    with sanitize():
        my_kernel[grid](x, y, n, BLOCK=64)

raises KernelFault at the first access that a GPU would let pass in silence:

- a load or store outside the elements of the argument its pointer came from (the gaps of a strided view included);
- a load of an element of an undefined buffer that nothing has stored yet (`uninitialised`, and every output buffer
  that the package allocates inside);
- two programs of one launch storing to one address, or one reading what another stores: a race, since programs run
  in any order.

The check runs before the access, so a wrong kernel does not take the process down with it.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .runtime import Access, Observer, observe

NOBODY, MANY = -1, -2  # in place of a program's number


class KernelFault(RuntimeError):
    """A wrong access: `kind`, the `argument` it came from (None when unknown) and the `program` that did it."""

    def __init__(self, kind: str, argument: str | None, program: tuple[int, int, int], detail: str):
        where = argument or "an unknown pointer"
        super().__init__(f"{kind} {where} in program {program}: {detail}")
        self.kind, self.argument, self.program = kind, argument, program


class _Memory:
    """One storage: which bytes start an element of an argument, which are undefined, who wrote, who read."""

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.tensor = (
            tensor  # keeps the storage alive, so that its address is not given to another one
        )
        self.base, self.size = storage.data_ptr(), storage.nbytes()
        self.undefined = np.zeros(self.size, dtype=bool)
        self.start_launch()

    def start_launch(self) -> None:
        self.elements: dict[
            str, np.ndarray
        ] = {}  # argument -> bytes that start one of its elements
        self.writer = np.full(self.size, NOBODY, dtype=np.int64)
        self.reader = np.full(self.size, NOBODY, dtype=np.int64)


class _Argument(NamedTuple):
    tensor: Tensor
    memory: _Memory


class Sanitizer(Observer):
    """The observer behind `sanitize`."""

    def __init__(self) -> None:
        self.memories: dict[int, _Memory] = {}
        self.arguments: dict[str, _Argument] = {}
        self.programs: dict[tuple[int, int, int], int] = {}

    def allocated(self, tensor: Tensor) -> None:
        """Declare the elements of a tensor undefined until a kernel stores them."""
        if tensor.numel():
            self._memory(tensor).undefined[_starts(tensor)] = True

    def launched(self, name: str, tensors: dict[str, Tensor], grid: tuple[int, ...]) -> None:
        """Learn the arguments of a launch, and forget who wrote and read in the one before."""
        self.programs.clear()
        self.arguments.clear()
        named = [
            (name, tensor, self._memory(tensor))
            for name, tensor in tensors.items()
            if tensor.numel()
        ]
        for memory in {id(memory): memory for _, _, memory in named}.values():
            memory.start_launch()
        for name, tensor, memory in named:
            self.arguments[name] = _Argument(tensor, memory)
            allowed = np.zeros(memory.size, dtype=bool)
            allowed[_starts(tensor)] = True
            memory.elements[name] = allowed

    def loaded(self, access: Access) -> None:
        """Check a load: inside, defined, and not of what another program stores."""
        memory, at, program = self._place("load outside", access)
        if memory is None:
            return
        if memory.undefined[at].any():
            detail = f"{_count(memory.undefined[at])} read before anything was stored"
            raise KernelFault("uninitialised read of", access.argument, access.program, detail)
        writer = memory.writer[at]
        if ((writer != NOBODY) & (writer != program)).any():
            detail = f"another program of the same launch stored there ({_count(writer != NOBODY)})"
            raise KernelFault("race on load of", access.argument, access.program, detail)
        reader = memory.reader[at]
        memory.reader[at] = np.where((reader == NOBODY) | (reader == program), program, MANY)

    def stored(self, access: Access) -> None:
        """Check a store: inside, and not where another program reads or stores."""
        memory, at, program = self._place("store outside", access)
        if memory is None:
            return
        writer, reader = memory.writer[at], memory.reader[at]
        if ((writer != NOBODY) & (writer != program)).any():
            detail = f"another program of the same launch stored there ({_count(writer != NOBODY)})"
            raise KernelFault("race on store to", access.argument, access.program, detail)
        if ((reader != NOBODY) & (reader != program)).any():
            detail = f"another program of the same launch reads there ({_count(reader != NOBODY)})"
            raise KernelFault("race on store to", access.argument, access.program, detail)
        memory.writer[at] = program
        memory.undefined[at] = False

    def _memory(self, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage.data_ptr())
        if memory is None or memory.size != storage.nbytes():
            memory = self.memories[storage.data_ptr()] = _Memory(tensor)
        return memory

    def _place(self, kind: str, access: Access) -> tuple[_Memory | None, np.ndarray, int]:
        # the memory an access lands in and its byte positions there; raises when a lane is not on an element
        program = self.programs.setdefault(access.program, len(self.programs))
        if not access.addresses.size:
            return None, access.addresses, program
        argument = self.arguments.get(access.argument or "")
        if argument is not None:
            return (*self._inside(kind, access, argument.memory, access.argument), program)
        for memory in {id(a.memory): a.memory for a in self.arguments.values()}.values():
            first = access.addresses[0] - memory.base
            if (
                0 <= first < memory.size
            ):  # a pointer made in ways that lose its origin: judge by where it points
                return (*self._inside(kind, access, memory, None), program)
        raise KernelFault(
            kind, access.argument, access.program, "the address belongs to no argument"
        )

    def _inside(
        self, kind: str, access: Access, memory: _Memory, name: str | None
    ) -> tuple[_Memory, np.ndarray]:
        at = access.addresses - memory.base
        allowed = [
            mask
            for argument, mask in memory.elements.items()
            if name is None or self._same(argument, name)
        ]
        ok = (at >= 0) & (at < memory.size)
        ok[ok] = np.logical_or.reduce([mask[at[ok]] for mask in allowed])
        if not ok.all():
            raise KernelFault(kind, name, access.program, self._describe(access, name, ok))
        return memory, at

    def _same(self, argument: str, name: str) -> bool:
        # two arguments that start at one address (an update in place) cannot be told apart by their pointers
        return self.arguments[argument].tensor.data_ptr() == self.arguments[name].tensor.data_ptr()

    def _describe(self, access: Access, name: str | None, ok: np.ndarray) -> str:
        text = f"{_count(~ok)} outside"
        if name is None:
            return text
        tensor = self.arguments[name].tensor
        element = (int(access.addresses[~ok][0]) - tensor.data_ptr()) // access.itemsize
        return f"{text}, the first at element {element} of a tensor of shape {list(tensor.shape)}"


def _starts(tensor: Tensor) -> np.ndarray:
    """The byte positions in its storage at which the elements of a tensor, any strides, begin."""
    at = np.array([tensor.storage_offset()], dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = (at[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return at * tensor.element_size()


def _count(lanes: np.ndarray) -> str:
    n = int(lanes.sum())
    return f"{n} lane" if n == 1 else f"{n} lanes"


_active: list[Sanitizer] = []


@contextlib.contextmanager
def sanitize() -> Iterator[Sanitizer]:
    """Inside, every interpreted launch is checked; raises KernelFault at the first wrong access."""
    sanitizer = Sanitizer()
    _active.append(sanitizer)
    try:
        with observe(sanitizer):
            yield sanitizer
    finally:
        _active.remove(sanitizer)


def uninitialised(tensor: Tensor) -> Tensor:
    """Declare a buffer's contents undefined until a kernel stores them, for the `sanitize` it is called in."""
    for sanitizer in _active:
        sanitizer.allocated(tensor)
    return tensor
