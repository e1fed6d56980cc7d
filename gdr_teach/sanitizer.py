"""A memory check for kernels on the interpreter: every lane of every load and store of every program.

    with sanitize():
        my_kernel[grid](x, y, n, BLOCK=64)

raises KernelFault at the first access that a GPU would let pass in silence:

- a load or store outside the elements of the argument its pointer came from (the gaps of a strided view included), or
  of elements of another size;
- a load of an element of an undefined buffer that nothing has stored yet (`uninitialised`, and every output buffer
  that the package allocates inside);
- two programs of one launch storing to one address, or one reading what another stores: a race, since programs run
  in any order. Atomic sums too: their order, and so their rounding, is anybody's guess;
- the same between the threads of one program: two lanes storing different values to one address; a load of what was
  stored since the last `tl.debug_barrier()`; a store by one lane of what another lane has read or stored since;
- a grid larger than a GPU takes.

The check runs before the access, so a wrong kernel does not take the process down with it. Only what threads of one
program do to each other waits for the end of the launch: it is often what comes of an access that is wrong in
itself, and then that one is raised. What it cannot see is what
a kernel computes from: the lanes that a masked load leaves out are `runtime.poisoned`'s to make visible.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .runtime import Access, Observer, observe

LANE_BITS = 24  # of a stamp, see `Sanitizer`; a block has no more numbers than 2^20
SMALL = (
    1 << 20
)  # storages up to so many units are shadowed whole, larger ones where they are touched
GRID_LIMIT = (2**31 - 1, 65_535, 65_535)


class KernelFault(RuntimeError):
    """A wrong access: `kind`, the `argument` it came from (None when unknown) and the `program` that did it."""

    def __init__(self, kind: str, argument: str | None, program: tuple[int, int, int], detail: str):
        where = argument or "an unknown pointer"
        super().__init__(f"{kind} {where} in program {program}: {detail}")
        self.kind, self.argument, self.program = kind, argument, program


class _Elements:
    """Where the elements of a tensor lie, any strides: membership is arithmetic, no map of a storage is needed."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.first, self.itemsize = tensor, tensor.data_ptr(), tensor.element_size()
        axes: list[tuple[int, int]] = []  # (stride, size) in elements, the longest stride first
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        for stride, size in sorted((x for x in pairs if x[0] and x[1] > 1), reverse=True):
            if axes and axes[-1][0] == stride * size:
                axes[-1] = (stride, axes[-1][1] * size)
            else:
                axes.append((stride, size))
        self.axes = axes or [(1, 1)]
        self.dense = len(self.axes) == 1 and self.axes[0][0] == 1
        # as_strided can lay windows over each other; then one element has several indices, and a list tells
        reach = [(size - 1) * stride for stride, size in self.axes]
        nested = all(self.axes[n][0] > sum(reach[n + 1 :]) for n in range(len(reach)))
        self.listed = None if nested else self.positions()

    def positions(self) -> np.ndarray:
        """All elements, counted from the first, in no order."""
        at = np.zeros(1, dtype=np.int64)
        for stride, size in self.axes:
            at = (at[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        return at

    def holds_all(self, low: int, high: int) -> bool:
        """Whether an element starts at every multiple of the item size between two addresses, both counted in."""
        return (
            self.dense and self.first <= low and high < self.first + self.axes[0][1] * self.itemsize
        )

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Whether an element starts at each of the addresses."""
        at, odd = np.divmod(addresses - self.first, self.itemsize)
        ok = (at >= 0) & (odd == 0)
        if self.listed is not None:
            return ok & np.isin(at, self.listed)
        for stride, size in self.axes:
            index = at // stride
            ok &= index < size
            at -= index * stride
        return ok & (at == 0)


class _Memory:
    """One storage in units of the smallest element seen in it: which are undefined, who wrote, who read.

    `writer`, `reader` (the first of a launch) and `last` hold stamps, `odd` is True where a unit is not what
    `undefined` says of all. They cover the units from `start` on, as far as anybody has come.
    """

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.alive = StorageWeakRef(storage)
        self.base, self.size = storage.data_ptr(), storage.nbytes()
        self.unit = tensor.element_size()
        self.undefined, self.version = False, 0
        self.tracked = False  # whether anything here may be undefined
        self.arguments: dict[str, _Elements] = {}
        self.start = 0
        self.odd = np.zeros(0, dtype=bool)
        self.writer, self.reader, self.last = (np.zeros(0, dtype=np.int64) for _ in range(3))
        if self.size // self.unit <= SMALL:
            self._cover(0, self.size // self.unit)

    def _cover(self, start: int, end: int) -> None:
        old = self.odd, self.writer, self.reader, self.last
        shift, self.start = self.start - start, start
        # zeros take no memory before they are touched
        new = tuple(np.zeros(end - start, dtype=x.dtype) for x in old)
        self.odd, self.writer, self.reader, self.last = new
        if len(old[0]):
            for to, x in zip(new, old, strict=True):
                to[shift : shift + len(x)] = x

    def refine(self, unit: int) -> None:
        """Count in smaller units, because an argument of smaller elements lies here."""
        if unit < self.unit:
            n, self.unit = self.unit // unit, unit
            self.start *= n
            self.odd, self.writer = self.odd.repeat(n), self.writer.repeat(n)
            self.reader, self.last = self.reader.repeat(n), self.last.repeat(n)

    def within(self, at: np.ndarray) -> np.ndarray:
        """Indices of units into the arrays, which grow to hold them."""
        low, high = int(at.min()), int(at.max()) + 1
        end = self.start + len(self.odd)
        if low < self.start or high > end:
            if len(self.odd):
                low, high = min(low, self.start), max(high, end)
            spare = high - low
            self._cover(max(low - spare, 0), min(high + spare, self.size // self.unit))
        return at - self.start if self.start else at

    def undefine(self, tensor: Tensor) -> None:
        """Declare a tensor's elements undefined."""
        elements = _Elements(tensor)
        self.tracked, self.version = True, _version(tensor)
        if elements.dense and tensor.numel() * tensor.element_size() == self.size:
            self.undefined = True
            self.odd = np.zeros(len(self.odd), dtype=bool)
            return
        at = elements.positions() * tensor.element_size() + (elements.first - self.base)
        for n in range(tensor.element_size() // self.unit):
            self.odd[self.within(at // self.unit + n)] = not self.undefined

    def define(self) -> None:
        """Declare everything defined."""
        self.tracked = self.undefined = False
        self.odd[:] = False


class Sanitizer(Observer):
    """The observer behind `sanitize`.

    Programs run one after the other here, so a number that only grows tells them apart: it is one more after each
    launch, program and barrier. A stamp is that number and the lane, so who touched an address last, and whether that
    was in this launch, in this program or since its last barrier, is a comparison, and nothing is ever cleared.
    """

    def __init__(self) -> None:
        self.memories: dict[int, _Memory] = {}
        self.launch = self.program = self.now = 1 << LANE_BITS  # stamps of lane 0
        self.current: tuple[int, int, int] | None = None
        self.late: KernelFault | None = None  # between threads, raised if nothing else is wrong

    def allocated(self, tensor: Tensor) -> None:
        """Declare the elements of a tensor undefined until a kernel stores them."""
        if tensor.numel():
            self._memory(tensor).undefine(tensor)

    def launched(self, name: str, tensors: dict[str, Tensor], grid: tuple[int, ...]) -> None:
        """Learn the arguments of a launch, and forget who wrote and read in the one before."""
        self._advance()
        self.launch, self.current, self.late = self.now, None, None
        for axis, (n, limit) in enumerate(
            zip(grid if not callable(grid) else (), GRID_LIMIT, strict=False)
        ):
            if n > limit:
                detail = f"{n:,} programs along axis {axis}, a GPU takes {limit:,}"
                raise KernelFault("grid too large for", name, (0, 0, 0), detail)
        self.arguments: dict[str, tuple[_Memory, _Elements]] = {}
        self.memories = {at: x for at, x in self.memories.items() if not x.alive.expired()}
        for memory in self.memories.values():
            memory.arguments = {}
        for argument, tensor in tensors.items():
            if tensor.numel():
                memory = self._memory(tensor)
                if memory.tracked and _version(tensor) > memory.version:
                    memory.define()  # PyTorch wrote there, nobody knows which elements
                memory.arguments[argument] = _Elements(tensor)
                self.arguments[argument] = memory, memory.arguments[argument]

    def synchronised(self) -> None:
        """The threads of the program have waited for each other."""
        self._advance()

    def finished(self) -> None:
        """Raise what has waited for the end of the launch."""
        if self.late is not None:
            raise self.late

    def loaded(self, access: Access) -> None:
        """Check a load: inside, defined, and not of what another program or another thread stores."""
        memory, at, lanes = self._place("load", access)
        if memory is None:
            return
        if memory.tracked:
            undefined = memory.odd[at] != memory.undefined
            if undefined.any():
                detail = f"{_count(undefined)} read before anything was stored"
                raise KernelFault("uninitialised read of", access.argument, access.program, detail)
        stamps = lanes + self.now
        writer = memory.writer[at]
        if int(writer.max()) >= self.launch:
            wrong = (writer >= self.launch) & (writer < self.program)
            if wrong.any():
                detail = f"another program of the same launch stored there ({_count(wrong)})"
                raise KernelFault("race on load of", access.argument, access.program, detail)
            if not access.atomic:
                self._after_barrier("load of", access, writer >= self.now, "stored")
        reader = memory.reader[at]
        fresh = reader < self.launch
        if fresh.all():
            memory.reader[at] = stamps
        elif fresh.any():
            memory.reader[at[fresh]] = stamps[fresh]
        memory.last[at] = stamps

    def stored(self, access: Access) -> None:
        """Check a store: inside, one lane an address, and not where another program or thread reads or stores."""
        memory, at, lanes = self._place("store", access)
        if memory is None:
            return
        writer, reader = memory.writer[at], memory.reader[at]
        for stamps, did in ((writer, "stored"), (reader, "reads")):
            wrong = (stamps >= self.launch) & (stamps < self.program)
            if wrong.any():
                detail = f"another program of the same launch {did} there ({_count(wrong)})"
                raise KernelFault("race on store to", access.argument, access.program, detail)
        stamps = lanes + self.now
        if not access.atomic:
            for before, did in ((writer, "stored"), (reader, "read"), (memory.last[at], "read")):
                # the lane that touched an address may store there: it is the same thread, or a layout changed between
                wrong = (before >= self.now) & (before != stamps)
                self._after_barrier("store to", access, wrong, did)
        memory.writer[at] = stamps
        self._one_lane(access, memory.writer[at] - self.now, lanes)
        if memory.tracked:
            memory.odd[at] = memory.undefined

    def _after_barrier(self, what: str, access: Access, wrong: np.ndarray, did: str) -> None:
        if self.late is None and wrong.any():
            detail = f"the program {did} there, no tl.debug_barrier() between ({_count(wrong)})"
            kind = f"missing barrier before {what}"
            self.late = KernelFault(kind, access.argument, access.program, detail)

    def _one_lane(self, access: Access, winner, lanes) -> None:
        # of several lanes that store to one address one wins, nobody knows which; no harm if all say the same
        lost = winner != lanes
        if access.atomic or self.late is not None or not lost.any():
            return
        place = np.zeros(int(access.lanes.max()) + 1, dtype=np.int64)
        place[access.lanes] = np.arange(access.lanes.size)
        values = np.ascontiguousarray(access.values).view(np.uint8).reshape(access.lanes.size, -1)
        wrong = (values[place[winner[lost]]] != values[place[lanes[lost]]]).any(axis=1)
        if wrong.any():
            detail = f"two lanes store different values to one address ({_count(wrong)})"
            self.late = KernelFault("race on store to", access.argument, access.program, detail)

    def _advance(self) -> None:
        self.now += 1 << LANE_BITS

    def _memory(self, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        memory = self.memories.get(storage.data_ptr())
        # memory that was freed may be given out again, and what was known of it is then wrong
        if memory is None or memory.size != storage.nbytes() or memory.alive.expired():
            memory = self.memories[storage.data_ptr()] = _Memory(tensor)
        memory.refine(tensor.element_size())
        return memory

    def _place(self, verb: str, access: Access) -> tuple[_Memory | None, np.ndarray, np.ndarray]:
        # the memory an access lands in, its units there and their lanes; raises when a lane is not on an element
        if access.program != self.current:
            self._advance()
            self.program, self.current = self.now, access.program
        if not access.addresses.size:
            return None, access.addresses, access.lanes
        memory, meant = self._meant(verb, access)
        sized = [x for x in meant.values() if x.itemsize == access.itemsize]
        if not sized:
            sizes = {x.itemsize for x in meant.values()}
            detail = f"elements of {access.itemsize} bytes where they have {sizes.pop()}"
            raise KernelFault(
                f"wrong element size in {verb} of", access.argument, access.program, detail
            )
        self._inside(verb, access, sized)
        at = (access.addresses - memory.base) // memory.unit
        lanes, n = access.lanes, access.itemsize // memory.unit
        if n > 1:
            at, lanes = (at[:, None] + np.arange(n)).reshape(-1), lanes.repeat(n)
        return memory, memory.within(at), lanes

    def _meant(self, verb: str, access: Access) -> tuple[_Memory, dict[str, _Elements]]:
        # the memory, and the arguments that a pointer may mean
        if access.argument in self.arguments:
            memory, own = self.arguments[access.argument]
            # two that start at one address (an update in place) cannot be told apart by their pointers
            return memory, {n: x for n, x in memory.arguments.items() if x.first == own.first}
        first = int(access.addresses[0])
        for memory, _ in self.arguments.values():
            if memory.base <= first < memory.base + memory.size:
                return (
                    memory,
                    memory.arguments,
                )  # lost its origin on the way: judge by where it points
        detail = "the address belongs to no argument"
        raise KernelFault(f"{verb} outside", access.argument, access.program, detail)

    def _inside(self, verb: str, access: Access, meant: list[_Elements]) -> None:
        low, high = int(access.addresses.min()), int(access.addresses.max())
        for elements in meant:
            if (
                elements.holds_all(low, high)
                and not ((access.addresses - elements.first) % access.itemsize).any()
            ):
                return
        ok = np.logical_or.reduce([elements.holds(access.addresses) for elements in meant])
        if not ok.all():
            detail = self._describe(access, ok)
            raise KernelFault(f"{verb} outside", access.argument, access.program, detail)

    def _describe(self, access: Access, ok: np.ndarray) -> str:
        text = f"{_count(~ok)} outside"
        if access.argument not in self.arguments:
            return text
        tensor = self.arguments[access.argument][1].tensor
        element = (int(access.addresses[~ok][0]) - tensor.data_ptr()) // access.itemsize
        return f"{text}, the first at element {element} of a tensor of shape {list(tensor.shape)}"


def _version(tensor: Tensor) -> int:
    """How often PyTorch has written to a tensor; kernels are not counted."""
    return 0 if tensor.is_inference() else tensor._version


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
