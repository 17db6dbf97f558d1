"""Plans are integers: every length, every number of ranks, no processes."""

import pytest
import torch

from commq.codecs.formats import FORMATS, get_format
from commq.collectives.plan import RAW, Source, make_plan, make_plans, raw_bytes

LENGTHS = [1, 15, 16, 17, 127, 128, 129, 4096, 100_003]
RANKS = range(1, 18)


def plan_of(name, numel, world_size, dtype=torch.float32, parts=1):
    fmt = get_format(name)
    return make_plan((Source(numel, dtype, fmt, fmt),) * parts, world_size=world_size)


def source(numel, name, answer=None, **options):
    return Source(numel, torch.float32, get_format(name), get_format(answer or name), **options)


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
        plan = make_plan((source(1000, "int4", "int8"), source(77, "bf16", "bf16")), world_size=world_size)
        first, second = plan.parts
        assert second.offset >= first.offset + first.layout.chunk_bytes
        assert second.answer_offset >= first.answer_offset + first.answer.chunk_bytes
        assert second.offset % 16 == second.answer_offset % 16 == plan.row_bytes % 16 == plan.answer_bytes % 16 == 0
        assert second.offset + second.layout.chunk_bytes <= plan.row_bytes


def test_both_hops_have_the_same_chunks():
    coded = Source(100_000, torch.float32, get_format("int4", block=32), get_format("nvfp4"), 1024)
    plan = make_plan((coded,), world_size=3)
    part = plan.parts[0]
    assert part.layout.chunk_numel == part.answer.chunk_numel
    assert part.layout.chunk_numel % 1024 == 0


@pytest.mark.parametrize("world_size", RANKS)
def test_pieces_cover_every_source_once_in_order(world_size):
    lists = [[100_003], [1, 5000, 17, 0, 300_000, 128], [64] * 200, [1_000_000, 3]]
    for numels in lists:
        for piece_bytes in (1 << 10, 1 << 16, 1 << 20):
            sources = tuple(source(numel, "int4", "int8") for numel in numels)
            plans = make_plans(sources, world_size=world_size, piece_bytes=piece_bytes)
            reached = [0] * len(numels)
            for plan in plans:
                assert plan.parts
                for part in plan.parts:
                    assert part.start == reached[part.source] and part.numel > 0
                    reached[part.source] += part.numel
                    unit = 128 * world_size
                    assert part.start % unit == 0, "a piece that is not the last of its source is padded"
                nbytes = sum(4 * part.numel for part in plan.parts)
                assert nbytes <= max(piece_bytes * 5 / 4, 4 * 128 * world_size)
            assert reached == numels


def test_pieces_send_no_more_than_one_piece_does():
    for numel in (100_003, 1 << 20):
        for world_size in RANKS:
            whole = make_plan((source(numel, "int4"),), world_size=world_size)
            plans = make_plans((source(numel, "int4"),), world_size=world_size, piece_bytes=1 << 16)
            assert len(plans) > 1
            # 16 bytes at most where a section of each piece's row ends.
            slack = 2 * 2 * 16 * (world_size - 1) * len(plans)
            assert sum(plan.sent_bytes for plan in plans) <= whole.sent_bytes + slack


def test_a_source_whose_random_bits_are_counted_from_its_start_is_not_cut():
    plans = make_plans((source(1_000_000, "bf16", whole=True),), world_size=2, piece_bytes=1 << 10)
    assert len(plans) == 1 and plans[0].parts[0].numel == 1_000_000
