"""`commq.all_gather`: torch.distributed's, with codes on the wire.

encode -> all-gather -> decode
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.rotation import Rotation
from commq.collectives.arguments import check_apart, check_tensor, check_together, copy_back, flat, landing, resolve
from commq.collectives.group import Group, transport_of
from commq.collectives.message import send_stream
from commq.collectives.rows import Piece, RowCodec, RowTensors
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Transport
from commq.collectives.work import Work, launch


def all_gather(
    output: Tensor | Sequence[Tensor],
    input: Tensor,
    *,
    format: Format | str,
    group: Group | None = None,
    async_op: bool = False,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    backend: str = "auto",
) -> Work | None:
    """Collect the ranks' inputs on every rank, in rank order, sending codes of `format`.

    input: float32, bfloat16 or float16, any shape, the same dtype on every rank. output: float32, bfloat16 or float16,
    in another dtype than the input if you like: W * input.numel() elements of any shape, or a list of W tensors,
    possibly of different lengths, the same list on every rank: input has as many elements as output[rank]. input is
    not changed, unless it is the rank's own part of the output (in place).
    step: a number that changes from call to call when rounding is stochastic.
    A rank's own part is encoded and decoded like everybody's, so all ranks end with the same bits. A part that
    encoding would not make smaller travels as it is. With one rank nothing is sent and output is a copy. A NaN or an
    infinity arrives as NaN, with its whole block.
    Error: the `error_bound` of each rank's input, and rounding to the output's dtype.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    single = isinstance(output, Tensor)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    for each in (input, *outputs):
        check_tensor("all_gather", each)
    check_together("all_gather", [input, *outputs])
    fmt, _, coding = resolve(format, None, rounding, rotation, seed, step)
    transport = transport_of(group)
    lengths = _lengths(outputs, input, single, transport)
    codec = RowCodec(fmt, replace(coding, stream=send_stream(transport.rank)), input.device, transport.memory, backend)
    x, flats = flat(input), [landing(each) for each in outputs]
    y = RowTensors.split(flats[0], lengths) if single else RowTensors(flats)
    own = y.rows[transport.rank]
    check_apart("all_gather", y.rows, [x], own)
    finish = copy_back(outputs, flats)

    def copy() -> None:
        own.copy_(x)
        finish()

    alone = transport.world_size == 1
    pieces = () if alone else codec.pieces(lengths, input.dtype)
    return launch(
        (_gather_piece(piece, x, y, codec, transport) for piece in pieces),
        outputs,
        transport,
        async_op=async_op,
        touched=[x, *flats],
        finish=copy if alone else finish,
    )


def _gather_piece(piece: Piece, x: Tensor, out: RowTensors, codec: RowCodec, transport: Transport) -> Schedule:
    run, world_size = piece.runs[transport.rank], transport.world_size
    outgoing = codec.take(1 if piece.even else world_size, run.layout.nbytes)
    codec.encode_run(run, x, outgoing[0])
    incoming = codec.take(1, piece.nbytes)
    if piece.even:
        yield transport.all_gather(outgoing[0], incoming.view(world_size, -1))
    else:
        outgoing[1:] = outgoing[0]
        splits = [run.layout.nbytes] * world_size
        yield transport.all_to_all_v(outgoing.view(-1), incoming[0], splits, piece.splits)

    codec.give(outgoing)
    codec.decode(piece, incoming[0], out)
    codec.give(incoming)


def _lengths(outputs: list[Tensor], input: Tensor, single: bool, transport: Transport) -> list[int]:
    rank, world_size, numel = transport.rank, transport.world_size, input.numel()
    if single:
        if outputs[0].numel() != world_size * numel:
            raise ValueError(
                f"all_gather: output has {outputs[0].numel()} elements, expected {world_size * numel}: the input's "
                f"{numel} for each of {world_size} ranks"
            )
        return [numel] * world_size
    if len(outputs) != world_size:
        raise ValueError(f"all_gather: a list of {len(outputs)} outputs, expected one for each of {world_size} ranks")
    if outputs[rank].numel() != numel:
        raise ValueError(
            f"all_gather: input has {numel} elements, expected {outputs[rank].numel()}, those of output[{rank}]"
        )
    return [each.numel() for each in outputs]
