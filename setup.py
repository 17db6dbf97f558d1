"""What is installed; the tools' settings are in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))
from build_native import NativeBuild, native_extension

TRAIN = ["matplotlib", "numpy", "rich", "tensorboard", "tyro"]

setup(
    name="commq",
    version="0.1.0",
    description="Compressed communication for distributed PyTorch training",
    license="Apache-2.0",
    packages=find_packages(include=["commq", "commq.*"]),
    ext_modules=[native_extension()],
    cmdclass={"build_ext": NativeBuild},
    python_requires=">=3.10",
    install_requires=["torch>=2.11"],
    extras_require={
        "train": TRAIN,
        "mpi": ["mpi4py>=4"],
        # ruff and mypy are pinned: a newer one finds new faults in unchanged code.
        "dev": [
            *TRAIN,
            "accelerate",
            "hypothesis",
            "lightning",
            "mpi4py>=4",
            "mypy==2.4.*",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff==0.17.*",
            'mpich; sys_platform == "linux"',
            'pyroute2; sys_platform == "linux"',
            'triton>=3.6; sys_platform == "linux" and platform_machine == "x86_64"',
        ],
    },
)
