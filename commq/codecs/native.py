"""The codec families of `reference.py` in native code: CUDA kernels and their CPU twins, in commq/_native.so.

Same signatures, same bytes. Each function turns its Layout and Coding into the one list of numbers that the op takes
and calls it, with no argument that has its default value; nothing is allocated besides the result, nothing waits for
the device, and work goes to the current stream.
The ops `torch.ops.commq.*` have fake implementations, so they go through torch.compile and CUDA graph capture. Their
overloads are held here: looking one up by name costs the host as much as some of its arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commq.codecs.formats import FITS, FORMATS, SCALE_BYTES, Format
from commq.codecs.reference import Blocks, Coding
from commq.codecs.wire import Layout

LIBRARY = Path(__file__).resolve().parent.parent / "_native.so"

_FORMAT_IDS = {name: number for number, name in enumerate(FORMATS)}
_LEVELS_IDS = {bits: len(FORMATS) + bits - 1 for bits in (1, 2, 3, 4)}
_SCALE_IDS = {name: number for number, name in enumerate(SCALE_BYTES)}


def _load() -> str:
    """Load the library; the reason why it could not be loaded, or ""."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY} was not built: there was no C++ compiler or no torch in sight when commq was installed; "
            "run `pip install --no-build-isolation` or `python setup.py build_ext --inplace`"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} could not be loaded: {error}"
    return ""


_MISSING = _load()


def missing(device: torch.device, *formats: Format) -> str:
    """Why tensors on `device` cannot be coded natively in all these formats; "" if they can."""
    if _MISSING:
        return _MISSING
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None:
        return f"the native library has no code for {device.type} tensors"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("commq::encode_bucket", key):
        return f"{LIBRARY} was built without {key} code: nvcc was not found; set CUDA_HOME and install again"
    for fmt in formats:
        if fmt.kind in ("means", "spikes"):
            return f"the native library does not have format {fmt.name}"
        if fmt.kind == "levels" and fmt.bits not in _LEVELS_IDS:
            return f"the native library has tables of at most 16 levels, not the {len(fmt.levels)} of {fmt.name}"
    return ""


def available(device: torch.device, *formats: Format) -> bool:
    """Whether tensors on `device` can be coded natively in all these formats."""
    return not missing(device, *formats)


def _numbers(layout: Layout) -> list[int]:
    """The layout as the ops take it (layout_of in cuda/ops.cpp), remembered in the layout itself."""
    numbers: list[int] | None = layout.__dict__.get("_native_numbers")
    if numbers is None:
        fmt = layout.format
        format_id = _LEVELS_IDS[fmt.bits] if fmt.kind == "levels" else _FORMAT_IDS[fmt.name]
        numbers = [
            format_id | _SCALE_IDS[fmt.scale] << 16 | fmt.block << 32 | fmt.group << 48,
            layout.numel,
            layout.chunks,
            layout.chunk_numel,
            layout.scales_offset,
            layout.groups_offset,
            layout.chunk_bytes,
        ]
        if fmt.kind == "levels":
            floats = [1 / fmt.spread**2 if fmt.spread else 0.0, *fmt.levels]
            numbers += [FITS.index(fmt.fit), *torch.tensor(floats, dtype=torch.float32).view(torch.int32).tolist()]
        layout.__dict__["_native_numbers"] = numbers
    return numbers


def _signs(coding: Coding, tensor: Tensor) -> Tensor | None:
    rotation = coding.rotation
    if rotation is None or not rotation.signs:
        return None
    return rotation.sign_pattern(seed=coding.seed, step=coding.step, device=tensor.device)


def _drawing(coding: Coding) -> tuple[int, int, int, int]:
    """The coding as the ops take it (random_of in cuda/ops.cpp)."""
    size = 0 if coding.rotation is None else coding.rotation.size
    return 2 * size + (coding.rounding == "stochastic"), coding.seed, coding.stream, coding.step


def encode_bucket(
    x_N: Tensor,
    wire_WS: Tensor,
    layout: Layout,
    coding: Coding,
    *,
    prescale: float = 1.0,
    residual_N: Tensor | None = None,
    residual_scales_G: Tensor | None = None,
    decay: float = 0.0,
    blocks: Blocks | None = None,
) -> None:
    """See `reference.encode_bucket`."""
    call = [*_drawing(coding), *_numbers(layout)]
    if prescale == 1.0 and residual_N is None and coding.rotation is None and blocks is None:
        _OPS["encode_bucket"](x_N, wire_WS, call)
        return
    _OPS["encode_bucket"](
        x_N,
        wire_WS,
        call,
        prescale,
        residual_N,
        residual_scales_G,
        decay,
        _signs(coding, x_N),
        None if blocks is None else blocks.ids_G,
        None if blocks is None else blocks.valid_G,
    )


def decode_bucket(wire_WS: Tensor, layout: Layout, out_N: Tensor, coding: Coding, *, accumulate: bool = False) -> None:
    """See `reference.decode_bucket`."""
    rotation = 0 if coding.rotation is None else coding.rotation.size
    call = [rotation, *_numbers(layout)]
    if rotation or accumulate:
        _OPS["decode_bucket"](wire_WS, call, out_N, _signs(coding, out_N), accumulate)
    else:
        _OPS["decode_bucket"](wire_WS, call, out_N)


def decode_sum(wire_KS: Tensor, layout: Layout, *, divisor: float = 1.0) -> Tensor:
    """See `reference.decode_sum`."""
    out_C = torch.empty(layout.chunk_numel, dtype=torch.float32, device=wire_KS.device)
    _OPS["decode_sum"](wire_KS, _numbers(layout), divisor, out_C)
    return out_C


def decode_sum_encode(
    wire_KS: Tensor,
    layout: Layout,
    answer_S: Tensor,
    answer_layout: Layout,
    coding: Coding,
    *,
    chunk: int,
    divisor: float = 1.0,
    residual_C: Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """See `reference.decode_sum_encode`."""
    call = [*_drawing(coding), chunk, *_numbers(layout)]
    if residual_C is None and answer_layout is layout and blocks is None:
        _OPS["decode_sum_encode"](wire_KS, call, answer_S, divisor)
        return
    _OPS["decode_sum_encode"](
        wire_KS,
        call,
        answer_S,
        divisor,
        residual_C,
        None if answer_layout is layout else _numbers(answer_layout),
        None if blocks is None else blocks.ids_G,
        None if blocks is None else blocks.valid_G,
    )


def _writes_only(*_: Any) -> None:
    """The fake implementation of every op: they write into tensors they are given and return nothing."""


_OPS: dict[str, torch._ops.OpOverload] = {}

if not _MISSING:
    for _name in ("encode_bucket", "decode_bucket", "decode_sum", "decode_sum_encode"):
        torch.library.register_fake(f"commq::{_name}", _writes_only)
        _OPS[_name] = getattr(torch.ops.commq, _name).default
