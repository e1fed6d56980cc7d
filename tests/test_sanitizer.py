"""The memory check finds what it should, names it, and is silent where nothing is wrong."""

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from gdr_teach.runtime import kernel, triton_version
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
    tl.debug_barrier()
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


# -- what a first version of the check let pass ------------------------------------------------------------------------


def fault(kernel, grid, *args):
    """What is said about a launch; nothing when it is right."""
    try:
        with sanitize():
            kernel[grid](*args)
    except KernelFault as error:
        return str(error)
    return ""


def test_lanes_that_are_masked_off_may_lie_anywhere_and_hold_anything():
    x, y = torch.empty(40), torch.empty(40)
    with sanitize():
        copy_kernel[(1,)](torch.randn(40), uninitialised(x), 16, 16)
        copy_kernel[(3,)](x[:16], y, 16, 16)


@kernel
def atomic_kernel(p_x, p_y, CAS: tl.constexpr):
    """Adds up, or exchanges."""
    i = tl.program_id(0)
    if CAS:
        tl.atomic_cas(p_y, 0, i + 1)
    else:
        tl.atomic_add(p_y + tl.arange(0, 4) * 0, tl.load(p_x + i) + tl.arange(0, 4))


@pytest.mark.parametrize("cas", [False, True])
def test_atomics_of_two_programs_are_a_race_and_of_one_are_none(cas):
    x, y = torch.ones(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    assert fault(atomic_kernel, (1,), x, y, cas) == ""
    assert "race on load of p_y in program (1, 0, 0)" in fault(atomic_kernel, (2,), x, y, cas)
    assert "load outside p_y" in fault(atomic_kernel, (1,), x, y[:0], cas)


@kernel
def block_pointer_kernel(p_x, p_y, n, CHECK: tl.constexpr, BLOCK: tl.constexpr):
    """y = x by block pointers, as long as n is what the pointers were told."""
    i = tl.program_id(0) * BLOCK
    x = tl.make_block_ptr(p_x, (n,), (1,), (i,), (BLOCK,), (0,))
    y = tl.make_block_ptr(p_y, (n,), (1,), (i,), (BLOCK,), (0,))
    b_x = tl.load(x, boundary_check=(0,) if CHECK else ())
    tl.store(y, b_x, boundary_check=(0,))


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.skipif(triton_version() >= (3, 9), reason="this triton has no block pointers")
def test_block_pointers_know_their_argument():
    buffer = torch.randn(60)
    x, y = buffer[:30], buffer[30:]
    assert fault(block_pointer_kernel, (2,), x, y, 30, True, 16) == ""
    assert torch.equal(x, y)
    # without the check the last block reaches into y, which lies in the same storage
    assert "load outside p_x" in fault(block_pointer_kernel, (2,), x, y, 30, False, 16)
    assert "load outside p_x" in fault(block_pointer_kernel, (2,), x, y, 31, True, 16)


@kernel
def descriptor_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """y = x by descriptors, as long as n is their length."""
    i = tl.program_id(0) * BLOCK
    x = tl.make_tensor_descriptor(p_x, [n], [1], [BLOCK])
    y = tl.make_tensor_descriptor(p_y, [n], [1], [BLOCK])
    y.store([i], x.load([i]))


def test_descriptors_know_their_argument():
    buffer = torch.randn(64)
    x, y = buffer[:32], buffer[32:62]
    assert fault(descriptor_kernel, (2,), x, y, 30, 16) == ""
    assert torch.equal(x[:30], y)
    assert "load outside p_x" in fault(descriptor_kernel, (2,), x[:29], y, 30, 16)
    assert "store outside p_y" in fault(descriptor_kernel, (2,), x, y, 31, 16)


def test_memory_that_is_given_out_again_is_not_undefined_any_more():
    with sanitize():
        for _ in range(20):  # one of them gets the address of the one before
            x = uninitialised(torch.empty(1000))
            address = x.data_ptr()
            del x
            x = torch.ones(1000)
            copy_kernel[(1,)](x, torch.empty(16), 16, 16)
            if x.data_ptr() == address:
                return
    pytest.skip("no address was given out twice")


def test_what_pytorch_has_written_is_defined():
    with sanitize():
        x = uninitialised(torch.empty(16))
        copy_kernel[(1,)](x.fill_(1.0), torch.empty(16), 16, 16)


@kernel
def reinterpreting_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Stores float32 where float16 belongs."""
    i = tl.arange(0, BLOCK)
    tl.store(p_y.to(tl.pointer_type(tl.float32)) + i, tl.load(p_x + i))


def test_elements_of_another_size_are_found():
    x, y = torch.randn(8), torch.zeros(16, dtype=torch.float16)  # 32 bytes both
    said = fault(reinterpreting_kernel, (1,), x, y, 8)
    assert "wrong element size in store of p_y" in said
    assert "elements of 4 bytes where they have 2" in said
    assert fault(reinterpreting_kernel, (1,), x, y.view(torch.float32), 8) == ""


def test_a_view_of_smaller_elements_knows_what_is_undefined():
    x = torch.empty(16)
    with sanitize():
        copy_kernel[(1,)](torch.randn(8), uninitialised(x), 8, 16)
        halves = x.view(torch.float16)
        copy_kernel[(1,)](halves, torch.empty(16, dtype=torch.float16), 16, 16)
        with pytest.raises(KernelFault, match="uninitialised read of p_x .* 1 lane read"):
            copy_kernel[(1,)](halves[1:], torch.empty(16, dtype=torch.float16), 16, 16)


def test_two_arguments_in_one_storage_can_race():
    buffer = torch.randn(62)
    assert fault(copy_kernel, (2,), buffer[:30], buffer[30:60], 30, 16) == ""
    # the second program reads what the first has stored; both know their own argument only
    assert "race on" in fault(copy_kernel, (2,), buffer[:32], buffer[16:48], 32, 16)


def test_windows_that_lie_over_each_other():
    x = torch.randn(11).as_strided(
        (4, 3), (2, 2)
    )  # every second element, most of them several times
    y = torch.empty(4)
    assert fault(scalar_kernel, (1,), x, y, 1) == ""
    assert "load outside p_x" in fault(scalar_kernel, (2,), x, y, 1)


def test_large_storages_are_shadowed_where_they_are_touched():
    x, y = torch.zeros(2**26, dtype=torch.int8), torch.empty(16, dtype=torch.int8)
    with sanitize() as sanitizer:
        copy_kernel[(1,)](x[-20:], y, 16, 16)
        copy_kernel[(1,)](x[-40:], y, 16, 16)
        copy_kernel[(1,)](y, x[-10_000:], 16, 16)
        covered = len(sanitizer.memories[x.data_ptr()].writer)
    assert 10_000 <= covered < 100_000


def test_grids():
    x, y = torch.randn(30), torch.empty(30)
    assert fault(no_store_mask_kernel, (0,), x, y, 30, 16) == ""  # wrong, and no program runs
    assert fault(copy_kernel, lambda meta: (2,), x, y, 30, 16) == ""
    said = fault(copy_kernel, (1, 65_536), x, y, 30, 16)
    assert "grid too large for copy_kernel" in said
    assert "65,536 programs along axis 1" in said


@kernel
def folded_kernel(p_x, p_y, BLOCK: tl.constexpr):
    """Two lanes an element."""
    i = tl.arange(0, BLOCK)
    tl.store(p_y + i // 2, tl.load(p_x + i))


def test_two_lanes_at_one_address_are_a_race_unless_they_agree():
    x = torch.randn(16)
    said = fault(folded_kernel, (1,), x, torch.zeros(8), 16)
    assert "race on store to p_y in program (0, 0, 0): two lanes store different" in said
    x[1::2] = x[::2]
    x[0] = x[1] = float("nan")
    assert fault(folded_kernel, (1,), x, torch.zeros(8), 16) == ""


@kernel
def scratch_kernel(p_x, p_y, WRITTEN: tl.constexpr, READ: tl.constexpr, BLOCK: tl.constexpr):
    """Turns x around by way of y, twice."""
    i = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i)
    for _ in range(2):
        tl.store(p_y + i, b_x)
        if WRITTEN:
            tl.debug_barrier()
        b_x = tl.load(p_y + BLOCK - 1 - i)
        if READ:
            tl.debug_barrier()


def test_a_barrier_is_missing_between_threads():
    x, y = torch.randn(16), torch.empty(16)
    assert fault(scratch_kernel, (1,), x, y, True, True, 16) == ""
    assert "missing barrier before load of p_y" in fault(
        scratch_kernel, (1,), x, y, False, True, 16
    )
    assert "missing barrier before store to p_y" in fault(
        scratch_kernel, (1,), x, y, True, False, 16
    )


@kernel
def turned_in_place_kernel(p_x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Turns x around in its own place."""
    i = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_x + BLOCK - 1 - i, b_x)


def test_a_store_may_come_too_early_for_another_thread():
    x = torch.arange(16.0)
    said = fault(turned_in_place_kernel, (1,), x.clone(), False, 16)
    assert "missing barrier before store to p_x in program (0, 0, 0): the program read" in said
    assert fault(turned_in_place_kernel, (1,), x, True, 16) == ""
    assert torch.equal(x, torch.arange(15.0, -1, -1))


@kernel
def spilling_kernel(p_x, p_y, rows, n, BLOCK: tl.constexpr):
    """y = x row by row, each store reaching into the next row."""
    i = tl.arange(0, BLOCK)
    for row in range(rows):
        tl.store(p_y + row * n + i, tl.load(p_x + row * n + i, mask=i < n, other=0.0))


def test_what_is_wrong_in_itself_is_said_rather_than_what_comes_of_it():
    x, y = torch.randn(3, 12), torch.empty(5, 12)
    assert "store outside p_y" in fault(spilling_kernel, (1,), x, y[:3], 3, 12, 16)
    assert "missing barrier before store to p_y" in fault(spilling_kernel, (1,), x, y, 3, 12, 16)


@kernel
def tuple_kernel(p_xs, p_y, n, BLOCK: tl.constexpr):
    """y = the sum of a tuple of two, the second without a mask."""
    i = tl.arange(0, BLOCK)
    b_x = tl.load(p_xs[0] + i, mask=i < n, other=0.0) + tl.load(p_xs[1] + i)
    tl.store(p_y + i, b_x, mask=i < n)


def test_tensors_in_a_tuple_are_arguments_too():
    xs, y = (torch.ones(16), torch.ones(16)), torch.zeros(15)
    assert fault(tuple_kernel, (1,), xs, y, 15, 16) == ""
    assert torch.equal(y, torch.full((15,), 2.0))
    assert "load outside p_xs[1]" in fault(tuple_kernel, (1,), (xs[0], xs[1][:15]), y, 15, 16)
