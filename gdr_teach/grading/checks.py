"""What a check is, and how the verdict on one call is taken: by value, against a float64 reference, in this process."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from .language import say
from .manifest import Task

Value = np.ndarray | float | int  # arrays are float32, so that an answer needs no dtype= anywhere
Arrays = tuple[np.ndarray | None, ...]  # None: this output is not looked at by this check

# The mistakes the checks look for move a result by a tenth of its size or more; float32 moves it by 1e-6.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Result:
    """What a call left behind: its outputs and, read after it, its array arguments; or why there is nothing."""

    outputs: tuple[np.ndarray, ...] = ()
    arguments: tuple[np.ndarray, ...] = ()
    failure: str = ""  # a finished sentence


@dataclass(frozen=True)
class Verdict:
    """One line of the report. The reason says what was shown, or what is likely wrong."""

    id: str
    passed: bool
    reason: str


@dataclass(frozen=True)
class Check:
    """Inputs drawn from a seed, what the answer should be, and what well-known mistakes would give instead.

    `want` and `suspects` get the inputs in float64. A suspect that matches a wrong output names the reason.
    """

    id: str
    draw: Callable[[np.random.Generator], tuple[Value, ...]]
    want: Callable[..., Arrays]
    suspects: Mapping[str, Callable[..., Arrays]] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def judge(self, task: Task, drawn: tuple[Value, ...], result: Result) -> Verdict:
        """The verdict on one call."""
        exact = tuple(x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in drawn)
        want = self.want(*exact)
        fault = result.failure or _form(task, want, result.outputs)
        if not fault and not _agree(want, result.outputs):
            fault = self._suspect(exact, result.outputs) or say(f"checks.{task.id}.{self.id}.wrong")
        return Verdict(self.id, not fault, fault or say(f"checks.{task.id}.{self.id}.right"))

    def _suspect(self, exact: tuple[Value, ...], outputs: tuple[np.ndarray, ...]) -> str:
        for name, wrong in self.suspects.items():
            if _agree(wrong(*exact), outputs):
                return say(f"mistakes.{name}")
        return ""


@dataclass(frozen=True)
class Untouched(Check):
    """The arguments have the same bits after the call as before."""

    def judge(self, task: Task, drawn: tuple[Value, ...], result: Result) -> Verdict:
        """The verdict on one call, whatever it returned."""
        before = [x for x in drawn if isinstance(x, np.ndarray)]
        fault = result.failure
        if not fault and not _same_bits(before, result.arguments):
            fault = say("reason.touched")
        return Verdict(self.id, not fault, fault or say("reason.untouched"))


def generator(seed: int, task: Task, check: Check) -> np.random.Generator:
    """The random numbers of one check: they depend on the seed and on its name alone."""
    return np.random.default_rng([seed, zlib.crc32(f"{task.id}/{check.id}".encode())])


def _form(task: Task, want: Arrays, outputs: tuple[np.ndarray, ...]) -> str:
    """What is wrong with number, shape, dtype or finiteness of the outputs; empty when nothing is."""
    if len(outputs) != len(want):
        return say("reason.count", got=len(outputs), want=len(want))
    for right, got in zip(want, outputs, strict=True):
        if right is None:
            continue
        if got.shape != right.shape:
            turned = right.ndim == 2 and got.shape == right.shape[::-1]
            key = "reason.transposed" if turned else "reason.shape"
            return say(key, got=list(got.shape), want=list(right.shape))
        if got.dtype != np.float32:
            return say("reason.dtype", got=got.dtype)
        if not np.isfinite(got).all():
            key = "reason.finite_kernel" if task.kind == "kernel" else "reason.finite"
            return say(key, bad=int((~np.isfinite(got)).sum()), all=got.size)
    return ""


def _agree(want: Arrays, outputs: tuple[np.ndarray, ...]) -> bool:
    for right, got in zip(want, outputs, strict=True):
        if right is not None and (
            np.abs(got.astype(np.float64) - right).max() > TOLERANCE * max(1.0, np.abs(right).max())
        ):
            return False
    return True


def _same_bits(before: list[np.ndarray], after: tuple[np.ndarray, ...]) -> bool:
    return len(before) == len(after) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(before, after, strict=True)
    )
