"""One kernel quantizes an operand: the bits of the plain torch, for everything that recipes ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from commq.codecs import philox
from commq.codecs.formats import get_format
from commq.lowp.operand import operand
from commq.lowp.quantize import quantized, rotated
from commq.lowp.random import random_signs
from commq.lowp.values import values
from interpreted import interpreting
from lowp_cases import OPERANDS, RARE, counter, odd_input


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    with interpreting():
        yield


def specified(x, how, rotation):
    h = x if rotation is None else rotated(x, rotation, counter(7))
    return quantized(h, how, counter(5))


def assert_same(found, want):
    """The signs of zeros, too; any NaN is one."""
    assert found.dtype == torch.float32 and found.is_contiguous() and found.shape == want.shape
    assert torch.equal(found.isnan(), want.isnan()) and not bool(want.isnan().all()) and bool((want != 0).any())
    assert torch.equal(found.nan_to_num(7).view(torch.int32), want.nan_to_num(7).contiguous().view(torch.int32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
@pytest.mark.parametrize(("text", "rotation", "i"), [(*case, i) for i, case in enumerate([*OPERANDS, *RARE])])
def test_values_have_the_bits_of_the_specification(interpreted, text, rotation, i):
    x, how = odd_input(text), operand(text)
    x = x.bfloat16().T if i % 2 else x
    assert_same(values(x, how, counter(5), rotation, counter(7)), specified(x, how, rotation))


@pytest.mark.parametrize("text", ["int4/1x32:stochastic", "nvfp4/1x16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (0, 32), (5, 0)])
def test_any_shape_and_strides(interpreted, text, shape):
    """Every second row and third column; and one number everywhere, as the gradient of a sum is."""
    how = operand(text)
    for x in (torch.randn(2 * shape[0], 3 * shape[1]).half()[::2, ::3], torch.full((1, 1), 0.3).expand(shape)):
        found = values(x, how, counter(5), None, counter(7))
        assert torch.equal(found, quantized(x, how, counter(5))) and found.shape == shape


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scales_of_another_dtype(interpreted):
    x, how = odd_input("int8"), operand("int8/1x32")
    rounded_up = replace(how, format=get_format("int8", scale="bf16"))
    found = [values(x, each, counter(5), None, counter(7)) for each in (how, rounded_up)]
    assert_same(found[1], specified(x, rounded_up, None))
    assert not torch.equal(found[0].nan_to_num(7), found[1].nan_to_num(7))


def test_a_kernel_serves_all_but_outliers(interpreted):
    from commq.lowp import triton_quantize as kernels

    left = [text for text, rotation in OPERANDS if not kernels.serves(operand(text))]
    assert left == ["int8/128x128+outliers"]
    assert all(kernels.rotates(operand(text), rotation.size) for text, rotation in OPERANDS if rotation is not None)


@pytest.mark.parametrize("turned", [False, True])
def test_the_operator_keeps_its_promises_to_a_compiler(turned):
    x = torch.randn(40, 70)
    args = x.T if turned else x, torch.tensor(3), "int4/1x32:stochastic", "fp32", 32, True, [1, 2, 3]
    torch.library.opcheck(torch.ops.commq.lowp_quantize.default, args)


@pytest.mark.parametrize("size", [16, 100, 320])
def test_signs_are_those_of_rotations(size):
    clock = torch.tensor(2**33 + 9)
    want = philox.random_signs(size, seed=3, step=clock, stream=7, device=clock.device)
    assert torch.equal(random_signs(clock, size, 3, 7), want)
