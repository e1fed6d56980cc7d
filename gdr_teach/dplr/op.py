"""`dplr_delta_rule`, the operator: checked, sent its way, differentiable, compilable and exportable."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from ..arguments import (
    check_call,
    check_cu_seqlens_values,
    check_log_decay_values,
    check_min_log_decay,
)
from ..chunkwise.kept import affine_kept_like, padded, padded_to_eight, untied_prepared_like
from ..notation import Output, Path, Sizes, state_like
from ..paths import choose

LAYOUT = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "a": "B T H K",
    "b": "B T H K",
    "log_decay": "B T H | B T H K",
}


def dplr_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    mode: str = "auto",
    backend: str = "auto",
    segments: int = 1,
    min_log_decay: float | None = None,
) -> Output:
    """Diagonal plus low rank: forget, carry what a reads over to b, write the new value, read with the query.

        u_t = S_{t-1}^T a_t                                           what the state holds before it fades
        S_t = exp(log_decay_t) * S_{t-1} + b_t u_t^T + k_t v_t^T      o_t = scale * S_t^T q_t

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, H, K]: where v is written. They are used as given.
        v: values [B, T, H, V].
        a: read directions [B, T, H, K]: a reads the state before its token's decay.
        b: write directions [B, T, H, K]: where what a has read is written. The state is multiplied by the matrix
            diag(exp(log_decay)) + b a^T; where it makes a direction longer token after token, the state grows without
            bound, and past the largest number of its dtype o and state are inf or nan; by chunks from the first token
            of that chunk on.
        log_decay: natural logarithm of the decay, <= 0, in q's dtype or float32: [B, T, H] (one a head) or
            [B, T, H, K] (one for each key channel, as in RWKV-7). 0 keeps all, -inf keeps nothing but what b and k
            write; any value in between is exact.
        scale: factor on the output, a Python number without gradient; default K ** -0.5.
        initial_state: the state before the first token [N, H, K, V], in the state's dtype; default zeros.
        cu_seqlens: int32 or int64 [N + 1], from 0 to T without falling, on the CPU or q's device: document n
            has the tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1 and a state of its own; B = 1. Default: B sequences.
        mode: "recurrent", "chunk" or "auto" (recurrent for T <= 16, and with triton in float32, where the token
            kernels lose no digit; else chunk).
        backend: "torch", "triton" (CPU tensors: interpreted; CUDA tensors: compiled) or "auto" (triton on CUDA where it
            is installed, else torch).
        segments: into how many pieces a sequence may be cut, to be walked side by side: for few heads and long
            sequences on a GPU; it means something for chunks in triton only. A sequence is cut by its own length, in
            pieces of at least four chunks, so packing changes no bit. More than 1 may change rounding. Default 1.
        min_log_decay: a Python number <= 0 that log_decay is promised never to fall below; it may make the call faster
            and changes no more than rounding: the gradient of log_decay, else right to its own digits, is then right to
            those of q * dq and a * da. Default: no promise.

    q, k, v, a, b share one dtype: float16, bfloat16, float32 or float64. Any strides. Autocast casts nothing here.
    The values of log_decay and its promise are checked on the CPU; on CUDA inside `gdr_teach.value_checks()` only.

    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V] in float32, float64 for float64 inputs).
    Differentiable in q, k, v, a, b, log_decay and initial_state, through o and through state, once.
    Raises: TypeError or ValueError that names the argument, what was wanted and what was got; ImportError when
        backend="triton" and triton is missing; RuntimeError for a gradient of a gradient.
    Source: Peng et al. 2025, "RWKV-7", section 4; Yang et al. 2024, "Parallelizing linear transformers with the delta
        rule over sequence length", on generalized rules.
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"mode": mode, "backend": backend, "segments": segments}
    options |= {"min_log_decay": min_log_decay}
    sizes, way = _plan(q, k, v, a, b, log_decay, **options)
    factor = float(sizes.K**-0.5 if scale is None else scale)
    bound = None if min_log_decay is None else float(min_log_decay)
    chosen = (bound, *way[:4])
    o, state, *_ = torch.ops.gdr_teach.dplr_delta_rule(
        q, k, v, a, b, log_decay, initial_state, cu_seqlens, factor, *chosen
    )
    return Output(o, state)


def path(
    q,
    k,
    v,
    a,
    b,
    log_decay,
    *,
    scale=None,
    initial_state=None,
    cu_seqlens=None,
    mode="auto",
    backend="auto",
    segments=1,
    min_log_decay=None,
) -> Path:
    """The way `dplr_delta_rule` would take with these arguments (see `gdr_teach.explain`)."""
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"mode": mode, "backend": backend, "segments": segments}
    options |= {"min_log_decay": min_log_decay}
    return _plan(q, k, v, a, b, log_decay, **options)[1]


def _plan(q, k, v, a, b, log_decay, *, mode, backend, segments, min_log_decay, **options):
    op = "dplr_delta_rule"
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay}
    sizes: Sizes = check_call(op, LAYOUT, tensors, mode=mode, backend=backend, **options)
    check_min_log_decay(op, min_log_decay)
    return sizes, choose(op, sizes, q, mode, backend, segments=segments, decay=True, untied=True)


# -- the operator, forward ---------------------------------------------------------------------------------------------


@library.custom_op("gdr_teach::dplr_delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    min_log_decay: float | None,
    backend: str,
    mode: str,
    chunk_size: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # the last eight outputs are what a call by chunks keeps for its backward; no caller sees them
    check_cu_seqlens_values("dplr_delta_rule", cu_seqlens, q.shape[1])
    check_log_decay_values("dplr_delta_rule", log_decay, min_log_decay)
    operands = (q, k, v, a, b, log_decay)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if backend == "triton" and mode == "chunk":
        from .chunk import call

        options |= {"chunk_size": chunk_size, "segments": segments}
        options |= {"min_log_decay": min_log_decay}
        o, state, kept = call(*operands, **options).forward()
        return o, state, *padded_to_eight(kept, q)
    if backend == "triton":
        from .recurrent import dplr_recurrent

        out = dplr_recurrent(*operands, **options)
        return out.o, out.state, *padded_to_eight((), q)
    from .reference import chunkwise, dplr_chunkwise, dplr_recurrence

    kept = ()
    with torch.autocast(q.device.type, enabled=False):
        if mode == "chunk" and cu_seqlens is None:
            out, kept = chunkwise(*operands, scale=scale, initial_state=initial_state, C=chunk_size)
        elif mode == "chunk":
            out = dplr_chunkwise(*operands, chunk_size=chunk_size, **options)
        else:
            out = dplr_recurrence(*operands, **options)
    return out.o.contiguous(), out.state.contiguous(), *padded_to_eight(kept, q)


@_forward.register_fake
def _(
    q,
    k,
    v,
    a,
    b,
    log_decay,
    initial_state,
    cu_seqlens,
    scale,
    min_log_decay,
    backend,
    mode,
    chunk_size,
    segments,
):
    shape, dtype = state_like(q, v, cu_seqlens)
    o, state = v.new_empty(v.shape), q.new_empty(shape, dtype=dtype)
    kept = ()
    if mode == "chunk" and backend == "triton":
        kept = untied_prepared_like(q, v, cu_seqlens, chunk_size, segments, decay=True)
    elif mode == "chunk" and cu_seqlens is None:
        kept = affine_kept_like(q, v, chunk_size)
    return o, state, *padded_to_eight(kept, q)


# -- the operator, backward --------------------------------------------------------------------------------------------


@library.custom_op("gdr_teach::dplr_delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    min_log_decay: float | None,
    backend: str,
    mode: str,
    chunk_size: int,
    segments: int,
    kept1: Tensor | None,
    kept2: Tensor | None,
    kept3: Tensor | None,
    kept4: Tensor | None,
    kept5: Tensor | None,
    kept6: Tensor | None,
    kept7: Tensor | None,
    kept8: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = (q, k, v, a, b, log_decay)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    six = (kept1, kept2, kept3, kept4, kept5, kept6)
    if backend == "triton" and mode == "chunk":
        from .chunk import call

        options |= {"chunk_size": chunk_size, "segments": segments}
        options |= {"min_log_decay": min_log_decay}
        maps = (kept7, kept8) if segments > 1 else ()
        kept = None if kept1 is None else (*padded(six, q), *maps)
        *grads, dstate0 = call(*operands, **options).backward(do, dstate, kept)
        return *grads, q.new_empty(0) if dstate0 is None else dstate0
    if dstate is None:
        shape, dtype = state_like(q, v, cu_seqlens)
        dstate = q.new_zeros(shape, dtype=dtype)
    options["dstate"] = dstate
    if backend == "triton":
        from .recurrent import dplr_recurrent_backward

        grads = dplr_recurrent_backward(do, *operands, **options)
    else:
        from ..chunkwise.affine import Kept
        from .transpose import dplr_chunkwise_backward, dplr_recurrence_backward

        kept = None if kept1 is None else Kept(*padded_to_eight((*six, kept7, kept8), q))
        with torch.autocast(q.device.type, enabled=False):
            if mode == "chunk":
                options |= {"chunk_size": chunk_size, "kept": kept}
                grads = dplr_chunkwise_backward(do, *operands, **options)
            else:
                grads = dplr_recurrence_backward(do, *operands, **options)
    dq, dk, dv, da, db, dlog_decay, dstate0 = (x.contiguous() for x in grads)
    return dq, dk, dv, da, db, dlog_decay, q.new_empty(0) if initial_state is None else dstate0


@_backward.register_fake
def _(do, dstate, q, k, v, a, b, log_decay, initial_state, *rest):
    grads = [x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay)]
    S0 = initial_state
    return *grads, q.new_empty(0) if S0 is None else S0.new_empty(S0.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.bound, ctx.backend, ctx.mode, ctx.chunk_size, ctx.segments = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # no memory for the gradient of a state that nobody used
    ctx.save_for_backward(*tensors, *(x if x.numel() else None for x in output[2:]))


def _gradients(ctx, do, dstate, *_):
    tensors, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
    do = torch.zeros_like(tensors[2]) if do is None else do
    options = (ctx.scale, ctx.bound, ctx.backend, ctx.mode, ctx.chunk_size, ctx.segments, *kept)
    *grads, dstate0 = torch.ops.gdr_teach.dplr_delta_rule_backward(do, dstate, *tensors, *options)
    return (*grads, None if tensors[6] is None else dstate0, *(None,) * 7)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError(
        "dplr_delta_rule: wanted a gradient of first order, got a gradient of a gradient (create_graph=True), which "
        "is not implemented; gdr_teach.dplr.reference.dplr_recurrence can be differentiated twice"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_gradient, setup_context=lambda ctx, inputs, output: None)
