"""What a boundary last knew of every sample: one row each, on the device, in the host's memory, or in a file.

Rows are stored in a format, fp32 to int4, each encoded on its own. Rows that are not on the device go through one
thread that reads and writes in the order in which it is asked, so a row is read as it was last written. The host waits
for nothing but that thread, and only if it was asked late: `prefetch` asks early.
"""

from __future__ import annotations

import importlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.ops import implementation, takes_triton
from commq.codecs.reference import Coding
from commq.codecs.wire import Layout

PLACES = ("device", "host", "disk")
_RAW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rows:
    """What is kept of some samples, on the device."""

    elements: Tensor
    """(any number, numel): raw as they are stored, else float32."""
    places: Tensor | None
    """int64, 1-D: which of these rows. None: all, in order."""


def row_bytes(storage: Format, numel: int) -> int:
    """Bytes of one stored row of `numel` elements."""
    return Layout(storage, numel).nbytes


class SampleCache:
    """Rows of `numel` elements by sample number, 0 to samples - 1; what no one has saved is not to be loaded."""

    def __init__(
        self,
        samples: int,
        numel: int,
        storage: Format,
        place: Literal["device", "host", "disk"],
        device: torch.device,
        file: Path | None = None,
        backend: str = "auto",
    ) -> None:
        """file: of place "disk", made anew; it may have holes."""
        self._numel, self._layout, self._device, self._backend = numel, Layout(storage, numel), device, backend
        self._pinned = device.type == "cuda"
        self._thread = None
        # Rows of plain elements need no codec between memory and the arithmetic.
        self._kernels = None
        if storage.kind == "raw" and takes_triton(backend, device):
            self._kernels = importlib.import_module("commq.attach.triton_samples")
        if place != "device":
            # Pinning memory in a thread happens on the device that is current there.
            choose = (lambda: torch.cuda.set_device(device)) if self._pinned else None
            self._thread = ThreadPoolExecutor(1, "commq-samples", initializer=choose)
        self._asked: dict[bytes, Future[Tensor]] = {}
        shape = samples, self._layout.nbytes
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            flat = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=torch.uint8)
            self._rows = flat.view(shape)
        elif place == "device":
            self._rows = torch.zeros(shape, dtype=torch.uint8, device=device)
        else:
            self._rows = torch.zeros(shape, dtype=torch.uint8)

    def prefetch(self, ids: Tensor) -> None:
        """Begin to read rows: ids int64 on the host. They must be loaded before any of them is saved."""
        if self._thread is not None:
            self._asked[_key(ids)] = self._thread.submit(self._read, ids)

    def fetch(self, ids: Tensor, ids_on_device: Tensor) -> Rows:
        """The rows of these samples, before they are advanced."""
        if self._thread is None:
            stored, places = self._rows, ids_on_device
        else:
            if _key(ids) not in self._asked:
                self.prefetch(ids)
            stored, places = self._asked.pop(_key(ids)).result().to(self._device, non_blocking=True), None
        if self._kernels is not None:
            return Rows(self._elements(stored), places)
        return Rows(self._decode(stored if places is None else stored.index_select(0, places)), None)

    def difference(self, x_N: Tensor, kept: Rows) -> Tensor:
        """float32: x - kept, both row after row."""
        if self._kernels is None:
            return x_N - kept.elements.reshape(-1)
        out_N = torch.empty(x_N.numel(), device=self._device)
        self._kernels.difference(x_N, kept.elements, kept.places, out_N)
        return out_N

    def advance(
        self,
        ids: Tensor,
        ids_on_device: Tensor,
        kept: Rows | None,
        delta_N: Tensor,
        y_N: Tensor | None = None,
        theirs: Tensor | None = None,
    ) -> None:
        """Keep new = kept + delta, where that is finite, and write it to y, all of it.

        kept: None stands for zeros. delta_N: float32, and it is overwritten. theirs: int64, like ids_on_device; a row
        where the two are not the same becomes NaN.
        """
        if self._kernels is None:
            old_N: Tensor | float = 0.0 if kept is None else kept.elements.reshape(-1)
            new_N = delta_N.add_(old_N)
            if theirs is not None:
                new_N.view(len(ids), -1).masked_fill_((theirs != ids_on_device)[:, None], torch.nan)
            if y_N is not None:
                y_N.copy_(new_N)
            rows = torch.where(new_N.abs() < torch.inf, new_N, old_N)
            self._save(ids, ids_on_device, self._encode(rows.view(len(ids), -1)))
            return
        here = self._thread is None
        target, target_places = (self._rows, ids_on_device) if here else (self._empty(len(ids)), None)
        old, places = (None, None) if kept is None else (kept.elements, kept.places)
        self._kernels.advance(
            old, places, delta_N, y_N, theirs, ids_on_device, self._elements(target), target_places
        )  # fmt: skip
        if not here:
            self._save(ids, ids_on_device, target)

    def _save(self, ids: Tensor, ids_on_device: Tensor, stored: Tensor) -> None:
        if self._thread is None:
            self._rows.index_copy_(0, ids_on_device, stored)
            return
        copied = None
        if self._pinned:
            landed = torch.empty(stored.shape, dtype=torch.uint8, pin_memory=True)
            landed.copy_(stored, non_blocking=True)
            stored, copied = landed, torch.cuda.current_stream(self._device).record_event()
        self._thread.submit(self._write, ids, stored, copied)

    def stored(self, ids: Tensor) -> Tensor:
        """uint8 (len(ids), bytes of a row) on the host, as they are kept. Waits for what is under way."""
        if self._thread is None:
            return self._rows[ids.to(self._device)].cpu()
        return self._thread.submit(self._read, ids).result().clone()

    def restore(self, ids: Tensor, stored: Tensor) -> None:
        """Put rows back as `stored` gave them. What was asked for before is read anew."""
        self._asked.clear()
        if self._thread is None:
            self._rows[ids.to(self._device)] = stored.to(self._device)
        else:
            self._thread.submit(self._write, ids, stored, None).result()

    def _of(self, rows: int) -> Layout:
        return Layout(self._layout.format, rows * self._layout.chunk_numel, rows)

    def _empty(self, rows: int) -> Tensor:
        return torch.empty(rows, self._layout.nbytes, dtype=torch.uint8, device=self._device)

    def _elements(self, stored: Tensor) -> Tensor:
        """Raw rows (any number, numel) in their own dtype: a view."""
        return stored.view(_RAW[self._layout.format.name])

    def _encode(self, rows: Tensor) -> Tensor:
        """float32 (any number, numel) as it is kept."""
        if self._layout.chunk_numel > self._numel:
            rows = torch.nn.functional.pad(rows, (0, self._layout.chunk_numel - self._numel))
        stored, layout = self._empty(len(rows)), self._of(len(rows))
        codec = implementation(self._backend, self._device, layout.format)
        codec.encode_bucket(rows.view(-1), stored, layout, Coding())
        return stored

    def _decode(self, stored: Tensor) -> Tensor:
        """float32 (any number, numel)."""
        layout = self._of(len(stored))
        out = torch.empty(layout.numel, device=self._device)
        implementation(self._backend, self._device, layout.format).decode_bucket(stored, layout, out, Coding())
        return out.view(len(stored), -1)[:, : self._numel]

    def _read(self, ids: Tensor) -> Tensor:
        rows = self._rows[ids]
        return rows.pin_memory() if self._pinned else rows

    def _write(self, ids: Tensor, stored: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._rows[ids] = stored


def _key(ids: Tensor) -> bytes:
    return ids.numpy().tobytes()
