"""Which way a call takes: backend, mode, chunk size. `explain` tells it, the operators follow it."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import TRITON_WIDTH, check_triton
from .notation import Path, Sizes

_FOUND_TRITON = (
    importlib.util.find_spec("triton") is not None
)  # torch.compile cannot trace the search
CHUNK_SIZE = 64  # figures in docs/log.md
CHUNK_WIDTH = 128  # the widest K or V of the compiled chunk kernels
SHORT = 16  # up to this many tokens "auto" takes the recurrence


def explain(op: Callable, *args, **kwargs) -> Path:
    """Path(backend, mode, chunk_size, segments, launches) of `op(*args, **kwargs)`, without computing it.

    Args: op, one of the package's operators, then its own arguments.
    Raises: what the call itself would raise for its arguments, and TypeError when op is not an operator of gdr_teach.
    """
    home = getattr(op, "__module__", None) or ""
    module: Any = sys.modules.get(home)
    if not home.startswith("gdr_teach.") or not hasattr(module, "path"):
        raise TypeError(f"explain: op must be an operator such as gdr_teach.delta_rule, got {op!r}")
    return module.path(*args, **kwargs)


def choose(
    op: str, sizes: Sizes, q: Tensor, mode: str, backend: str, *, chunk_kernel: bool = False
) -> Path:
    """The way for one call whose arguments are already checked; chunk_kernel: the rule has one in Triton.

    "auto" takes triton for CUDA tensors where it is installed and the sizes fit its kernels, else torch.
    Raises: ValueError or TypeError when triton was asked for and cannot do it, ImportError when it is missing.
    """
    if backend == "auto":
        fits = (
            max(sizes.K, sizes.V) <= TRITON_WIDTH and q.dtype != torch.float64 and mode != "chunk"
        )
        backend = "triton" if q.device.type == "cuda" and fits and has_triton() else "torch"
    if backend == "triton":
        check_triton(op, sizes, q)
        if mode == "chunk" and not chunk_kernel:
            raise ValueError(
                f"{op}: mode 'chunk' wants backend 'torch' in this version, got backend 'triton', "
                "whose kernel is mode 'recurrent'"
            )
        if mode == "chunk":
            _check_chunk_kernel(op, sizes, q)
        if not has_triton():
            raise ImportError(
                f"{op}: backend 'triton' wants the package triton, which is not installed. On Linux: "
                "pip install 'triton>=3.6'. Elsewhere use backend='torch'."
            )
        if mode == "chunk":
            return Path("triton", "chunk", CHUNK_SIZE, 1, 2)
        return Path("triton", "recurrent", 0, 1, 1)
    if mode == "recurrent" or (mode == "auto" and sizes.T <= SHORT):
        return Path("torch", "recurrent", 0, 1, 0)
    return Path("torch", "chunk", CHUNK_SIZE, 1, 0)


def _check_chunk_kernel(op: str, sizes: Sizes, q: Tensor) -> None:
    # compiled, the chunk kernels are for half precision and widths whose tiles fit; interpreted, for everything
    if q.device.type == "cpu":
        return
    if q.dtype == torch.float32:
        raise TypeError(
            f"{op}: mode 'chunk' with backend 'triton' wants float16 or bfloat16 on cuda, got float32; "
            "use mode='recurrent' or backend='torch'"
        )
    for axis, size in (("K", sizes.K), ("V", sizes.V)):
        if size > CHUNK_WIDTH:
            raise ValueError(
                f"{op}: mode 'chunk' with backend 'triton' wants {axis} <= {CHUNK_WIDTH} on cuda, "
                f"got {axis} = {size}; use mode='recurrent' or backend='torch'"
            )


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return _FOUND_TRITON
