"""What a boundary last knew of every sample: one row each, on the device, in the host's memory, or in a file.

Rows are stored in a format, fp32 to int4, each encoded on its own. Rows that are not on the device go through one
thread that reads and writes in the order in which it is asked, so a row is read as it was last written. The host waits
for nothing but that thread, and only if it was asked late: `prefetch` asks early.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from commq.codecs.formats import Format
from commq.codecs.ops import implementation
from commq.codecs.reference import Coding
from commq.codecs.wire import Layout

PLACES = ("device", "host", "disk")


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

    def load(self, ids: Tensor, ids_on_device: Tensor) -> Tensor:
        """float32 (len(ids), numel), on the device."""
        if self._thread is None:
            stored = self._rows.index_select(0, ids_on_device)
        else:
            if _key(ids) not in self._asked:
                self.prefetch(ids)
            stored = self._asked.pop(_key(ids)).result().to(self._device, non_blocking=True)
        return self._decode(stored)

    def save(self, ids: Tensor, ids_on_device: Tensor, rows: Tensor) -> None:
        """Replace rows: float32 (len(ids), numel), finite."""
        stored = torch.empty(len(ids), self._layout.nbytes, dtype=torch.uint8, device=self._device)
        layout = self._of(len(ids))
        codec = implementation(self._backend, self._device, layout.format)
        padded = torch.nn.functional.pad(rows, (0, self._layout.chunk_numel - self._numel))
        codec.encode_bucket(padded.view(-1), stored, layout, Coding())
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

    def _decode(self, stored: Tensor) -> Tensor:
        layout = self._of(stored.shape[0])
        out = torch.empty(layout.numel, device=self._device)
        implementation(self._backend, self._device, layout.format).decode_bucket(stored, layout, out, Coding())
        return out.view(stored.shape[0], -1)[:, : self._numel]

    def _read(self, ids: Tensor) -> Tensor:
        rows = self._rows[ids]
        return rows.pin_memory() if self._pinned else rows

    def _write(self, ids: Tensor, stored: Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._rows[ids] = stored


def _key(ids: Tensor) -> bytes:
    return ids.numpy().tobytes()
