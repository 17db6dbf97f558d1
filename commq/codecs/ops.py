"""The public pair `encode` / `decode`, and the choice of an implementation."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from commq.codecs import native, reference, tiles
from commq.codecs.formats import Format, get_format
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout

BACKENDS = ("auto", "native", "triton", "reference")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def implementation(backend: str, device: torch.device, *formats: Format) -> ModuleType:
    """The module that implements the codec families of `reference.py` for these formats of tensors on `device`.

    auto: the native library if it was built for the device, else Triton on a GPU, else the reference; a format that
    the first two do not have (dynamic8, means) goes to the reference. All of them give the same bytes.
    One asked for by name that is not there is a RuntimeError with the reason, never a fallback.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    if backend == "native" or (backend == "auto" and native.available(device, *formats)):
        if reason := native.missing(device, *formats):
            raise RuntimeError(f"backend='native': {reason}")
        return native
    lacks = [fmt.name for fmt in formats if fmt.kind == "means" or (fmt.kind == "levels" and fmt.bits == 8)]
    if backend == "triton" and lacks:
        raise RuntimeError(f"backend='triton': it does not have format {lacks[0]}, only tables of up to 16 levels")
    if not lacks and takes_triton(backend, device):
        return importlib.import_module("commq.codecs.triton_kernels")
    return reference


@cache
def tile_implementation(backend: str, device: torch.device) -> ModuleType:
    """The module whose `encode_tiles` and `decode_tiles` are for tensors on `device`, as `implementation` chooses.

    auto: Triton on a GPU, else plain torch (tiles.py). There is no native one: asked for, it is a RuntimeError.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    if backend == "native":
        raise RuntimeError("backend='native': the native library does not have tiles; use backend='auto'")
    return importlib.import_module("commq.codecs.triton_pivots") if takes_triton(backend, device) else tiles


def takes_triton(backend: str, device: torch.device) -> bool:
    """Whether to use Triton; an error if it was asked for by name and cannot be."""
    has_triton = importlib.util.find_spec("triton") is not None
    if backend != "triton":
        return backend == "auto" and device.type == "cuda" and has_triton
    if not has_triton:
        raise RuntimeError("backend='triton': triton is not installed; pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"backend='triton': the tensor is on {device.type}, expected a GPU (or TRITON_INTERPRET=1)")
    return True


@dataclass(frozen=True)
class Encoded:
    """An encoded tensor: `wire` is what would be sent, the rest is what the receiver already knows."""

    wire: Tensor
    """uint8, (layout.nbytes,): codes and scales."""
    layout: Layout
    coding: Coding
    shape: torch.Size

    @property
    def format(self) -> Format:
        return self.layout.format


def check_coding(fmt: Format, coding: Coding) -> None:
    """Refuse what cannot be combined, with the reason."""
    if coding.rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={coding.rounding!r}: expected 'nearest' or 'stochastic'")
    if fmt.fit != "largest" and (coding.rounding == "stochastic" or coding.rotation is None):
        raise ValueError(
            f"format {fmt.name!r} with rounding={coding.rounding!r} and rotation={coding.rotation}: its levels "
            "suit the normal distribution that a rotation makes, and its scale suits the nearest of them; expected "
            "rounding='nearest' and a rotation, such as Rotation(size=1024, signs=True)"
        )
    if coding.rounding == "stochastic" and not fmt.unbiased:
        raise ValueError(
            f"rounding='stochastic' with format {fmt.name!r}: expected a format that rounds in float32, "
            "such as bf16, int8 or int4; fp32 loses nothing, fp16 overflows, means has no neighbours to choose from"
        )
    if coding.rotation is not None and fmt.kind == "raw":
        raise ValueError(
            f"a rotation with format {fmt.name!r}: it spreads outliers for the sake of a shared scale, and "
            f"{fmt.name} has no scale; drop the rotation"
        )


def encode(
    x: Tensor,
    format: Format | str,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rotation: Rotation | int | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 0,
    backend: str = "auto",
) -> Encoded:
    """Encode a tensor of any shape, block by block in memory order.

    x: float32, bfloat16 or float16. format: a Format or its name. rotation: a Rotation or its size.
    seed, step, stream: the counter of stochastic rounding and of random signs; same numbers, same bytes.
    Returns an Encoded whose `wire` is uint8 with format.bits_per_element bits an element plus padding.
    Error: `commq.codecs.bounds.error_bound`. A NaN or an infinity makes its whole block NaN.
    Raises TypeError for another dtype, ValueError for a combination that cannot be.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"encode: dtype {x.dtype}, expected float32, bfloat16 or float16; convert the tensor first")
    fmt = get_format(format) if isinstance(format, str) else format
    rotation = Rotation(size=rotation) if isinstance(rotation, int) else rotation
    coding = Coding(rounding=rounding, rotation=rotation, seed=seed, step=step, stream=stream)
    check_coding(fmt, coding)
    layout = Layout(fmt, x.numel(), align=rotation.size if rotation else 1)
    wire = torch.empty(layout.nbytes, dtype=torch.uint8, device=x.device)
    flat = x.detach().contiguous().view(-1)
    implementation(backend, x.device, fmt).encode_bucket(flat, wire.view(1, -1), layout, coding)
    return Encoded(wire, layout, coding, x.shape)


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32, *, backend: str = "auto") -> Tensor:
    """The tensor that `encoded` stands for, in its original shape.

    dtype: float32, bfloat16 or float16. Raises ValueError if the wire does not have the layout's length.
    """
    if dtype not in _DTYPES:
        raise TypeError(f"decode: dtype {dtype}, expected float32, bfloat16 or float16")
    wire, layout = encoded.wire, encoded.layout
    if wire.dtype != torch.uint8 or wire.shape != (layout.nbytes,):
        raise ValueError(
            f"decode: wire is {wire.dtype} {tuple(wire.shape)}, expected uint8 ({layout.nbytes},) for "
            f"{layout.numel} elements of {layout.format}"
        )
    out = torch.empty(layout.numel, dtype=dtype, device=wire.device)
    implementation(backend, wire.device, layout.format).decode_bucket(wire.view(1, -1), layout, out, encoded.coding)
    return out.view(encoded.shape)
