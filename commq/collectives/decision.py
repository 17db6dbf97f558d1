"""Decisions of schedule "auto", told once: nobody should believe that bytes are saved where they are not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commq.collectives.transport import Transport

_log = logging.getLogger("commq")


def log_decision(transport: Transport, what: str, chosen: str, format: object, nbytes: int) -> None:
    """Once for a group, what is exchanged, format and whether it is compressed; on rank 0, by the logger "commq".

    chosen: a schedule, or "plain". nbytes: of the first such message.
    """
    key = "told", what, chosen == "plain", str(format)
    if key in transport.memory.facts:
        return
    transport.memory.facts[key] = chosen
    if transport.rank:
        return
    if chosen == "plain":
        _log.warning(
            "commq: schedule auto chose plain for %s of %d bytes: by measurement, compression with %s would be slower "
            "there, so messages like it travel uncompressed",
            what,
            nbytes,
            format,
        )
    else:
        _log.info("commq: schedule auto chose %s with %s for %s of %d bytes", chosen, format, what, nbytes)
