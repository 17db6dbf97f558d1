"""A rank that dies in the middle of an exchange: the others say which, and in which operation."""

import os
import re
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import commq
from commq.collectives import lost
from harness import RankError, run_processes


def all_reduce_until_one_dies(victim):
    lost.PATIENCE = timedelta(seconds=1)
    tensor = torch.ones(1 << 20)
    commq.all_reduce(tensor, format="int8")
    if dist.get_rank() == victim:
        # After the next exchange has begun, at a moment that the others do not choose.
        threading.Timer(0.02, os._exit, (9,)).start()
    for _ in range(10_000):
        commq.all_reduce(tensor, dist.ReduceOp.AVG, format="int8")


@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_name_the_rank_and_the_operation(victim):
    """The harness holds the store, as torchrun does, so rank 0 may be the one.

    A survivor that waits for the other survivor alone sees nothing fail until that one ends: it may be named, too.
    """
    with pytest.raises(RankError) as caught:
        run_processes(all_reduce_until_one_dies, 3, args=(victim,))
    said = str(caught.value)
    for survivor in {0, 1, 2} - {victim}:
        assert f"RankLostError: rank {survivor} of 3: all_" in said
    named = re.findall(r"ranks? ([\d, ]+) ha(?:s|ve) not been heard of for 1 s", said)
    assert len(named) >= 2 and all(str(victim) in ranks.split(", ") for ranks in named), named
    assert str(victim) in named


def wait_for_a_rank_that_does_something_else():
    lost.PATIENCE = timedelta(seconds=1)
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 1:
        dist.barrier()
        return "alive"
    try:
        commq.all_reduce(torch.ones(1000), format="int8", group=group)
    except lost.RankLostError as error:
        dist.barrier()
        return error.ranks
    return "no error"


def test_a_rank_that_does_not_come_is_named_within_the_group_s_timeout():
    assert run_processes(wait_for_a_rank_that_does_something_else, 2) == [(1,), "alive"]
