"""One token of the delta rule, for decoding: the next state comes out, or overwrites the one given."""

import torch
from jaxtyping import Float
from torch import Tensor, library

from ..arguments import check_step
from ..notation import Output
from ..paths import choose
from .op import delta_rule

LAYOUT = {"q": "B H K", "k": "B H K", "v": "B H V", "beta": "B H"}


def delta_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    beta: Float[Tensor, "B H"],
    state: Float[Tensor, "B H K V"],
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> Output:
    """One token: S <- S + k (beta (v - S^T k))^T, o = scale * S^T q. T steps are one call of `gdr_teach.delta_rule`.

    Args:
        q: query [B, H, K].
        k: key [B, H, K].
        v: value [B, H, V].
        beta: step size [B, H], in q's dtype or float32.
        state: the state before this token [B, H, K, V]: float32, float64 for float64 inputs.
        scale: factor on the output, a Python number without gradient; default K ** -0.5.
        inplace: False leaves `state` as it is. True overwrites it: no gradient can then be asked for.

    Returns: Output(o [B, H, V] in v's dtype, state [B, H, K, V]); with inplace=True that is `state` itself.
    Raises: TypeError or ValueError that names the argument, what was wanted and what was got.
    """
    name, tokens = "delta_rule_step", {"q": q, "k": k, "v": v, "beta": beta}
    sizes = check_step(name, LAYOUT, tokens, state=state, scale=scale, inplace=inplace)
    if inplace:
        factor = float(sizes.K**-0.5 if scale is None else scale)
        backend = choose(name, sizes, q, "recurrent", "auto").backend
        return Output(
            torch.ops.gdr_teach.delta_rule_step(q, k, v, beta, state, factor, backend), state
        )
    sequence = (x[:, None] for x in tokens.values())
    out = delta_rule(*sequence, scale=scale, initial_state=state, mode="recurrent")
    return Output(out.o[:, 0], out.state)


@library.custom_op("gdr_teach::delta_rule_step", mutates_args=("state",))
def _in_place(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float, backend: str
) -> Tensor:
    if backend == "triton":
        from .recurrent import accumulator, delta_forward_kernel, tile

        (B, H, K), V = q.shape, v.shape[-1]
        S, o = state.contiguous(), torch.empty(v.shape, dtype=v.dtype, device=v.device)
        BK, BV, NV = tile(K, V)
        if o.numel():
            sizes = (scale, 1, H, K, V, BK, BV, NV, accumulator(S.dtype))
            operands = [x.contiguous() for x in (q, k, v, beta)]
            delta_forward_kernel[(NV * B * H,)](*operands, S, None, o, None, S, *sizes)
    else:
        from .reference import delta_recurrence

        with torch.autocast(q.device.type, enabled=False):
            sequence = (x[:, None] for x in (q, k, v, beta))
            out = delta_recurrence(*sequence, scale=scale, initial_state=state)
        S, o = out.state, out.o[:, 0].contiguous()
    if S.data_ptr() != state.data_ptr():
        state.copy_(S)
    return o


@_in_place.register_fake
def _(q, k, v, beta, state, scale, backend):
    return v.new_empty(v.shape)
