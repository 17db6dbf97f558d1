#!/usr/bin/env bash
# Trains on a cluster with SLURM, one process for each GPU; commq finds rank and rendezvous in srun's variables:
#
#   sbatch launch/slurm.sh --recipe int4 --steps 2000         # what follows the script goes to python -m commq.train
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 launch/slurm.sh ...
#
# Started again with the same --out, as after a requeue, it goes on from the last checkpoint.
#SBATCH --job-name=commq
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=INT@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# sbatch runs a copy of this script, so the repository is where it was submitted from.
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the repository}"
source .venv/bin/activate # made by launch/test.sh or launch/quickstart.sh

# The network to take where hosts have several:
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0

# --kill-on-bad-exit: one lost rank ends the others, too. --gpus-per-task would hide a host's other GPUs from each
# rank; commq counts them, so leave that out.
exec srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  python -m commq.train --out "out/$SLURM_JOB_NAME-$SLURM_JOB_ID" --resume "$@"
