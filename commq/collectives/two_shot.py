"""Two-shot: every element is encoded twice, however many ranks there are.

    encode -> all-to-all -> decode and sum in fp32 (rank order) -> encode -> all-gather -> decode

Rank w owns chunk w. The owner decodes its own messages like everybody else, so all ranks end with the same bits.
With format sign and feedback on both hops this is the compressed all-reduce of 1-bit Adam (Tang et al. 2021, section
4.2), but for the scale: mean |x| of each block, which is nearer in the 2-norm than their root mean square.
"""

from __future__ import annotations

from commq.collectives.message import ANSWER_STREAM, Message, send_stream, with_stream
from commq.collectives.schedule import Schedule


def two_shot(message: Message) -> Schedule:
    """All-reduce a piece. Error: the mean (or sum) of the ranks' encoding errors, and that of the answer."""
    plan, transport, codec = message.plan, message.transport, message.codec
    world_size, rank = transport.world_size, transport.rank
    outgoing = message.take(world_size, plan.row_bytes)
    for part, wire_WS in zip(message.parts, message.sent(outgoing), strict=True):
        codec.encode_bucket(
            part.x,
            wire_WS,
            part.part.layout,
            with_stream(part.coding, send_stream(rank)),
            residual_N=part.residual,
            residual_scales_G=part.residual_scales,
            decay=part.decay,
            blocks=part.blocks,
        )
    incoming = message.take_received(world_size, plan.row_bytes)
    yield transport.all_to_all(outgoing, incoming)

    message.give(outgoing)
    own = message.take(1, plan.answer_bytes)
    row = own[0]
    for part, wire_WS, answer_S in zip(message.parts, message.sent(incoming), message.answered(row), strict=True):
        codec.decode_sum_encode(
            wire_WS,
            part.part.layout,
            answer_S,
            part.part.answer,
            with_stream(part.coding, ANSWER_STREAM),
            chunk=rank,
            divisor=message.divisor,
            residual_C=part.answer_residual_C,
            blocks=part.answer_blocks,
        )
    message.give(incoming)
    answers = message.take_received(world_size, plan.answer_bytes)
    yield transport.all_gather(row, answers)

    message.give(own)
    for part, wire_WS in zip(message.parts, message.answered(answers), strict=True):
        codec.decode_bucket(wire_WS, part.part.answer, part.out, part.coding)
    message.give(answers)
