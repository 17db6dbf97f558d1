"""Linear layers in low precision: formats of the three GEMMs, by layer, switched between steps.

conversion = commq.lowp.convert(model, "fp8")
print(conversion.table())
conversion.step(n)  # before each forward pass: the counter of stochastic rounding
"""

from commq.lowp.control import Control
from commq.lowp.convert import Conversion, convert
from commq.lowp.gemm import Gemm, Precision
from commq.lowp.linear import Linear
from commq.lowp.operand import Operand
from commq.lowp.policy import LayerRule, Policy, phases, policy, recipes
from commq.lowp.schedule import Schedule, schedule
from commq.lowp.spike import SpikeDetector

__all__ = [
    "Control",
    "Conversion",
    "Gemm",
    "LayerRule",
    "Linear",
    "Operand",
    "Policy",
    "Precision",
    "Schedule",
    "SpikeDetector",
    "convert",
    "phases",
    "policy",
    "recipes",
    "schedule",
]
