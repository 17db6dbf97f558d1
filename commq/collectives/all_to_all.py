"""`commq.all_to_all`: torch.distributed's all_to_all_single, with codes on the wire.

encode -> all-to-all -> decode
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
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


def all_to_all(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
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
    """Send split w of `input` to rank w, and receive split w of `output` from it, as codes of `format`.

    input, output: float32, bfloat16 or float16, at least 1-D, with the same number of elements for each index of
    dimension 0; the same input dtype on every rank, and another output dtype if you like; no common memory.
    output_split_sizes, input_split_sizes: W lengths along dimension 0; None: equal ones. Pass both as None on all ranks
    or on none: only equal splits are cut into pieces, of which one is encoded while another travels. With others no
    rank knows how long the longest split is that two others exchange, so all of them go in one message.
    step: a number that changes from call to call when rounding is stochastic.
    The split that a rank sends to itself does not cross the wire: it is copied exactly. A split that encoding would
    not make smaller travels as it is. A NaN or an infinity arrives as NaN, with its whole block; blocks start anew
    with each split.
    Error: the `error_bound` of each split, and rounding to the output's dtype.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    for each in (output, input):
        check_tensor("all_to_all", each)
    check_together("all_to_all", [output, input])
    fmt, _, coding = resolve(format, None, rounding, rotation, seed, step)
    if min(output.dim(), input.dim()) < 1 or output.shape[1:].numel() != input.shape[1:].numel():
        raise ValueError(
            f"all_to_all: output {tuple(output.shape)} and input {tuple(input.shape)}, expected the same number of "
            "elements for each index of dimension 0"
        )
    transport = transport_of(group)
    rank = transport.rank
    lengths = _lengths("input", input, input_split_sizes, transport.world_size)
    out_lengths = _lengths("output", output, output_split_sizes, transport.world_size)
    if lengths[rank] != out_lengths[rank]:
        raise ValueError(
            f"all_to_all: rank {rank} sends itself {lengths[rank]} elements and expects {out_lengths[rank]} from itself"
        )
    x_N, y_N = flat(input), landing(output)
    check_apart("all_to_all", [y_N], [x_N])
    x, y = RowTensors.split(x_N, lengths), RowTensors.split(y_N, out_lengths)
    codec = RowCodec(fmt, replace(coding, stream=send_stream(rank)), input.device, transport.memory, backend)
    finish = copy_back([output], [y_N])

    def copy_own() -> None:
        y.rows[rank].copy_(x.rows[rank])
        finish()

    return launch(
        _exchange_pieces(x, y, input.dtype, codec, transport, even=not (input_split_sizes or output_split_sizes)),
        [output],
        transport,
        async_op=async_op,
        touched=[x_N, y_N],
        finish=copy_own,
    )


def _exchange_pieces(
    x: RowTensors, y: RowTensors, dtype: torch.dtype, codec: RowCodec, transport: Transport, *, even: bool
) -> Iterator[Schedule]:
    if transport.world_size == 1:
        return
    sent, received = [row.numel() for row in x.rows], [row.numel() for row in y.rows]
    # The own split is left out, but where one call encodes all of them at once.
    together = even and any(piece.together for piece in codec.pieces(sent, dtype))
    kept = None if together or codec.whole else transport.rank
    outgoing = codec.pieces(sent, dtype, kept=kept, single=not even)
    incoming = codec.pieces(received, dtype, kept=kept, single=not even)
    for out_piece, in_piece in zip(outgoing, incoming, strict=True):
        yield _exchange_piece(out_piece, in_piece, x, y, codec, transport, together)


def _exchange_piece(
    sent: Piece, received: Piece, x: RowTensors, y: RowTensors, codec: RowCodec, transport: Transport, together: bool
) -> Schedule:
    outgoing, incoming = codec.take(1, sent.nbytes), codec.take(1, received.nbytes)
    codec.encode(sent, x, outgoing[0])
    if together:
        rows = outgoing.view(transport.world_size, -1)
        yield transport.all_to_all(rows, incoming.view(rows.shape))
    else:
        yield transport.all_to_all_v(outgoing[0], incoming[0], sent.splits, received.splits)

    codec.give(outgoing)
    codec.decode(received, incoming[0], y)
    codec.give(incoming)


def _lengths(name: str, tensor: Tensor, sizes: Sequence[int] | None, world_size: int) -> list[int]:
    """Elements of each split."""
    size, width = tensor.shape[0], tensor.shape[1:].numel()
    if not sizes:
        if size % world_size:
            raise ValueError(
                f"all_to_all: {name} has {size} rows, expected a multiple of {world_size}, one split for each rank; or "
                f"pass {name}_split_sizes"
            )
        return [size // world_size * width] * world_size
    if len(sizes) != world_size or min(sizes) < 0 or sum(sizes) != size:
        raise ValueError(
            f"all_to_all: {name}_split_sizes={list(sizes)}, expected {world_size} lengths with the sum {size}, the "
            f"{name}'s dimension 0"
        )
    return [length * width for length in sizes]
