"""Stages of `torch.distributed.pipelining` whose boundary tensors travel encoded; the schedules stay as they are.

    stage = commq.PipelineStage(module, rank, W, device, forward="int4", backward="int8")
    schedule = ScheduleGPipe(stage, n_microbatches=8, loss_fn=loss_fn)
    schedule.step(tokens)

A schedule asks its stage for receives, runs them, lets the stage compute, asks for sends, and runs those. The stage
encodes when sends are asked for, and decodes when the computation asks for what was received. What travels are wires in
place of tensors, on channels of the stage's own or by the schedule's operations. Stages that share a rank hand tensors
over as they are, and so travel tensors that are not floating point (masks, token numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from commq.attach.channel import Channel
from commq.attach.crossing import Place, Samples, Turn, Way, way_of
from commq.attach.flow import Flow
from commq.codecs.formats import Format
from commq.collectives.roll_call import RollCall
from commq.collectives.transport import C10d, check_equal


class PipelineStage(pipelining.PipelineStage):
    """torch's PipelineStage with an encoded boundary on either side.

    forward, backward: how activations and their gradients travel: a format or its name ("int4"), "tiles", or a
    `commq.Direct`, `Tiles` or `Differences`. seed: of stochastic rounding. All other arguments are torch's.
    ahead: micro-batches whose receives are posted before the schedule asks for them, on a channel of its own for
    each boundary and direction. 0: the schedule's own operations, one after the other, on its group.
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
        ahead: int = 1,
        seed: int = 0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, group=group, **options)
        ways = way_of(forward), way_of(backward)
        if ways[1].names_samples:
            raise ValueError(f"backward={backward}: gradients of a sample are not alike from epoch to epoch; use int8")
        if ahead < 0:
            raise ValueError(f"ahead={ahead}: expected micro-batches, 0 or more")
        transport = C10d(group)
        check_equal("forward, backward, ahead and seed of a pipeline's stages", repr((*ways, ahead, seed)), transport)
        self._ahead, self._names_samples = ahead, ways[0].names_samples
        self._roll_call = RollCall.of(transport.group)
        self._step, self._first_step = 0, 1
        self._samples: Samples | None = None
        self._named = False
        before, after = stage_index - 1, stage_index

        def flow(boundary: int, *, backward: bool, sends: bool) -> Flow:
            place = Place(boundary, backward, sends, 0, seed, transport.memory, backend)
            return Flow(ways[backward], place)

        self._flows = {
            "activations in": flow(before, backward=False, sends=False),
            "gradients out": flow(before, backward=True, sends=True),
            "activations out": flow(after, backward=False, sends=True),
            "gradients in": flow(after, backward=True, sends=False),
        }

    def watch(self) -> RollCall:
        """Around `schedule.step` if ahead is 0: a rank that dies is named. On channels it is named anyway."""
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
        ids = ids.clone()  # a thread may still write rows when the caller fills the tensor with the next ones
        cuda = torch.device(self.device).type == "cuda"
        on_device = (ids.pin_memory() if cuda else ids).to(self.device, non_blocking=True)
        self._samples = Samples(ids, on_device)
        for flow in self._flows.values():
            flow.prefetch(self._samples)

    @property
    def raw_bytes(self) -> int:
        """What this stage would have sent in float32, since it was made."""
        return sum(self._flows[name].raw_bytes for name in ("activations out", "gradients out"))

    @property
    def sent_bytes(self) -> int:
        """What this stage has sent, since it was made; tensors that are not floating point are not counted."""
        return sum(self._flows[name].wire_bytes for name in ("activations out", "gradients out"))

    @property
    def received_bytes(self) -> int:
        return sum(self._flows[name].wire_bytes for name in ("activations in", "gradients in"))

    def boundary_state(self) -> dict[str, Any]:
        """What this stage keeps between steps, as tensors and plain data."""
        return {"step": self._step} | {name: flow.state_dict() for name, flow in self._flows.items()}

    def load_boundary_state(self, state: dict[str, Any]) -> None:
        """Continue from a `boundary_state`, to the bit: all stages together, from the same step."""
        self._step, self._first_step = state["step"], state["step"] + 1
        for name, flow in self._flows.items():
            flow.load_state_dict(state[name])

    # What schedules call.

    def clear_runtime_states(self) -> None:
        """A step begins."""
        super().clear_runtime_states()
        self._step += 1
        if self._ahead and self._step == self._first_step:
            self._open_channels()
        if self._names_samples and not self._named:
            raise ValueError(
                f"stage {self.stage_index}, step {self._step}: nobody has said which samples it holds; call "
                "stage.set_samples(ids) before each step on every stage, or set_samples(None) to go without"
            )
        self._named = False

    def _open_channels(self) -> None:
        """In the order of boundaries on every rank: making one waits for the peer."""
        group = C10d(self.group).group
        for boundary, names in (
            (self.stage_index - 1, ("activations in", "gradients out")),
            (self.stage_index, ("activations out", "gradients in")),
        ):
            if 0 <= boundary < self.num_stages - 1:
                ranks = self.stage_index_to_group_rank[boundary], self.stage_index_to_group_rank[boundary + 1]
                for name in names if ranks[0] != ranks[1] else ():
                    direction = f"{name.split()[0]}-{boundary}"
                    self._flows[name].channel = Channel(group, ranks, direction, torch.device(self.device))

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._receive("activations in", super().get_fwd_recv_ops, fwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send("activations out", super().get_fwd_send_ops, fwd_chunk_id, last=not self.has_backward)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._receive("gradients in", super().get_bwd_recv_ops, bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send("gradients out", super().get_bwd_send_ops, bwd_chunk_id, last=True)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        with self._roll_call:
            self._flows["activations in"].land(fwd_chunk_id)
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        with self._roll_call:
            self._flows["gradients in"].land(bwd_chunk_id)
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def _receive(self, name: str, ask: Callable[[int], list[dist.P2POp]], chunk: int) -> list[dist.P2POp]:
        """The micro-batch's receives, and those ahead of it."""
        left: list[dist.P2POp] = []
        with self._roll_call:
            for each in range(chunk, min(chunk + self._ahead + 1, self._chunks)):
                if not self._flows[name].is_posted(each):
                    left += self._flows[name].post(ask(each), self._turn(each))
        return left

    def _send(self, name: str, ask: Callable[[int], list[dist.P2POp]], chunk: int, *, last: bool) -> list[dist.P2POp]:
        """The micro-batch's sends. last: nothing of a step is sent after its last micro-batch's."""
        with self._roll_call:
            left = self._flows[name].send(ask(chunk), self._turn(chunk))
            if last and chunk == self._chunks - 1:
                for flow in self._flows.values():
                    flow.flush()
        return left

    @property
    def _chunks(self) -> int:
        """Micro-batches of a step."""
        return len(self.args_recv_info)

    def _turn(self, chunk: int) -> Turn:
        return Turn(self._step, chunk, self._samples)
