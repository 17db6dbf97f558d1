"""Differences: a boundary sends how a sample's activation has changed since it last crossed (AQ-SGD).

    first time   send a in format `first`     both sides keep m = what arrived
    later        send q = encode(a - m)       both sides: m <- m + decode(q), which is what the receiver uses

A sample's activation changes little from epoch to epoch, so 2 to 4 bits of the difference say more than as many of the
activation, and what was lost is part of the next difference. For training over several epochs; not for gradients.

A wire: | the samples' numbers: int64, whole 16 bytes | the micro-batch |. The receiver compares the numbers to its own.
A micro-batch with a sample that has not crossed before goes in format `first` as a whole. Where the new m is not finite
the old one stays (0 the first time). A NaN reaches the receiver as NaN.
Source: AQ-SGD (Wang et al. 2022, arXiv 2206.01299, section 3).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from commq.attach.crossing import Crossing, Place, Samples, Turn, warn_of_shared_blocks
from commq.attach.sample_cache import PLACES, Rows, SampleCache, row_bytes
from commq.codecs.formats import Format, get_format
from commq.codecs.ops import check_coding, implementation
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.codecs.wire import Layout

_log = logging.getLogger("commq")


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Way of activations whose samples have numbers: `stage.set_samples` before every step, on all stages."""

    names_samples: ClassVar[bool] = True
    samples: int
    """Numbers are 0 to samples - 1."""
    format: Format = get_format("int4")
    """Of differences: 2 to 4 bits."""
    rotation: Rotation | None = None
    """Of differences."""
    first: Format = get_format("bf16")
    """Of what crosses for the first time, and of samples without names."""
    storage: Format = get_format("bf16")
    """Of what both sides keep."""
    cache: Literal["device", "host", "disk"] = "host"
    """Where they keep it."""
    folder: Path | None = None
    """Of cache "disk": where each side makes its file."""

    def __post_init__(self) -> None:
        check_coding(self.format, self.coding)
        for fmt in (self.first, self.storage):
            check_coding(fmt, Coding())
        if self.rotation is not None and self.rotation.signs:
            raise ValueError("differences with a rotation with signs: those change with the step; drop the signs")
        if self.format.kind == "raw":
            raise ValueError(f"differences in format {self.format.name!r}: expected one of few bits, such as int4")
        if self.samples < 1 or self.cache not in PLACES or (self.cache == "disk") != (self.folder is not None):
            raise ValueError(
                f"differences of {self.samples} samples with cache={self.cache!r}, folder={self.folder}: expected one "
                f"sample or more, cache one of {', '.join(PLACES)}, and a folder for disk alone"
            )

    @property
    def coding(self) -> Coding:
        """Of differences."""
        return Coding(rotation=self.rotation)

    def cache_bytes(self, shape: Sequence[int]) -> int:
        """Bytes that each side of a boundary keeps, for one sample's activation of this shape."""
        return self.samples * row_bytes(self.storage, math.prod(shape))

    def crossing(self, place: Place, like: Tensor) -> Crossing:
        return _DifferenceCrossing(self, place, like)


@dataclass(frozen=True)
class _Passage:
    """A micro-batch that crosses."""

    turn: Turn
    samples: Samples | None
    """Its own."""
    known: bool
    """All of them have crossed before. Both sides say the same."""
    header: int
    """Bytes of the samples' numbers, up to a multiple of 16."""
    layout: Layout
    """Of the micro-batch on the wire."""


class _DifferenceCrossing(Crossing):
    def __init__(self, way: Differences, place: Place, like: Tensor) -> None:
        if like.ndim < 2 or not like.numel():
            raise ValueError(f"{place}: shape {tuple(like.shape)}, expected samples in rows, with elements")
        self._way, self._place, self._device = way, place, like.device
        self._rows, self._numel = like.shape[0], like.numel() // like.shape[0]
        self._known = torch.zeros(way.samples, dtype=torch.bool)
        side = "sender" if place.sends else "receiver"
        file = None
        if way.folder is not None:
            file = way.folder / f"boundary-{place.boundary}-tensor-{place.index}-{side}.bin"
        if place.sends:
            size = way.cache_bytes(like.shape[1:]) / 1e9
            warn_of_shared_blocks(place, like, max(way.format.unit, way.rotation.size if way.rotation else 1))
            _log.warning("%s: each side keeps %.3f GB (%s) for %d samples", place, size, way.cache, way.samples)
        self._cache = SampleCache(
            way.samples, self._numel, way.storage, way.cache, like.device, file, place.backend
        )  # fmt: skip
        numel = self._rows * self._numel
        self._first = Layout(way.first, numel)
        self._later = Layout(way.format, numel, align=way.rotation.size if way.rotation else 1)
        if self._later.nbytes >= self._first.nbytes:
            self._later = self._first  # a difference that would not be shorter
        self._passages: dict[int, _Passage] = {}

    def nbytes(self, turn: Turn) -> int:
        passage = self._passage(turn)
        return passage.header + passage.layout.nbytes

    def encode(self, x_N: Tensor, wire_S: Tensor, turn: Turn) -> None:
        passage = self._passage(turn)
        named, kept, change_N = 8 * self._rows, self._kept(passage), x_N
        if passage.samples is not None:
            wire_S[:named].view(torch.int64).copy_(passage.samples.device)
            wire_S[named : passage.header].zero_()
        if kept is not None:
            change_N = self._cache.difference(x_N, kept)
        codes_1S = wire_S[passage.header :].view(1, -1)
        codec = implementation(self._place.backend, self._device, passage.layout.format)
        codec.encode_bucket(change_N, codes_1S, passage.layout, self._coding(passage.layout))
        if passage.samples is not None:
            delta_N = self._decode(codes_1S, passage.layout, torch.empty(x_N.numel(), device=self._device))
            self._cache.advance(passage.samples.host, passage.samples.device, kept, delta_N)
            self._done(passage)

    def decode(self, wire_S: Tensor, y_N: Tensor, turn: Turn) -> None:
        passage = self._passage(turn)
        codes_1S = wire_S[passage.header :].view(1, -1)
        if passage.samples is None:
            self._decode(codes_1S, passage.layout, y_N)
            return
        theirs = wire_S[: 8 * self._rows].view(torch.int64)
        self._check(theirs, passage)
        kept = self._kept(passage)
        delta_N = self._decode(codes_1S, passage.layout, torch.empty(y_N.numel(), device=self._device))
        self._cache.advance(passage.samples.host, passage.samples.device, kept, delta_N, y_N, theirs)
        self._done(passage)

    def prefetch(self, samples: Samples) -> None:
        if self._way.cache == "device":
            return
        for first in range(0, len(samples.host), self._rows):
            ids = samples.host[first : first + self._rows]
            # Those that do not fit are refused when they cross, by the stages on both sides.
            inside = int(ids.min()) >= 0 and int(ids.max()) < self._way.samples
            if inside and bool(self._known[ids].all()):
                self._cache.prefetch(ids)

    def state_dict(self) -> dict[str, Any]:
        ids = self._known.nonzero()[:, 0]
        return {"ids": ids, "rows": self._cache.stored(ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._passages.clear()
        self._known.zero_()
        self._known[state["ids"]] = True
        self._cache.restore(state["ids"], state["rows"])

    def _passage(self, turn: Turn) -> _Passage:
        """What is known of a micro-batch before it crosses; found once for each turn."""
        passage = self._passages.get(turn.chunk)
        if passage is None or passage.turn is not turn:
            passage = self._passages[turn.chunk] = self._find(turn)
        return passage

    def _find(self, turn: Turn) -> _Passage:
        if turn.samples is None:
            return _Passage(turn, None, False, 0, self._first)
        here = slice(turn.chunk * self._rows, (turn.chunk + 1) * self._rows)
        samples = Samples(turn.samples.host[here], turn.samples.device[here])
        ids = samples.host.tolist()
        if len(ids) != self._rows or max(ids) >= self._way.samples or min(ids) < 0:
            raise ValueError(
                f"{self._place}, micro-batch {turn.chunk}: {len(ids)} samples {ids[:8]} were named, "
                f"expected {self._rows} with numbers from 0 to {self._way.samples - 1}; see set_samples"
            )
        known = bool(self._known[samples.host].all())
        return _Passage(turn, samples, known, -(-8 * self._rows // 16) * 16, self._later if known else self._first)

    def _done(self, passage: _Passage) -> None:
        """Its samples have crossed."""
        assert passage.samples is not None
        self._known[passage.samples.host] = True
        self._passages.pop(passage.turn.chunk)

    def _kept(self, passage: _Passage) -> Rows | None:
        """What both sides hold of the micro-batch; None if not of all its samples."""
        if passage.samples is None or not passage.known:
            return None
        return self._cache.fetch(passage.samples.host, passage.samples.device)

    def _coding(self, layout: Layout) -> Coding:
        return self._way.coding if layout.align > 1 else Coding()  # those of differences alone are rotated

    def _decode(self, codes_1S: Tensor, layout: Layout, out_N: Tensor) -> Tensor:
        codec = implementation(self._place.backend, self._device, layout.format)
        codec.decode_bucket(codes_1S, layout, out_N, self._coding(layout))
        return out_N

    def _check(self, theirs: Tensor, passage: _Passage) -> None:
        """Whether each row is the sample it is taken for. On the CPU an error says so; a GPU makes the row NaN."""
        if self._device.type != "cpu":
            return
        assert passage.samples is not None
        if not torch.equal(theirs, passage.samples.host):
            raise ValueError(
                f"{self._place}, micro-batch {passage.turn.chunk}: samples {theirs.tolist()[:8]} came, this "
                f"stage was told {passage.samples.host.tolist()[:8]}; name the same samples on every stage"
            )
