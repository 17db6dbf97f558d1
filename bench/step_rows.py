"""Rows of bench/step.py: in a file, and as lines of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from host_parts import text

BASELINE = "no communication"
Row = dict[str, Any]
KEY = ("parallel", "model", "rows", "hosts", "ranks_per_host", "bucket_cap_mb", "rate", "method")
"""What makes a row the same as another."""


def read_rows(path: Path) -> list[Row]:
    """The newest row of each kind."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({tuple(row[name] for name in KEY): row for row in map(json.loads, lines)}.values())


HEAD = (
    f"{'rate':>9} {'method':<32} {'median':>9} {'mean':>9} {'fastest':>9} {'slowest':>9} "
    f"{'expected':>9} {'beyond':>9} ms {'sent MB':>8} {'link MB':>8} {'host us':>8}"
)


def line(row: Row) -> str:
    """A row of the table; bytes are those of a rank and step."""
    if "error" in row:
        return f"{row['rate']:>9} {row['method']:<32} left out: {row['error']}"
    times = f"{row['rate']:>9} {row['method']:<32} " + " ".join(
        f"{row[name]:9.1f}" if row.get(name) is not None else f"{'-':>9}"
        for name in ("median_ms", "mean_ms", "fastest_ms", "slowest_ms", "expected_ms", "beyond_ms")
    )
    sent = f"{row['sent_bytes'] / 1e6:8.2f}" if row["sent_bytes"] is not None else f"{'-':>8}"
    host = f"{row['host_us_per_bucket']:8.0f}" if row["host_us_per_bucket"] is not None else f"{'-':>8}"
    profile = row.get("profile")
    extra = ""
    if profile:
        extra = f"  {profile.get('allocations_beyond', 0.0):+.0f} allocations, {profile['segments']:.1f} segments, "
        extra += f"{profile['synchronizations']:.1f} synchronizations a step"
    if row.get("host_parts"):
        extra += "\n" + text(row["host_parts"])
    return f"{times}    {sent} {row['link_bytes'] / 1e6:8.2f} {host}{extra}"
