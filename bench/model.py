"""What a collective must send, and the least time that takes: integers and one division, no measurement.

    python bench/model.py --world-size 4 --rates 1,10,25         # computed milliseconds by size, method and rate
    python bench/model.py --world-size 8 --ranks-per-host 2

The bound of a method is the bytes that each host sends to others, divided by the rate of its link: nothing that sends
these bytes can be faster. Plain all-reduces are rings, 2 (W - 1) / W of the tensor from each rank; of a host with
several ranks only one sends to the next host.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commq.codecs.formats import get_format
from commq.collectives.arguments import PIECE_BYTES
from commq.collectives.plan import Source, make_plans, ring_bytes

PLAIN = {"fp32": 4, "bf16": 2}


def all_reduce_bytes(
    numel: int, format: str, *, world_size: int, ranks_per_host: int = 1, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that a host sends to others in an all-reduce of `numel` elements, two-shot unless `format` is plain."""
    if format in PLAIN:
        return ring_bytes(numel, PLAIN[format], world_size)
    fmt = get_format(format)
    plans = make_plans((Source(numel, dtype, fmt, fmt),), world_size=world_size, piece_bytes=PIECE_BYTES["cuda"])
    away = world_size - ranks_per_host
    return sum(ranks_per_host * away * (plan.row_bytes + plan.answer_bytes) for plan in plans)


def gather_bytes(numel: int, format: str, *, world_size: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a rank sends in a reduce-scatter of `numel` elements, or in an all-gather of as many, all told."""
    if format in PLAIN:
        return ring_bytes(numel, PLAIN[format], world_size) // 2
    return all_reduce_bytes(numel, format, world_size=world_size, dtype=dtype) // 2


def milliseconds(nbytes: int, gbit: float) -> float:
    """Time of `nbytes` on a link of `gbit` Gbit/s."""
    return nbytes * 8 / gbit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rates", default="1,10,25", help="Gbit/s, separated by commas")
    args = parser.parse_args()
    rates = [float(rate) for rate in args.rates.split(",")]
    print(f"computed ms of an all-reduce, W={args.world_size}, {args.ranks_per_host} ranks a host")
    print(f"{'bf16 elements':>14} {'format':>7} {'MB sent':>9} " + " ".join(f"{rate:>7g} Gb" for rate in rates))
    for mi in (1, 16, 64, 128):
        for name in ("fp32", "bf16", "int8", "int4", "sign"):
            nbytes = all_reduce_bytes(
                mi << 20, name, world_size=args.world_size, ranks_per_host=args.ranks_per_host, dtype=torch.bfloat16
            )
            times = " ".join(f"{milliseconds(nbytes, rate):>10.2f}" for rate in rates)
            print(f"{mi:>11} Mi {name:>7} {nbytes / 1e6:>9.2f} {times}")


if __name__ == "__main__":
    main()
