"""Inputs and bounds that tests of low-precision GEMMs share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from commq.codecs.rotation import Rotation
from commq.lowp.product import Plan, Product
from commq.lowp.quantize import Counter
from commq.lowp.recipes import PRECISIONS
from numerics import nasty_inputs

REAL = ("fp8", "fp8-rowwise", "fp8-block", "int8", "int8-block", "int8-fallback", "switchback")
"""Recipes that a Hopper GPU has GEMMs for."""

PAIRS = [
    ("fp8_e4m3/tensor", "fp8_e4m3/tensor"),
    ("fp8_e5m2/tensor", "fp8_e4m3/row"),
    ("int8/row", "int8/row:stochastic"),
    ("fp8_e4m3/1x128", "fp8_e4m3/1x128"),
    ("fp8_e4m3/128x128", None),
    (None, "fp8_e4m3/128x128"),
    ("int8/32x32:stochastic", "int8/32x32"),
    ("int8/1x128:stochastic", "int8/1x128:stochastic"),
]
"""How a matrix and its transpose are encoded together."""

INT8_PRODUCTS = [
    ("int8/row", (208, 144, 272)),
    ("int8/row x int8/tensor", (128, 272, 128)),
    ("int8/32x32", (160, 288, 96)),
    ("int8/128x128", (256, 128, 256)),
    ("int8/128x128+outliers x int8/128x128", (256, 128, 384)),
    ("int8/128x128 x int8/128x128+outliers", (128, 256, 384)),
]
"""GEMMs and the sizes R, S, C of a_RC @ b_SC.T."""

OPERANDS: list[tuple[str, Rotation | None]] = sorted(
    {
        (str(how), gemm.rotation)
        for precision in PRECISIONS.values()
        for gemm in precision.gemms
        if gemm is not None
        for how in (gemm.first, gemm.second)
    },
    key=str,
)
"""All that recipes quantize, and how it is rotated first."""

RARE = [
    ("int4/tensor", None),
    ("int4/tensor:stochastic", None),
    ("int2/row:stochastic", None),
    ("fp8_e5m2/8x8:stochastic", None),
    ("mxfp8/row", None),
    ("nvfp4/row", None),
    ("nvfp4/1x16+all", None),
    ("int4/row+all", None),
    ("int4/1x24", None),
    ("mxfp4/16x1", None),
    ("fp8_e4m3/row", Rotation(size=16)),
    ("int4/1x16", Rotation(size=32, signs=True)),
    ("fp8_e4m3/1x256", Rotation(size=256, signs=True)),
]
"""What may be asked for besides, some of it served by no kernel."""


def counter(stream: int = 0) -> Counter:
    return Counter(3, stream, torch.tensor(2**33 + 9))


def hard_input(text: str | None) -> Tensor:
    """(128, 144) or, for tiles, (128, 128): a NaN (but for whole tensors), subnormals, zeros, tiny and huge rows."""
    x = torch.randn(128, 144)
    x[3, 5] = 0.0 if text and "tensor" in text else torch.nan
    x[4] = F.pad(nasty_inputs()["subnormals"][:100], (0, 44))
    x[100], x[7], x[9] = x[100] * 1e-30, 0.0, x[9] * 1e30
    return x[:, :128] if text and "x" in text else x


def odd_input(text: str) -> Tensor:
    """(125, 141) with a NaN and an infinity, but for whole tensors; no row dwarfs others that share its scale."""
    whole = "tensor" in text or text.startswith("nvfp4")
    x = hard_input("tensor" if "tensor" in text else None)[:125, :141]
    if whole:
        x[9] *= 1e-28
    if "tensor" not in text:
        x[33, 7] = -torch.inf
    return x


def largest_products(a_RC: Tensor, b_SC: Tensor) -> Tensor:
    """(R, S): the largest of a_rc * b_sc along the contraction."""
    pieces = zip(a_RC.split(16, dim=1), b_SC.split(16, dim=1), strict=True)
    return torch.stack([(a[:, None] * b).amax(dim=-1) for a, b in pieces]).amax(dim=0)


def products(
    recipe: str, capability: tuple[int, int] | None, x: Tensor, w: Tensor, dy: Tensor
) -> tuple[Plan, tuple[Tensor, Tensor, Tensor]]:
    """y, dx and dw of one layer, with GEMMs that are real on a GPU of this capability."""
    plan = Plan.of(PRECISIONS[recipe], (w.shape[0], w.shape[1]), capability, name="layer", seed=1, rank=0)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = Product.apply(x, w, torch.tensor(7), plan, None)
    y.backward(dy)
    return plan, (y.detach(), x.grad, w.grad)
