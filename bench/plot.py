"""Pictures of bench results.

python bench/plot.py results.json picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def share_of_copy(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Percent of a device copy: one panel for each family, one bar for each kind of input."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = [
        f for f in ("encode", "decode", "decode_sum", "decode_sum_encode") if any(r["family"] == f for r in rows)
    ]
    heights = [sum(r["family"] == f for r in rows) for f in families]
    figure, axes = pyplot.subplots(
        len(families), figsize=(9, 1.5 + 0.19 * sum(heights)), height_ratios=heights, squeeze=False, sharex=True
    )
    colours = {"native": "tab:blue", "triton": "tab:orange", "reference": "tab:gray"}
    for axis, family in zip(axes[:, 0], families, strict=True):
        shown = [r for r in rows if r["family"] == family][::-1]
        labels = [f"{r['what'].removeprefix(family + ' ')}, {r['numel'] / 2**20:.3g} Mi" for r in shown]
        positions = range(len(shown))
        axis.barh(
            positions,
            [r["percent_of_copy"] for r in shown],
            color=[colours.get(r["implementation"], "tab:green") for r in shown],
        )
        for position, row in enumerate(shown):
            if row["bar"] is not None:
                axis.plot([row["bar"]] * 2, [position - 0.4, position + 0.4], color="black")
        axis.set_yticks(positions, labels, fontsize=6)
        axis.set_ylim(-0.6, len(shown) - 0.4)
        axis.set_title(family, fontsize=9, loc="left")
        axis.grid(axis="x", alpha=0.3)
    axes[-1, 0].set_xlabel("% of the fastest plain copy; black: what must be reached")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (*colours.values(), "tab:green")]
    figure.legend(handles, [*colours, "other libraries"], loc="upper right", fontsize=7, ncols=4)
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    results = json.loads(source.read_text())
    share_of_copy(results["rows"], target, title=results["environment"]["device"])
