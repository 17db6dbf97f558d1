"""A small GPT trained with DistributedDataParallel whose gradients commq compresses.

    python -m commq.train --recipe int4 --steps 300 --out out/run
    torchrun --standalone --nproc-per-node 2 -m commq.train --recipe int4 --out out/run

Read in this order: `config`, `data`, `model`, `optimizer`, `ranks`, `trainer` (one step), `checkpoint`, `run` (all
steps), `cli`.
"""
