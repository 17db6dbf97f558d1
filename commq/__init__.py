"""commq compresses what distributed PyTorch training sends.

The path of a tensor, folder by folder:

    attach -> (+ residual) -> rotate -> encode -> exchange -> decode-sum -> encode -> exchange -> decode -> attach
               feedback/      codecs/             collectives/

One line turns it on for a DistributedDataParallel module:

    handle = commq.register(ddp, "int4")
"""

from commq.attach.ddp import HookState, comm_hook, register
from commq.build_info import build_info
from commq.codecs.formats import Format, get_format
from commq.codecs.ops import Encoded, decode, encode
from commq.codecs.rotation import Rotation
from commq.collectives.all_reduce import all_reduce
from commq.feedback.rule import Feedback
from commq.feedback.state import fold
from commq.recipe import Exempt, Recipe, recipe, recipes

__all__ = [
    "Encoded",
    "Exempt",
    "Feedback",
    "Format",
    "HookState",
    "Recipe",
    "Rotation",
    "all_reduce",
    "build_info",
    "comm_hook",
    "decode",
    "encode",
    "fold",
    "get_format",
    "recipe",
    "recipes",
    "register",
]
__version__ = "0.1.0"
