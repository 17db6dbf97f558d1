"""Every implementation of the codecs gives the reference's bytes, residuals and decoded numbers, to the bit.

A case (codec_cases.py) draws format, block, scale, lengths, rows, dtypes, rounding, rotation, residual, content and
alignment from its number, and goes through all four families. Random bytes must decode alike as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from codec_cases import SPIKES, SWEEP, Case, assert_same, run_case
from commq.codecs import native, reference
from commq.codecs.formats import FORMATS, get_format
from commq.codecs.reference import Blocks, Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout
from interpreted import interpreted as interpreted_copy

ROUND = len(SWEEP)
"""Cases in which every format and scale comes once."""


def check(numbers: range, codec: ModuleType, device: str, sweep: list = SWEEP) -> None:
    for number in numbers:
        case = Case(number, sweep)
        for fuzz in (False, True):
            assert_same(run_case(case, codec, device, fuzz=fuzz), run_case(case, reference, "cpu", fuzz=fuzz), case)


def native_on(device: str) -> ModuleType:
    if reason := native.missing(torch.device(device)):
        pytest.skip(reason)
    return native


def compiled_triton() -> ModuleType:
    pytest.importorskip("triton", reason="triton is not installed; pip install triton")
    return importlib.import_module("commq.codecs.triton_kernels")


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return interpreted_copy("commq.codecs.triton_kernels")


@pytest.mark.parametrize("turn", range(20))
def test_native_on_cpu(turn: int) -> None:
    check(range(turn * ROUND, (turn + 1) * ROUND), native_on("cpu"), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("turn", range(60))
def test_native_on_cuda(turn: int) -> None:
    check(range(turn * ROUND, (turn + 1) * ROUND), native_on("cuda"), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("turn", range(10))
def test_reference_on_cuda(turn: int) -> None:
    check(range(turn * ROUND, (turn + 1) * ROUND), reference, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3 * ROUND))
def test_triton_on_cuda(number: int) -> None:
    check(range(number, number + 1), compiled_triton(), "cuda")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
@pytest.mark.parametrize("number", range(ROUND))
def test_triton_interpreted(interpreted: ModuleType, number: int) -> None:
    check(range(number, number + 1), interpreted, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3 * len(SPIKES)))
def test_spikes_in_triton_on_cuda(number: int) -> None:
    check(range(number, number + 1), compiled_triton(), "cuda", SPIKES)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
@pytest.mark.parametrize("number", range(len(SPIKES)))
def test_spikes_in_triton_interpreted(interpreted: ModuleType, number: int) -> None:
    check(range(number, number + 1), interpreted, "cpu", SPIKES)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("implementation", [lambda: native_on("cuda"), compiled_triton], ids=["native", "triton"])
def test_more_than_two_to_the_31_elements(implementation: Callable[[], ModuleType]) -> None:
    """int4 of 2**31 + 13 elements: the pieces around 0, 2**31 and the end, against the reference on those pieces."""
    codec = implementation()
    numel, block, piece = 2**31 + 13, 128, 1 << 16
    layout = Layout(get_format("int4", block=block), numel)
    need = 2 * numel + layout.nbytes + 4 * numel
    if (free := torch.cuda.mem_get_info()[0]) < need:
        pytest.skip(f"needs {need:,} bytes of GPU memory, {free:,} are free")
    x = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
    for start in range(0, numel, 1 << 28):
        x[start : start + (1 << 28)].normal_()
    wire = torch.empty(1, layout.nbytes, dtype=torch.uint8, device="cuda")
    out = torch.empty(numel, dtype=torch.float32, device="cuda")
    coding = Coding(rounding="stochastic", seed=1, step=2, stream=3)
    codec.encode_bucket(x, wire, layout, coding)
    codec.decode_bucket(wire, layout, out, coding)
    for start in (0, 2**31 - piece, numel // block * block - piece):
        values = x[start : start + 2 * piece].cpu()
        part = Layout(layout.format, len(values))
        ids_G = torch.arange(part.chunk_blocks) + start // block
        valid_G = (len(values) - torch.arange(part.chunk_blocks) * block).clamp(0, block).to(torch.int32)
        expected = torch.empty(1, part.nbytes, dtype=torch.uint8)
        reference.encode_bucket(values, expected, part, coding, blocks=Blocks(ids_G, valid_G))
        codes = layout.codes(wire)[:, start // 2 :][:, : part.chunk_numel // 2]
        scales = layout.scales(wire)[:, start // block * 4 :][:, : part.chunk_blocks * 4]
        assert torch.equal(codes.cpu(), part.codes(expected)), f"codes from element {start} on"
        assert torch.equal(scales.cpu(), part.scales(expected)), f"scales from element {start} on"
        decoded = torch.empty(len(values))
        reference.decode_bucket(expected, part, decoded, coding)
        assert torch.equal(out[start : start + 2 * piece].cpu(), decoded), f"decoded from element {start} on"


# The native ops inside torch's machinery.


def sample(name: str, device: str, residual: bool = True) -> dict:
    """Arguments of the native families for a small bucket of 4 chunks, with everything that may be absent present."""
    fmt = get_format(name)
    rotation = None if fmt.kind == "raw" else Rotation(size=32, signs=True)
    layout = Layout(fmt, 5000, 4, align=32)
    return {
        "x": torch.randn(5000, device=device),
        "wire": torch.zeros(4, layout.chunk_bytes, dtype=torch.uint8, device=device),
        "layout": layout,
        "coding": Coding(rotation=rotation, seed=1, step=2, stream=3),
        "residual": torch.randn(5000, device=device) if residual and fmt.kind != "raw" else None,
        "out": torch.zeros(5000, device=device),
        "answer": torch.zeros(layout.chunk_bytes, dtype=torch.uint8, device=device),
        "residual_C": torch.randn(layout.chunk_numel, device=device) if residual else None,
    }


def all_reduce_alone(s: dict) -> Tensor:
    """What one rank's chain of kernels would be: encode, reduce, decode, and the float sum."""
    layout, coding = s["layout"], s["coding"]
    native.encode_bucket(s["x"], s["wire"], layout, coding, residual_N=s["residual"], prescale=0.5)
    native.decode_sum_encode(
        s["wire"], layout, s["answer"], layout, coding, chunk=1, divisor=4.0, residual_C=s["residual_C"]
    )
    native.decode_bucket(s["wire"], layout, s["out"], coding, accumulate=True)
    return native.decode_sum(s["answer"].view(1, -1), layout)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_what_travels_raw_is_not_rounded_at_random(name: str, device: str) -> None:
    """A tensor too short for its format travels raw, with the coding of the format."""
    x = torch.randn(131, generator=torch.Generator().manual_seed(0)) * 100
    layout = Layout(get_format(name), len(x), 1)
    coding = Coding(rounding="stochastic", seed=5, step=7)
    expected = torch.zeros(1, layout.chunk_bytes, dtype=torch.uint8)
    reference.encode_bucket(x, expected, layout, coding)
    found = torch.zeros_like(expected, device=device)
    native_on(device).encode_bucket(x.to(device), found, layout, coding)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
def test_opcheck(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of each op: schema, mutated arguments, fake implementation."""
    native_on(device)
    calls = []
    for family, op in list(native._OPS.items()):
        monkeypatch.setitem(native._OPS, family, lambda *args, op=op: calls.append((op, args)))
    all_reduce_alone(sample(name, device))
    monkeypatch.undo()
    assert len(calls) == 4
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["int4"])
def test_torch_compile_without_graph_breaks(name: str, device: str) -> None:
    native_on(device)
    torch.manual_seed(0)
    plain = sample(name, device)
    torch.manual_seed(0)
    traced = sample(name, device)
    expected = all_reduce_alone(plain)
    backend = "inductor" if device == "cuda" else "aot_eager"
    found = torch.compile(all_reduce_alone, fullgraph=True, backend=backend)(traced)
    assert torch.equal(found, expected)
    for key in ("wire", "residual", "out", "answer", "residual_C"):
        assert torch.equal(traced[key], plain[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FORMATS))
def test_cuda_graph_replays_the_chain(name: str) -> None:
    native_on("cuda")
    s = sample(name, "cuda", residual=False)
    s["coding"] = Coding(rotation=None, seed=1)
    all_reduce_alone(s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = all_reduce_alone(s)
    s["x"].normal_()
    s["out"].zero_()
    graph.replay()
    replayed = [t.clone() for t in (s["wire"], s["answer"], s["out"], total)]
    s["out"].zero_()
    expected = all_reduce_alone(s)
    for found, want in zip(replayed, (s["wire"], s["answer"], s["out"], expected), strict=True):
        assert torch.equal(found, want)
