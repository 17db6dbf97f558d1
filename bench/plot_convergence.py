"""The picture of bench/convergence.py: loss against steps, bytes sent and computed time, and the gaps.

python bench/plot_convergence.py out/convergence.jsonl picture.png [--gbit 1] [--compute-ms 100] [--recipes "int8 int4"]

Time is computed, as runs share a GPU: a step takes --compute-ms and then its bytes over a link of --gbit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convergence_report import BASELINE, find_gaps, read_rows

Row = dict[str, Any]


def draw(rows: list[Row], path: Path, *, gbit: float, compute_ms: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = list(dict.fromkeys(row["recipe"] for row in rows))
    texts.sort(key=lambda text: text != BASELINE)
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    by_step, by_bytes, by_time, gaps = axes.flat
    colours = pyplot.get_cmap("tab20").colors
    for number, text in enumerate(texts):
        colour = "black" if text == BASELINE else colours[number % len(colours)]
        for nth, row in enumerate(row for row in rows if row["recipe"] == text and row["validation"]):
            steps, sent, _, losses = zip(*row["validation"], strict=True)
            label = text if nth == 0 else None
            style = {"color": colour, "linewidth": 1.2, "alpha": 0.8, "label": label}
            by_step.plot(*_smooth(row), color=colour, linewidth=0.6, alpha=0.25)
            by_step.plot(steps, losses, ".-", **style)
            by_bytes.plot([n / 1e9 for n in sent], losses, ".-", **style)
            seconds = [s * compute_ms / 1e3 + n * 8 / gbit / 1e9 for s, n in zip(steps, sent, strict=True)]
            by_time.plot(seconds, losses, ".-", **style)
    best = min((row["val_loss"] for row in rows if row["val_loss"] is not None), default=1.0)
    for axis, label in (
        (by_step, "steps; faint: training loss"),
        (by_bytes, "GB sent by a rank"),
        (by_time, f"computed seconds: {compute_ms:g} ms a step, and its bytes at {gbit:g} Gbit/s"),
    ):
        axis.set_ylim(0.97 * best, 2 * best)
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss, nats per byte")
        axis.grid(alpha=0.3)
    by_bytes.set_xscale("log")
    by_time.set_xscale("log")
    by_step.legend(fontsize=7)
    found = sorted((gap for gap in find_gaps(rows) if gap.recipe != BASELINE), key=lambda gap: -gap.mean)
    places = range(len(found))
    gaps.barh(places, [gap.mean for gap in found], xerr=[2 * gap.error for gap in found], color="tab:blue", alpha=0.7)
    for place, gap in zip(places, found, strict=True):
        gaps.plot(gap.gaps, [place] * len(gap.gaps), "k.", markersize=4)
    gaps.set_yticks(places, [f"{gap.recipe}, {gap.bits} bits" for gap in found], fontsize=7)
    gaps.set_xlabel(f"gap to {BASELINE} in validation loss, %; bars: two standard errors; dots: seeds")
    gaps.set_xscale("symlog", linthresh=0.25)
    gaps.grid(axis="x", alpha=0.3)
    first = rows[0]
    figure.suptitle(
        f"GPT of {first['parameters'] / 1e6:.1f} M parameters, {first['world_size']} ranks, {first['steps']} steps of "
        f"{first['update']}, {first['environment']['device']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _smooth(row: Row) -> tuple[list[int], list[float]]:
    """Training loss by step, averaged over 100 to 150 steps."""
    curve = row["curve"]
    windows = [curve[max(0, i - 2) : i + 1] for i in range(len(curve))]
    return [point[0] for point in curve], [sum(p[3] for p in window) / len(window) for window in windows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gbit", type=float, default=1.0)
    parser.add_argument("--compute-ms", type=float, default=100.0)
    parser.add_argument("--recipes", default="", help="only these, separated by blanks")
    args = parser.parse_args()
    shown = [row for row in read_rows(args.source) if not args.recipes or row["recipe"] in args.recipes.split()]
    draw(shown, args.target, gbit=args.gbit, compute_ms=args.compute_ms)
