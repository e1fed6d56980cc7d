"""One token of the IPLR rule, for decoding; what `delta.step` is to the delta rule."""

import torch
from jaxtyping import Float
from torch import Tensor, library

from ..arguments import check_step
from ..notation import Output
from ..paths import choose
from .op import iplr_delta_rule

LAYOUT = {"q": "B H K", "k": "B H K", "v": "B H V", "a": "B H K", "b": "B H K"}


def iplr_delta_rule_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    a: Float[Tensor, "B H K"],
    b: Float[Tensor, "B H K"],
    state: Float[Tensor, "B H K V"],
    *,
    scale: float | None = None,
    inplace: bool = False,
) -> Output:
    """One token: S <- S + b (S^T a)^T + k v^T, o = scale * S^T q. T steps are one call of `gdr_teach.iplr_delta_rule`.

    Args:
        q: query [B, H, K].
        k: key [B, H, K].
        v: value [B, H, V].
        a: read direction [B, H, K].
        b: write direction [B, H, K].
        state: the state before this token [B, H, K, V]: float32, float64 for float64 inputs.
        scale: factor on the output, a Python number without gradient; default K ** -0.5.
        inplace: False leaves `state` as it is. True overwrites it: no gradient can then be asked for.

    Returns: Output(o [B, H, V] in v's dtype, state [B, H, K, V]); with inplace=True that is `state` itself.
    Raises: TypeError or ValueError that names the argument, what was wanted and what was got.
    """
    name = "iplr_delta_rule_step"
    tokens = {"q": q, "k": k, "v": v, "a": a, "b": b}
    sizes = check_step(name, LAYOUT, tokens, state=state, scale=scale, inplace=inplace)
    if inplace:
        factor = float(sizes.K**-0.5 if scale is None else scale)
        backend = choose(name, sizes, q, "recurrent", "auto").backend
        o = torch.ops.gdr_teach.iplr_delta_rule_step(*tokens.values(), state, factor, backend)
        return Output(o, state)
    sequence = (x[:, None] for x in tokens.values())
    out = iplr_delta_rule(*sequence, scale=scale, initial_state=state, mode="recurrent")
    return Output(out.o[:, 0], out.state)


@library.custom_op("gdr_teach::iplr_delta_rule_step", mutates_args=("state",))
def _in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    sequence = [x[:, None] for x in (q, k, v, a, b)]
    if backend == "triton":
        from .recurrent import iplr_recurrent

        S = state.contiguous()
        o = iplr_recurrent(*sequence, scale=scale, initial_state=S, out_state=S).o
    else:
        from .reference import iplr_recurrence

        with torch.autocast(q.device.type, enabled=False):
            o, S = iplr_recurrence(*sequence, scale=scale, initial_state=state)
    if S.data_ptr() != state.data_ptr():
        state.copy_(S)
    return o[:, 0].contiguous()


@_in_place.register_fake
def _(q, k, v, a, b, state, scale, backend):
    return v.new_empty(v.shape)
