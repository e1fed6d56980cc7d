"""The memory check finds what it should, names it, and is silent where nothing is wrong."""

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from gdr_teach.runtime import kernel
from gdr_teach.sanitizer import KernelFault, sanitize, uninitialised


@kernel
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """y = x. Right."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < n, other=0.0), mask=i < n)


@kernel
def no_load_mask_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Reads past the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i), mask=i < n)


@kernel
def no_store_mask_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Writes past the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < n, other=0.0))


@kernel
def same_place_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Every program writes the same block."""
    i = tl.arange(0, BLOCK)
    tl.store(p_y + i, tl.load(p_x + i, mask=i < n, other=0.0), mask=i < n)


@kernel
def neighbour_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Reads y where the next program writes it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + i, mask=i < n, other=0.0) + tl.load(p_y + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(p_y + i, x, mask=i < n)


@kernel
def scalar_kernel(p_x, p_y, n):
    """One element a program, by scalar pointers."""
    i = tl.program_id(0)
    tl.store(p_y + i, tl.load(p_x + i))


@kernel
def transposed_kernel(p_x, p_y, M: tl.constexpr, N: tl.constexpr):
    """A block of pointers through broadcast, transpose and reshape: its origin must survive."""
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(
        tl.reshape(tl.trans(p_y + i), [M * N]), tl.reshape(tl.trans(tl.load(p_x + i)), [M * N])
    )


def test_silent_when_right():
    x, y = torch.randn(30), torch.empty(30)
    with sanitize():
        copy_kernel[(2,)](x, uninitialised(y), 30, 16)
        copy_kernel[(2,)](y, torch.empty(30), 30, 16)  # y is defined now
        scalar_kernel[(30,)](x, y, 30)
        transposed_kernel[(1,)](torch.randn(4, 8), torch.empty(4, 8), 4, 8)
    assert torch.equal(x, y)


def test_silent_outside_its_block():
    x = torch.randn(40)
    y = torch.empty(40)
    with sanitize():
        pass
    no_store_mask_kernel[(2,)](
        x[:30], y[:30], 30, 16
    )  # wrong, yet nobody looks; inside y's storage


@pytest.mark.parametrize(
    ("bad", "n", "message"),
    [
        (
            no_load_mask_kernel,
            30,
            r"load outside p_x in program \(1, 0, 0\): 2 lanes outside, .* element 30 .*\[30\]",
        ),
        (no_store_mask_kernel, 30, r"store outside p_y in program \(1, 0, 0\): 2 lanes"),
        (copy_kernel, 31, r"load outside p_x in program \(1, 0, 0\): 1 lane "),
        (same_place_kernel, 30, r"race on store to p_y in program \(1, 0, 0\)"),
        (neighbour_kernel, 30, r"race on (load of|store to) p_y in program \(1, 0, 0\)"),
    ],
)
def test_faults_are_found_and_named(bad, n, message):
    buffer = torch.randn(100)  # so that a stray access has somewhere to land
    with pytest.raises(KernelFault, match=message), sanitize():
        bad[(2,)](buffer[10:40], torch.zeros(64)[:30], n, 16)


def test_a_stray_pointer_that_lands_in_another_argument_is_found():
    buffer = torch.randn(60)
    with pytest.raises(KernelFault, match=r"load outside p_x"), sanitize():
        no_load_mask_kernel[(2,)](buffer[:30], buffer[30:], 30, 16)


def test_the_gaps_of_a_strided_view_are_outside():
    with pytest.raises(KernelFault, match=r"load outside p_x .* element 1 "), sanitize():
        copy_kernel[(2,)](torch.randn(60)[::2], torch.empty(30), 30, 16)


def test_uninitialised_reads_are_found_element_by_element():
    x, y = torch.randn(40), torch.empty(40)
    with sanitize():
        copy_kernel[(1,)](x, uninitialised(y), 16, 16)
        copy_kernel[(1,)](y, torch.empty(40), 16, 16)
        with pytest.raises(
            KernelFault, match=r"uninitialised read of p_x in program \(1, 0, 0\): 1 lane read"
        ):
            copy_kernel[(2,)](y, torch.empty(40), 17, 16)


def test_in_place_updates_are_no_race():
    x = torch.randn(30)
    want = x.clone()
    with sanitize():
        copy_kernel[(2,)](x, x, 30, 16)
    assert torch.equal(x, want)


def test_a_fault_leaves_memory_as_it_was():
    x, y = torch.randn(30), torch.full((64,), 7.0)
    with pytest.raises(KernelFault), sanitize():
        no_store_mask_kernel[(2,)](x, y[:30], 30, 16)
    assert (y[30:] == 7.0).all()


def test_a_fault_says_what_it_is():
    with pytest.raises(KernelFault) as caught, sanitize():
        no_load_mask_kernel[(2,)](torch.randn(30), torch.empty(30), 30, 16)
    assert (caught.value.kind, caught.value.argument, caught.value.program) == (
        "load outside",
        "p_x",
        (1, 0, 0),
    )


def test_empty_arguments():
    with sanitize():
        copy_kernel[(1,)](torch.empty(0), torch.empty(0), 0, 16)
        with pytest.raises(
            KernelFault, match="outside p_x .*belongs to no argument|load outside p_x"
        ):
            no_load_mask_kernel[(1,)](torch.empty(0), torch.empty(4), 0, 16)
