"""The command line: options in, exit code out."""

import sys
from collections.abc import Sequence

import torch.distributed as dist
import tyro

from commq.train.config import Config
from commq.train.config_file import expand
from commq.train.ranks import join_ranks
from commq.train.report import check_matplotlib, write_report
from commq.train.run import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns 0: complete or stopped in order, 1: loss not finite, 2: wrong options or data.

    Any other error leaves with its traceback, so that the launcher ends the other ranks.
    """
    try:
        given = expand(sys.argv[1:] if arguments is None else arguments)
        config = tyro.cli(Config, prog="python -m commq.train", args=given, config=(tyro.conf.OmitArgPrefixes,))
        if config.output.report:
            check_matplotlib()
        run = Run(config, join_ranks())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        run.execute()
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if config.output.report and run.ranks.rank == 0 and run.trainer.step == config.steps:
        print(f"report  {write_report(run)}", flush=True)
    dist.destroy_process_group()
    return 0
