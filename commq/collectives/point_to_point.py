"""`commq.send` and `commq.recv`: torch.distributed's, with codes on the wire.

All pieces are posted at once: the first travel while the next are encoded, and no rank's `wait` needs its peer to
wait for the same transfer, as between neighbours of a pipeline that both send and receive.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.rotation import Rotation
from commq.collectives.arguments import check_member, check_tensor, copy_back, flat, landing, resolve
from commq.collectives.group import Group, transport_of
from commq.collectives.message import send_stream
from commq.collectives.rows import Piece, RowCodec, RowTensors
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Transport
from commq.collectives.work import Work, launch


def send(
    tensor: Tensor,
    dst: int,
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
    """Send a tensor to rank `dst` of `group`, which must `recv` it, as codes of `format`.

    tensor: float32, bfloat16 or float16, any shape; it is not changed. dst: another rank in the group (in a sub-group
    that is not its global rank). Both sides name the same number of elements, dtype, format, rounding, rotation, seed
    and step.
    step: a number that changes from call to call when rounding is stochastic.
    A tensor that encoding would not make smaller travels as it is. A NaN or an infinity arrives as NaN, with its whole
    block. Blocks until the tensor may be changed; with async_op, `wait` does. NCCL runs the transfers of a pair of
    ranks one after the other, so two ranks must not both send first.
    Error: the receiver holds the tensor to within its `error_bound`.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    check_tensor("send", tensor)
    fmt, _, coding = resolve(format, None, rounding, rotation, seed, step)
    transport = transport_of(group)
    _check_peer("send", "dst", dst, transport)
    codec = RowCodec(fmt, replace(coding, stream=send_stream(transport.rank)), tensor.device, transport.memory, backend)
    x_N = flat(tensor)
    pieces = codec.pieces([x_N.numel()], tensor.dtype)
    return launch([_send(pieces, x_N, dst, codec, transport)], [tensor], transport, async_op=async_op, touched=[x_N])


def recv(
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
    """Receive into `tensor` what rank `src` of `group` sends with `commq.send`.

    tensor: of as many elements as the sender's and of its dtype, any shape. src: another rank in the group. All other
    arguments as the sender's; see `send`. Blocks until the tensor has arrived; with async_op, `wait` does.
    Error: `error_bound` of the sender's tensor.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is received.
    """
    check_tensor("recv", tensor)
    fmt, _, coding = resolve(format, None, rounding, rotation, seed, step)
    transport = transport_of(group)
    _check_peer("recv", "src", src, transport)
    codec = RowCodec(fmt, replace(coding, stream=send_stream(src)), tensor.device, transport.memory, backend)
    y_N = landing(tensor)
    pieces = codec.pieces([y_N.numel()], tensor.dtype)
    return launch(
        [_recv(pieces, y_N, src, codec, transport)],
        [tensor],
        transport,
        async_op=async_op,
        touched=[y_N],
        finish=copy_back([tensor], [y_N]),
    )


def _send(pieces: tuple[Piece, ...], x_N: Tensor, dst: int, codec: RowCodec, transport: Transport) -> Schedule:
    under_way = []
    for piece in pieces:
        wire = codec.take(1, piece.nbytes)
        codec.encode(piece, RowTensors([x_N], x_N), wire[0])
        under_way.append((transport.send(wire[0], dst), wire))
    for move, wire in under_way:
        yield move
        codec.give(wire)


def _recv(pieces: tuple[Piece, ...], y_N: Tensor, src: int, codec: RowCodec, transport: Transport) -> Schedule:
    under_way = []
    for piece in pieces:
        wire = codec.take(1, piece.nbytes)
        under_way.append((piece, transport.recv(wire[0], src), wire))
    for piece, move, wire in under_way:
        yield move
        codec.decode(piece, wire[0], RowTensors([y_N], y_N))
        codec.give(wire)


def _check_peer(what: str, name: str, peer: int, transport: Transport) -> None:
    check_member(what, name, peer, transport.world_size)
    if peer == transport.rank:
        raise ValueError(f"{what}: {name}={peer} is this rank itself, expected another")
