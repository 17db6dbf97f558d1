"""One-shot: every rank sends all of its tensor to every other, which sums. One message in place of two.

    encode -> all-gather -> decode and sum in fp32 (rank order)

It sends W / 2 times the bytes of two-shot and encodes once, so it suits what is so short that only latency counts.
"""

from __future__ import annotations

from commq.codecs.reference import Blocks
from commq.codecs.rotation import unrotate
from commq.codecs.wire import Layout
from commq.collectives.message import Message, send_stream, with_stream
from commq.collectives.plan import Part, ceil16
from commq.collectives.schedule import Schedule


def one_shot(message: Message) -> Schedule:
    """All-reduce a piece. Error: the mean (or sum) of the ranks' encoding errors."""
    transport, codec = message.transport, message.codec
    layouts, nbytes = _rows(message.plan.parts)
    row = message.take(1, nbytes)
    for part, (layout, offset) in zip(message.parts, layouts, strict=True):
        codec.encode_bucket(
            part.x,
            row[:, offset : offset + layout.chunk_bytes],
            layout,
            with_stream(part.coding, send_stream(transport.rank)),
            residual_N=part.residual,
            residual_scales_G=part.residual_scales,
            decay=part.decay,
            blocks=_first_blocks(part.blocks, layout),
        )
    rows = message.take_received(transport.world_size, nbytes)
    yield transport.all_gather(row[0], rows)

    message.give(row)
    for part, (layout, offset) in zip(message.parts, layouts, strict=True):
        total_C = codec.decode_sum(rows[:, offset : offset + layout.chunk_bytes], layout, divisor=message.divisor)
        coding = part.coding
        if coding.rotation is not None:
            signs = coding.rotation.sign_pattern(seed=coding.seed, step=coding.step, device=total_C.device)
            total_C = unrotate(total_C, coding.rotation, signs)
        part.out.copy_(total_C[: part.part.numel])
    message.give(rows)


def row_bytes(parts: tuple[Part, ...]) -> int:
    """Bytes of one rank's message."""
    return _rows(parts)[1]


def _rows(parts: tuple[Part, ...]) -> tuple[list[tuple[Layout, int]], int]:
    """Layout and offset of each part in the one row that holds all of its elements, and the row's length."""
    layouts, offset = [], 0
    for part in parts:
        layout = Layout(part.layout.format, part.numel, 1, part.layout.align)
        layouts.append((layout, offset))
        offset = ceil16(offset + layout.chunk_bytes)
    return layouts, offset


def _first_blocks(blocks: Blocks | None, layout: Layout) -> Blocks | None:
    """Without the blocks that pad a tensor to equal chunks."""
    return None if blocks is None else blocks.chunk(0, layout)
