"""Linear layers in low precision: formats of the three GEMMs, by layer, switched between steps.

conversion = commq.lowp.convert(model, "fp8")
print(conversion.table())
conversion.step(n)  # before each forward pass: the counter of stochastic rounding
"""

from commq.lowp.convert import Conversion, convert
from commq.lowp.gemm import Gemm, Precision
from commq.lowp.linear import Linear
from commq.lowp.operand import Operand
from commq.lowp.policy import LayerRule, Policy, phases, policy, recipes

__all__ = [
    "Conversion",
    "Gemm",
    "LayerRule",
    "Linear",
    "Operand",
    "Policy",
    "Precision",
    "convert",
    "phases",
    "policy",
    "recipes",
]
