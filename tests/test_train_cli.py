"""`python -m commq.train` as a user runs it: processes that are interrupted, killed, or do not agree."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from commq.train.metrics import read_rows

TINY = ["--layers", "1", "--dim", "32", "--heads", "2", "--context", "16", "--batch", "2", "--val-sequences", "8"]
LIMIT = 120  # seconds until a process that should have ended counts as hanging


class Ranks:
    """The processes of one job, started as torchrun starts them."""

    def __init__(self, *options_of_ranks: list[str]) -> None:
        # As torchrun does, keep the store here: a port looked up for rank 0 could be given to another job meanwhile.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world_size = str(len(options_of_ranks))
        job = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "commq.train", *TINY, *options],
                env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, options in enumerate(options_of_ranks)
        ]

    def wait_for(self, text: str) -> None:
        """Read what rank 0 prints until a line has `text`."""
        assert any(text in line for line in self.processes[0].stdout), self.finish()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(number)

    def finish(self) -> list[tuple[int, str, str]]:
        """Exit code, rest of the output, and errors of each rank."""
        texts = [process.communicate(timeout=LIMIT) for process in self.processes]
        return [(process.returncode, *text) for process, text in zip(self.processes, texts, strict=True)]


@pytest.fixture
def start() -> Iterator[type[Ranks]]:
    started = []

    def start_ranks(*options_of_ranks: list[str]) -> Ranks:
        started.append(Ranks(*options_of_ranks))
        return started[-1]

    yield start_ranks
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.communicate()


def losses(out: Path) -> list[tuple]:
    """Every row of a run but for its time."""
    return [dataclasses.astuple(dataclasses.replace(row, seconds=0.0)) for row in read_rows(out)]


def test_an_interrupted_and_killed_run_has_the_losses_of_one_that_was_not(tmp_path, start):
    options = ["--recipe", "int4", "--steps", "160", "--checkpoint-every", "30", "--log-every", "1"]
    whole = start(*2 * [[*options, "--out", str(tmp_path / "whole")]])
    parts = [*options, "--out", str(tmp_path / "parts"), "--resume"]

    ranks = start(parts, parts)
    ranks.wait_for("step 40/160")
    ranks.signal(signal.SIGINT, 1)  # the other one learns of it
    (code, output, errors), (other_code, _, other_errors) = ranks.finish()
    assert code == other_code == 0, errors + other_errors
    assert "continue with the same command and --resume" in output

    ranks = start(parts, parts)
    ranks.wait_for("step 80/160")
    ranks.signal(signal.SIGKILL, 1)
    codes = [code for code, _, _ in ranks.finish()]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)  # noticed by itself

    ranks = start(parts, parts)
    for code, _, errors in [*ranks.finish(), *whole.finish()]:
        assert code == 0, errors
    assert len(losses(tmp_path / "whole")) == 160
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_ranks_with_different_recipes_all_say_so(tmp_path, start):
    ranks = start(*(["--recipe", recipe, "--out", str(tmp_path)] for recipe in ("int8", "int4")))
    for code, _, errors in ranks.finish():
        assert code == 2
        assert "error: recipe differs between processes: rank 0 has 'int8', rank 1 has 'int4'" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere"], "error: --data /nowhere: no such file"),
        (["--recipe", "int5"], "error: recipe 'int5' is unknown"),
        (["--heads", "3"], "dim=32 is not a multiple of 2 * heads = 6"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(tmp_path, start, options, message):
    ((code, _, errors),) = start([*options, "--out", str(tmp_path)]).finish()
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_alone_it_trains_and_writes_what_it_says(tmp_path, start):
    ((code, output, errors),) = start(["--steps", "3", "--out", str(tmp_path)]).finish()
    assert code == 0, errors
    assert "1 process, " in output and "complete at step 3" in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert any((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "config.json").exists()
