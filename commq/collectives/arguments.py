"""What the collectives take: the checks of their arguments, and what the arguments come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from commq.codecs.formats import Format, get_format
from commq.codecs.ops import check_coding
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.collectives.plan import RAW

PIECE_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""Bytes of a tensor that travel as one piece: enough to fill a link, few enough that the first leave soon."""


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


def check_tensor(what: str, tensor: Tensor) -> None:
    """Refuse tensors that cannot be sent or written in place."""
    if tensor.dtype not in RAW:
        raise TypeError(f"{what}: dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{what}: several elements of the tensor share memory (expand); pass tensor.contiguous()")


def check_residual(what: str, residual: Tensor, numel: int) -> None:
    """Refuse a residual that is not as long as the tensor, or that codecs cannot update in place."""
    if (
        residual.numel() != numel
        or residual.dtype not in (torch.float32, torch.bfloat16)
        or not residual.is_contiguous()
    ):
        raise ValueError(
            f"{what}: residual is {residual.dtype} of {residual.numel()} elements, expected contiguous float32 or "
            f"bfloat16 of the tensor's {numel}"
        )


def check_member(what: str, name: str, rank: int, world_size: int) -> None:
    """Refuse what is no rank of the group."""
    if not 0 <= rank < world_size:
        raise ValueError(f"{what}: {name}={rank}, expected a rank in the group, 0 to {world_size - 1}")


def check_together(what: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors on several devices."""
    if len({each.device for each in tensors}) > 1:
        raise ValueError(f"{what}: tensors on {sorted({str(t.device) for t in tensors})}, expected one device")


def check_apart(what: str, written: Sequence[Tensor], read: Sequence[Tensor], own: Tensor | None = None) -> None:
    """Refuse outputs that share memory with inputs; all are contiguous vectors.

    own: the one of them whose partner may be the same elements, in an exchange that reads those before it writes them.
    """
    for y in written:
        for x in read:
            first, last = sorted((x, y), key=Tensor.data_ptr)
            if not x.numel() or not y.numel() or first.data_ptr() + first.nbytes <= last.data_ptr():
                continue
            same = (x.data_ptr(), x.numel(), x.dtype) == (y.data_ptr(), y.numel(), y.dtype)
            if not (same and (x is own or y is own)):
                raise ValueError(
                    f"{what}: output and input share memory, and not as the rank's own part; copy one of them"
                )


def flat(tensor: Tensor) -> Tensor:
    """The elements as a contiguous vector: the tensor's own memory if it is contiguous, else a copy."""
    return tensor.detach().contiguous().view(-1)


def landing(tensor: Tensor) -> Tensor:
    """A contiguous vector to write a tensor's elements into: its own memory if it is contiguous, else fresh memory."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    return torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)


def copy_back(outputs: Sequence[Tensor], flats: Sequence[Tensor]) -> Callable[[], None]:
    """What is left to do in the end: fill the outputs that are not contiguous from their `landing`."""

    def finish() -> None:
        for output, y in zip(outputs, flats, strict=True):
            if not output.is_contiguous():
                output.detach().copy_(y.view(output.shape))

    return finish
