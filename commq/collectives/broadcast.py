"""`commq.broadcast`: torch.distributed's, with codes on the wire."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.rotation import Rotation
from commq.collectives.arguments import check_member, check_tensor, copy_back, flat, resolve
from commq.collectives.group import Group, transport_of
from commq.collectives.message import send_stream
from commq.collectives.rows import Piece, RowCodec, RowTensors
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Transport
from commq.collectives.work import Work, launch


def broadcast(
    tensor: Tensor,
    src: int,
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
    """Copy rank `src`'s tensor to all ranks of `group`, in place, sending codes of `format`.

    tensor: float32, bfloat16 or float16, any shape, the same on every rank. src: a rank in the group (in a sub-group
    that is not its global rank).
    step: a number that changes from call to call when rounding is stochastic.
    The source's tensor, too, becomes what was decoded, so all ranks end with the same bits. A tensor that encoding
    would not make smaller travels as it is. With one rank nothing is sent and the tensor stays as it is. A NaN or an
    infinity arrives as NaN, with its whole block.
    Error: the `error_bound` of the source's tensor, and rounding to its dtype.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    check_tensor("broadcast", tensor)
    fmt, _, coding = resolve(format, None, rounding, rotation, seed, step)
    transport = transport_of(group)
    check_member("broadcast", "src", src, transport.world_size)
    codec = RowCodec(fmt, replace(coding, stream=send_stream(src)), tensor.device, transport.memory, backend)
    x_N = flat(tensor)
    pieces = codec.pieces([x_N.numel()], tensor.dtype) if transport.world_size > 1 else ()
    return launch(
        (_copy_piece(piece, RowTensors([x_N], x_N), src, codec, transport) for piece in pieces),
        [tensor],
        transport,
        async_op=async_op,
        touched=[x_N],
        finish=copy_back([tensor], [x_N]),
    )


def _copy_piece(piece: Piece, x: RowTensors, src: int, codec: RowCodec, transport: Transport) -> Schedule:
    wire = codec.take(1, piece.nbytes)
    if transport.rank == src:
        codec.encode(piece, x, wire[0])
    yield transport.broadcast(wire[0], src)

    codec.decode(piece, wire[0], x)
    codec.give(wire)
