"""A small GPT trained with compressed gradients, and with GEMMs and optimizer state in low precision.

    python -m commq.train --recipe int4 --steps 300 --out out/run
    torchrun --standalone --nproc-per-node 2 -m commq.train --recipe int4 --out out/run
    python -m commq.train --precision fp8 --optimizer adamw8bit --recipe int4 --parallel fsdp --guard rollback
    python -m commq.train --config run.toml

Read in this order: `config`, `data`, `model`, `precision`, `optimizer`, `ranks`, `trainer` (one step), `guard`,
`checkpoint`, `run` (all steps), `report`, `cli`.
"""
