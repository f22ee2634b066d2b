"""Both transports against plain torch on one process: every collective exact, and every fault named.

The functions that run on the ranks take the group first; what they compare with is computed from seeds on each rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.ranks.group import Group
from parallel.sharding.tree import ReductionTree, middle

Run = Callable[..., list[Any]]
COMMS = ("shm", "gloo")
SHAPES = ((), (1,), (3, 7), (5, 512), (2, 0, 4))
DTYPES = (None, torch.bfloat16, torch.float16)


def sum_of(leaves: Tensor, lo: int, hi: int) -> Tensor:
    """The tree over the leaves, evaluated from its definition."""
    if hi - lo == 1:
        return leaves[lo]
    mid = middle(lo, hi)
    return sum_of(leaves, lo, mid) + sum_of(leaves, mid, hi)


def owned_roots(leaves: Tensor, tree: ReductionTree, rank: int) -> Tensor:
    roots = [sum_of(leaves, lo, hi) for lo, hi in tree.nodes(rank)]
    return torch.stack(roots) if roots else leaves.new_empty(0, *leaves.shape[1:])


def draw(seed: int, *shape: int) -> Tensor:
    """Values of very different sizes, so that any other order of additions gives other bits."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made) * 10.0 ** torch.randint(-4, 5, shape, generator=made)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def wrong_tree_sums(group: Group, shapes: Sequence[tuple[int, ...]], leaf_counts: Sequence[int]) -> list[str]:
    wrong = []
    for seed, (shape, num_leaves) in enumerate((s, n) for s in shapes for n in leaf_counts):
        tree = ReductionTree.over(num_leaves, group.size)
        leaves = draw(seed, num_leaves, *shape)
        for bias in (None, *([draw(7, shape[-1]), draw(8, shape[-1]).bfloat16()] if shape else [])):
            for dtype in DTYPES:
                total = sum_of(leaves, 0, num_leaves)
                expected = (total if bias is None else total + bias.float()).to(dtype or torch.float32)
                got = group.talk.tree_sum(owned_roots(leaves, tree, group.rank), tree, bias, dtype)
                if not same(got, expected):
                    wrong.append(f"rank {group.rank}: {shape}, {num_leaves} leaves, {dtype}, bias {bias is not None}")
    return wrong


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_tree_sum_has_the_bits_of_one_process_at_any_number_of_ranks(ranks: Run, size: int, comm: str) -> None:
    counts = (1, 2, 3, 8, 13) if comm == "shm" else (3, 8)
    assert ranks(size, wrong_tree_sums, SHAPES, counts, comm=comm) == [[]] * size


@pytest.mark.parametrize("size", [2, 3, 8])
def test_tree_sum_keeps_its_bits_when_divided_and_sent_in_pieces(ranks: Run, size: int) -> None:
    assert ranks(size, wrong_tree_sums, [(8191,), (3, 8193), (300_007,)], (3, 8)) == [[]] * size


def wrong_in_place_sums(group: Group) -> list[str]:
    """Half of the ranks write their nodes into their slot, the others hand in a tensor."""
    import ctypes

    wrong = []
    for seed, shape in enumerate(((5,), (3, 512), (40, 4096), (190_000,))):
        tree = ReductionTree.over(8, group.size)
        leaves, bias = draw(seed, 8, *shape), draw(9, shape[-1])
        nodes = owned_roots(leaves, tree, group.rank).contiguous()
        address = group.talk.slot(nodes.nbytes)
        if group.rank % 2 == 0 and address is not None:
            ctypes.memmove(address, nodes.data_ptr(), nodes.nbytes)
            got = group.talk.tree_sum_in_place(shape, tree, bias, torch.bfloat16)
        else:
            got = group.talk.tree_sum(nodes, tree, bias, torch.bfloat16)
        if not same(got, (sum_of(leaves, 0, 8) + bias).bfloat16()):
            wrong.append(f"rank {group.rank}: {shape}, slot at {address}")
        if (address is None) != (nodes.nbytes > 1 << 21):
            wrong.append(f"rank {group.rank}: slot of {nodes.nbytes} bytes is {address}")
    return wrong


@pytest.mark.parametrize("size", [2, 3])
def test_nodes_written_in_the_slot_give_the_same_bits(ranks: Run, size: int) -> None:
    assert ranks(size, wrong_in_place_sums) == [[]] * size


def wrong_plain_reductions(group: Group) -> list[str]:
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
        for seed, shape in enumerate(((), (3,), (5, 33), (70_000,))):
            parts = [(draw(seed * 10 + r, *shape) / 100).to(dtype) for r in range(group.size)]
            if dtype.is_floating_point and shape == (5, 33):
                parts[-1][0, 0] = parts[0][0, 1] = float("nan")
                parts[0][0, 2] = float("inf")
            wide = [part.float() if dtype in (torch.bfloat16, torch.float16) else part for part in parts]
            mine = parts[group.rank]
            strided = torch.stack([mine, mine], -1)[..., 1]
            if not same(group.talk.all_reduce_max(strided), torch.stack(parts).amax(0)):
                wrong.append(f"max {dtype} {shape}")
            total = wide[0]
            for part in wide[1:]:
                total = total + part
            got = group.talk.sum(strided)
            if not same(got, total.to(dtype)):
                wrong.append(f"sum {dtype} {shape}")
            if not same(mine, parts[group.rank]):
                wrong.append(f"{dtype} {shape}: the input changed")
    return wrong


@pytest.mark.parametrize(("comm", "size"), [("shm", 2), ("shm", 3), ("shm", 8), ("gloo", 2)])
def test_sum_and_max_equal_torch_in_every_type(ranks: Run, size: int, comm: str) -> None:
    assert ranks(size, wrong_plain_reductions, comm=comm) == [[]] * size


def sums_in_rank_order(group: Group) -> list[bool]:
    """Whether 16-bit and float32 sums are exactly the float32 sum rank after rank."""
    exact = []
    for dtype in (torch.float32, torch.bfloat16):
        for n in (100, 50_000):
            parts = [draw(r, n).to(dtype) for r in range(group.size)]
            total = parts[0].float()
            for part in parts[1:]:
                total = total + part.float()
            exact.append(same(group.talk.sum(parts[group.rank]), total.to(dtype)))
    return exact


def test_shared_memory_sums_in_rank_order_and_rounds_once(ranks: Run) -> None:
    assert ranks(4, sums_in_rank_order) == [[True] * 4] * 4


UNEVEN = [1, 0, 5, 2, 0, 4, 3, 1]
WAYS_TO_JOIN = [  # the shape but for the rank's own length, which stands where the 0 is, and the dimension joined
    ((0,), 0), ((3, 0), 1), ((3, 0), -1), ((0, 4), 0), ((2, 0, 3), 1), ((2, 0), 1), ((70, 0), 1), ((0, 65_537), 0)
]  # fmt: skip


def wrong_gathers(group: Group) -> list[str]:
    wrong = []
    for shape, dim in WAYS_TO_JOIN:
        sizes = [20_011, *[3] * (group.size - 1)] if shape == (70, 0) else UNEVEN[: group.size]
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            parts = [draw(r, *[length if n == 0 else n for n in shape]).to(dtype) for r, length in enumerate(sizes)]
            mine = parts[group.rank]
            mine = mine.transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
            joined = torch.cat(parts, dim)
            if not same(group.talk.all_gather(mine, sizes, dim), joined):
                wrong.append(f"all_gather {shape} {dim} {dtype}")
            dst = group.size - 1
            got = group.talk.gather(mine, sizes, dim, dst)
            if (got is not None) != (group.rank == dst) or (got is not None and not same(got, joined)):
                wrong.append(f"gather {shape} {dim} {dtype}")
    return wrong


@pytest.mark.parametrize(("comm", "size"), [("shm", 2), ("shm", 3), ("shm", 8), ("gloo", 3)])
def test_gathers_join_uneven_and_empty_parts(ranks: Run, size: int, comm: str) -> None:
    assert ranks(size, wrong_gathers, comm=comm) == [[]] * size


def messages_received(group: Group, sizes: Sequence[int]) -> list[bool]:
    right = []
    for seed, length in enumerate(sizes):
        payload = random.Random(seed).randbytes(length)
        right.append(group.talk.broadcast_bytes(payload if group.rank == 0 else None, timeout=60.0) == payload)
    return right


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("size", [2, 3])
def test_broadcast_bytes_of_any_length_arrive(ranks: Run, size: int, comm: str) -> None:
    lengths = (0, 1, 8167, 8168, 8169, 32_767, 32_768, 32_769, 5_000_000, *[100] * 50)
    assert ranks(size, messages_received, lengths, comm=comm) == [[True] * len(lengths)] * size


def step_of_a_random_run(group: Group, rng: random.Random, seed: int) -> bool:
    talk, kind, n = group.talk, rng.randrange(6), rng.choice((1, 2, 63, 64, 65, 1000, 9000))
    if kind == 0:
        tree, leaves = ReductionTree.over(5, group.size), draw(seed, 5, n)
        return same(talk.tree_sum(owned_roots(leaves, tree, group.rank), tree), sum_of(leaves, 0, 5))
    parts = torch.arange(group.size * n).view(group.size, n) * 7919 % 8191 + seed
    if kind == 1:
        return same(talk.all_reduce_max(parts[group.rank].float()), parts.amax(0).float())
    if kind == 2:
        return same(talk.sum(parts[group.rank].float()), parts.sum(0).float())
    if kind == 3:
        return same(talk.all_gather(parts[group.rank], [n] * group.size, 0), parts.view(-1))
    if kind == 4:
        payload = rng.randbytes(n)
        return talk.broadcast_bytes(payload if group.rank == 0 else None) == payload
    talk.barrier()
    return True


def wrong_steps(group: Group, steps: int) -> list[int]:
    rng = random.Random(3)
    wrong = [step for step in range(steps) if not step_of_a_random_run(group, rng, step)]
    assert sum(group.talk.counts.values()) >= steps
    return wrong


@pytest.mark.parametrize(("comm", "size", "steps"), [("shm", 2, 10_000), ("shm", 3, 3_000), ("gloo", 2, 300)])
def test_thousands_of_random_collectives_in_a_row_stay_right(ranks: Run, comm: str, size: int, steps: int) -> None:
    assert ranks(size, wrong_steps, steps, comm=comm) == [[]] * size


def counts_after_some(group: Group) -> tuple[dict[str, int], dict[str, int]]:
    talk = group.talk
    before, bytes_before = dict(talk.counts), dict(talk.byte_counts)
    tree = ReductionTree.over(8, group.size)
    for _ in range(3):
        talk.tree_sum(torch.zeros(tree.node_counts[group.rank], 10), tree)
    talk.all_gather(torch.zeros(2), [2] * group.size, 0)
    talk.broadcast_bytes(b"abc")
    counts = {kind: count - before.get(kind, 0) for kind, count in talk.counts.items()}
    sent = {kind: count - bytes_before.get(kind, 0) for kind, count in talk.byte_counts.items()}
    return {k: v for k, v in counts.items() if v}, {k: v for k, v in sent.items() if v}


@pytest.mark.parametrize("comm", COMMS)
def test_collectives_and_bytes_are_counted_by_kind(ranks: Run, comm: str) -> None:
    counts, sent = ranks(2, counts_after_some, comm=comm)[1]
    assert counts == {"tree_sum": 3, "all_gather": 1, "broadcast_bytes": 1}
    assert sent == {"tree_sum": 120, "all_gather": 8, "broadcast_bytes": 3}
