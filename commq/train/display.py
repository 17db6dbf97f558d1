"""The progress of a run on rank 0's terminal: a bar, or plain lines where there is no terminal."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from commq.train.metrics import Row

_PLAIN_LINES = 20  # per run


class Display:
    """Shows rows as they come. `tokens_per_step` counts all ranks."""

    def __init__(self, title: str, steps: int, step: int, tokens_per_step: int) -> None:
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._last: Row | None = None
        self._speed = ""
        self._val_loss = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(title, total=steps, completed=step, text="")
        self._interactive = self._bar.console.is_terminal
        if self._interactive:
            self._bar.start()

    def write(self, row: Row) -> None:
        if row.val_loss is not None:
            self._val_loss = f"  val {row.val_loss:.4f}"
        elif self._last is not None:  # a row with a validation would count its time too
            tokens = (row.step - self._last.step) * self._tokens_per_step
            self._speed = f"  {tokens / max(row.seconds - self._last.seconds, 1e-3):,.0f} tokens/s"
        self._last = row
        text = f"loss {row.train_loss:.4f}{self._val_loss}{self._speed}  sent {format_bytes(row.sent_bytes)}"
        if self._interactive:
            self._bar.update(self._task, completed=row.step, text=text)
        elif row.step % max(1, self._steps // _PLAIN_LINES) == 0 or row.val_loss is not None:
            print(f"step {row.step}/{self._steps}  {text}", flush=True)

    def close(self) -> None:
        if self._interactive:
            self._bar.stop()


def format_bytes(count: float) -> str:
    """Decimal units with three digits: 1.23 MB is 1 230 000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
