"""`iplr_delta_rule`, the operator: checked, sent its way, differentiable, compilable and exportable."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from ..arguments import check_call, check_cu_seqlens_values
from ..chunkwise.kept import affine_kept_like, padded, padded_to_eight, untied_prepared_like
from ..notation import Output, Path, Sizes, state_like
from ..paths import choose

LAYOUT = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T H V",
    "a": "B T H K",
    "b": "B T H K",
}


def iplr_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
    mode: str = "auto",
    backend: str = "auto",
    segments: int = 1,
) -> Output:
    """Identity plus low rank: carry what a reads over to b, write the new value, read with the query.

        S_t = S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T             o_t = scale * S_t^T q_t

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, H, K]: where v is written. They are used as given.
        v: values [B, T, H, V].
        a: read directions [B, T, H, K].
        b: write directions [B, T, H, K]: where what a has read is written. The state is multiplied by I + b a^T:
            with b = k, a = -beta k and beta v in place of v this is the delta rule. Where it makes a direction longer
            token after token (|1 + a . b| > 1), the state grows without bound, and past the largest number of its
            dtype o and state are inf or nan; by chunks from the first token of that chunk on.
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

    q, k, v, a, b share one dtype: float16, bfloat16, float32 or float64. Any strides. Autocast casts nothing here.

    Returns: Output(o [B, T, H, V] in v's dtype, state [N, H, K, V] in float32, float64 for float64 inputs).
    Differentiable in q, k, v, a, b and initial_state, through o and through state, once.
    Raises: TypeError or ValueError that names the argument, what was wanted and what was got; ImportError when
        backend="triton" and triton is missing; RuntimeError for a gradient of a gradient.
    Source: Yang et al. 2024, "Parallelizing linear transformers with the delta rule over sequence length", on
        generalized rules.
    """
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    sizes, way = _plan(q, k, v, a, b, mode=mode, backend=backend, segments=segments, **options)
    factor = float(sizes.K**-0.5 if scale is None else scale)
    o, state, *_ = torch.ops.gdr_teach.iplr_delta_rule(
        q, k, v, a, b, initial_state, cu_seqlens, factor, *way[:4]
    )
    return Output(o, state)


def path(
    q,
    k,
    v,
    a,
    b,
    *,
    scale=None,
    initial_state=None,
    cu_seqlens=None,
    mode="auto",
    backend="auto",
    segments=1,
) -> Path:
    """The way `iplr_delta_rule` would take with these arguments (see `gdr_teach.explain`)."""
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return _plan(q, k, v, a, b, mode=mode, backend=backend, segments=segments, **options)[1]


def _plan(
    q, k, v, a, b, *, mode: str, backend: str, segments: int, **options
) -> tuple[Sizes, Path]:
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b}
    sizes = check_call("iplr_delta_rule", LAYOUT, tensors, mode=mode, backend=backend, **options)
    return sizes, choose("iplr_delta_rule", sizes, q, mode, backend, segments=segments, untied=True)


# -- the operator, forward ---------------------------------------------------------------------------------------------


@library.custom_op("gdr_teach::iplr_delta_rule", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    backend: str,
    mode: str,
    chunk_size: int,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # the last eight outputs are what a call by chunks keeps for its backward; no caller sees them
    check_cu_seqlens_values("iplr_delta_rule", cu_seqlens, q.shape[1])
    operands = (q, k, v, a, b)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    if backend == "triton" and mode == "chunk":
        from .chunk import call

        o, state, kept = call(
            *operands, chunk_size=chunk_size, segments=segments, **options
        ).forward()
        return o, state, *padded_to_eight(kept, q)
    if backend == "triton":
        from .recurrent import iplr_recurrent

        out = iplr_recurrent(*operands, **options)
        return out.o, out.state, *padded_to_eight((), q)
    from ..dplr.reference import chunkwise
    from .reference import iplr_chunkwise, iplr_recurrence

    kept = ()
    with torch.autocast(q.device.type, enabled=False):
        if mode == "chunk" and cu_seqlens is None:
            out, kept = chunkwise(*operands, scale=scale, initial_state=initial_state, C=chunk_size)
        elif mode == "chunk":
            out = iplr_chunkwise(*operands, chunk_size=chunk_size, **options)
        else:
            out = iplr_recurrence(*operands, **options)
    return out.o.contiguous(), out.state.contiguous(), *padded_to_eight(kept, q)


@_forward.register_fake
def _(
    q,
    k,
    v,
    a,
    b,
    initial_state,
    cu_seqlens,
    scale,
    backend,
    mode,
    chunk_size,
    segments,
):
    shape, dtype = state_like(q, v, cu_seqlens)
    o, state = v.new_empty(v.shape), q.new_empty(shape, dtype=dtype)
    kept = ()
    if mode == "chunk" and backend == "triton":
        kept = untied_prepared_like(q, v, cu_seqlens, chunk_size, segments, decay=False)
    elif mode == "chunk" and cu_seqlens is None:
        kept = affine_kept_like(q, v, chunk_size)
    return o, state, *padded_to_eight(kept, q)


# -- the operator, backward --------------------------------------------------------------------------------------------


@library.custom_op("gdr_teach::iplr_delta_rule_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = (q, k, v, a, b)
    options = {"scale": scale, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    six = (kept1, kept2, kept3, kept4, kept5, kept6)
    if backend == "triton" and mode == "chunk":
        from .chunk import call

        maps = (kept7, kept8) if segments > 1 else ()
        kept = None if kept1 is None else (*padded(six, q), *maps)
        this = call(*operands, chunk_size=chunk_size, segments=segments, **options)
        *grads, _, dstate0 = this.backward(do, dstate, kept)
        return *grads, q.new_empty(0) if dstate0 is None else dstate0
    if dstate is None:
        shape, dtype = state_like(q, v, cu_seqlens)
        dstate = q.new_zeros(shape, dtype=dtype)
    options["dstate"] = dstate
    if backend == "triton":
        from .recurrent import iplr_recurrent_backward

        grads = iplr_recurrent_backward(do, *operands, **options)
    else:
        from ..chunkwise.affine import Kept
        from .transpose import iplr_chunkwise_backward, iplr_recurrence_backward

        kept = None if kept1 is None else Kept(*padded_to_eight((*six, kept7, kept8), q))
        with torch.autocast(q.device.type, enabled=False):
            if mode == "chunk":
                options |= {"chunk_size": chunk_size, "kept": kept}
                grads = iplr_chunkwise_backward(do, *operands, **options)
            else:
                grads = iplr_recurrence_backward(do, *operands, **options)
    dq, dk, dv, da, db, dstate0 = (x.contiguous() for x in grads)
    return dq, dk, dv, da, db, q.new_empty(0) if initial_state is None else dstate0


@_backward.register_fake
def _(do, dstate, q, k, v, a, b, initial_state, *rest):
    grads = [x.new_empty(x.shape) for x in (q, k, v, a, b)]
    S0 = initial_state
    return *grads, q.new_empty(0) if S0 is None else S0.new_empty(S0.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.backend, ctx.mode, ctx.chunk_size, ctx.segments = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # no memory for the gradient of a state that nobody used
    ctx.save_for_backward(*tensors, *(x if x.numel() else None for x in output[2:]))


def _gradients(ctx, do, dstate, *_):
    tensors, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    do = torch.zeros_like(tensors[2]) if do is None else do
    options = (ctx.scale, ctx.backend, ctx.mode, ctx.chunk_size, ctx.segments, *kept)
    *grads, dstate0 = torch.ops.gdr_teach.iplr_delta_rule_backward(do, dstate, *tensors, *options)
    return (*grads, None if tensors[5] is None else dstate0, *(None,) * 6)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError(
        "iplr_delta_rule: wanted a gradient of first order, got a gradient of a gradient (create_graph=True), which "
        "is not implemented; gdr_teach.iplr.reference.iplr_recurrence can be differentiated twice"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_gradient, setup_context=lambda ctx, inputs, output: None)
