"""The picture of bench/collectives.py: time by size for each rate, and against the library's bf16.

python bench/plot_collectives.py results.json [more.json ...] picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]

LINES = {
    ("library", "fp32"): ("library fp32", "black", "-"),
    ("library", "bf16"): ("library bf16", "gray", "-"),
    ("two_shot", "int8"): ("int8", "tab:blue", "-"),
    ("two_shot", "int4"): ("int4", "tab:orange", "-"),
    ("two_shot", "sign"): ("sign", "tab:green", "-"),
    ("one_shot", "int4"): ("int4, one-shot", "tab:orange", ":"),
    ("auto", "int4"): ("int4, auto", "tab:red", "-"),
    ("no communication", "int4"): ("int4 codecs alone", "tab:brown", ":"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[Row] = results["rows"]
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    figure, axes = pyplot.subplots(
        2, len(rates), figsize=(4.2 * len(rates), 7), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2)
    )
    for column, rate in enumerate(rates):
        here = [row for row in rows if row["rate"] == rate]
        reference = {row["nbytes"]: row["median_ms"] for row in here if (row["method"], row["format"]) == _REFERENCE}
        upper, lower = axes[:, column]
        for key, (label, colour, style) in LINES.items():
            line = sorted((r for r in here if (r["method"], r["format"]) == key), key=lambda r: r["nbytes"])
            if not line:
                continue
            sizes, times = [r["nbytes"] for r in line], [r["median_ms"] for r in line]
            upper.plot(sizes, times, style, color=colour, label=label, linewidth=2.5 if key[0] == "auto" else 1.3)
            upper.fill_between(
                sizes, [r["fastest_ms"] for r in line], [r["slowest_ms"] for r in line], color=colour, alpha=0.12
            )
            if key[0] == "two_shot":
                expected = [(r["nbytes"], r["expected_ms"]) for r in line if r["expected_ms"]]
                upper.plot(*zip(*expected, strict=True), "x", color=colour, markersize=4)
            ratios = [(r["nbytes"], r["median_ms"] / reference[r["nbytes"]]) for r in line if r["nbytes"] in reference]
            lower.plot(*zip(*ratios, strict=True), style, color=colour, linewidth=2.5 if key[0] == "auto" else 1.3)
        lower.axhline(1.05, color="gray", linewidth=0.6, linestyle="--")
        upper.set_title(rate)
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        lower.set_xlabel("bytes of the tensor")
        sizes = sorted(reference)
        lower.set_xticks(sizes[::2], [_short(size) for size in sizes[::2]])
    axes[0, 0].set_ylabel("all-reduce, ms")
    axes[1, 0].set_ylabel("time / library bf16")
    axes[0, 0].plot([], [], "x", color="gray", label="expected by the cost model")
    axes[0, 0].legend(fontsize=8)
    first, device = rows[0], results["environment"]["device"]
    figure.suptitle(
        f"{first['hosts']} hosts x {first['ranks_per_host']} ranks, {first['dtype']}, {device}; "
        "median, band from the fastest to the slowest run",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


_REFERENCE = ("library", "bf16")


def _short(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    found = [json.loads(source.read_text()) for source in sources]
    draw(found[0] | {"rows": [row for each in found for row in each["rows"]]}, target)
