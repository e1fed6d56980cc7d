"""How big the tiles of the chunk kernels are: by what is compiled for, the dtype and the widths.

Found by compiling every choice (`make compile-check` prints what each asks for) and, for sm_90, timing some on a GPU
(docs/log.md). A tile that spills or does not fit is replaced by a smaller one, and `gdr_teach.explain` tells its chunk.
Needs torch alone, so that `explain` works without triton.
"""

from typing import NamedTuple

import torch

LONG_CHUNK = 64  # figures in docs/log.md
NO_DECAY = 0  # in place of a base block


class Stage(NamedTuple):
    """Tile widths and warps of one kernel: BK of the K channels, BV of the V columns."""

    BK: int
    BV: int
    warps: int
    stages: int = 1


class Tiles(NamedTuple):
    """One call's choice: the chunk size and the four kernels."""

    C: int
    prepare: Stage
    scan: Stage
    reverse: Stage
    grads: Stage


def target_of(device: torch.device) -> str:
    """The name of `aot.TARGETS` whose tiles a device takes; "cpu" where kernels are interpreted."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return "gfx942"
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return "sm_90" if shared >= 232_448 else "sm_80"


def tiles(target: str, dtype: torch.dtype, K: int, V: int, *, decay: bool) -> Tiles:
    """The tiles of one call; K and V up to 256."""
    BK, BV = width(K, target), width(V, target)
    walk = Stage(BK, min(BV, 64), 4, 2)
    C = 16 if dtype == torch.float32 else 64
    return Tiles(C, Stage(min(BK, 64), 0, 4), walk, walk, Stage(min(BK, 64), min(BV, 64), 8 if decay else 4))


def inverse_dtype(dtype: torch.dtype, target: str) -> torch.dtype:
    """The dtype of X: twice the digits of what it is multiplied with. AMD's compiler has no float64 product."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half or target == "gfx942" else torch.float64


def width(n: int, target: str) -> int:
    """The power of two that holds n; compiled products want at least 16."""
    return max(1 << (n - 1).bit_length(), 1 if target == "cpu" else 16)


def base_block(dtype: torch.dtype, C: int, bound: float | None) -> tuple[int, float]:
    """BASE and FLOOR of `chunkwise.decay`: blocks of BASE tokens whose first token is the reference, gates >= FLOOR.

    A column's factor there is at most exp(reach). bfloat16 has room for exp(60); without a promise (bound) its blocks
    have 4 tokens and gates below -20 count as -20, which is 2e-9 in place of less. float16 has room for exp(4) before
    digits go, and float32 and float64 want every digit: without a promise that helps, BASE = 1.
    """
    reach = {torch.bfloat16: 60.0, torch.float16: 4.0}.get(dtype, 0.0)
    BASE = 4 if dtype == torch.bfloat16 else 1
    if bound is not None and reach:
        while 2 * BASE <= C and (2 * BASE - 1) * -bound <= reach:
            BASE *= 2
    BASE = min(BASE, C)
    return BASE, -reach / max(BASE - 1, 1)
