"""`python -m commq.train` as a user runs it: processes that are interrupted, killed, or do not agree.

Most are forked from the harness's server and run the module from there: all is as in a process of their own, but for
the seconds that Python takes to start and to import torch.
"""

import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from commq.train.metrics import read_rows
from harness import forked
from rank_process import die_with_parent

TINY = ["--layers", "1", "--dim", "32", "--heads", "2", "--context", "16", "--batch", "2", "--val-sequences", "8"]
LIMIT = 120  # seconds until a process that should have ended counts as hanging


class Ranks:
    """The processes of one job, started as torchrun starts them."""

    def __init__(self, folder: Path, *options_of_ranks: list[str]) -> None:
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
        self.outputs, self.errors, self.processes = [], [], []
        for rank, options in enumerate(options_of_ranks):
            output, written = forked.Pipe(duplex=False)
            errors = folder / str(rank)
            environ = os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = forked.Process(target=run_module, args=([*TINY, *options], environ, written, errors))
            process.start()
            written.close()  # so that the process's is the last, and its end is the end of the output
            self.outputs.append(os.fdopen(os.dup(output.fileno())))
            self.errors.append(errors)
            self.processes.append(process)

    def wait_for(self, text: str) -> None:
        """Read what rank 0 prints until a line has `text`."""
        assert any(text in line for line in self.outputs[0]), self.finish()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def finish(self) -> list[tuple[int | None, str, str]]:
        """Exit code, rest of the output, and errors of each rank. No code: it hung, and was killed."""
        deadline, found = time.monotonic() + LIMIT, []
        for process, output, errors in zip(self.processes, self.outputs, self.errors, strict=True):
            process.join(max(0.0, deadline - time.monotonic()))
            code = process.exitcode
            process.kill()
            found.append((code, output.read(), errors.read_text()))
        return found


def run_module(options: list[str], environ: dict[str, str], output: Connection, errors: Path) -> None:
    """In the process: `python -m commq.train OPTIONS`, with these as its standard output and error output."""
    os.setpgrp()  # which dies as a whole
    threading.Thread(target=die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environ)
    os.dup2(output.fileno(), 1)
    output.close()
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv[1:] = options
    runpy.run_module("commq.train", run_name="__main__", alter_sys=True)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ranks]]:
    started = []

    def start_ranks(*options_of_ranks: list[str]) -> Ranks:
        started.append(Ranks(tmp_path_factory.mktemp("errors"), *options_of_ranks))
        return started[-1]

    yield start_ranks
    for ranks in started:
        for process, output in zip(ranks.processes, ranks.outputs, strict=True):
            process.kill()
            process.join()
            output.close()


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


def test_alone_it_trains_and_writes_what_it_says(tmp_path):
    command = [sys.executable, "-m", "commq.train", *TINY, "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "1 process, " in done.stdout and "complete at step 3" in done.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert any((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "config.json").exists()
