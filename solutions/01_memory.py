# %% [markdown] name="title"
# In this exercise a matrix becomes a memory. You store a pair, ask many questions at once, work out what the other
# pairs add to an answer, walk a whole sequence, and write that walk as your first Triton kernel. Each task is one
# function: write its body, run the cell, then run the check below it. A check tells you what holds and what does not;
# `hint("01.write")` gives the next hint for that task.
#
# Everything runs on a CPU. The letters are those of the chapter: `S` is the memory, of shape `[K, V]`, one row for each
# number in a key and one column for each number in a value; `k` is a key and `q` a query, of width `K`; `v` is a value,
# of width `V`.
#
# 中文提示：设置环境变量 `GDR_LANG=zh`。

# %% name="imports"
import torch
from torch import Tensor

from gdr_teach.grading import check, hint

# %% [markdown] task="01.write"
# To store the value `v` under the key `k`, add their outer product. Entry `[i, j]` grows by `k[i] * v[j]`. Nothing that
# was there is taken out: a second value under the same key comes on top of the first.
#
# $$S_{\text{new}} = S + k\, v^\top \tag{1.1}$$
#
# **Given** `S [K, V]`, `k [K]`, `v [V]`. **Return** the new state `[K, V]`; leave `S` as it is.
#
# **Example**, K = 2 and V = 3. `S = [[1, 2, 3], [4, 5, 6]]`, `k = [1, 2]` and `v = [10, 0, 1]`. The first row gets `v`
# once, the second twice: `[[11, 2, 4], [24, 5, 8]]`.


# %% task="01.write"
def write(S: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The memory after one more pair: [K, V], [K], [V] -> [K, V]."""
    # BEGIN SOLUTION
    return S + torch.outer(k, v)
    # END SOLUTION


# %% name="write-example"
S = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
print(write(S, torch.tensor([1.0, 2.0]), torch.tensor([10.0, 0.0, 1.0])))
# wanted: tensor([[11.,  2.,  4.],
# wanted:         [24.,  5.,  8.]])

# %% [markdown] task="01.read_all"
# To ask, multiply. One query `q` gets one answer of width `V`:
#
# $$o = \text{scale} \cdot S^\top q \tag{1.2}$$
#
# `N` queries need no loop. Put them into the rows of a matrix `Q`, and one matrix product gives all the answers, one to
# a row. A query is used as it is: twice as long, it gets twice the answer.
#
# **Given** `S [K, V]`, `Q [N, K]` and the number `scale`. **Return** the answers `[N, V]`.
#
# **Example**: with `S` as above and `scale = 0.5`, the queries `[1, 0]`, `[0, 1]`, `[1, 1]` and `[2, 0]` get half of
# the first row, half of the second, half of their sum, and the whole first row: `[[0.5, 1, 1.5], [2, 2.5, 3],
# [2.5, 3.5, 4.5], [1, 2, 3]]`.


# %% task="01.read_all"
def read_all(S: Tensor, Q: Tensor, scale: float) -> Tensor:
    """What the memory answers to each row of Q: [K, V], [N, K] -> [N, V]."""
    # BEGIN SOLUTION
    return scale * (Q @ S)
    # END SOLUTION


# %% name="read-all-example"
queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
print(read_all(S, queries, 0.5))
# wanted: tensor([[0.5000, 1.0000, 1.5000],
# wanted:         [2.0000, 2.5000, 3.0000],
# wanted:         [2.5000, 3.5000, 4.5000],
# wanted:         [1.0000, 2.0000, 3.0000]])

# %% [markdown] task="01.interference"
# Store `N` pairs in an empty memory and ask for one of them by its own key. All pairs answer, each as loudly as its key
# resembles the one you ask with:
#
# $$S^\top k_j = \lVert k_j \rVert^2\, v_j + \sum_{i \neq j} (k_i \cdot k_j)\, v_i \tag{1.3}$$
#
# The first term is what you wanted, times the squared length of its key. The sum is the **interference**: what the
# others add. Return the sum alone. Keys can have any length, and another pair may have the very same key: it counts as
# one of the others.
#
# **Given** `k [N, K]`, `v [N, V]` and the index `j` of a pair, counted from 0. **Return** the interference `[V]`.
#
# **Example**, N = 3, K = 2 and V = 3. The keys are `[2, 0]`, `[1, 1]`, `[0, 3]`, the values `[1, 0, 0]`, `[0, 1, 0]`,
# `[0, 0, 1]`, and `j = 1`. Key 0 resembles key 1 by 2, key 2 does by 3, so the interference is `[2, 0, 3]`.


# %% task="01.interference"
def interference(k: Tensor, v: Tensor, j: int) -> Tensor:
    """What all pairs but j add to the read with key j: [N, K], [N, V] -> [V]."""
    # BEGIN SOLUTION
    weights = k @ k[j]  # [N]
    weights[j] = 0
    return weights @ v
    # END SOLUTION


# %% name="interference-example"
keys = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
print(interference(keys, torch.eye(3), 1))  # wanted: tensor([2., 0., 3.])

# %% [markdown] task="01.causal_attention"
# Now tokens come one after the other. Each brings a pair, which is written, and a query, which is read **after** that
# write: token `t` sees its own pair and those before it, and none that come later. `B` sequences and `H` heads run side
# by side, each with a memory of its own.
#
# $$S_t = S_{t-1} + k_t v_t^\top, \qquad o_t = \text{scale} \cdot S_t^\top q_t$$
#
# This is *linear attention*. You can walk the tokens in a loop, or compute all outputs of a head at once, with its `q`,
# `k`, `v` in the rows of `Q`, `K`, `V`. Both are right:
#
# $$O = \text{scale}\, \big(Q S_0 + \mathrm{tril}(Q K^\top)\, V\big) \tag{1.4}$$
#
# **Given** `q, k [B, T, H, K]`, `v [B, T, H, V]`, the number `scale`, and `initial_state [B, H, K, V]`, which is $S_0$.
# **Return** the outputs `o [B, T, H, V]` and the last state `[B, H, K, V]`. Leave `initial_state` as it is.
#
# **Example**, two tokens, K = 2, V = 1, B = H = 1 and `scale = 0.5`. The memory starts as `[[1], [2]]`. Token 1 writes
# 3 under `[1, 0]`, which gives `[[4], [2]]`; token 2 writes 4 under `[1, 1]`, which gives `[[8], [6]]`. Both queries
# are `[1, 1]`, so the outputs are `0.5 * (4 + 2) = 3` and `0.5 * (8 + 6) = 7`.


# %% task="01.causal_attention"
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and last state [B, H, K, V] of linear attention over T tokens."""
    # BEGIN SOLUTION
    S, outputs = initial_state, []
    for t in range(k.shape[1]):
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, dim=1), S
    # END SOLUTION


# %% name="causal-attention-example"
two_keys = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 1, 2)
two_values = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
start = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
two_tokens = (torch.ones(1, 2, 1, 2), two_keys, two_values, 0.5, start)
if (result := causal_attention(*two_tokens)) is not None:
    print(*(x.flatten().tolist() for x in result))  # wanted: [3.0, 7.0] [8.0, 6.0]

# %% [markdown] task="01.memory_kernel"
# The same walk as a GPU would take it. A *kernel* is one function that runs many times side by side; each run is a
# *program*, and `tl.program_id(0)` is its number. Here program `i_bh = i_b * H + i_h` owns the memory of head `i_h` of
# sequence `i_b`, keeps it in registers as a tile `b_S`, and walks the tokens. On your CPU an interpreter runs the
# programs one after the other, and every memory access is checked.
#
# **Where.** An array is one long line of numbers, and `p_k` points to the first. Cut `[B, T, H, K]` into rows of `K`
# numbers, one for each token and head; token `t` of this program is row `(i_b * T + t) * H + i_h`. (`i_bh` divided by
# `H` is `i_b`, and `i_h` is the remainder.) The row's key and query start `row * K` numbers from the beginning, its
# value and its output `row * V`.
#
# **How much.** `p_k + row * K + i_k` are `BK` addresses, and `BK` is a power of two: for `K = 5` it is 8, and three
# lanes lie past the key's end. `m_k` is true for the lanes inside; `m_v` does the same for values. Every load and store
# of a block takes its mask: `tl.load(address, mask=m_k, other=0.0)`, `tl.store(address, block, mask=m_v)`.
#
# **Write** the walk, `for t in range(T):`. Find the row; load `k`, `v` and `q`; update `b_S` by (1.1); store the output
# (1.2). The first state is loaded and the last one stored for you.
# **Example**: for the two tokens of the last task the kernel stores 3 and 7 in `p_o` and leaves `[[8], [6]]` in
# `p_state`.


# %% name="kernel-imports"
try:
    import triton.language as tl

    from gdr_teach.runtime import kernel
except (
    ImportError
):  # Triton is for Linux: elsewhere you can read and write the kernel, and check it later
    from gdr_teach.grading.absent import kernel, tl


# %% task="01.memory_kernel"
@kernel
def memory_kernel(
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, H, V]
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
    """One program: linear attention over the tokens of one head of one sequence."""
    i_bh = tl.program_id(0)
    i_k = tl.arange(0, BK)  # [BK]
    i_v = tl.arange(0, BV)  # [BV]
    m_k = i_k < K
    m_v = i_v < V
    m_s = m_k[:, None] & m_v[None, :]  # [BK, BV]
    o_s = i_bh * K * V + i_k[:, None] * V + i_v[None, :]  # [BK, BV]
    b_S = tl.load(p_initial + o_s, mask=m_s, other=0.0)  # [BK, BV]
    # BEGIN SOLUTION
    i_b, i_h = i_bh // H, i_bh % H
    for t in range(T):
        row = (i_b * T + t) * H + i_h
        b_k = tl.load(p_k + row * K + i_k, mask=m_k, other=0.0)  # [BK]
        b_v = tl.load(p_v + row * V + i_v, mask=m_v, other=0.0)  # [BV]
        b_q = tl.load(p_q + row * K + i_k, mask=m_k, other=0.0)  # [BK]
        b_S += b_k[:, None] * b_v[None, :]  # [BK, BV]      (1.1)
        b_o = scale * tl.sum(b_S * b_q[:, None], axis=0)  # [BV]      (1.2)
        tl.store(p_o + row * V + i_v, b_o, mask=m_v)
    # END SOLUTION
    tl.store(p_state + o_s, b_S, mask=m_s)


# %% [markdown] name="launch"
# The check launches your kernel with the function below: it makes room for the outputs, which count as undefined until
# you store to them, chooses the tile, and starts one program for each sequence and head.

# %% name="launch-source"
import inspect

from gdr_teach.grading.launch import launch_memory

print(inspect.getsource(launch_memory))

# %% [markdown] name="end"
# Done? Save the notebook, then `gdr-teach grade my/01_memory.ipynb` in a terminal grades it on fresh numbers, and
# `gdr-teach progress` ticks what you have passed. One thing this memory cannot do is change its mind: what is written
# stays. The next chapter looks before it writes.
