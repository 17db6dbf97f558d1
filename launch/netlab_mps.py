"""NVIDIA MPS for a lab whose ranks share a GPU: without it the ranks' kernels take turns."""

import os
import re
import shutil
import subprocess
from pathlib import Path


def gpus() -> list[str]:
    """The GPUs a lab may use: those CUDA_VISIBLE_DEVICES names ("" = none), by default all of the machine."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    devices = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").iterdir())
    return sorted((device[1] for device in devices if device), key=int)


def mps_program() -> str | None:
    """The MPS control program; containers often have it beside nvidia-smi but not on the PATH."""
    smi = shutil.which("nvidia-smi") or ""
    folders = [os.environ.get("PATH", ""), os.path.dirname(os.path.realpath(smi)), "/usr/local/nvidia/bin"]
    return shutil.which("nvidia-cuda-mps-control", path=os.pathsep.join(folders))


class Mps:
    """An MPS daemon of the lab's own, its pipes and logs under `folder`. No setting of the device changes."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program = program
        pipe, log = folder / "mps", folder / "mps-log"
        pipe.mkdir()
        log.mkdir()
        self.environment = {"CUDA_MPS_PIPE_DIRECTORY": str(pipe), "CUDA_MPS_LOG_DIRECTORY": str(log)}

    def start(self) -> bool:
        return self._control("-d")

    def quit(self) -> bool:
        return self._control(input=b"quit\n")

    def _control(self, *options: str, input: bytes = b"") -> bool:
        # A daemon that is told of some GPUs only counts them anew, and its clients' numbers would mean others.
        everything = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        try:
            result = subprocess.run(
                [self.program, *options],
                input=input,
                env=everything | self.environment,
                stdout=subprocess.DEVNULL,  # the daemon keeps these open
                stderr=subprocess.DEVNULL,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return result.returncode == 0
