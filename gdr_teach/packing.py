"""Packed sequences: several documents side by side on one time axis, told apart by `cu_seqlens`.

    cu_seqlens = [0, e_1, e_2, ..., T]        document n holds the tokens e_n <= t < e_{n+1}

The definition is a loop: each document is a sequence of its own, with its own start state.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .notation import Output


def documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """The (start, end) of every document, as Python integers."""
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def per_document(
    rule: Callable[..., Output],
    cu_seqlens: Tensor,
    initial_state: Tensor | None,
    tensors: Sequence[Tensor],
    **options,
) -> Output:
    """Run `rule` on every document alone and put the results side by side again."""
    outputs, states = [], []
    for n, (start, end) in enumerate(documents(cu_seqlens)):
        S0 = None if initial_state is None else initial_state[n : n + 1]
        out = rule(*(x[:, start:end] for x in tensors), initial_state=S0, **options)
        outputs.append(out.o)
        states.append(out.state)
    if not states:  # no document at all: let the rule say what empty looks like
        out = rule(*(x[:, :0] for x in tensors), initial_state=None, **options)
        return Output(out.o, out.state[:0])
    return Output(torch.cat(outputs, dim=1), torch.cat(states, dim=0))
