"""The picture of a quickstart: loss against steps, and loss against bytes sent."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from commq.train.display import format_bytes
from commq.train.metrics import Row

# Okabe and Ito's colours, told apart with any colour vision. fp32 is a broad band: the others run on top of it.
COLORS = {
    "fp32": "#c8c8c8",
    "bf16": "#000000",
    "fp8": "#CC79A7",
    "int8": "#E69F00",
    "int4": "#0072B2",
    "onebit": "#D55E00",
}
OTHER_COLOR = "#009E73"
FP32_TEXT = "#707070"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ebebeb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(runs: dict[str, list[Row]], path: Path) -> None:
    """Write a PNG with both panels; runs by recipe, each with the rows of its steps."""
    with plt.rc_context(STYLE):
        figure, (by_steps, by_bytes) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
        window = max(1, max(map(len, runs.values())) // 20)
        curves = {recipe: _smooth(rows, window) for recipe, rows in runs.items()}
        _draw_steps(by_steps, curves)
        _draw_bytes(by_bytes, curves)
        by_steps.set_ylabel(f"training loss, nats per byte\n(mean of {window} steps)")
        low, high = by_steps.get_ylim()
        by_steps.set_ylim(low - 0.12 * (high - low), high)  # room for the legend and the labels
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _draw_steps(axes: Axes, curves: dict[str, list[tuple[int, int, float]]]) -> None:
    ends = axes.inset_axes((0.46, 0.42, 0.54, 0.55))
    for target in (axes, ends):
        for recipe, curve in curves.items():
            steps, _, losses = zip(*curve, strict=True)
            target.plot(steps, losses, label=recipe, **_line(recipe))
    last = max(curve[-1][0] for curve in curves.values())
    late = [loss for curve in curves.values() for step, _, loss in curve if step >= 0.75 * last]
    ends.set(xlim=(0.75 * last, last), ylim=(min(late) - 0.02, max(late) + 0.02))
    ends.set_title("the last quarter", fontsize=9, weight="normal", loc="center")
    ends.tick_params(labelsize=8)
    (left, right), (low, high) = ends.get_xlim(), ends.get_ylim()
    axes.add_patch(Rectangle((left, low), right - left, high - low, fill=False, edgecolor="#909090"))
    axes.set(title="Loss against steps", xlabel="optimizer steps")
    axes.legend(loc="lower center", ncols=len(curves), columnspacing=1.2, handlelength=1.4)


def _draw_bytes(axes: Axes, curves: dict[str, list[tuple[int, int, float]]]) -> None:
    for recipe, curve in curves.items():
        color = FP32_TEXT if recipe == "fp32" else _line(recipe)["color"]
        _, sent, losses = zip(*curve, strict=True)
        axes.plot(sent, losses, **_line(recipe))
        axes.plot(sent[-1], losses[-1], "o", color=color, markersize=5)
        axes.annotate(
            recipe,
            (sent[-1], losses[-1]),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            color=color,
        )
    axes.set(title="Loss against bytes sent", xlabel="bytes sent by a rank since the first step", xscale="log")
    axes.xaxis.set_major_formatter(lambda count, _: format_bytes(count))


def _line(recipe: str) -> dict[str, object]:
    width = 5.0 if recipe == "fp32" else 1.4
    return {"color": COLORS.get(recipe, OTHER_COLOR), "linewidth": width, "solid_capstyle": "butt"}


def _smooth(rows: list[Row], window: int) -> list[tuple[int, int, float]]:
    """(step, bytes sent so far, mean training loss of the last `window` steps) for each step that has so many."""
    return [
        (row.step, row.sent_bytes, sum(r.train_loss for r in rows[end - window : end]) / window)
        for end, row in enumerate(rows, start=1)
        if end >= window
    ]
