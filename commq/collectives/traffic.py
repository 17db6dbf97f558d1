"""Traffic: what differentiable exchanges have sent, by name and direction. It goes when the group goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from commq.collectives.group import Group, transport_of
from commq.collectives.transport import Transport
from commq.collectives.wires import transport_named


@dataclass(kw_only=True)
class Traffic:
    """Totals of this rank's exchanges of one name. What a rank keeps for itself is not counted."""

    forward_calls: int = 0
    forward_bytes: int = 0
    """Sent to other ranks, scales and padding included; recomputation of checkpointed layers counts again."""
    forward_raw_bytes: int = 0
    """What the same exchanges send of the tensors as they are, in their own dtypes."""
    backward_calls: int = 0
    backward_bytes: int = 0
    backward_raw_bytes: int = 0


def traffic(group: Group | str | None = None) -> dict[str, Traffic]:
    """The traffic of a group (or of one of this name) by the names of its exchanges.

    Those are what was given as `name=`, else the functions' own.
    """
    return _of(transport_named(group) if isinstance(group, str) else transport_of(group))


@contextmanager
def counted(transport: Transport, name: str, raw_bytes: int, *, backward: bool) -> Iterator[None]:
    """Count what is sent within as one exchange."""
    before = transport.memory.sent_bytes
    yield
    sent = transport.memory.sent_bytes - before
    entry = _of(transport).setdefault(name, Traffic())
    if backward:
        entry.backward_calls += 1
        entry.backward_bytes += sent
        entry.backward_raw_bytes += raw_bytes
    else:
        entry.forward_calls += 1
        entry.forward_bytes += sent
        entry.forward_raw_bytes += raw_bytes


def _of(transport: Transport) -> dict[str, Traffic]:
    totals: dict[str, Traffic] = transport.memory.facts.setdefault("traffic", {})
    return totals
