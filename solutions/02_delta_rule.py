# %% [markdown] name="title"
# In this exercise you build the delta rule four times: one step, the same step as gradient descent, the loop over a
# sequence, and the loop as a Triton kernel. Each task is one function. Write its body, run the cell, run the check
# below it. The check names what is wrong; `hint("02.read")` gives the next hint for that task.
#
# Everything runs on a CPU. The letters are those of the chapter: `S` is the memory, of shape `[K, V]`; `k` is a key and
# `q` a query, of width `K`; `v` is a value, of width `V`; `beta` is the step size.
#
# 中文提示：设置环境变量 `GDR_LANG=zh`。

# %% name="imports"
import torch
from torch import Tensor

from gdr_teach.grading import check, hint

# %% [markdown] task="02.read"
# The memory answers a query. Each of the `V` output channels is a weighted sum down one column of `S`; the weights are
# the entries of `q`.
#
# $$o = \text{scale} \cdot S^\top q \tag{2.4}$$
#
# **Given** `S [K, V]`, `q [K]` and the number `scale`. **Return** `o [V]`.
#
# **Example**, K = 2 and V = 3. The query is 1 for the first row and 10 for the second:
# `S = [[1, 2, 3], [4, 5, 6]]`, `q = [1, 10]`, `scale = 0.5` give `[20.5, 26, 31.5]`.


# %% task="02.read"
def read(S: Tensor, q: Tensor, scale: float) -> Tensor:
    """What the memory S gives back for the query q: [K, V], [K] -> [V]."""
    # BEGIN SOLUTION
    return scale * (S.T @ q)
    # END SOLUTION


# %% name="read-example"
S = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
print(read(S, torch.tensor([1.0, 10.0]), 0.5))  # wanted: tensor([20.5000, 26.0000, 31.5000])

# %% [markdown] task="02.delta_step"
# A plain memory only adds: write twice under one key and it returns the sum of both values. The delta rule first asks
# what it holds under `k`, and then writes only the difference. With `beta = 1` and a key of length 1 the new value
# replaces the old one; with `beta = 0.5` it goes half of the way.
#
# $$r = v - S^\top k \tag{2.1}$$
# $$u = \beta\, r \tag{2.2}$$
# $$S_{\text{new}} = S + k\, u^\top \tag{2.3}$$
#
# **Given** `S [K, V]`, `k [K]`, `v [V]` and the number `beta`. **Return** the new state `[K, V]`; leave `S` as it is.
#
# **Example**: the key looks at the first row, which holds `[1, 2, 3]`. With `S` as above, `k = [1, 0]`, `v = [0, 0, 1]`
# and `beta = 0.5` that row goes half of the way to `v`, to `[0.5, 1, 2]`. The second row stays.


# %% task="02.delta_step"
def delta_step(S: Tensor, k: Tensor, v: Tensor, beta: float) -> Tensor:
    """The memory after one delta step: [K, V], [K], [V] -> [K, V]."""
    # BEGIN SOLUTION
    u = beta * (v - S.T @ k)
    return S + torch.outer(k, u)
    # END SOLUTION


# %% name="delta-step-example"
k, v = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
print(delta_step(S, k, v, 0.5))
# wanted: tensor([[0.5000, 1.0000, 2.0000],
# wanted:         [4.0000, 5.0000, 6.0000]])

# %% [markdown] task="02.gradient"
# Where does the rule come from? Ask of the memory that it gives back `v` for `k`, and measure how far off it is:
#
# $$L(S) = \tfrac12 \lVert S^\top k - v \rVert^2$$
#
# One step of gradient descent on this loss, with step size `beta`, is `S - beta * gradient`. Work out the gradient by
# hand, without autograd, and you have met the delta rule again.
#
# **Given** `S [K, V]`, `k [K]`, `v [V]`. **Return** the gradient of `L` with respect to `S`, of shape `[K, V]`.
#
# **Example**: with the numbers of the last task the error is `[1, 2, 3] - [0, 0, 1] = [1, 2, 2]`. Only the first row
# of `S` had a part in it, so the gradient is `[[1, 2, 2], [0, 0, 0]]`.


# %% task="02.gradient"
def loss_gradient(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The gradient of half the squared error of S on (k, v): [K, V], [K], [V] -> [K, V]."""
    # BEGIN SOLUTION
    return torch.outer(k, S.T @ k - v)
    # END SOLUTION


# %% name="gradient-example"
gradient, stepped = loss_gradient(S, k, v), delta_step(S, k, v, 0.5)
print(gradient)
# wanted: tensor([[1., 2., 2.],
# wanted:         [0., 0., 0.]])
if gradient is not None and stepped is not None:  # both written: the two are one step
    print(float((S - 0.5 * gradient - stepped).abs().max()))  # wanted: 0.0

# %% [markdown] task="02.delta_loop"
# Now a whole sequence: one step per token, and after each step a read. The state a token leaves is the state the next
# one finds. `B` sequences and `H` heads run side by side, each with a memory of its own.
#
# **Given** `q, k [B, T, H, K]`, `v [B, T, H, V]`, `beta [B, T, H]`, the number `scale`, and
# `initial_state [B, H, K, V]`. **Return** the outputs `o [B, T, H, V]` and the last state `[B, H, K, V]`. Leave
# `initial_state` as it is.
#
# **Example**, two tokens, K = 2, V = 1, B = H = 1 and `scale = 0.5`. The memory starts as `[[1], [0]]`. Token 1 writes
# 3 under `[1, 0]` with `beta = 1`, which gives `[[3], [0]]`; token 2 writes 4 under `[0, 1]` with `beta = 0.5`, which
# gives `[[3], [2]]`. Both queries are `[1, 1]`, so the outputs are `0.5 * 3 = 1.5` and `0.5 * (3 + 2) = 2.5`.


# %% task="02.delta_loop"
def delta_loop(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and last state [B, H, K, V] of the delta rule over T tokens."""
    # BEGIN SOLUTION
    S, outputs = initial_state, []
    for t in range(k.shape[1]):
        held = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        u = beta[:, t, :, None] * (v[:, t] - held)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, dim=1), S
    # END SOLUTION


# %% name="delta-loop-example"
two_keys = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
two_values = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
two_betas = torch.tensor([1.0, 0.5]).reshape(1, 2, 1)
start = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
two_tokens = (torch.ones(1, 2, 1, 2), two_keys, two_values, two_betas, 0.5, start)
if (result := delta_loop(*two_tokens)) is not None:
    print(*(x.flatten().tolist() for x in result))  # wanted: [1.5, 2.5] [3.0, 2.0]

# %% [markdown] task="02.delta_kernel"
# The same loop as a GPU would run it. One *program* owns the memory of one head of one sequence and keeps it in
# registers, as a tile of `[BK, BV]` numbers, while it walks the tokens. `B * H` programs run at once. Here they are
# interpreted on your CPU, and every memory access is checked.
#
# A tile's sides are powers of two, `K` and `V` need not be: with `K = 5`, `BK` is 8, and three lanes hang over the
# edge. Those lanes must neither load nor store, so every load and store of a block carries a mask. The load of the
# first state and the store of the last show how.
#
# All arrays lie flat in memory. Counted in rows of one token and head, token `t` of this program's head is row
# `(i_b * T + t) * H + i_h`: the next token is `H` rows on. Its key starts at `p_k + row * K`, its value and its output
# at `row * V`, and its beta is the one number at `p_beta + row`.
#
# **Write** the body of the loop: load this token's `k`, `v`, `beta` and `q`; update `b_S` by (2.1) to (2.3); store the
# output (2.4). **Example**: for the two tokens of the last task the kernel stores 1.5 and 2.5 in `p_o` and leaves
# `[[3], [2]]` in `p_state`.


# %% name="kernel-imports"
try:
    import triton.language as tl

    from gdr_teach.runtime import kernel
except (
    ImportError
):  # Triton is for Linux: elsewhere you can read and write the kernel, and check it later
    from gdr_teach.grading.absent import kernel, tl


# %% task="02.delta_kernel"
@kernel
def delta_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
    p_beta,  # [B, T, H]
    p_initial,  # [B, H, K, V]
    p_o,  # [B, T, H, V], written here
    p_state,  # [B, H, K, V], written here
    scale,
    T,
    H,
    K,
    V,
    BK: tl.constexpr,  # a power of two, K or more
    BV: tl.constexpr,  # a power of two, V or more
):
    """One program: the delta rule over the tokens of one head of one sequence."""
    i_bh = tl.program_id(0)
    i_b, i_h = i_bh // H, i_bh % H
    i_k = tl.arange(0, BK)  # [BK]
    i_v = tl.arange(0, BV)  # [BV]
    m_s = (i_k < K)[:, None] & (i_v < V)[None, :]  # [BK, BV]
    o_s = i_bh * K * V + i_k[:, None] * V + i_v[None, :]  # [BK, BV]
    b_S = tl.load(p_initial + o_s, mask=m_s, other=0.0)  # [BK, BV]
    row = i_b * T * H + i_h  # of the first token
    for _ in range(T):
        # BEGIN SOLUTION
        b_k = tl.load(p_k + row * K + i_k, mask=i_k < K, other=0.0)  # [BK]
        b_v = tl.load(p_v + row * V + i_v, mask=i_v < V, other=0.0)  # [BV]
        b_q = tl.load(p_q + row * K + i_k, mask=i_k < K, other=0.0)  # [BK]
        b_beta = tl.load(p_beta + row)
        b_u = b_beta * (b_v - tl.sum(b_S * b_k[:, None], axis=0))  # [BV]      (2.1), (2.2)
        b_S += b_k[:, None] * b_u[None, :]  # [BK, BV]      (2.3)
        b_o = scale * tl.sum(b_S * b_q[:, None], axis=0)  # [BV]      (2.4)
        tl.store(p_o + row * V + i_v, b_o, mask=i_v < V)
        # END SOLUTION
        row += H
    tl.store(p_state + o_s, b_S, mask=m_s)


# %% [markdown] name="launch"
# This is how the check launches your kernel. It allocates the outputs as memory that counts as undefined until you
# store to it, chooses the tile, and starts one program per sequence and head.

# %% name="launch-source"
import inspect

from gdr_teach.grading.launch import launch_delta

print(inspect.getsource(launch_delta))

# %% [markdown] name="end"
# Done? Save the notebook, then `gdr-teach grade my/02_delta_rule.ipynb` in a terminal grades it on fresh numbers and
# `gdr-teach progress` ticks what you have passed. The library's own kernel, `gdr_teach/delta/recurrent.py`, is yours
# with a backward pass, packed sequences and tiles over `V`: you can read it now.
