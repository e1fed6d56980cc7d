"""Every argument error of every operator: what was wanted, what was got, before anything is launched.

Shapes, dtypes, devices and options are checked always, in Python. The values of `cu_seqlens` and `log_decay` are
checked always on the CPU; for CUDA tensors, where looking means waiting for the device, inside
`with gdr_teach.value_checks():` only.
"""

import contextlib
import numbers
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .notation import Sizes, state_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MODES = ("auto", "recurrent", "chunk")
BACKENDS = ("auto", "torch", "triton")
GATES = ("beta", "log_decay")  # may stay in float32 beside half-precision q, k, v
TRITON_WIDTH = 256  # the widest K or V of the Triton kernels

_value_checks = False


@contextlib.contextmanager
def value_checks() -> Iterator[None]:
    """Inside, the values of arguments on CUDA devices are checked too, at the price of a synchronisation."""
    global _value_checks
    saved, _value_checks = _value_checks, True
    try:
        yield
    finally:
        _value_checks = saved


def check_call(
    op: str,
    layout: Mapping[str, str],
    tensors: Mapping[str, Any],
    *,
    scale: Any,
    initial_state: Any,
    cu_seqlens: Any,
    mode: Any,
    backend: Any,
) -> Sizes:
    """Check one call of a rule and return its sizes.

    layout names the axes of each tensor, for example {"q": "B T H K", "beta": "B T H"}: the first tensor that
    names an axis sets its size, the later ones must agree; "B T H | B T H K" leaves a choice.
    Raises TypeError for a wrong type or dtype and ValueError for a wrong size, device or option.
    """
    size = _check_tensors(op, layout, tensors)
    q = tensors["q"]
    N = _check_cu_seqlens(op, cu_seqlens, q, size["B"])
    _check_state(op, "initial_state", initial_state, q, (N, size["H"], size["K"], size["V"]))
    _check_number(op, "scale", scale)
    _check_choice(op, "mode", mode, MODES)
    _check_choice(op, "backend", backend, BACKENDS)
    return Sizes(size["B"], size["T"], size["H"], size["K"], size["V"], N)


def check_step(
    op: str,
    layout: Mapping[str, str],
    tensors: Mapping[str, Any],
    *,
    state: Any,
    scale: Any,
    inplace: Any,
) -> Sizes:
    """The same for one token: tensors without the axis T, and a state that must be there and may be overwritten."""
    size = _check_tensors(op, layout, tensors)
    _check_tensor(op, "state", state)
    shape = (size["B"], size["H"], size["K"], size["V"])
    _check_state(op, "state", state, tensors["q"], shape)
    _check_number(op, "scale", scale)
    if not isinstance(inplace, bool):
        raise TypeError(f"{op}: inplace must be a bool, got {type(inplace).__name__}")
    for name, x in {**tensors, "state": state}.items():
        if inplace and torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{op}: inplace=True wants tensors without gradient, or torch.no_grad(), got {name} that requires one"
            )
    return Sizes(size["B"], 1, size["H"], size["K"], size["V"], size["B"])


def check_triton(op: str, sizes: Sizes, q: Tensor) -> None:
    """What the Triton kernels ask beyond `check_call`: a device they run on, widths up to 256, no float64 on CUDA."""
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{op}: backend 'triton' wants tensors on cpu or cuda, got {q.device}; use backend='torch'"
        )
    for axis, size in (("K", sizes.K), ("V", sizes.V)):
        if size > TRITON_WIDTH:
            raise ValueError(
                f"{op}: backend 'triton' wants {axis} <= {TRITON_WIDTH}, got {axis} = {size}; use backend='torch'"
            )
    if q.dtype == torch.float64 and q.device.type == "cuda":
        raise TypeError(
            f"{op}: backend 'triton' wants float16, bfloat16 or float32 on cuda, got float64; use backend='torch'"
        )


def check_cu_seqlens_values(op: str, cu_seqlens: Tensor | None, T: int) -> None:
    """Raise ValueError unless cu_seqlens runs from 0 to T without falling; skipped on CUDA, see `value_checks`."""
    if cu_seqlens is None or (cu_seqlens.device.type != "cpu" and not _value_checks):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T:
        raise ValueError(
            f"{op}: cu_seqlens must start at 0 and end at T = {T}, got [{ends[0]}, ..., {ends[-1]}]"
        )
    for n, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ValueError(
                f"{op}: cu_seqlens must not decrease, got {start} then {end} at positions {n} and {n + 1}"
            )


def check_min_log_decay(op: str, value: Any) -> None:
    """A bound that log_decay is promised to keep: None, or a Python number <= 0."""
    _check_number(op, "min_log_decay", value)
    if value is not None and not value <= 0:
        raise ValueError(f"{op}: min_log_decay must be <= 0, got {value}")


def check_log_decay_values(op: str, log_decay: Tensor, min_log_decay: float | None) -> None:
    """Raise ValueError unless min_log_decay <= log_decay <= 0; skipped on CUDA, see `value_checks`.

    min_log_decay is rounded to log_decay's dtype first: a gate that was set to the bound keeps it.
    """
    if log_decay.device.type != "cpu" and not _value_checks:
        return
    _check_everywhere(op, log_decay, ~(log_decay <= 0), "<= 0 (the decay's natural logarithm)")
    if min_log_decay is not None:
        bound = torch.tensor(min_log_decay, dtype=log_decay.dtype, device=log_decay.device)
        wanted = f">= min_log_decay = {min_log_decay}"
        _check_everywhere(op, log_decay, log_decay < bound, wanted)


def check_positive_int(op: str, name: str, value: Any) -> int:
    """A whole number >= 1, such as a chunk size: TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    return int(value)


def _check_tensors(
    op: str, layout: Mapping[str, str], tensors: Mapping[str, Any]
) -> dict[str, int]:
    # types, shapes, dtypes and devices; returns the size of each axis
    for name, x in tensors.items():
        _check_tensor(op, name, x)
    size: dict[str, int] = {}
    for name, axes in layout.items():
        _bind(op, name, tensors[name], [choice.split() for choice in axes.split("|")], size)
    for axis in ("K", "V"):
        if size[axis] == 0:
            owner = "k" if axis == "K" else "v"
            raise ValueError(f"{op}: {owner} must have a last dimension of at least 1, got 0")
    q = tensors["q"]
    for name, x in tensors.items():
        _check_dtype(op, name, x, q.dtype)
        _check_device(op, name, x, q.device)
    return size


def _check_everywhere(op: str, log_decay: Tensor, wrong: Tensor, wanted: str) -> None:
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        got = log_decay[tuple(at)].item()
        raise ValueError(f"{op}: log_decay must be {wanted}, got {got:.6g} at {at}")


def _check_number(op: str, name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a Python number or None, got {type(value).__name__}")


def _check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {x.layout}")


def _bind(op: str, name: str, x: Tensor, choices: list[list[str]], size: dict[str, int]) -> None:
    got = list(x.shape)
    wanted = [[size.get(axis, axis) for axis in axes] for axes in choices]
    for axes, sizes in zip(choices, wanted, strict=True):
        if len(got) == len(axes) and all(
            isinstance(w, str) or w == g for w, g in zip(sizes, got, strict=True)
        ):
            size.update(zip(axes, got, strict=True))
            return
    shapes = " or ".join(map(_shape, wanted))
    raise ValueError(f"{op}: {name} must have shape {shapes}, got {_shape(got)}")


def _shape(sizes: list) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


def _check_dtype(op: str, name: str, x: Tensor, wanted: torch.dtype) -> None:
    if x.dtype not in DTYPES:
        names = ", ".join(_name(d) for d in DTYPES)
        raise TypeError(f"{op}: {name} must have dtype {names}, got {_name(x.dtype)}")
    allowed = {wanted, torch.float32} if name in GATES else {wanted}
    if x.dtype not in allowed:
        names = " or ".join(sorted(_name(d) for d in allowed))
        raise TypeError(
            f"{op}: {name} must have dtype {names} beside q in {_name(wanted)}, got {_name(x.dtype)}"
        )


def _check_device(op: str, name: str, x: Tensor, wanted: torch.device) -> None:
    if x.device != wanted:
        raise ValueError(f"{op}: {name} must be on q's device {wanted}, got {x.device}")


def _check_cu_seqlens(op: str, cu_seqlens: Any, q: Tensor, B: int) -> int:
    # returns N, the number of sequences
    if cu_seqlens is None:
        return B
    _check_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{op}: cu_seqlens must have dtype int32 or int64, got {_name(cu_seqlens.dtype)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape [N + 1], got {_shape(list(cu_seqlens.shape))}"
        )
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != q.device:
        raise ValueError(
            f"{op}: cu_seqlens must be on cpu or q's device {q.device}, got {cu_seqlens.device}"
        )
    if B != 1:
        raise ValueError(f"{op}: packed sequences (cu_seqlens) want B = 1, got B = {B}")
    return cu_seqlens.shape[0] - 1


def _check_state(op: str, name: str, S: Any, q: Tensor, shape: tuple[int, ...]) -> None:
    if S is None:
        return
    _check_tensor(op, name, S)
    if tuple(S.shape) != shape:
        raise ValueError(
            f"{op}: {name} must have shape {_shape(list(shape))}, got {_shape(list(S.shape))}"
        )
    if S.dtype != state_dtype(q.dtype):
        wanted = f"{_name(state_dtype(q.dtype))} (the state's dtype beside q in {_name(q.dtype)})"
        raise TypeError(f"{op}: {name} must have dtype {wanted}, got {_name(S.dtype)}")
    _check_device(op, name, S, q.device)


def _check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
