"""One kernel source, three ways: interpreted for CPU tensors, compiled for GPU tensors, compiled ahead of time.

    @kernel                                       # in place of @triton.jit, for kernels and their helpers
    def add_kernel(p_x, p_y, n, BLOCK: tl.constexpr): ...

    add_kernel[(cdiv(n, 64),)](x, y, n, BLOCK=64)     # CPU tensors: interpreted; CUDA tensors: compiled

Plain triton wants an environment variable set before it is imported, and then cannot compile in that process. Here
the tensors decide, launch by launch. This is the only file that uses private names of triton; it is tested on every
version in `KNOWN_INTERPRETERS`. Repairs made to the interpreter while a kernel runs on it:

- bfloat16 values are widened to float32, computed, and rounded to nearest even after each operation, as hardware
  does; plain triton computes with their bit patterns.
- a pointer remembers the argument it came from, so that a stray address can be named (see `sanitizer`).
- a kernel sees only its own module's names, as when compiled; plain triton adds `np`, `math` and others to it.
- triton 3.6 with numpy >= 2.4: `range` over a run-time number works.
"""

import contextlib
import functools
import importlib
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .observers import (  # some of them for those who import from here
    Access,
    Observer,  # noqa: F401
    filling,
    new_empty,  # noqa: F401
    observe,  # noqa: F401
    observers,
    poisoned,  # noqa: F401
)

try:
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction
except (
    ImportError
) as error:  # macOS and Windows have no triton; the torch half of the package does not need it
    raise ImportError(
        "gdr_teach.runtime: the Triton kernels need the package triton, which is not installed. "
        "On Linux: pip install 'triton>=3.6'. Elsewhere use backend='torch'."
    ) from error

KNOWN_INTERPRETERS = ((3, 6), (3, 7), (3, 8), (3, 9))


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n; 1 for n <= 1. Triton's block sizes are powers of two."""
    return 1 << max(n - 1, 0).bit_length()


def triton_version(text: str | None = None) -> tuple[int, int]:
    """(major, minor) of the triton that is installed."""
    found = re.match(r"(\d+)\.(\d+)", triton.__version__ if text is None else text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# -- launches that are written down ------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A launch that was recorded and not run (see `recorded`)."""

    kernel: "Kernel"
    args: tuple
    kwargs: dict[str, Any]
    grid: tuple[int, ...]


_recordings: list[tuple[str, list[Launch]]] = []


@contextlib.contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Inside, launches are written down instead of run: what `aot` compiles is what a call would launch on target."""
    _recordings.append((target, []))
    try:
        yield _recordings[-1][1]
    finally:
        _recordings.pop()


def recording() -> str | None:
    """The target that launches are written down for; None outside `recorded`."""
    return _recordings[-1][0] if _recordings else None


# -- the kernel decorator ----------------------------------------------------------------------------------------------


class Kernel(JITFunction):
    """A JITFunction whose launches on CPU tensors are interpreted."""

    def run(self, *args, grid, warmup, **kwargs):
        if _recordings:
            _recordings[-1][1].append(Launch(self, args, kwargs, grid))
            return None
        if not warmup and runs_on_cpu(self, args, kwargs):
            return _interpret(self, args, kwargs, grid)
        if triton_version() > KNOWN_INTERPRETERS[-1]:
            _warn_untested()
        return super().run(*args, grid=grid, warmup=warmup, **kwargs)


def kernel(fn=None, **options) -> Any:
    """Mark a function as a kernel, or as a helper called by kernels: takes the options of `triton.jit`."""
    if fn is None:
        return functools.partial(kernel, **options)
    return Kernel(fn, **options)


def named_tensors(kernel: Kernel, args: tuple, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensor arguments of a launch by name."""
    named = list((dict(zip(kernel.arg_names, args, strict=False)) | kwargs).items())
    found = {}
    for name, x in named:  # grows as it goes: a tuple's items are arguments of their own
        if isinstance(x, tuple):
            named += [(f"{name}[{i}]", item) for i, item in enumerate(x)]
        tensor = getattr(x, "base", x) if hasattr(x, "block_shape") else x  # of a descriptor
        if isinstance(tensor, torch.Tensor):
            found[name] = tensor
    return found


def runs_on_cpu(kernel: Kernel, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a launch is for the interpreter; ValueError when its tensors are not all on one device."""
    devices = {name: str(x.device) for name, x in named_tensors(kernel, args, kwargs).items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{kernel.__name__}: all tensors must be on one device, got {where}")
    return set(devices.values()) == {"cpu"}


@functools.cache
def _warn_untested() -> None:
    last = ".".join(map(str, KNOWN_INTERPRETERS[-1]))
    warnings.warn(
        f"gdr_teach: triton {triton.__version__} is newer than the tested {last}", stacklevel=4
    )


# -- the interpreter ---------------------------------------------------------------------------------------------------


_lock = threading.RLock()  # interpreting changes triton.language for the whole process
_inside = False


def _interpret(kernel: Kernel, args: tuple, kwargs: dict[str, Any], grid) -> None:
    with _interpreting():
        tensors = named_tensors(kernel, args, kwargs)
        interpreter_builder().origins = {x.data_ptr(): name for name, x in tensors.items()}
        for observer in observers:
            observer.launched(kernel.__name__, tensors, grid)
        try:
            with overflow_is_silent():
                run = _twin(kernel.fn).run
                _with_room()(lambda: run(*args, grid=grid, warmup=False, **kwargs))
            for observer in observers:
                observer.finished()
        except Exception as error:  # noqa: BLE001  whatever the kernel raised
            raise _cause(error) from None


@functools.cache
def _with_room() -> Callable[[Callable[[], None]], None]:
    """A function that calls another one in a piece of Python's stack with room for all calls that it makes.

    CPython keeps frames in pieces of memory, and a call just past a piece's end maps a new one and gives it back on
    return: some 800,000 page faults in one test, a third of its time. A frame of so many variables gets a large piece.
    """
    names = " = ".join(f"v{n}" for n in range(40_000))
    scope: dict[str, Any] = {}
    exec(f"def call(run):\n    if run is None:\n        {names} = None\n    return run()\n", scope)
    return scope["call"]


def overflow_is_silent() -> contextlib.AbstractContextManager:
    """As on a GPU: numpy would warn of an inf, even of one that a mask drops in the next line."""
    import numpy as np

    return np.errstate(all="ignore")


def _cause(error: BaseException) -> BaseException:
    # triton wraps each level of an interpreted call in an InterpreterError that holds only a repr
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    """Make triton.language run eagerly; undone on exit, so that compiling works afterwards."""
    global _inside
    with _lock:
        if _inside:
            yield
            return
        interpreter = _interpreter_module()
        probe = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
        scope = interpreter._patch_lang(probe)
        saved = JITFunction.__call__, interpreter.ReduceScanOpInterface.apply
        builder = interpreter_builder()
        JITFunction.__call__ = lambda self, *a, **kw: _twin(self.fn).rewrite()(*a, **kw)
        interpreter.ReduceScanOpInterface.apply = _widened_reduction(saved[1])
        plain, builder.__class__ = builder.__class__, _builder_class()
        _inside = True
        try:
            yield
        finally:
            _inside = False
            builder.__class__ = plain
            JITFunction.__call__, interpreter.ReduceScanOpInterface.apply = saved
            scope.restore()


def _interpreter_module() -> Any:
    if triton_version() not in KNOWN_INTERPRETERS:
        known = ", ".join(f"{major}.{minor}" for major, minor in KNOWN_INTERPRETERS)
        raise RuntimeError(
            f"gdr_teach: kernels on CPU tensors need triton's interpreter in a known version ({known}), got triton "
            f"{triton.__version__}. Compiled kernels (CUDA tensors) and backend='torch' work all the same."
        )
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")  # brings numpy
    _repair_index(interpreter)
    return interpreter


def interpreter_builder() -> Any:
    """The object that carries out triton.language's operations while a kernel is interpreted."""
    return _interpreter_module().interpreter_builder


@functools.cache
def _repair_index(interpreter: Any) -> None:
    # triton 3.6 does int(array of one element with one dimension), which numpy >= 2.4 refuses
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@functools.cache
def _twin(fn):
    """The interpreted form of a kernel or of one of triton's own device functions."""
    from triton.runtime.interpreter import (
        FunctionRewriter,
        InterpretedFunction,
        interpreter_semantic,
    )

    class Rewriter(FunctionRewriter):
        def _compile_and_exec(self, transformed_ast):
            code = compile(transformed_ast, filename=self.filename, mode="exec")
            names = self.fn.__globals__
            names.setdefault(
                "interpreter_semantic", interpreter_semantic
            )  # the rewritten assignments call it
            local: dict[str, Any] = {}
            exec(code, names, local)
            return local[self.fn.__name__]

    twin = InterpretedFunction(fn)
    twin.rewriter = Rewriter(fn)
    return twin


# -- bfloat16 and pointers on the interpreter --------------------------------------------------------------------------


def _widen(handle):
    """A bfloat16 block (held as its 16 bits) as float32; anything else as it is."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    if not isinstance(handle, TensorHandle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(data):
    """Floats as bfloat16, rounded to nearest even."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _filled(dtype: tl.dtype, shape: tuple[int, ...]):
    """A block of what `poisoned` fills memory with; of an integer type, of its smallest number."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    if dtype == tl.bfloat16:
        return _narrow(np.full(shape, filling[-1], dtype=np.float32))
    kind = np.dtype(_get_np_dtype(dtype))
    value = np.iinfo(kind).min if kind.kind in "iu" else filling[-1]
    return TensorHandle(np.full(shape, value, dtype=kind), dtype)


def _is_bf16(*handles) -> bool:
    return any(getattr(getattr(h, "dtype", None), "scalar", None) == tl.bfloat16 for h in handles)


@functools.cache
def _builder_class():
    """Triton's InterpreterBuilder with honest bfloat16, pointers that know their argument, and observers."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(name):
        plain = getattr(InterpreterBuilder, name)

        def operation(self, *args):
            if not _is_bf16(*args):
                return plain(self, *args)
            if name == "ternary_op" and args[3] is np.where:  # moves values, computes nothing
                return plain(self, *args)
            out = plain(self, *map(_widen, args))
            return _narrow(out.data) if out.data.dtype == np.float32 else out

        return operation

    def carried(name):
        plain = getattr(InterpreterBuilder, name)

        def operation(self, *args, **kwargs):
            out = plain(self, *args, **kwargs)
            for x in args:  # the pointer among the operands, if any, hands its origin on
                argument = self.argument_of(x)
                if argument is not None:
                    out.attr["argument"] = argument
                    break
            return out

        return operation

    def based(name):
        plain = getattr(InterpreterBuilder, name)

        def operation(self, pointer, *args, **kwargs):
            self.base = pointer.base
            try:
                return plain(self, pointer, *args, **kwargs)
            finally:
                self.base = None

        return operation

    class Builder(InterpreterBuilder):
        origins: ClassVar[dict[int, str]] = {}  # base address -> argument of the launch
        base: Any = None  # the pointer that a block pointer or descriptor in use was made from

        def get_bf16(self, value):
            return _narrow(np.array([value], dtype=np.float32))

        def cast_impl(self, src, dst_type):
            if _is_bf16(src):
                wide = _widen(src)
                return wide if dst_type.scalar == tl.float32 else self.cast_impl(wide, dst_type)
            if dst_type.scalar == tl.bfloat16:
                return _narrow(src.data.astype(np.float32))
            return super().cast_impl(src, dst_type)

        def create_fp_to_fp(self, src, dst_type, rounding_mode):
            if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
                return self.cast_impl(src, dst_type)
            return super().create_fp_to_fp(src, dst_type, rounding_mode)

        def create_dot(self, a, b, d, *options):
            return super().create_dot(_widen(a), _widen(b), d, *options)

        def argument_of(self, handle):
            """The argument that a pointer was made from; None for anything else."""
            if not isinstance(handle, TensorHandle):
                return None
            name = handle.attr.get("argument")
            if (
                name is None
                and handle.data.size == 1
                and isinstance(handle.dtype.scalar, tl.pointer_type)
            ):
                name = self.origins.get(int(handle.data.item()))
            return name

        def create_masked_load(self, ptrs, mask, other, *options, **named):
            self._tell("loaded", ptrs, mask)
            if other is None and filling:  # compiled, the lanes that are off hold anything at all
                other = _filled(ptrs.get_element_ty(), np.shape(ptrs.data))
            return super().create_masked_load(ptrs, mask, other, *options, **named)

        def create_masked_store(self, ptrs, value, mask, *options, **named):
            self._tell("stored", ptrs, mask, value)
            return super().create_masked_store(ptrs, value, mask, *options, **named)

        def create_atomic_rmw(self, rmw, ptr, val, mask, *options):
            if _is_bf16(val):
                raise TypeError("atomics on bfloat16 are not supported on the interpreter")
            self._tell("loaded", ptr, mask, atomic=True)
            self._tell("stored", ptr, mask, val, atomic=True)
            return super().create_atomic_rmw(rmw, ptr, val, mask, *options)

        def create_atomic_cas(self, ptr, cmp, val, *options):
            self._tell("loaded", ptr, True, atomic=True)
            self._tell("stored", ptr, True, val, atomic=True)
            return super().create_atomic_cas(ptr, cmp, val, *options)

        def create_barrier(self):
            for observer in observers:
                observer.synchronised()
            return super().create_barrier()

        def _tell(self, event, ptrs, mask, value=None, atomic=False):
            if not observers:
                return
            addresses = np.asarray(ptrs.data)
            mask = np.broadcast_to(np.asarray(getattr(mask, "data", mask)), addresses.shape)
            lanes = np.flatnonzero(mask)
            active = addresses.reshape(-1)[lanes].astype(np.int64)
            itemsize = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
            if value is not None:
                value = np.broadcast_to(value.data, addresses.shape).reshape(-1)[lanes]
            argument = self.argument_of(ptrs) or self.argument_of(self.base)
            access = Access(self.grid_idx, active, lanes, itemsize, argument, value, atomic)
            for observer in observers:
                getattr(observer, event)(access)

    for name in ("binary_op", "ternary_op", "unary_op", "create_fma"):
        setattr(Builder, name, widened(name))
    shape_ops = "create_addptr create_splat create_unsplat create_broadcast create_expand_dims"
    for name in (
        *shape_ops.split(),
        "create_reshape",
        "create_trans",
        "create_bitcast",
        "create_cat",
        "create_join",
        "create_select",
    ):
        if hasattr(InterpreterBuilder, name):
            setattr(Builder, name, carried(name))
    for name in (
        "create_tensor_pointer_load",
        "create_tensor_pointer_store",
        "create_descriptor_load",
        "create_descriptor_store",
    ):
        if hasattr(InterpreterBuilder, name):
            setattr(Builder, name, based(name))
    return Builder


def _widened_reduction(plain):
    """Reductions and scans of bfloat16 run in float32 and are rounded once at the end."""

    def as_tensor(x, handle, dtype):
        ty = tl.block_type(dtype, list(x.shape)) if x.type.is_block() else dtype
        return tl.tensor(handle, ty)

    def apply(self, operands):
        single = not isinstance(operands, tuple)
        xs = (operands,) if single else operands
        if not any(x.dtype == tl.bfloat16 for x in xs):
            return plain(self, operands)
        wide = tuple(
            as_tensor(x, _widen(x.handle), tl.float32) if x.dtype == tl.bfloat16 else x for x in xs
        )
        out = plain(self, wide)
        out = out if isinstance(out, tuple) else (out,)
        narrow = tuple(
            as_tensor(y, _narrow(y.handle.data), tl.bfloat16)
            if x.dtype == tl.bfloat16 and y.dtype == tl.float32
            else y
            for x, y in zip(xs, out, strict=True)
        )
        return narrow[0] if single else narrow

    return apply
