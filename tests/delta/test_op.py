"""`delta_rule` by every way it can take: values, gradients, packing, strides, semantics, compilers."""

import itertools

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from gdr_teach import delta_rule, explain
from gdr_teach.delta.reference import delta_chunkwise, delta_recurrence
from gdr_teach.testing import assert_rows_close, delta_inputs, delta_oracle, gradients

WAYS = [
    ("torch", "recurrent"),
    ("torch", "chunk"),
    ("triton", "recurrent"),
    ("triton", "chunk"),
]
NAMES = ("dq", "dk", "dv", "dbeta", "dstate0")
every_way = pytest.mark.parametrize(("backend", "mode"), WAYS, ids=["-".join(w) for w in WAYS])


def rows(x: torch.Tensor) -> torch.Tensor:
    """[B, T, H] as [B, T, H, 1], so that the last axis is a row."""
    return x[..., None] if x.dim() == 3 else x


def packed(lengths: list[int], H: int = 2, K: int = 4, V: int = 3, **options):
    """Inputs of documents side by side, and their cu_seqlens."""
    x = delta_inputs(1, sum(lengths), H, K, V, N=len(lengths), **options)
    return x, torch.tensor([0, *itertools.accumulate(lengths)])


# -- N1: values and gradients in float64 -------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 5, 3, 7, 4),
    (1, 17, 2, 3, 9),
    (1, 70, 1, 5, 6),  # more than one chunk of 64
    (1, 6, 1, 100, 90),  # the triton kernel cuts V into tiles, the last one partly filled
]


@every_way
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, mode, shape):
    x = delta_inputs(*shape)
    way = {"backend": backend, "mode": mode}
    got = delta_rule(*x[:4], initial_state=x.initial_state, **way)
    want = delta_oracle(*x[:4], initial_state=x.initial_state)
    assert_rows_close(got.o, want.o, rtol=1e-11, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-11, name="state")
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    found = gradients(delta_rule, x, do, dstate, **way)
    for name, g, w in zip(NAMES, found, gradients(delta_oracle, x, do, dstate), strict=True):
        assert_rows_close(rows(g), rows(w), rtol=1e-11, name=name)


@every_way
@pytest.mark.parametrize("keys", ["unit", "identical", "cos0.9", "zero"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_gradients_on_hard_data(backend, mode, keys, beta):
    x = delta_inputs(1, 20, 1, 6, 5, keys=keys, beta=beta)
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    found = gradients(delta_rule, x, do, dstate, backend=backend, mode=mode)
    for name, g, w in zip(NAMES, found, gradients(delta_oracle, x, do, dstate), strict=True):
        assert_rows_close(rows(g), rows(w), rtol=1e-11, name=name)


@every_way
@pytest.mark.parametrize("through", ["o", "state"])
def test_gradients_through_one_output_only(backend, mode, through):
    x = delta_inputs(1, 9, 2, 4, 3)
    do = torch.randn_like(x.v) * (through == "o")
    dstate = torch.randn_like(x.initial_state) * (through == "state")
    leaves = [y.clone().requires_grad_() for y in x]
    out = delta_rule(*leaves[:4], initial_state=leaves[4], backend=backend, mode=mode)
    getattr(out, through).backward(do if through == "o" else dstate)
    for name, leaf, w in zip(NAMES, leaves, gradients(delta_oracle, x, do, dstate), strict=True):
        got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_rows_close(rows(got), rows(w), rtol=1e-11, name=name)


@every_way
def test_gradcheck(backend, mode):
    x = delta_inputs(1, 4, 2, 3, 2)
    leaves = [y.clone().requires_grad_() for y in x]

    def call(q, k, v, beta, S0):
        return tuple(delta_rule(q, k, v, beta, initial_state=S0, backend=backend, mode=mode))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, atol=1e-7, nondet_tol=0.0)


@every_way
def test_without_initial_state_and_with_a_scale(backend, mode):
    x = delta_inputs(2, 9, 1, 4, 3)
    got = delta_rule(*x[:4], scale=-0.3, backend=backend, mode=mode)
    assert_rows_close(got.o, delta_oracle(*x[:4], scale=-0.3).o, rtol=1e-12, name="o")
    leaves = [y.clone().requires_grad_() for y in x[:4]]
    delta_rule(*leaves, scale=-0.3, backend=backend, mode=mode).o.sum().backward()
    zero = x._replace(initial_state=torch.zeros_like(x.initial_state))
    want = gradients(delta_oracle, zero, torch.ones_like(x.v), torch.zeros_like(x[4]), scale=-0.3)
    for name, leaf, w in zip(NAMES, leaves, want, strict=False):
        assert_rows_close(rows(leaf.grad), rows(w), rtol=1e-11, name=name)


@every_way
def test_the_shapes_written_in_the_signature_hold(backend, mode):
    # not by the import hook: the operator must stay plain for torch.compile
    checked = jaxtyped(typechecker=beartype)(delta_rule)
    x, cu = packed([3, 0, 4])
    out = checked(*x[:4], initial_state=x.initial_state, cu_seqlens=cu, backend=backend, mode=mode)
    assert out.state.shape == (3, 2, 4, 3)
    with pytest.raises(TypeCheckError):
        checked(x.q, x.k, x.v, x.beta[..., None])


# -- N2: rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
def test_kernel_rounds_no_more_than_pytorch(dtype, keys):
    x = delta_inputs(1, 40, 2, 16, 8, dtype=dtype, keys=keys)
    want = delta_oracle(*x[:4], initial_state=x.initial_state)
    plain = delta_recurrence(*x[:4], initial_state=x.initial_state)
    got = delta_rule(*x[:4], initial_state=x.initial_state, backend="triton", mode="recurrent")
    assert got.o.dtype == dtype
    assert got.state.dtype == torch.float32
    assert_rows_close(got.o, want.o, rtol=1e-7, rounded=plain.o, name="o")
    assert_rows_close(got.state, want.state, rtol=1e-7, rounded=plain.state, name="state")
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    want = gradients(delta_oracle, x, do, dstate)
    plain = gradients(delta_rule, x, do, dstate, backend="torch", mode="recurrent")
    found = gradients(delta_rule, x, do, dstate, backend="triton", mode="recurrent")
    for name, g, p, w in zip(NAMES, found, plain, want, strict=True):
        assert_rows_close(rows(g), rows(w), rtol=1e-7, rounded=rows(p), name=name)


NORMWISE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", NORMWISE, ids=str)
@pytest.mark.parametrize("keys", ["unit", "cos0.9", "identical"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_chunks_stay_near_the_token_loop(dtype, keys, beta):
    x = delta_inputs(1, 300, 2, 32, 16, dtype=dtype, keys=keys, beta=beta)
    exact = type(x)(*(y.double() for y in x))
    do, dstate = torch.randn_like(exact.v), torch.randn_like(exact.initial_state)
    want = delta_recurrence(*exact[:4], initial_state=exact.initial_state)
    got = delta_rule(*x[:4], initial_state=x.initial_state, backend="torch", mode="chunk")
    options = {"rtol": NORMWISE[dtype], "norm": "tensor"}
    assert_rows_close(got.o, want.o, name="o", **options)
    assert_rows_close(got.state, want.state, name="state", **options)
    wants = gradients(delta_rule, exact, do, dstate, backend="torch", mode="recurrent")
    found = gradients(delta_rule, x, do, dstate, backend="torch", mode="chunk")
    for name, g, w in zip(NAMES, found, wants, strict=True):
        assert_rows_close(rows(g), rows(w), name=name, **options)


# -- packing, strides, memory ------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    "lengths",
    [[0, 5, 1, 0, 7], [64, 1, 63], [128, 0, 65, 64], [1], [0], [0, 0, 3]],
    ids=str,
)
def test_packed_documents_equal_a_loop_over_them(backend, mode, lengths):
    if backend == "triton" and sum(lengths) > 100:
        lengths = [
            n // 8 for n in lengths
        ]  # the interpreter is slow; a token loop has no chunk to miss
    x, cu = packed(lengths)
    way = {"backend": backend, "mode": mode}
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    got = delta_rule(*x[:4], initial_state=x.initial_state, cu_seqlens=cu, **way)
    found = gradients(delta_rule, x, do, dstate, cu_seqlens=cu, **way)
    for n, (start, end) in enumerate(itertools.pairwise(cu.tolist())):
        own = type(x)(*(y[:, start:end] for y in x[:4]), x.initial_state[n : n + 1])
        want = delta_oracle(*own[:4], initial_state=own.initial_state)
        assert_rows_close(got.o[:, start:end], want.o, rtol=1e-11, name=f"o of document {n}")
        assert_rows_close(got.state[n : n + 1], want.state, rtol=1e-11, name=f"state {n}")
        wants = gradients(delta_oracle, own, do[:, start:end], dstate[n : n + 1])
        for name, g, w in zip(NAMES, found, wants, strict=True):
            part = g[n : n + 1] if name == "dstate0" else g[:, start:end]
            assert_rows_close(rows(part), rows(w), rtol=1e-11, name=f"{name} of document {n}")


@every_way
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packing_changes_no_bit(backend, mode, dtype):
    x, cu = packed([5, 0, 9])
    way = {"backend": backend, "mode": mode}
    both = delta_rule(*x[:4], initial_state=x.initial_state, cu_seqlens=cu.to(dtype), **way)
    alone = delta_rule(*(y[:, 5:] for y in x[:4]), initial_state=x.initial_state[2:], **way)
    assert torch.equal(both.o[:, 5:], alone.o)
    assert torch.equal(both.state[2:], alone.state)


@every_way
def test_no_documents_at_all(backend, mode):
    x, _ = packed([])
    leaves = [y.clone().requires_grad_() for y in x]
    cu = torch.tensor([0])
    out = delta_rule(
        *leaves[:4], initial_state=leaves[4], cu_seqlens=cu, backend=backend, mode=mode
    )
    assert out.o.shape == (1, 0, 2, 3)
    assert out.state.shape == (0, 2, 4, 3)
    (out.o.sum() + out.state.sum()).backward()
    assert leaves[4].grad.shape == (0, 2, 4, 3)


@every_way
@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5)], ids=["B", "T", "H"]
)
def test_empty_axes(backend, mode, shape):
    x = delta_inputs(*shape)
    leaves = [y.clone().requires_grad_() for y in x]
    out = delta_rule(*leaves[:4], initial_state=leaves[4], backend=backend, mode=mode)
    assert out.o.shape == x.v.shape
    assert torch.equal(out.state, x.initial_state)
    assert out.state.data_ptr() != x.initial_state.data_ptr() or not out.state.numel()
    (out.o.sum() + 2 * out.state.sum()).backward()
    assert torch.equal(leaves[4].grad, torch.full_like(x.initial_state, 2.0))
    start = delta_rule(*leaves[:4], backend=backend, mode=mode).state
    assert not start.any()


def halo(x: torch.Tensor, steps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values with other strides inside a buffer full of NaN; and that buffer."""
    buffer = x.new_full([2 + n * s for n, s in zip(x.shape, steps, strict=True)], float("nan"))
    view = buffer[tuple(slice(1, 1 + n * s, s) for n, s in zip(x.shape, steps, strict=True))]
    view.copy_(x)
    return view, buffer


@every_way
def test_strides_change_no_bit_and_the_halo_is_not_touched(backend, mode):
    x = delta_inputs(2, 6, 2, 4, 3)
    way = {"backend": backend, "mode": mode}
    want = delta_rule(*x[:4], initial_state=x.initial_state, **way)
    views, buffers = zip(*(halo(y, [1, 2, 3, 2][: y.dim()]) for y in x), strict=True)
    before = [b.clone() for b in buffers]
    got = delta_rule(*views[:4], initial_state=views[4], **way)
    assert torch.equal(got.o, want.o)
    assert torch.equal(got.state, want.state)
    for b, saved in zip(buffers, before, strict=True):
        assert torch.equal(b.isnan(), saved.isnan())
        assert torch.equal(b.nan_to_num(), saved.nan_to_num())
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    wants = gradients(delta_rule, x, do, dstate, **way)
    leaves = [y.clone().requires_grad_() for y in x]
    out = delta_rule(*leaves[:4], initial_state=leaves[4], **way)
    strided = halo(do, [2, 1, 2, 3])[0], halo(dstate, [1, 3, 2, 2])[0]
    for g, w in zip(torch.autograd.grad(tuple(out), leaves, strided), wants, strict=True):
        assert torch.equal(g, w)


@every_way
def test_expanded_inputs(backend, mode):
    x = delta_inputs(1, 6, 2, 4, 3)
    one = x.k[:, :1].expand_as(x.k)  # stride zero along time
    got = delta_rule(x.q, one, x.v, x.beta, backend=backend, mode=mode)
    want = delta_rule(x.q, one.contiguous(), x.v, x.beta, backend=backend, mode=mode)
    assert torch.equal(got.o, want.o)


# -- determinism and semantics -----------------------------------------------------------------------------------------


@every_way
def test_inputs_never_change_and_no_output_aliases_one(backend, mode):
    x = delta_inputs(1, 20, 2, 4, 3)
    saved = [y.clone() for y in x]
    leaves = [y.requires_grad_() for y in x]
    out = delta_rule(*leaves[:4], initial_state=leaves[4], backend=backend, mode=mode)
    (out.o.sum() + out.state.sum()).backward()
    for y, s in zip(x, saved, strict=True):
        assert torch.equal(y.detach(), s)
    storages = {y.untyped_storage().data_ptr() for y in x}
    for y in (*out, *(leaf.grad for leaf in leaves)):
        assert y.untyped_storage().data_ptr() not in storages


@every_way
def test_backward_twice_over_one_graph_gives_equal_bits(backend, mode):
    x = delta_inputs(1, 20, 2, 4, 3, dtype=torch.float32)
    leaves = [y.requires_grad_() for y in x]
    out = delta_rule(*leaves[:4], initial_state=leaves[4], backend=backend, mode=mode)
    loss = out.o.square().sum() + out.state.square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_way
def test_a_gradient_of_a_gradient_is_refused_in_words(backend, mode):
    x = delta_inputs(1, 3, 1, 2, 2)
    q, k = x.q.requires_grad_(), x.k.requires_grad_()
    out = delta_rule(q, k, x.v, x.beta, backend=backend, mode=mode)
    (dq,) = torch.autograd.grad(out.o.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="delta_rule: .*gradient of a gradient"):
        torch.autograd.grad(dq.sum(), k)


@every_way
def test_causality_is_exact(backend, mode):
    x = delta_inputs(
        1, 20 if (backend, mode) == ("triton", "recurrent") else 70, 2, 4, 3, dtype=torch.float32
    )
    way = {"backend": backend, "mode": mode}
    before = delta_rule(*x[:4], initial_state=x.initial_state, **way).o
    for t in (1, 9, 18):
        changed = [y.clone() for y in x[:4]]
        for y in changed:
            y[:, t:] = torch.randn_like(y[:, t:])
        after = delta_rule(*changed, initial_state=x.initial_state, **way).o
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@every_way
def test_a_batch_in_another_order_has_the_same_rows(backend, mode):
    x = delta_inputs(3, 20, 2, 4, 3, dtype=torch.float32)
    order = torch.tensor([2, 0, 1])
    way = {"backend": backend, "mode": mode}
    a = delta_rule(*x[:4], initial_state=x.initial_state, **way)
    b = delta_rule(*(y[order] for y in x[:4]), initial_state=x.initial_state[order], **way)
    assert torch.equal(a.o[order], b.o)
    assert torch.equal(a.state[order], b.state)


@every_way
@pytest.mark.parametrize("split", [0, 1, 13, 20])
def test_a_sequence_can_be_cut_anywhere(backend, mode, split):
    x = delta_inputs(1, 20, 2, 4, 3)
    way = {"backend": backend, "mode": mode}
    whole = delta_rule(*x[:4], initial_state=x.initial_state, **way)
    head = delta_rule(*(y[:, :split] for y in x[:4]), initial_state=x.initial_state, **way)
    tail = delta_rule(*(y[:, split:] for y in x[:4]), initial_state=head.state, **way)
    joined = torch.cat([head.o, tail.o], dim=1)
    assert_rows_close(joined, whole.o, rtol=1e-12, name="o")
    assert_rows_close(tail.state, whole.state, rtol=1e-12, name="state")


@every_way
def test_dtypes_of_results_and_gradients(backend, mode):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = delta_inputs(1, 20, 1, 4, 3, dtype=dtype)
        beta = x.beta if dtype == torch.float64 else x.beta.float()
        leaves = [y.clone().requires_grad_() for y in (*x[:3], beta, x[4])]
        out = delta_rule(*leaves[:4], initial_state=leaves[4], backend=backend, mode=mode)
        assert out.o.dtype == dtype
        assert out.state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (out.o.sum() + out.state.sum()).backward()
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@every_way
def test_autocast_casts_nothing(backend, mode):
    x = delta_inputs(1, 20, 1, 4, 3, dtype=torch.float32)
    leaves = [y.requires_grad_() for y in x]
    want = delta_rule(*leaves[:4], backend=backend, mode=mode)
    (dwant,) = torch.autograd.grad(want.o.sum(), leaves[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = delta_rule(*leaves[:4], backend=backend, mode=mode)
        (dgot,) = torch.autograd.grad(got.o.sum(), leaves[0])
    assert torch.equal(got.o, want.o)
    assert torch.equal(dgot, dwant)


# -- compilers ---------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_opcheck(backend, mode, pack):
    x, cu = packed([3, 0, 4])
    S0 = x.initial_state if pack else x.initial_state[:1]
    size = 64 if mode == "chunk" else 0
    leaves = [y.clone().requires_grad_() for y in (*x[:4], S0)]
    args = (*leaves, cu if pack else None, 0.5, backend, mode, size)
    torch.library.opcheck(torch.ops.gdr_teach.delta_rule.default, args)
    torch.library.opcheck(
        torch.ops.gdr_teach.delta_rule_backward.default,
        (torch.randn_like(x.v), torch.randn_like(S0), *(y.detach() for y in leaves), *args[5:]),
    )


@every_way
@pytest.mark.parametrize("pack", [False, True], ids=["dense", "packed"])
def test_torch_compile_in_one_graph(backend, mode, pack):
    x, cu = packed([3, 0, 4])
    S0 = x.initial_state if pack else x.initial_state[:1]
    leaves = [y.clone().requires_grad_() for y in (*x[:4], S0)]
    options = {"cu_seqlens": cu if pack else None, "backend": backend, "mode": mode}

    def loss(q, k, v, beta, S0):
        out = delta_rule(2 * q, k, v, beta, initial_state=S0, **options)
        return out.o.square().sum() + out.state.sin().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_export():
    x = delta_inputs(1, 20, 1, 4, 3)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v, beta):
            return delta_rule(q, k, v, beta).o

    program = torch.export.export(Layer(), x[:4])
    assert torch.equal(program.module()(*x[:4]), delta_rule(*x[:4]).o)


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "options", "way"),
    [
        (16, {}, ("torch", "recurrent", 0, 1, 0)),
        (17, {}, ("torch", "chunk", 64, 1, 0)),
        (17, {"mode": "recurrent"}, ("torch", "recurrent", 0, 1, 0)),
        (4, {"mode": "chunk"}, ("torch", "chunk", 64, 1, 0)),
        (17, {"backend": "triton"}, ("triton", "recurrent", 0, 1, 1)),
        (17, {"backend": "triton", "mode": "chunk"}, ("triton", "chunk", 64, 1, 2)),
    ],
)
def test_explain(T, options, way):
    x = delta_inputs(1, T, 1, 4, 3)
    assert tuple(explain(delta_rule, *x[:4], **options)) == way


def test_explain_wants_an_operator():
    with pytest.raises(TypeError, match="explain: op must be an operator"):
        explain(torch.relu, torch.zeros(1))


def test_auto_takes_what_explain_says():
    x = delta_inputs(1, 70, 1, 4, 3)
    assert torch.equal(delta_rule(*x[:4]).o, delta_chunkwise(*x[:4]).o)
    short = [y[:, :16] for y in x[:4]]
    assert torch.equal(delta_rule(*short).o, delta_recurrence(*short).o)
