"""The command line: options in, exit code out."""

import sys
from collections.abc import Sequence

import torch.distributed as dist
import tyro

from commq.train.config import Config
from commq.train.ranks import join_ranks
from commq.train.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns 0: complete or stopped in order, 1: loss not finite, 2: wrong options or data.

    Any other error leaves with its traceback, so that the launcher ends the other ranks.
    """
    config = tyro.cli(Config, prog="python -m commq.train", args=arguments, config=(tyro.conf.OmitArgPrefixes,))
    try:
        run = Run(config, join_ranks())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        run.execute()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    dist.destroy_process_group()
    return 0
