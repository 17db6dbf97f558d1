"""Two-hop: sum inside each host first, so that one sum for each host, and not one for each rank, crosses between them.

    encode -> all-to-all inside the host -> decode and sum -> encode
           -> all-to-all between hosts   -> decode and sum -> encode
           -> all-gather between hosts   -> all-gather inside the host -> decode

With n hosts of l ranks, chunk j * n + h belongs to rank j of host h. Rank j of a host collects the chunks j * n to
j * n + n - 1 there, one run of the buffer, and sends one of them to rank j of every host: nothing is permuted. A host
sends 2 N (n - 1) / n elements to other hosts, a flat two-shot l times as many. Every element is encoded three times;
inside a host, where links are fast, in a format of more bits. A rotation is applied by the first encoding, commutes
with both sums and is undone by the last decoding. Answers are passed on as they are, so all ranks end with the same
bits. With one host, or with one rank on each, this is two_shot, in `format` and `answer` alone.
Source: SDP4Bit (Jia et al. 2024, section 3.2, two-level quantization) and qgZ of ZeRO++ (Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from commq.collectives.hosts import Hosts, find_hosts
from commq.collectives.message import ANSWER_STREAM, Message, host_stream, send_stream, with_stream
from commq.collectives.plan import Plan
from commq.collectives.schedule import Schedule
from commq.collectives.two_shot import two_shot


def two_hop(message: Message) -> Schedule:
    """All-reduce a piece.

    Error of a sum, with b(f, x) the `error_bound` of format f, x_w the input of rank w, s_h the exact sum of host h's
    ranks, s the exact sum of all, and D the divisor (W for an average, else 1):

        e1_h = sum over host h's ranks of b(inside, x_w)
        e2_h = b(format, |s_h| + e1_h)
        E    = sum over hosts of (e1_h + e2_h) / D
        |result - s / D| <= E + b(answer, |s| / D + E), plus fp32 rounding of the sums

    Feedback of the first hop (`residual`) holds what `inside` loses, `answer_residual` what the answer loses; what the
    encoding between the two loses is not fed back. ValueError on every rank, before anything is sent, if hosts have
    different numbers of ranks.
    """
    plan, transport, codec = message.plan, message.transport, message.codec
    hosts = find_hosts(transport)
    ranks_per_host = _equal(hosts)
    if hosts.count == 1 or ranks_per_host == 1:
        yield from two_shot(message)
        return
    rank, world_size = transport.rank, transport.world_size
    host, local = hosts.host_of[rank], hosts.local_of[rank]
    # Rows between hosts stand in the order of ranks, which need not be that of hosts: row i is host across[i]'s.
    peers = sorted(ranks[local] for ranks in hosts.members)
    across = [hosts.host_of[peer] for peer in peers]
    shape = (ranks_per_host, hosts.count)

    outgoing = message.take(world_size, plan.inside_bytes)
    for part in message.parts:
        raw = part.part.inside.format.kind == "raw"  # nothing is lost that is worth feeding back
        codec.encode_bucket(
            part.x,
            part.sent_inside(outgoing),
            part.part.inside,
            with_stream(part.coding, send_stream(rank)),
            residual_N=None if raw else part.residual,
            residual_scales_G=None if raw else part.residual_scales,
            decay=part.decay,
            blocks=part.inside_blocks,
        )
    incoming = message.take_received(world_size, plan.inside_bytes)
    splits = _splits(world_size, hosts.members[host], hosts.count * plan.inside_bytes)
    yield transport.all_to_all_v(outgoing.view(-1), incoming.view(-1), splits, splits)

    message.give(outgoing)
    outgoing = message.take(hosts.count, plan.row_bytes)
    for i, to in enumerate(across):
        for part in message.parts:
            codec.decode_sum_encode(
                part.sent_inside(incoming.view(*shape, -1)[:, to]),
                part.part.inside,
                part.sent(outgoing)[i],
                part.part.layout,
                with_stream(part.coding, host_stream(host)),
                chunk=local * hosts.count + to,
                blocks=part.blocks,
            )
    message.give(incoming)
    incoming = message.take_received(hosts.count, plan.row_bytes)
    splits = _splits(world_size, peers, plan.row_bytes)
    yield transport.all_to_all_v(outgoing.view(-1), incoming.view(-1), splits, splits, longest=plan.row_bytes)

    message.give(outgoing)
    incoming = _by_host(message, incoming, across)
    copies = message.take(hosts.count, plan.answer_bytes)
    for part in message.parts:
        codec.decode_sum_encode(
            part.sent(incoming),
            part.part.layout,
            part.answered(copies)[0],
            part.part.answer,
            with_stream(part.coding, ANSWER_STREAM),
            chunk=local * hosts.count + host,
            divisor=message.divisor,
            residual_C=part.answer_residual_C,
            blocks=part.answer_blocks,
        )
    message.give(incoming)
    copies[1:] = copies[0]
    run = message.take_received(hosts.count, plan.answer_bytes)
    splits = _splits(world_size, peers, plan.answer_bytes)
    yield transport.all_to_all_v(copies.view(-1), run.view(-1), splits, splits, longest=plan.answer_bytes)

    message.give(copies)
    run = _by_host(message, run, across)
    copies = message.take(world_size, plan.answer_bytes)
    copies.view(*shape, -1)[:] = run
    message.give(run)
    answers = message.take_received(world_size, plan.answer_bytes)
    splits = _splits(world_size, hosts.members[host], hosts.count * plan.answer_bytes)
    yield transport.all_to_all_v(copies.view(-1), answers.view(-1), splits, splits)

    message.give(copies)
    for part in message.parts:
        codec.decode_bucket(part.answered(answers), part.part.answer, part.out, part.coding)
    message.give(answers)


def sent_bytes(plan: Plan, hosts: Hosts) -> tuple[int, int]:
    """Bytes that each rank sends to other ranks of its host, and to ranks of other hosts. ValueError as `two_hop`."""
    n, per_host = hosts.count, _equal(hosts)
    if n == 1:
        return plan.sent_bytes, 0
    if per_host == 1:
        return 0, plan.sent_bytes
    return (per_host - 1) * n * (plan.inside_bytes + plan.answer_bytes), (n - 1) * (plan.row_bytes + plan.answer_bytes)


def _equal(hosts: Hosts) -> int:
    if hosts.ranks_per_host is None:
        found = ", ".join(str(len(ranks)) for ranks in hosts.members)
        raise ValueError(
            f"two_hop: {hosts.count} hosts of {found} ranks, expected the same number of ranks on every host; use "
            'schedule="two_shot"'
        )
    return hosts.ranks_per_host


def _by_host(message: Message, rows_nS: Tensor, across: list[int]) -> Tensor:
    """Rows in the order of hosts: sums in an order that depends on the owner would depend on how a tensor is cut."""
    if across == sorted(across):
        return rows_nS
    ordered_nS = message.take(*rows_nS.shape)
    for row_S, host in zip(rows_nS, across, strict=True):
        ordered_nS[host] = row_S
    message.give(rows_nS)
    return ordered_nS


def _splits(world_size: int, peers: Iterable[int], nbytes: int) -> list[int]:
    """`nbytes` for each of the peers, nothing for other ranks."""
    splits = [0] * world_size
    for peer in peers:
        splits[peer] = nbytes
    return splits
