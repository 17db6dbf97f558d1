"""`commq.all_reduce`: torch.distributed's, with codes on the wire and a choice of schedules."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from commq.codecs.formats import Format, get_format
from commq.codecs.ops import check_coding
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.collectives.arguments import PIECE_BYTES, check_residual, check_tensor, resolve
from commq.collectives.decision import log_decision
from commq.collectives.group import Group, transport_of
from commq.collectives.hosts import find_hosts
from commq.collectives.message import Operand, make_messages
from commq.collectives.plain import is_narrow
from commq.collectives.plan import Plan, Source, make_plans
from commq.collectives.route import SCHEDULES, check_schedule, find_route, inside_format
from commq.collectives.shortcut import add_shortcut, find_shortcut
from commq.collectives.work import Work, launch

__all__ = ["SCHEDULES", "all_reduce", "answer_residual_numel"]


def all_reduce(
    tensor: Tensor | Sequence[Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    *,
    format: Format | str,
    answer: Format | str | None = None,
    inside: Format | str | None = None,
    schedule: str = "auto",
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
    in one exchange. answer: format of the second hop, if it is another one.
    schedule: one of SCHEDULES, or "auto": the one that should be the fastest by what this group's link and codecs were
    measured to do, plain where compression would lose. Measurements differ from job to job and so may the choice,
    which decides the bits: name a schedule to repeat a run. The logger "commq" tells once what was chosen.
    inside: format between ranks of one host, in two_hop; by default int8 where `format` has fewer bits.
    step: a number that changes from call to call when rounding is stochastic.
    residual: error feedback of the first hop (classic), float32 or bfloat16, as many elements as the tensor; read and
    written in place. answer_residual: that of the second hop, float32, `answer_residual_numel(...)` elements.
    Sums are fp32 in rank order; all ranks end with the same bits. A tensor that encoding would not make smaller
    travels as it is. A NaN or an infinity on one rank arrives as NaN, with its whole block, on all ranks.
    Error: with b_w the `error_bound` of rank w's tensor and b the bound of the reduced one,
    |result - exact| <= sum_w b_w + b (AVG: mean_w b_w + b), plus fp32 rounding of the sum; one_shot has no b.
    Of two_hop and ring: see there.
    In a CUDA graph, after the same call was made once outside: step and seed are captured with it.
    Returns a Work if async_op, else None. Raises TypeError, ValueError before anything is sent.
    """
    call: Hashable = None
    if type(tensor) is Tensor and residual is answer_residual is None and not async_op:
        about = tensor.numel(), tensor.dtype, tensor.device, op
        call = "call", about, format, answer, inside, schedule, rounding, rotation, backend
        shortcut = find_shortcut(group, call)
        if shortcut is not None and tensor.is_contiguous():
            shortcut.run(tensor, group)  # type: ignore[arg-type]  # only process groups have any
            return None
    tensors = [tensor] if isinstance(tensor, Tensor) else list(tensor)
    feeds = residual is not None, answer_residual is not None
    fmt, second, within, coding = _resolve(format, answer, inside, schedule, rounding, rotation, *feeds)
    _check(tensor, tensors, op, residual, answer_residual)
    transport = transport_of(group)
    flats = [each.detach().contiguous().view(-1) for each in tensors]
    sent = [flat for flat in flats if flat.numel()] if transport.world_size > 1 else []
    if not sent:
        return launch((), tensors, transport, async_op=async_op)
    # Found once for messages that look alike: finding it takes longer than a short message.
    kinds = tuple((flat.numel(), flat.dtype) for flat in sent)
    key = "all_reduce", schedule, fmt, second, within, coding, sent[0].device, backend, kinds
    route = transport.memory.notes.get(key)
    if route is None:
        if schedule == "auto" and not find_hosts(transport).has_two_levels:
            within = None
        sources = _sources(sent, fmt, second, coding, within)
        narrow = all(is_narrow(flat.dtype, fmt, coding) for flat in sent)
        route = find_route(schedule, sources, coding, transport, device=sent[0].device, backend=backend, narrow=narrow)
        transport.memory.note(key, route)
        if schedule == "auto":
            log_decision(transport, "all-reduces", route.name, fmt, sum(f.nbytes for f in sent))
    if route.name == "plain" and call is not None and not is_narrow(sent[0].dtype, fmt, coding):
        add_shortcut(transport, call, sent[0], op)
    if seed or step:
        coding = replace(coding, seed=seed, step=step)
    operands = [Operand(flat, flat, coding, residual_N=residual, answer_residual=answer_residual) for flat in sent]
    if answer_residual is not None:
        _check_answer_residual(answer_residual, route.plans)
    messages = make_messages(route.plans, operands, transport, average=op == dist.ReduceOp.AVG, backend=backend)
    copied = [(t.detach(), f) for t, f in zip(tensors, flats, strict=True) if t.data_ptr() != f.data_ptr()]

    def copy_back() -> None:
        for target, flat in copied:
            target.copy_(flat.view(target.shape))

    return launch(
        map(route.build, messages),
        tensors,
        transport,
        async_op=async_op,
        touched=[*flats, *(r for r in (residual, answer_residual) if r is not None)],
        finish=copy_back if copied else None,
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
    inside: Format | str | None = None,
    schedule: str = "two_shot",
) -> int:
    """Elements of `answer_residual` for a tensor of `numel` elements: about numel / world_size, padding included.

    All arguments as for the all_reduce that it is meant for.
    """
    fmt, second, coding = resolve(format, answer, "nearest", rotation, 0, 0)
    within = _inside(inside, fmt, schedule, coding)
    sources = _sources([torch.empty(numel, dtype=dtype, device="meta")], fmt, second, coding, within)
    return _answer_numel(make_plans(sources, world_size=world_size, piece_bytes=PIECE_BYTES[device]))


@lru_cache(maxsize=256)
def _resolve(
    format: Format | str,
    answer: Format | str | None,
    inside: Format | str | None,
    schedule: str,
    rounding: Literal["nearest", "stochastic"],
    rotation: Rotation | int | None,
    feeds_back: bool,
    feeds_answer_back: bool,
) -> tuple[Format, Format, Format | None, Coding]:
    """Formats of the hops and the one inside hosts, and a coding of seed and step 0."""
    fmt, second, coding = resolve(format, answer, rounding, rotation, 0, 0)
    within = _inside(inside, fmt, schedule, coding)
    check_schedule(schedule, fmt, residual=feeds_back, answer_residual=feeds_answer_back)
    return fmt, second, within, coding


def _inside(inside: Format | str | None, fmt: Format, schedule: str, coding: Coding) -> Format | None:
    if schedule not in ("two_hop", "auto"):
        if inside is not None:
            raise ValueError(f"all_reduce: inside={inside!s} with schedule {schedule!r}; it goes with two_hop and auto")
        return None
    if inside is None:
        return inside_format(fmt)
    resolved = get_format(inside) if isinstance(inside, str) else inside
    check_coding(resolved, coding)
    return resolved


def _sources(
    flats: list[Tensor], fmt: Format, answer: Format, coding: Coding, inside: Format | None = None
) -> tuple[Source, ...]:
    align = coding.rotation.size if coding.rotation else 1
    whole = coding.rounding == "stochastic" and "raw" in (fmt.kind, answer.kind, inside.kind if inside else "")
    return tuple(Source(flat.numel(), flat.dtype, fmt, answer, align, inside, whole) for flat in flats)


def _check(
    tensor: object,
    tensors: list[Tensor],
    op: dist.ReduceOp.RedOpType,
    residual: Tensor | None,
    answer_residual: Tensor | None,
) -> None:
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        raise ValueError(f"all_reduce: op {op}, expected ReduceOp.SUM or ReduceOp.AVG")
    for each in tensors:
        check_tensor("all_reduce", each)
    if len({each.device for each in tensors}) > 1:
        raise ValueError(f"all_reduce: tensors on {sorted({str(t.device) for t in tensors})}, expected one device")
    if not isinstance(tensor, Tensor) and not (residual is None and answer_residual is None):
        raise ValueError("all_reduce: residuals go with one tensor, not with a list; call it once for each")
    if residual is not None:
        check_residual("all_reduce", residual, tensors[0].numel())


def _check_answer_residual(answer_residual: Tensor, plans: tuple[Plan, ...]) -> None:
    expected = _answer_numel(plans)
    if answer_residual.dtype != torch.float32 or answer_residual.shape != (expected,):
        raise ValueError(
            f"all_reduce: answer_residual is {answer_residual.dtype} {tuple(answer_residual.shape)}, expected float32 "
            f"({expected},); see answer_residual_numel"
        )


def _answer_numel(plans: tuple[Plan, ...]) -> int:
    return sum(part.answer.chunk_numel for plan in plans for part in plan.parts)
