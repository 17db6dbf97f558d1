"""The picture of bench/step.py: time of a step by method, one panel for each rate.

python bench/plot_step.py out/step.jsonl picture.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from step_rows import BASELINE, read_rows

Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Rows of one setting: model, parallelism, number of hosts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "median_ms" in row]
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != BASELINE))
    places = {method: -number for number, method in enumerate(methods)}
    figure, axes = pyplot.subplots(
        1, len(rates), figsize=(1.5 + 4 * len(rates), 1.6 + 0.3 * len(methods)), sharey=True, squeeze=False
    )
    for axis, rate in zip(axes[0], rates, strict=True):
        here = [row for row in rows if row["rate"] == rate]
        for row in here:
            if row["method"] == BASELINE:
                axis.axvline(row["median_ms"], color="black", linestyle="--", linewidth=1)
                continue
            place, median = places[row["method"]], row["median_ms"]
            colour = "tab:blue" if row["method"].startswith("commq") else "tab:gray"
            spread = [[median - row["fastest_ms"]], [row["slowest_ms"] - median]]
            axis.barh(place, median, xerr=spread, color=colour, error_kw={"linewidth": 0.8})
            axis.text(row["slowest_ms"], place, f" {median:.0f}", va="center", fontsize=7)
            if row.get("expected_ms") is not None:
                axis.plot([row["expected_ms"]] * 2, [place - 0.4, place + 0.4], color="tab:orange")
        axis.set_title(rate, fontsize=10)
        axis.set_xlabel("ms a step")
        axis.set_xlim(0, 1.15 * max(row["slowest_ms"] for row in here))
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(list(places.values()), list(places), fontsize=8)
    first = rows[0]
    device = next((row["environment"]["device"] for row in rows if row["environment"]), "")
    figure.suptitle(
        f"{first['model']}, {first['parallel']}, {first['hosts']} hosts x {first['ranks_per_host']} ranks, {device}; "
        "median, fastest to slowest\ndashed: no communication; orange: expected by a model",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    draw(read_rows(source), target)
