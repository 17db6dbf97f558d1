"""Crossings: how a tensor gets from one stage of a pipeline to the next, as bytes.

A way says how, as a value: `Direct`, `Tiles`, or `Differences` (differences.py). On both sides it makes one crossing
for each tensor of the boundary and direction. Both sides do the same turns, so what they keep stays equal.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from commq.codecs.formats import Format, get_format
from commq.codecs.ops import check_coding, tile_implementation
from commq.codecs.reference import Coding
from commq.codecs.rotation import Rotation
from commq.codecs.tiles import TILE, TileLayout
from commq.collectives.memory import Memory
from commq.collectives.message import send_stream
from commq.collectives.plan import RAW
from commq.collectives.rows import RowCodec, RowTensors

_log = logging.getLogger("commq")


@dataclass(frozen=True)
class Samples:
    """Which samples a step holds, micro-batch by micro-batch: int64, 1-D."""

    host: Tensor
    device: Tensor
    """The same, where the boundary's tensors are."""


@dataclass(frozen=True)
class Turn:
    """One passage: of a micro-batch, in a step of the schedule."""

    step: int
    chunk: int
    samples: Samples | None = None
    """Those of the whole step. None: they have no names."""

    @property
    def number(self) -> int:
        """Different for every turn of a boundary: the counter of random bits."""
        return self.step << 20 | self.chunk


@dataclass(frozen=True)
class Place:
    """One tensor at one side of a boundary."""

    boundary: int
    """Number of the stage before it."""
    backward: bool
    """It goes to that stage, not from it."""
    sends: bool
    """This is the sender's side."""
    index: int
    """Which of the boundary's tensors."""
    seed: int
    memory: Memory
    backend: str

    @property
    def stream(self) -> int:
        """Philox stream: errors of different boundaries, and of the tensors of one, must not be the same."""
        return send_stream((self.index << 12 | self.boundary) << 1 | self.backward)

    def __str__(self) -> str:
        stages = (self.boundary, self.boundary + 1)
        first, last = reversed(stages) if self.backward else stages
        return f"tensor {self.index} from stage {first} to stage {last}"


class Crossing:
    """Encodes on one side, decodes on the other. Nothing waits for the device."""

    def nbytes(self, turn: Turn) -> int:
        """Bytes on the wire."""
        raise NotImplementedError

    def encode(self, x_N: Tensor, wire_S: Tensor, turn: Turn) -> None:
        """Write all bytes of wire_S (uint8) from the tensor as a contiguous vector."""
        raise NotImplementedError

    def decode(self, wire_S: Tensor, y_N: Tensor, turn: Turn) -> None:
        """Write the tensor, a contiguous vector, from what has arrived."""
        raise NotImplementedError

    def prefetch(self, samples: Samples) -> None:
        """These samples come in the next step."""

    def state_dict(self) -> dict[str, Any]:
        """What is kept between turns: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there, to the bit."""


class Way(Protocol):
    """How tensors cross, as a frozen value whose repr says all of it."""

    names_samples: ClassVar[bool]
    """It must be told which samples a step holds."""

    def crossing(self, place: Place, like: Tensor) -> Crossing:
        """Of tensors with the shape, dtype and device of `like`."""


def warn_of_shared_blocks(place: Place, like: Tensor, unit: int) -> None:
    """Once for a boundary, where runs of `unit` elements that are encoded together span tokens (rows of the last
    dimension)."""
    if place.sends and like.ndim > 1 and like.shape[-1] % unit:
        _log.warning(
            "%s: %d elements are encoded together, tokens have %d: what one token loses depends on the next, which a "
            "causal model must not see in training; choose a block and a rotation that divide the width",
            place,
            unit,
            like.shape[-1],
        )


@dataclass(frozen=True)
class Direct:
    """Every tensor as codes of a format, nothing kept. One that would not shrink travels as it is.

    Blocks and rotated runs should divide the width of a token: one that spans two tells the first about the second.
    """

    names_samples: ClassVar[bool] = False
    format: Format
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        check_coding(self.format, Coding(rounding=self.rounding, rotation=self.rotation))

    def crossing(self, place: Place, like: Tensor) -> Crossing:
        return _DirectCrossing(self, place, like)


class _DirectCrossing(Crossing):
    def __init__(self, way: Direct, place: Place, like: Tensor) -> None:
        self._format, self._place, self._device = way.format, place, like.device
        rounding, rotation = way.rounding, way.rotation
        self._coding = Coding(rounding=rounding, rotation=rotation, seed=place.seed, stream=place.stream)
        if not place.backward and way.format.kind != "raw":
            warn_of_shared_blocks(place, like, max(way.format.unit, rotation.size if rotation else 1))
        (self._piece,) = self._codec(self._coding).pieces([like.numel()], like.dtype, single=True)

    def nbytes(self, turn: Turn) -> int:
        return self._piece.nbytes

    def encode(self, x_N: Tensor, wire_S: Tensor, turn: Turn) -> None:
        self._of(turn).encode(self._piece, RowTensors([x_N], x_N), wire_S)

    def decode(self, wire_S: Tensor, y_N: Tensor, turn: Turn) -> None:
        self._of(turn).decode(self._piece, wire_S, RowTensors([y_N], y_N))

    def _of(self, turn: Turn) -> RowCodec:
        return self._codec(replace(self._coding, step=turn.number))

    def _codec(self, coding: Coding) -> RowCodec:
        return RowCodec(self._format, coding, self._device, self._place.memory, self._place.backend)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of 64 elements in 4 and 3 bits, an outlier rotated away; nothing kept (TAH-Quant, codecs/tiles.py)."""

    names_samples: ClassVar[bool] = False
    narrow_share: float = 0.2
    """Part of the tiles that has 3 bits."""
    tau: float = 2.0
    """A tile is rotated whose largest element is more than `tau` times as large as the second."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.narrow_share <= 1.0 and self.tau >= 1.0):
            raise ValueError(
                f"narrow_share={self.narrow_share}, tau={self.tau}: expected 0 <= narrow_share <= 1 and tau >= 1"
            )

    def crossing(self, place: Place, like: Tensor) -> Crossing:
        layout = TileLayout(like.numel(), self.narrow_share)
        if layout.nbytes >= like.numel() * like.dtype.itemsize:
            return Direct(get_format(RAW[like.dtype])).crossing(place, like)
        if not place.backward:
            warn_of_shared_blocks(place, like, TILE)
        return _TileCrossing(layout, self.tau, place, like)


class _TileCrossing(Crossing):
    def __init__(self, layout: TileLayout, tau: float, place: Place, like: Tensor) -> None:
        self._layout, self._tau = layout, tau
        self._codec = tile_implementation(place.backend, like.device)

    def nbytes(self, turn: Turn) -> int:
        return self._layout.nbytes

    def encode(self, x_N: Tensor, wire_S: Tensor, turn: Turn) -> None:
        self._codec.encode_tiles(x_N, wire_S, self._layout, tau=self._tau)

    def decode(self, wire_S: Tensor, y_N: Tensor, turn: Turn) -> None:
        self._codec.decode_tiles(wire_S, self._layout, y_N)


def way_of(value: Way | Format | str) -> Way:
    """A way from what callers write: a way, a format, a format's name, or "tiles"."""
    if isinstance(value, str):
        return Tiles() if value == "tiles" else Direct(get_format(value))
    if isinstance(value, Format):
        return Direct(value)
    if not hasattr(value, "crossing"):
        raise TypeError(
            f"a boundary's way is a {type(value).__name__}; expected a commq.Direct, commq.Tiles or "
            "commq.Differences, a commq.Format, its name, or 'tiles'"
        )
    return value
