"""Plans are integers: every length, every number of ranks, no processes."""

import pytest
import torch

from commq.codecs.formats import FORMATS, get_format
from commq.collectives.plan import RAW, make_plan, raw_bytes

LENGTHS = [1, 15, 16, 17, 127, 128, 129, 4096, 100_003]
RANKS = range(1, 18)


def plan_of(name, numel, world_size, dtype=torch.float32, parts=1):
    fmt = get_format(name)
    return make_plan([(numel, fmt, fmt, 1)] * parts, world_size=world_size, dtype=dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_cover_the_tensor_once_and_keep_blocks_whole(name):
    for world_size in RANKS:
        for numel in LENGTHS:
            layout = plan_of(name, numel, world_size).parts[0].layout
            assert layout.chunk_numel % layout.format.unit == 0
            assert sum(layout.valid(chunk) for chunk in range(world_size)) == numel
            assert layout.chunks * layout.chunk_numel >= numel
            ends = [0] if layout.format.kind == "raw" else [layout.scales_offset, layout.groups_offset]
            assert all(end % 16 == 0 for end in ends) and max(ends) <= layout.chunk_bytes


@pytest.mark.parametrize("dtype", RAW)
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_ever_grows(name, dtype):
    """Wire bytes <= the tensor's own bytes on the same path, for every shape: a flat tensor is no exception."""
    for world_size in RANKS:
        for numel in LENGTHS:
            sent = plan_of(name, numel, world_size, dtype).sent_bytes
            assert sent <= raw_bytes(numel, world_size) * dtype.itemsize // 4


def test_bytes_of_the_default_formats():
    """Two-shot bytes of a large tensor, scales included, as a fraction of fp32's."""
    numel = 1 << 20
    for name, bits in {"int8": 8.25, "int4": 4.25, "int2": 2.25, "sign": 1.125, "mxfp4": 4.25, "nvfp4": 4.625}.items():
        assert plan_of(name, numel, 4).sent_bytes / raw_bytes(numel, 4) == bits / 32


def test_parts_do_not_overlap_and_are_aligned():
    for world_size in RANKS:
        plan = make_plan(
            [(1000, get_format("int4"), get_format("int8"), 1), (77, get_format("bf16"), get_format("bf16"), 1)],
            world_size=world_size,
            dtype=torch.float32,
        )
        first, second = plan.parts
        assert second.offset >= first.offset + first.layout.chunk_bytes
        assert second.answer_offset >= first.answer_offset + first.answer.chunk_bytes
        assert second.offset % 16 == second.answer_offset % 16 == plan.row_bytes % 16 == plan.answer_bytes % 16 == 0
        assert second.offset + second.layout.chunk_bytes <= plan.row_bytes


def test_both_hops_have_the_same_chunks():
    plan = make_plan(
        [(100_000, get_format("int4", block=32), get_format("nvfp4"), 1024)], world_size=3, dtype=torch.float32
    )
    part = plan.parts[0]
    assert part.layout.chunk_numel == part.answer.chunk_numel
    assert part.layout.chunk_numel % 1024 == 0
