"""bench/step.py: every method trains on two processes, and bytes and times are what its model says."""

import argparse
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from gpt2 import GPT2, MODELS
from harness import process_ranks
from host_parts import host_parts
from lab import set_rate
from step import Worker, collect
from step_methods import ddp_methods
from step_rows import BASELINE, read_rows
from step_training import Training


def arguments(**changed):
    found = {
        "hosts": 2,
        "ranks_per_host": 1,
        "bucket_cap_mb": 25,
        "rates": "unshaped",
        "model": "tiny",
        "rows": 1,
        "parallel": "ddp",
        "recipes": "fp32 int4 int4:schedule=auto",
        "methods": "",
        "device": "cpu",
        "profile": False,
        "budget": float("inf"),
    }
    return argparse.Namespace(**{**found, **changed})


@process_ranks(2)
def test_every_method_has_a_row():
    found = list(Worker(arguments(), []).execute())
    rows = {row["method"]: row for row in found}
    assert not [row["error"] for row in found if "error" in row]
    assert {BASELINE, "fp32", "bf16 hook", "PowerSGD rank 4", "commq int4", "commq int4:schedule=auto"} <= set(rows)
    parameters = sum(p.numel() for p in GPT2(MODELS["tiny"]).parameters())
    assert rows["fp32"]["sent_bytes"] == 4 * parameters  # 2 (W - 1) / W of them, at W = 2
    assert rows["bf16 hook"]["sent_bytes"] == 2 * parameters
    assert rows["commq fp32"]["sent_bytes"] == pytest.approx(4 * parameters, rel=1e-3)  # an odd element more
    assert rows["commq int4"]["sent_bytes"] < 0.15 * 4 * parameters
    assert rows[BASELINE]["sent_bytes"] == rows[BASELINE]["beyond_ms"] == 0
    assert sum(rows[BASELINE]["buckets"]) == parameters
    for row in found:
        assert row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]

    # Rows that are there are not repeated; what failed is tried again.
    assert not list(Worker(arguments(), found).execute())
    failed = {key: value for key, value in rows["commq int4"].items() if key != "median_ms"}
    rest = [row for row in found if row["method"] != "commq int4"]
    assert [row["method"] for row in Worker(arguments(), [*rest, failed]).execute()] == ["commq int4"]
    assert not list(Worker(arguments(budget=-1.0), []).execute())

    # The slower of link and computation, and the last bucket: 1 MB takes 8 ms, and a quarter of it comes last.
    worker = Worker(arguments(), [])
    base = {**worker.setting, "rate": "1gbit", "method": BASELINE, "median_ms": 100.0, "buckets": [3, 1]}
    worker.rows.append(base)
    for megabytes, expected in ((4, 100 + 8), (40, 240 + 80)):
        compared = worker._compare({**base, "method": "x", "median_ms": 150.0, "sent_bytes": megabytes * 10**6})
        assert compared["expected_ms"] == pytest.approx(expected)
        assert compared["beyond_ms"] == pytest.approx(50.0)

    # What a hook spends its time on: each message is encoded, moved twice and decoded.
    (method,) = (method for method in ddp_methods(["int4"], 2) if method.name == "commq int4")
    training = Training(method, MODELS["tiny"], 1, torch.device("cpu"))
    training.step()
    parts = host_parts(training.step, 2)
    assert {"encode", "sum", "decode", "moves", "python"} <= parts["us"].keys()
    assert min(parts["us"].values()) > 0
    moves = sum(count for name, count in parts["calls"].items() if name.startswith("c10d::"))
    assert moves >= 2 and moves == int(moves)

    # A model must not outlive its row: 27 of them do not fit on a GPU.
    for method in ddp_methods(["int4"], 2):
        training = Training(method, MODELS["tiny"], 1, torch.device("cpu"))
        training.step()
        parameter = weakref.ref(next(training.attached.module.parameters()))
        del training
        collect()
        assert parameter() is None, f"{method.name} keeps its model"


def test_the_newest_row_counts(tmp_path):
    setting = '"parallel": "ddp", "model": "tiny", "rows": 1, "hosts": 2, "ranks_per_host": 1, "bucket_cap_mb": 25'
    line = "{{" + setting + ', "rate": "{}", {}}}\n'
    path = tmp_path / "step.jsonl"
    path.write_text(
        line.format("1gbit", '"method": "a", "error": "x"')
        + line.format("2gbit", '"method": "a", "median_ms": 1')
        + line.format("1gbit", '"method": "a", "median_ms": 2')
    )
    assert [(row["rate"], row.get("median_ms")) for row in read_rows(path)] == [("1gbit", 2), ("2gbit", 1)]


def test_a_rate_outside_a_lab_is_refused(monkeypatch):
    monkeypatch.delenv("NETLAB", raising=False)
    set_rate("unshaped")
    with pytest.raises(ValueError, match="not in a lab"):
        set_rate("1gbit")
