"""Stages of `torch.distributed.pipelining` whose boundary tensors travel encoded; the schedules stay as they are.

    stage = commq.PipelineStage(module, rank, W, device, forward="int4", backward="int8")
    schedule = ScheduleGPipe(stage, n_microbatches=8, loss_fn=loss_fn)
    with stage.watch():
        schedule.step(tokens)

A schedule asks its stage for receives, runs them, lets the stage compute, asks for sends, and runs those. The stage
hands out the same operations with wires in place of its tensors: it encodes when sends are asked for, and decodes when
the computation asks for what was received. Stages that share a rank hand tensors over as they are, and so travel
tensors that are not floating point (masks, token numbers).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from commq.attach.crossing import Place, Samples, Turn, Way, way_of
from commq.attach.traffic import Traffic
from commq.codecs.formats import Format
from commq.collectives.roll_call import RollCall
from commq.collectives.transport import C10d, check_equal


class PipelineStage(pipelining.PipelineStage):
    """torch's PipelineStage with an encoded boundary on either side.

    forward, backward: how activations and their gradients travel: a format or its name ("int4"), "tiles", or a
    `commq.Direct`, `Tiles` or `Differences`. seed: of stochastic rounding. All other arguments are torch's.
    Error: what a stage receives is within the format's `error_bound` of what was sent; with fp32 for float32 tensors,
    the same bits. NaN and infinity arrive as NaN, with their block.
    The group's ranks make their stages in the same order: they compare `forward`, `backward` and `seed`, and there is a
    ValueError on all of them if these differ.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        *,
        forward: Way | Format | str,
        backward: Way | Format | str,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, group=group, **options)
        ways = way_of(forward), way_of(backward)
        if ways[1].names_samples:
            raise ValueError(f"backward={backward}: gradients of a sample are not alike from epoch to epoch; use int8")
        transport = C10d(group)
        check_equal("forward, backward and seed of a pipeline's stages", repr((*ways, seed)), transport)
        self._names_samples = ways[0].names_samples
        self._roll_call = RollCall(transport.group)
        self._step = 0
        self._samples: Samples | None = None
        self._named = False

        def traffic(boundary: int, *, backward: bool, sends: bool) -> Traffic:
            place = Place(boundary, backward, sends, 0, seed, transport.memory, backend)
            return Traffic(ways[backward], place)

        self._traffic = {
            "activations in": traffic(stage_index - 1, backward=False, sends=False),
            "activations out": traffic(stage_index, backward=False, sends=True),
            "gradients in": traffic(stage_index, backward=True, sends=False),
            "gradients out": traffic(stage_index - 1, backward=True, sends=True),
        }

    def watch(self) -> RollCall:
        """Around `schedule.step`: if a rank dies, the error names it; see `RollCall`."""
        return self._roll_call

    def set_samples(self, ids: Tensor | None) -> None:
        """Which samples the next step's batch holds: `commq.Differences` needs them, on every stage, before each step.

        ids: int64, 1-D, one for each row of the batch, all different. They are on the host. None: samples without
        names, as in validation; what is kept is neither used nor changed.
        """
        self._named, self._samples = True, None
        if ids is None:
            return
        if ids.dtype != torch.int64 or ids.ndim != 1 or ids.device.type != "cpu" or ids.unique().numel() != ids.numel():
            raise ValueError(
                f"set_samples: {ids.dtype} {tuple(ids.shape)} on {ids.device}, {ids.unique().numel()} different ones; "
                "expected int64, 1-D, on the CPU, all different"
            )
        cuda = torch.device(self.device).type == "cuda"
        on_device = (ids.pin_memory() if cuda else ids).to(self.device, non_blocking=True)
        self._samples = Samples(ids, on_device)
        for traffic in self._traffic.values():
            traffic.prefetch(self._samples)

    @property
    def raw_bytes(self) -> int:
        """What this stage would have sent in float32, since it was made."""
        return sum(self._traffic[name].raw_bytes for name in ("activations out", "gradients out"))

    @property
    def sent_bytes(self) -> int:
        """What this stage has sent, since it was made; tensors that are not floating point are not counted."""
        return sum(self._traffic[name].wire_bytes for name in ("activations out", "gradients out"))

    @property
    def received_bytes(self) -> int:
        return sum(self._traffic[name].wire_bytes for name in ("activations in", "gradients in"))

    def boundary_state(self) -> dict[str, Any]:
        """What this stage keeps between steps, as tensors and plain data."""
        return {"step": self._step} | {name: traffic.state_dict() for name, traffic in self._traffic.items()}

    def load_boundary_state(self, state: dict[str, Any]) -> None:
        """Continue from a `boundary_state`, to the bit: all stages together, from the same step."""
        self._step = state["step"]
        for name, traffic in self._traffic.items():
            traffic.load_state_dict(state[name])

    # What schedules call.

    def clear_runtime_states(self) -> None:
        """A step begins."""
        super().clear_runtime_states()
        self._step += 1
        if self._names_samples and not self._named:
            raise ValueError(
                f"stage {self.stage_index}, step {self._step}: nobody has said which samples it holds; call "
                "stage.set_samples(ids) before each step on every stage, or set_samples(None) to go without"
            )
        self._named = False

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        return self._traffic["activations in"].receive(operations, self._turn(fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        return self._traffic["activations out"].send(operations, self._turn(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        return self._traffic["gradients in"].receive(operations, self._turn(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        return self._traffic["gradients out"].send(operations, self._turn(bwd_chunk_id))

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        self._traffic["activations in"].land(fwd_chunk_id)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        self._traffic["gradients in"].land(bwd_chunk_id)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def _turn(self, chunk: int) -> Turn:
        return Turn(self._step, chunk, self._samples)
