"""Named precisions of linear layers, and the policies made of them.

fp8            one scale a tensor: E4M3 forward, E5M2 gradients (Micikevicius et al. 2022, arXiv 2209.05433)
fp8-rowwise    E4M3 everywhere, one scale a row
fp8-block      E4M3, 1x128 activations and gradients, 128x128 weights (DeepSeek-V3, arXiv 2412.19437)
int8           one scale a row
int8-block     32x32 tiles, gradients rounded stochastically (Jetfire, arXiv 2403.12422)
int8-fallback  128x128 tiles; activation tiles with outliers in two terms (arXiv 2503.08040)
switchback     int8 forward and input gradient, the weight gradient as it is (arXiv 2304.13013)
mxfp8          1x32, scales rounded up, E4M3 for gradients too (arXiv 2506.08027)
mxfp4          1x32; backward unbiased: stochastic rounding after a random Hadamard transform (arXiv 2502.20586; our
               scale is rounded up, so nothing clips and its factor 3/4 is not needed)
nvfp4          1x16, weights 16x16, stochastic gradients, random Hadamard for the weight gradient (arXiv 2509.25149)
int4           Hadamard forward; gradients split in two 4-bit terms (arXiv 2306.11987), backward unbiased
fp4-tpt        attention FP8, feed-forward FP4, weight gradients FP8, the end as it is (arXiv 2502.11458)
bf16           every GEMM as it is
"""

from __future__ import annotations

from commq.lowp.gemm import Precision, precision

_INT4_BACKWARD = "int4/1x32+all:stochastic x int4/1x32:stochastic random hadamard 32"

PRECISIONS: dict[str, Precision] = {
    name: precision(dict(zip(("forward", "input_gradient", "weight_gradient"), texts, strict=True)))
    for name, texts in {
        "bf16": (None, None, None),
        "fp8": ("fp8_e4m3/tensor", *["fp8_e5m2/tensor x fp8_e4m3/tensor"] * 2),
        "fp8-rowwise": ("fp8_e4m3/row",) * 3,
        "fp8-block": (*["fp8_e4m3/1x128 x fp8_e4m3/128x128"] * 2, "fp8_e4m3/1x128"),
        "int8": ("int8/row",) * 3,
        "int8-block": ("int8/32x32", *["int8/32x32:stochastic x int8/32x32"] * 2),
        "int8-fallback": (
            "int8/128x128+outliers x int8/128x128",
            "int8/128x128:stochastic x int8/128x128",
            "int8/128x128:stochastic x int8/128x128+outliers",
        ),
        "switchback": (*["int8/row x int8/tensor"] * 2, None),
        "mxfp8": ("mxfp8/1x32",) * 3,
        "mxfp4": ("mxfp4/1x32 hadamard 32", *["mxfp4/1x32:stochastic random hadamard 32"] * 2),
        "nvfp4": (
            "nvfp4/1x16 x nvfp4/16x16",
            "nvfp4/1x16:stochastic x nvfp4/16x16",
            "nvfp4/1x16:stochastic x nvfp4/1x16 random hadamard 16",
        ),
        "int4": ("int4/1x32 hadamard 32", *[_INT4_BACKWARD] * 2),
        "fp4-tpt": ("mxfp4/1x32", "mxfp4/1x32:stochastic x mxfp4/1x32", "fp8_e4m3/row"),
    }.items()
}
"""fp4-tpt is that of its feed-forward layers."""
