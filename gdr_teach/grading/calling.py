"""One call of a learner's function with arrays in and arrays out, and every way it can go wrong put in one word."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .checks import Value

OUTPUTS, ELEMENTS = 8, 2**20  # more than any task returns


class LibraryCalled(BaseException):
    """An answer called an operator it is to be written without; its own `except Exception` must not hide that."""


@dataclass(frozen=True)
class Outcome:
    """What came back. `failure` is "" or the name of a sentence under `reason.`, filled in with `detail`."""

    failure: str = ""
    detail: str = ""
    outputs: tuple[np.ndarray, ...] = ()
    arguments: tuple[np.ndarray, ...] = ()


def call(function: Callable, values: Sequence[Value]) -> Outcome:
    """Call with fresh tensors made of `values`. Never raises, whatever the function does."""
    import torch

    if not callable(function):
        return Outcome("not_a_function", type(function).__name__)
    given = [torch.tensor(x) if isinstance(x, np.ndarray) else x for x in values]
    try:
        returned = function(*given)
        if type(returned) is not torch.Tensor and isinstance(returned, tuple | list):
            returned = tuple(returned)
        else:
            returned = (returned,)
        return _read(returned, [x for x in given if isinstance(x, torch.Tensor)])
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt cost the task, not the grader
        return _failed(error)


def call_kernel(task_id: str, answer: object, values: Sequence[Value]) -> Outcome:
    """Launch a learner's kernel on the interpreter, every access checked. Never raises."""
    from ..runtime import Kernel, poisoned
    from ..sanitizer import sanitize
    from .launch import LAUNCH

    if not isinstance(answer, Kernel):
        return Outcome("not_a_kernel", type(answer).__name__)

    def launched(*tensors):
        with sanitize(), poisoned():
            return LAUNCH[task_id](answer, *tensors)

    return call(launched, values)


def _read(returned: tuple, given: list) -> Outcome:
    import torch

    outputs = []
    if len(returned) == 1 and returned[0] is None:
        return Outcome("nothing")
    for x in returned[: OUTPUTS + 1]:
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            return Outcome("not_a_tensor", type(x).__name__)
        if x.layout is not torch.strided or x.dtype in (torch.bfloat16, torch.complex64):
            return Outcome("odd_tensor", str(x.dtype))
        if x.numel() > ELEMENTS:  # before it is copied
            return Outcome("too_large")
        outputs.append(x.detach().cpu().resolve_conj().resolve_neg().numpy().copy())
    return Outcome("", "", tuple(outputs), tuple(x.detach().numpy().copy() for x in given))


def _failed(error: BaseException) -> Outcome:
    chain, seen = error, set()
    while chain is not None and id(chain) not in seen:  # triton wraps what a kernel raises
        seen.add(id(chain))
        if type(chain).__name__ == "KernelFault":
            outside = str(getattr(chain, "kind", "")).endswith("outside")
            return Outcome("outside" if outside else "fault", describe(chain).partition(": ")[2])
        if isinstance(chain, LibraryCalled):
            return Outcome("operator")
        chain = chain.__cause__ or chain.__context__
    return Outcome("raised", _where(error) + describe(error))


def describe(error: BaseException) -> str:
    """The exception in one line. Its own __str__ is not trusted to work."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001
        text = f"({type(second).__name__} while it was printed)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(error: BaseException) -> str:
    """The innermost line of the learner's own code, quoted."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename.startswith("<cell ")]
        return f"`{own[-1].line}`: " if own and own[-1].line else ""
    except BaseException:  # noqa: BLE001  a broken traceback costs only this courtesy
        return ""
