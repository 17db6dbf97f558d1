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
from commq.attach.sample_cache import PLACES, SampleCache, row_bytes
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

    def nbytes(self, turn: Turn) -> int:
        return self._header(turn) + self._layout(turn).nbytes

    def encode(self, x_N: Tensor, wire_S: Tensor, turn: Turn) -> None:
        header, layout, kept_N = self._header(turn), self._layout(turn), self._kept(turn)
        if turn.samples is not None:
            wire_S[:header].zero_()
            wire_S[: 8 * self._rows].view(torch.int64).copy_(self._ids(turn.samples, turn)[1])
        codes_1S = wire_S[header:].view(1, -1)
        codec = implementation(self._place.backend, self._device, layout.format)
        codec.encode_bucket(x_N.to(torch.float32) - kept_N, codes_1S, layout, self._coding(layout))
        if turn.samples is not None:
            self._keep(kept_N, kept_N + self._decoded(codes_1S, layout), turn)

    def decode(self, wire_S: Tensor, y_N: Tensor, turn: Turn) -> None:
        header, kept_N = self._header(turn), self._kept(turn)
        new_N = kept_N + self._decoded(wire_S[header:].view(1, -1), self._layout(turn))
        if turn.samples is not None:
            same = self._agrees(wire_S[: 8 * self._rows].view(torch.int64), turn)
            new_N = new_N.view(self._rows, -1).masked_fill(~same[:, None], torch.nan).view(-1)
            self._keep(kept_N, new_N, turn)
        y_N.copy_(new_N)

    def prefetch(self, samples: Samples) -> None:
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
        self._known.zero_()
        self._known[state["ids"]] = True
        self._cache.restore(state["ids"], state["rows"])

    def _ids(self, samples: Samples, turn: Turn) -> tuple[Tensor, Tensor]:
        """Of this micro-batch, on the host and on the device."""
        here = slice(turn.chunk * self._rows, (turn.chunk + 1) * self._rows)
        host = samples.host[here]
        if len(host) != self._rows or int(host.max()) >= self._way.samples or int(host.min()) < 0:
            raise ValueError(
                f"{self._place}, micro-batch {turn.chunk}: {len(host)} samples {host.tolist()[:8]} were named, "
                f"expected {self._rows} with numbers from 0 to {self._way.samples - 1}; see set_samples"
            )
        return host, samples.device[here]

    def _knows(self, turn: Turn) -> bool:
        """All samples of the micro-batch have crossed before. Both sides say the same."""
        if turn.samples is None:
            return False
        host, _ = self._ids(turn.samples, turn)
        return bool(self._known[host].all())

    def _header(self, turn: Turn) -> int:
        """Bytes of the samples' numbers, up to a multiple of 16."""
        return 0 if turn.samples is None else -(-8 * self._rows // 16) * 16

    def _layout(self, turn: Turn) -> Layout:
        """Of the micro-batch on the wire. A difference that would not be shorter goes in format `first`, too."""
        numel = self._rows * self._numel
        rotation = self._way.rotation
        first = Layout(self._way.first, numel)
        later = Layout(self._way.format, numel, align=rotation.size if rotation else 1)
        return later if self._knows(turn) and later.nbytes < first.nbytes else first

    def _coding(self, layout: Layout) -> Coding:
        return self._way.coding if layout.align > 1 else Coding()  # those of differences alone are rotated

    def _decoded(self, codes_1S: Tensor, layout: Layout) -> Tensor:
        out_N = torch.empty(layout.numel, device=self._device)
        codec = implementation(self._place.backend, self._device, layout.format)
        codec.decode_bucket(codes_1S, layout, out_N, self._coding(layout))
        return out_N

    def _kept(self, turn: Turn) -> Tensor:
        """What both sides hold of the micro-batch; zeros if not of all its samples."""
        if turn.samples is None or not self._knows(turn):
            return torch.zeros(self._rows * self._numel, device=self._device)
        return self._cache.load(*self._ids(turn.samples, turn)).reshape(-1)

    def _keep(self, kept_N: Tensor, new_N: Tensor, turn: Turn) -> None:
        assert turn.samples is not None
        host, on_device = self._ids(turn.samples, turn)
        rows = torch.where(new_N.isfinite(), new_N, kept_N).view(self._rows, -1)
        self._cache.save(host, on_device, rows)
        self._known[host] = True

    def _agrees(self, theirs: Tensor, turn: Turn) -> Tensor:
        """Whether each row is the sample it is taken for. On the CPU an error says so; a GPU makes the row NaN."""
        assert turn.samples is not None
        host, on_device = self._ids(turn.samples, turn)
        same = theirs == on_device
        if self._device.type == "cpu" and not bool(same.all()):
            raise ValueError(
                f"{self._place}, micro-batch {turn.chunk}: samples {theirs.tolist()[:8]} came, this "
                f"stage was told {host.tolist()[:8]}; name the same samples on every stage"
            )
        return same
