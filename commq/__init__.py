"""commq compresses what distributed PyTorch training sends.

The path of a tensor, folder by folder:

    attach -> (+ residual) -> rotate -> encode -> exchange -> decode-sum -> encode -> exchange -> decode -> attach
               feedback/      codecs/             collectives/

One line turns it on for a DistributedDataParallel module:

    handle = commq.register(ddp, "int4")

`commq.optim` has optimizers that send a momentum in one bit in place of the gradient. `commq.functional` has
differentiable exchanges, for activations and their gradients; ColwiseParallel, RowwiseParallel, SequenceParallel and
Experts are layers that use them. `commq.lowp` computes linear layers in low precision.
"""

from typing import TYPE_CHECKING, Any

from commq import functional, lowp, optim
from commq.attach.check import ReplicaError
from commq.attach.crossing import Direct, Tiles
from commq.attach.ddp import HookState, comm_hook, register
from commq.attach.differences import Differences
from commq.attach.estimate import estimate_memory
from commq.attach.experts import Experts
from commq.attach.fold import fold
from commq.attach.fsdp import fully_shard, handle_of
from commq.attach.fsdp_module import FSDP
from commq.attach.tensor_parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from commq.build_info import build_info
from commq.codecs.formats import Format, get_format
from commq.codecs.ops import Encoded, decode, encode
from commq.codecs.rotation import Rotation
from commq.collectives.all_gather import all_gather
from commq.collectives.all_reduce import all_reduce
from commq.collectives.all_to_all import all_to_all
from commq.collectives.broadcast import broadcast
from commq.collectives.point_to_point import recv, send
from commq.collectives.reduce_scatter import reduce_scatter
from commq.feedback.rule import Feedback
from commq.policy.exempt import Exempt
from commq.policy.levels import Adapt
from commq.policy.phase import Phase
from commq.policy.rule import Rule
from commq.policy.widths import Widths
from commq.recipe import Recipe
from commq.recipes import recipe, recipes

if TYPE_CHECKING:
    from commq.attach.pipeline import PipelineStage

__all__ = [
    "FSDP",
    "Adapt",
    "ColwiseParallel",
    "Differences",
    "Direct",
    "Encoded",
    "Exempt",
    "Experts",
    "Feedback",
    "Format",
    "HookState",
    "Phase",
    "PipelineStage",
    "Recipe",
    "ReplicaError",
    "Rotation",
    "RowwiseParallel",
    "Rule",
    "SequenceParallel",
    "Tiles",
    "Widths",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "build_info",
    "comm_hook",
    "decode",
    "encode",
    "estimate_memory",
    "fold",
    "fully_shard",
    "functional",
    "get_format",
    "handle_of",
    "lowp",
    "optim",
    "recipe",
    "recipes",
    "recv",
    "reduce_scatter",
    "register",
    "send",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`PipelineStage`, when it is asked for: torch's pipelining takes two seconds to import, and Triton with it."""
    if name == "PipelineStage":
        from commq.attach.pipeline import PipelineStage

        return PipelineStage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
