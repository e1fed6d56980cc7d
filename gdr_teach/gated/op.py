"""`gated_delta_rule`, the operator: checked, sent its way, differentiable, compilable and exportable."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from ..arguments import (
    check_call,
    check_cu_seqlens_values,
    check_log_decay_values,
    check_min_log_decay,
)
from ..chunkwise.kept import kept_like, padded, prepared_like
from ..notation import Output, Path, Sizes, state_like
from ..paths import choose

LAYOUT = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "beta": "B T H",
    "log_decay": "B T H | B T H K",
}


def gated_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
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
    """The delta rule with decay: forget, erase what the key recalls, write the new value, read with the query.

        S~_t = exp(log_decay_t) * S_{t-1}                   row by row: a decay a head, or one for each key channel
        S_t = S~_t + k_t (beta_t (v_t - S~_t^T k_t))^T      o_t = scale * S_t^T q_t

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, H, K]; unit length makes beta = 1 an exact overwrite. They are used as given.
        v: values [B, T, H, V].
        beta: step sizes [B, T, H]; for unit keys the state cannot grow while 0 <= beta <= 2. In q's dtype or float32.
        log_decay: natural logarithm of the decay, <= 0, in q's dtype or float32: [B, T, H] (gated DeltaNet) or
            [B, T, H, K] (Kimi delta attention). 0 keeps all, -inf starts afresh; any value in between is exact.
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
            those of q * dq. Default: no promise.

    q, k, v share one dtype: float16, bfloat16, float32 or float64. Any strides. Autocast casts nothing here.
    The values of log_decay and its promise are checked on the CPU; on CUDA inside `gdr_teach.value_checks()` only.

    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V] in float32, float64 for float64 inputs).
    Differentiable in q, k, v, beta, log_decay and initial_state, through o and through state, once.
    Raises: TypeError or ValueError that names the argument, what was wanted and what was got; ImportError when
        backend="triton" and triton is missing; RuntimeError for a gradient of a gradient.
    Source: Yang et al. 2024, "Gated Delta Networks"; Kimi Team 2025, "Kimi Linear".
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"mode": mode, "backend": backend, "segments": segments}
    options |= {"min_log_decay": min_log_decay}
    sizes, way = _plan(q, k, v, beta, log_decay, **options)
    factor = float(sizes.K**-0.5 if scale is None else scale)
    bound = None if min_log_decay is None else float(min_log_decay)
    chosen = (bound, *way[:4])
    o, state, *_ = torch.ops.gdr_teach.gated_delta_rule(
        q, k, v, beta, log_decay, initial_state, cu_seqlens, factor, *chosen
    )
    return Output(o, state)


def path(
    q,
    k,
    v,
    beta,
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
    """The way `gated_delta_rule` would take with these arguments (see `gdr_teach.explain`)."""
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    options |= {"mode": mode, "backend": backend, "segments": segments}
    options |= {"min_log_decay": min_log_decay}
    return _plan(q, k, v, beta, log_decay, **options)[1]


def _plan(q, k, v, beta, log_decay, *, mode, backend, segments, min_log_decay, **options):
    op = "gated_delta_rule"
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
    sizes: Sizes = check_call(op, LAYOUT, tensors, mode=mode, backend=backend, **options)
    check_min_log_decay(op, min_log_decay)
    return sizes, choose(op, sizes, q, mode, backend, segments=segments, decay=True)


# -- the operator, forward ---------------------------------------------------------------------------------------------


@library.custom_op("gdr_teach::gated_delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    min_log_decay: float | None,
    backend: str,
    mode: str,
    chunk_size: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # the last six outputs are what a call by chunks keeps for its backward; no caller sees them
    check_cu_seqlens_values("gated_delta_rule", cu_seqlens, q.shape[1])
    check_log_decay_values("gated_delta_rule", log_decay, min_log_decay)
    operands = (q, k, v, beta, log_decay)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if backend == "triton" and mode == "chunk":
        from .chunk import call

        options |= {"chunk_size": chunk_size, "segments": segments}
        options |= {"min_log_decay": min_log_decay}
        o, state, kept = call(*operands, **options).forward()
        return o, state, *padded(kept, q)
    if backend == "triton":
        from .recurrent import gated_recurrent

        out = gated_recurrent(*operands, **options)
        return out.o, out.state, *padded((), q)
    from .reference import chunkwise, gated_chunkwise, gated_recurrence

    kept = ()
    with torch.autocast(q.device.type, enabled=False):
        if mode == "chunk" and cu_seqlens is None:
            out, kept = chunkwise(*operands, scale, initial_state, chunk_size)
        elif mode == "chunk":
            out = gated_chunkwise(*operands, chunk_size=chunk_size, **options)
        else:
            out = gated_recurrence(*operands, **options)
    return out.o.contiguous(), out.state.contiguous(), *padded(kept, q)


@_forward.register_fake
def _(
    q,
    k,
    v,
    beta,
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
        kept = prepared_like(q, v, cu_seqlens, chunk_size, segments, decay=True)
    elif mode == "chunk" and cu_seqlens is None:
        kept = kept_like(q, v, chunk_size)
    return o, state, *padded(kept, q)


# -- the operator, backward --------------------------------------------------------------------------------------------


@library.custom_op("gdr_teach::gated_delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = (q, k, v, beta, log_decay)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if backend == "triton" and mode == "chunk":
        from .chunk import call

        options |= {"chunk_size": chunk_size, "segments": segments}
        options |= {"min_log_decay": min_log_decay}
        six = (kept1, kept2, kept3, kept4, kept5, kept6)
        kept = None if kept1 is None else six if segments > 1 else six[:4]
        *grads, dstate0 = call(*operands, **options).backward(do, dstate, kept)
        return *grads, q.new_empty(0) if dstate0 is None else dstate0
    if dstate is None:
        shape, dtype = state_like(q, v, cu_seqlens)
        dstate = q.new_zeros(shape, dtype=dtype)
    options["dstate"] = dstate
    if backend == "triton":
        from .recurrent import gated_recurrent_backward

        grads = gated_recurrent_backward(do, *operands, **options)
    else:
        from .transpose import gated_chunkwise_backward, gated_recurrence_backward

        kept = None if kept1 is None else (kept1, kept2, kept3, kept4, kept5, kept6)
        with torch.autocast(q.device.type, enabled=False):
            if mode == "chunk":
                options |= {"chunk_size": chunk_size, "kept": kept}
                grads = gated_chunkwise_backward(do, *operands, **options)
            else:
                grads = gated_recurrence_backward(do, *operands, **options)
    dq, dk, dv, dbeta, dlog_decay, dstate0 = (x.contiguous() for x in grads)
    return dq, dk, dv, dbeta, dlog_decay, q.new_empty(0) if initial_state is None else dstate0


@_backward.register_fake
def _(do, dstate, q, k, v, beta, log_decay, initial_state, *rest):
    grads = [x.new_empty(x.shape) for x in (q, k, v, beta, log_decay)]
    S0 = initial_state
    return *grads, q.new_empty(0) if S0 is None else S0.new_empty(S0.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.bound, ctx.backend, ctx.mode, ctx.chunk_size, ctx.segments = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # no memory for the gradient of a state that nobody used
    ctx.save_for_backward(*tensors, *(x if x.numel() else None for x in output[2:]))


def _gradients(ctx, do, dstate, *_):
    tensors, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    do = torch.zeros_like(tensors[2]) if do is None else do
    options = (ctx.scale, ctx.bound, ctx.backend, ctx.mode, ctx.chunk_size, ctx.segments, *kept)
    *grads, dstate0 = torch.ops.gdr_teach.gated_delta_rule_backward(do, dstate, *tensors, *options)
    return (*grads, None if tensors[5] is None else dstate0, *(None,) * 7)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError(
        "gated_delta_rule: wanted a gradient of first order, got a gradient of a gradient (create_graph=True), which "
        "is not implemented; gdr_teach.gated.reference.gated_recurrence can be differentiated twice"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_gradient, setup_context=lambda ctx, inputs, output: None)
