"""`commq.reduce_scatter`: torch.distributed's, with codes on the wire.

encode -> all-to-all -> decode and sum in fp32 (rank order)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.rotation import Rotation
from commq.collectives.arguments import (
    check_apart,
    check_residual,
    check_tensor,
    check_together,
    copy_back,
    flat,
    landing,
    resolve,
)
from commq.collectives.group import Group, transport_of
from commq.collectives.message import send_stream
from commq.collectives.rows import Piece, RowCodec, RowTensors
from commq.collectives.schedule import Schedule
from commq.collectives.transport import Transport
from commq.collectives.work import Work, launch


def reduce_scatter(
    output: Tensor,
    input: Tensor | Sequence[Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    *,
    format: Format | str,
    group: Group | None = None,
    async_op: bool = False,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Work | None:
    """Sum or average the ranks' inputs, sending codes of `format`; rank w ends with part w of the result.

    input: float32, bfloat16 or float16, W * output.numel() elements in rank order, any shape, the same dtype on every
    rank; or a list of W tensors, possibly of different lengths: output has as many elements as input[rank]. input is
    not changed. output: float32, bfloat16 or float16, in another dtype than the input if you like; it may be the
    rank's own part of the input (in place).
    step: a number that changes from call to call when rounding is stochastic.
    residual: classic error feedback of an input that is one tensor: contiguous float32 or bfloat16 with as many
    elements, read and written in place.
    Sums are fp32 in rank order. A rank's own part is encoded and decoded like everybody's, so the result does not
    depend on which rank owns it. A part that encoding would not make smaller travels as it is. With one rank nothing
    is sent: output is a copy, and residual stays as it was. A NaN or an infinity on one rank arrives as NaN, with its
    whole block.
    Error: with b_w the `error_bound` of rank w's part, |result - exact| <= sum_w b_w (AVG: mean_w b_w), plus fp32
    rounding of the sum and rounding to the output's dtype.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    single = isinstance(input, Tensor)
    tensors = [input] if isinstance(input, Tensor) else list(input)
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        raise ValueError(f"reduce_scatter: op {op}, expected ReduceOp.SUM or ReduceOp.AVG")
    for each in (output, *tensors):
        check_tensor("reduce_scatter", each)
    check_together("reduce_scatter", [output, *tensors])
    if len({each.dtype for each in tensors}) > 1:
        raise TypeError(f"reduce_scatter: inputs of {sorted({str(t.dtype) for t in tensors})}, expected one dtype")
    fmt, _, coding = resolve(format, None, rounding, rotation, seed, step)
    if residual is not None:
        if not single:
            raise ValueError("reduce_scatter: a residual goes with one input tensor, not with a list")
        check_residual("reduce_scatter", residual, tensors[0].numel())
        check_together("reduce_scatter", [output, residual])
    transport = transport_of(group)
    lengths = _lengths(output, tensors, single, transport)
    codec = RowCodec(fmt, replace(coding, stream=send_stream(transport.rank)), output.device, transport.memory, backend)
    flats = [flat(each) for each in tensors]
    if codec.whole and not single:
        single, flats = True, [torch.cat(flats)]
    x = RowTensors.split(flats[0], lengths) if single else RowTensors(flats)
    y, own = landing(output), x.rows[transport.rank]
    check_apart("reduce_scatter", [y], x.rows, own)
    finish = copy_back([output], [y])

    def copy() -> None:
        y.copy_(own)
        finish()

    alone = transport.world_size == 1
    divisor = float(transport.world_size) if op == dist.ReduceOp.AVG else 1.0
    lost = None if residual is None else RowTensors.split(residual.detach().view(-1), lengths)
    pieces = () if alone else codec.pieces(lengths, tensors[0].dtype)
    return launch(
        (_reduce_piece(piece, x, y, lost, codec, transport, divisor) for piece in pieces),
        [output],
        transport,
        async_op=async_op,
        touched=[y, *flats, *([] if residual is None else [residual])],
        finish=copy if alone else finish,
    )


def _reduce_piece(
    piece: Piece,
    x: RowTensors,
    out_C: Tensor,
    residual: RowTensors | None,
    codec: RowCodec,
    transport: Transport,
    divisor: float,
) -> Schedule:
    run, world_size = piece.runs[transport.rank], transport.world_size
    outgoing = codec.take(1, piece.nbytes)
    codec.encode(piece, x, outgoing[0], residual)
    incoming = codec.take(world_size, run.layout.nbytes)
    if piece.even:
        yield transport.all_to_all(outgoing.view(world_size, -1), incoming)
    else:
        splits = [run.layout.nbytes] * world_size
        yield transport.all_to_all_v(outgoing[0], incoming.view(-1), piece.splits, splits)

    codec.give(outgoing)
    codec.decode_sum(run, incoming, out_C, divisor=divisor)
    codec.give(incoming)


def _lengths(output: Tensor, inputs: list[Tensor], single: bool, transport: Transport) -> list[int]:
    rank, world_size, numel = transport.rank, transport.world_size, output.numel()
    if single:
        if inputs[0].numel() != world_size * numel:
            raise ValueError(
                f"reduce_scatter: input has {inputs[0].numel()} elements, expected {world_size * numel}: one part of "
                f"the output's {numel} for each of {world_size} ranks"
            )
        return [numel] * world_size
    if len(inputs) != world_size:
        raise ValueError(f"reduce_scatter: a list of {len(inputs)} inputs, expected one for each of {world_size} ranks")
    if inputs[rank].numel() != numel:
        raise ValueError(
            f"reduce_scatter: output has {numel} elements, expected {inputs[rank].numel()}, those of input[{rank}]"
        )
    return [each.numel() for each in inputs]
