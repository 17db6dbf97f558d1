"""`commq.all_reduce`: torch.distributed's, with codes on the wire and a choice of schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from commq.codecs.formats import Format, get_format
from commq.codecs.ops import check_coding
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.collectives.group import Group, transport_of
from commq.collectives.message import Message, Operand, make_messages
from commq.collectives.one_shot import one_shot
from commq.collectives.plain import plain
from commq.collectives.plan import RAW, Plan, Source, make_plans
from commq.collectives.schedule import Schedule
from commq.collectives.two_shot import two_shot
from commq.collectives.work import Work, launch

SCHEDULES: dict[str, Callable[[Message], Schedule]] = {
    "two_shot": two_shot,
    "one_shot": one_shot,
    "plain": plain,
}

PIECE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""Bytes of a tensor that travel as one piece: enough to fill a link, few enough that the first leave soon."""


def all_reduce(
    tensor: Tensor | Sequence[Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    *,
    format: Format | str,
    answer: Format | str | None = None,
    inside: Format | str | None = None,
    schedule: str = "two_shot",
    group: Group | None = None,
    async_op: bool = False,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    residual: Tensor | None = None,
    answer_residual: Tensor | None = None,
    backend: str = "auto",
) -> Work | None:
    """Sum or average `tensor` over the ranks of `group`, in place, sending codes of `format`.

    tensor: float32, bfloat16 or float16, any shape, the same on every rank; or a list of such tensors, which travel
    in one exchange. answer: format of the second hop, if it is another one. schedule: one of SCHEDULES.
    inside: format between ranks of one host, for two_hop; by default int8 where `format` has fewer bits.
    step: a number that changes from call to call when rounding is stochastic.
    residual: error feedback of the first hop (classic), float32 or bfloat16, as many elements as the tensor; read and
    written in place. answer_residual: that of the second hop, float32, `answer_residual_numel(...)` elements.
    Sums are fp32 in rank order; all ranks end with the same bits. A tensor that encoding would not make smaller
    travels as it is. A NaN or an infinity on one rank arrives as NaN, with its whole block, on all ranks.
    Error: with b_w the `error_bound` of rank w's tensor and b the bound of the reduced one,
    |result - exact| <= sum_w b_w + b (AVG: mean_w b_w + b), plus fp32 rounding of the sum; one_shot has no b.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    single = isinstance(tensor, Tensor)
    tensors = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        raise ValueError(f"all_reduce: op {op}, expected ReduceOp.SUM or ReduceOp.AVG")
    for each in tensors:
        check_tensor("all_reduce", each)
    if len({each.device for each in tensors}) > 1:
        raise ValueError(f"all_reduce: tensors on {sorted({str(t.device) for t in tensors})}, expected one device")
    if schedule not in SCHEDULES:
        raise ValueError(f"all_reduce: schedule {schedule!r} is unknown; expected one of {', '.join(SCHEDULES)}")
    fmt, second, coding = resolve(format, answer, rounding, rotation, seed, step)
    if residual is not None or answer_residual is not None:
        _check_residuals(single, tensors, residual, answer_residual, schedule)
    within = _inside(inside, fmt, schedule, coding)
    transport = transport_of(group)
    flats = [each.detach().contiguous().view(-1) for each in tensors]
    used = [i for i, flat in enumerate(flats) if flat.numel()] if transport.world_size > 1 else []
    operands = [Operand(flats[i], flats[i], coding, residual_N=residual, answer_residual=answer_residual) for i in used]
    plans = _plans([flats[i] for i in used], fmt, second, coding, transport.world_size, inside=within) if used else ()
    if answer_residual is not None and used:
        _check_answer_residual(answer_residual, plans)
    messages = make_messages(plans, operands, transport, average=op == dist.ReduceOp.AVG, backend=backend)
    copied = [(t.detach(), f) for t, f in zip(tensors, flats, strict=True) if t.data_ptr() != f.data_ptr()]

    def copy_back() -> None:
        for target, flat in copied:
            target.copy_(flat.view(target.shape))

    return launch(
        (SCHEDULES[schedule](message) for message in messages) if used else (),
        tensors,
        transport,
        async_op=async_op,
        touched=[*flats, *(r for r in (residual, answer_residual) if r is not None)],
        finish=copy_back if copied and used else None,
    )


def answer_residual_numel(
    numel: int,
    *,
    format: Format | str,
    world_size: int,
    dtype: torch.dtype = torch.float32,
    answer: Format | str | None = None,
    rotation: Rotation | int | None = None,
    device: str = "cpu",
) -> int:
    """Elements of `answer_residual` for a tensor of `numel` elements: about numel / world_size, padding included."""
    fmt, second, coding = resolve(format, answer, "nearest", rotation, 0, 0)
    plans = _plans([torch.empty(numel, dtype=dtype, device="meta")], fmt, second, coding, world_size, device=device)
    return sum(part.answer.chunk_numel for plan in plans for part in plan.parts)


def resolve(
    format: Format | str,
    answer: Format | str | None,
    rounding: Literal["nearest", "stochastic"],
    rotation: Rotation | int | None,
    seed: int,
    step: int,
) -> tuple[Format, Format, Coding]:
    """Formats of both hops and the coding that arguments name. ValueError if they do not go together."""
    fmt = get_format(format) if isinstance(format, str) else format
    second = get_format(answer) if isinstance(answer, str) else answer or fmt
    coding = Coding(
        rounding=rounding,
        rotation=Rotation(size=rotation) if isinstance(rotation, int) else rotation,
        seed=seed,
        step=step,
    )
    for each in (fmt, second):
        check_coding(each, coding)
    return fmt, second, coding


def _inside(inside: Format | str | None, fmt: Format, schedule: str, coding: Coding) -> Format | None:
    if schedule != "two_hop":
        if inside is not None:
            raise ValueError(f"all_reduce: inside={inside!s} with schedule {schedule!r}; it goes with two_hop")
        return None
    if inside is None:
        return get_format("int8", block=fmt.block) if fmt.kind != "raw" and fmt.bits < 8 else fmt
    resolved = get_format(inside) if isinstance(inside, str) else inside
    check_coding(resolved, coding)
    return resolved


def check_tensor(what: str, tensor: Tensor) -> None:
    """Refuse tensors that cannot be sent or written in place."""
    if tensor.dtype not in RAW:
        raise TypeError(f"{what}: dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{what}: several elements of the tensor share memory (expand); pass tensor.contiguous()")


def _plans(
    flats: list[Tensor],
    fmt: Format,
    answer: Format,
    coding: Coding,
    world_size: int,
    *,
    inside: Format | None = None,
    device: str = "",
) -> tuple[Plan, ...]:
    align = coding.rotation.size if coding.rotation else 1
    whole = coding.rounding == "stochastic" and "raw" in (fmt.kind, answer.kind)
    sources = tuple(Source(flat.numel(), flat.dtype, fmt, answer, align, inside, whole) for flat in flats)
    piece_bytes = PIECE_BYTES[device or flats[0].device.type]
    return make_plans(sources, world_size=world_size, piece_bytes=piece_bytes)


def _check_residuals(
    single: bool, tensors: list[Tensor], residual: Tensor | None, answer_residual: Tensor | None, schedule: str
) -> None:
    if not single:
        raise ValueError("all_reduce: residuals go with one tensor, not with a list; call it once for each")
    if residual is not None and (
        residual.numel() != tensors[0].numel()
        or residual.dtype not in (torch.float32, torch.bfloat16)
        or not residual.is_contiguous()
    ):
        raise ValueError(
            f"all_reduce: residual is {residual.dtype} of {residual.numel()} elements, expected contiguous float32 or "
            f"bfloat16 of the tensor's {tensors[0].numel()}"
        )
    if schedule != "two_shot" and not (schedule == "one_shot" and answer_residual is None):
        raise ValueError(
            f"all_reduce: schedule {schedule!r} keeps no {'residual' if residual is not None else 'answer_residual'}; "
            "use two_shot"
        )


def _check_answer_residual(answer_residual: Tensor, plans: tuple[Plan, ...]) -> None:
    expected = sum(part.answer.chunk_numel for plan in plans for part in plan.parts)
    if answer_residual.dtype != torch.float32 or answer_residual.shape != (expected,):
        raise ValueError(
            f"all_reduce: answer_residual is {answer_residual.dtype} {tuple(answer_residual.shape)}, expected float32 "
            f"({expected},); see answer_residual_numel"
        )
