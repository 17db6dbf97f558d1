"""Ring: every rank sends only to the next. For links where only neighbours are fast, and to compare with.

    encode -> to the next rank -> decode, add the own chunk in fp32 -> encode -> ...        W - 1 times
    encode the sum -> to the next rank -> pass on unchanged -> ... -> decode                W - 1 times

It sends the bytes of two_shot in 2 (W - 1) moves that wait for each other, and encodes an element W times in place of
twice: a partial sum of ranks at every hop, whose errors add up. Chunk c starts at rank c + 1 and ends at its owner c.
Units of elements that must stay together are dealt to chunks like cards, unit u to chunk u mod W, so an element starts
its way at the same rank however the tensor is cut into pieces, and its bits are the same.
Source: the ring of Patarasuk and Yuan (2009). What re-encoding at every hop costs: Marsit (Wu et al. 2022).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from commq.codecs.formats import get_format
from commq.codecs.reference import Blocks, count_blocks
from commq.codecs.rotation import rotate
from commq.codecs.wire import Layout
from commq.collectives.message import ANSWER_STREAM, Message, PartOperand, send_stream
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Move, Transport


def ring(message: Message) -> Schedule:
    """All-reduce a piece. Error in chunk c, with b the `error_bound` and p_m the exact sum of ranks c + 1 ... c + m:

        e_0 = 0 ;  e_m = e_{m-1} + b(format, |p_m| + e_{m-1})  for m = 1 ... W - 1
        |result - exact| <= e_{W-1} / D + b(answer, |exact| + e_{W-1} / D), plus fp32 rounding of the sums

    with D the divisor (W for an average, else 1) and exact = p_W / D. b grows with the partial sums, so the error of an
    average grows with W; with sign, whose bound is at least its input, e doubles at every hop.
    """
    plan, transport, codec = message.plan, message.transport, message.codec
    rank, world_size = transport.rank, transport.world_size
    hands = [_Hand(part) for part in message.parts]
    totals = [hand.own_WC[rank - 1] for hand in hands]
    for hop in range(world_size - 1):
        chunk = (rank - 1 - hop) % world_size
        outgoing = message.take(1, plan.row_bytes)
        for hand, total_C in zip(hands, totals, strict=True):
            codec.decode_sum_encode(
                *_as_row(total_C, hand.layout),
                hand.part.sent(outgoing)[0],
                hand.layout,
                replace(hand.part.coding, stream=send_stream(hop * world_size + rank)),
                chunk=chunk,
                blocks=hand.blocks,
            )
        incoming = message.take(1, plan.row_bytes)
        yield _to_next(transport, outgoing[0], incoming[0])

        message.give(outgoing)
        totals = [codec.decode_sum(h.part.sent(incoming), h.layout) + h.own_WC[chunk - 1] for h in hands]
        message.give(incoming)

    answers = message.take(world_size, plan.answer_bytes)
    for hand, total_C in zip(hands, totals, strict=True):
        codec.decode_sum_encode(
            *_as_row(total_C, hand.answer),
            hand.part.answered(answers)[rank],
            hand.answer,
            replace(hand.part.coding, stream=ANSWER_STREAM),
            chunk=rank,
            divisor=message.divisor,
            blocks=hand.answer_blocks,
        )
    for hop in range(world_size - 1):
        chunk = (rank - hop) % world_size
        yield _to_next(transport, answers[chunk], answers[chunk - 1])
    for hand in hands:
        part, dealt = hand.part, hand.part.out.new_empty(hand.answer.numel)
        codec.decode_bucket(part.answered(answers), hand.answer, dealt, part.coding)
        part.out.copy_(gather_up(dealt, hand.answer, 1)[: part.part.numel])
    message.give(answers)


def deal(x: Tensor, layout: Layout, width: int) -> Tensor:
    """From one entry for each `width` elements, in their order, to the order of chunks: unit u in chunk u mod W."""
    return x.view(-1, layout.chunks, layout.unit // width).transpose(0, 1).reshape(-1)


def gather_up(dealt: Tensor, layout: Layout, width: int) -> Tensor:
    """The opposite of `deal`."""
    return dealt.view(layout.chunks, -1, layout.unit // width).transpose(0, 1).reshape(-1)


class _Hand:
    """A part as it was dealt: W chunks of C elements, padding included."""

    def __init__(self, part: PartOperand) -> None:
        planned, coding = part.part.layout, part.coding
        self.part = part
        self.layout, self.answer = _padded(planned), _padded(part.part.answer)
        x = torch.nn.functional.pad(part.x.to(torch.float32), (0, self.layout.numel - planned.numel))
        if coding.rotation is not None:
            signs = coding.rotation.sign_pattern(seed=coding.seed, step=coding.step, device=x.device)
            x = rotate(x, coding.rotation, signs)
        self.own_WC = deal(x, planned, 1).view(planned.chunks, planned.chunk_numel)
        """float32: what this rank adds to each chunk, rotated as encoding would."""
        self.blocks = _deal_blocks(part.blocks, planned, x.device)
        self.answer_blocks = _deal_blocks(part.answer_blocks, part.part.answer, x.device)


def _padded(layout: Layout) -> Layout:
    return replace(layout, numel=layout.chunks * layout.chunk_numel)


def _deal_blocks(blocks: Blocks | None, layout: Layout, device: torch.device) -> Blocks | None:
    block = layout.format.block
    if layout.format.kind == "raw":
        return None
    blocks = blocks or count_blocks(layout, device)
    return Blocks(deal(blocks.ids_G, layout, block), deal(blocks.valid_G, layout, block))


def _as_row(total_C: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """A chunk of float32 as a row (1, 4 C) of the wire, which it already is, and the layout of that row."""
    return total_C.view(torch.uint8).view(1, -1), Layout(get_format("fp32"), layout.numel, layout.chunks, layout.unit)


def _to_next(transport: Transport, outgoing_S: Tensor, incoming_S: Tensor) -> Move:
    """Send to the next rank of the ring and receive from the one before."""
    send_splits, recv_splits = [0] * transport.world_size, [0] * transport.world_size
    send_splits[(transport.rank + 1) % transport.world_size] = outgoing_S.numel()
    recv_splits[transport.rank - 1] = incoming_S.numel()
    return transport.all_to_all_v(outgoing_S, incoming_S, send_splits, recv_splits)
