"""Layouts: the buckets of a DDP module, each with its route, made when it, its buffer or the phase is new."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from commq.attach.answer_residual import AnswerResidual
from commq.attach.bucket import Bucket, Laid, Member, bind_answers, lay, make_bucket
from commq.codecs.formats import get_format
from commq.codecs.reference import Coding
from commq.collectives import link
from commq.collectives.hosts import find_hosts
from commq.collectives.plan import RAW
from commq.collectives.route import Route, find_route
from commq.collectives.transport import Transport
from commq.feedback.residual import Residual
from commq.policy.adaptation import Adaptation
from commq.recipe import Recipe

HOOK_NANOSECONDS = 100_000
"""What calling a hook in Python takes of the host at least, for each bucket."""
_log = logging.getLogger("commq")


@dataclass
class Known:
    """What is known of the bucket at one place."""

    parameters: tuple[int, ...]
    """Their ids."""
    bucket: Bucket
    route: Route
    nbytes: int
    laid: Laid | None = None
    """In the buffer that it last had."""


class Layouts:
    """All buckets of a module, by number and phase; names and numbers of its parameters."""

    def __init__(
        self,
        recipe: Recipe,
        adaptation: Adaptation,
        transport: Transport,
        residual: Residual,
        answer_residual: AnswerResidual | None,
        backend: str,
    ) -> None:
        self.recipe = recipe
        self.adaptation = adaptation
        self.transport = transport
        self.residual = residual
        self.answer_residual = answer_residual
        self.backend = backend
        self._live: dict[str, Tensor] = {}
        self._members: dict[int, tuple[str, int]] = {}
        self._next_unit = 0
        self._known: dict[tuple[int, int], Known] = {}
        self._two_levels: bool | None = None
        self._reported = False

    def restart(self, residual: Residual, answer_residual: AnswerResidual | None, live: Mapping[str, Tensor]) -> None:
        """Forget all buckets; the next have these residuals, and of some parameters only the elements in `live`."""
        self.residual, self.answer_residual, self._live = residual, answer_residual, dict(live)
        self._known.clear()

    def member(self, parameter: Tensor, name: str | None = None) -> tuple[str, int]:
        """Name and first unit of a parameter; new ones are numbered on."""
        if id(parameter) not in self._members:
            self._members[id(parameter)] = name or f"parameter.{len(self._members)}", self._next_unit
            self._next_unit += -(-parameter.numel() // self.recipe.unit)
        return self._members[id(parameter)]

    def find(self, grads: GradBucket, phase: int) -> Known | None:
        """What is known of this bucket; None if it is new, and must be made."""
        known = self._known.get((grads.index(), phase))
        if known is None or known.parameters != tuple(map(id, grads.parameters())):
            return None
        return known

    def make(self, grads: GradBucket, phase: int) -> Known:
        """Lay out a new bucket. Nothing may be under way: residuals move. All ranks do it together."""
        parameters, buffer = grads.parameters(), grads.buffer()
        if (grads.index(), phase) in self._known:  # DDP has rebuilt its buckets, all of them
            self._known.clear()
            if self.answer_residual is not None:
                self.answer_residual.collect()
        self._check(parameters, buffer)
        members = self._members_of(parameters, phase)
        self._find_levels()
        schedule = self.recipe.schedule
        if schedule == "auto":
            schedule = self._choose(members, buffer.numel(), buffer.dtype, buffer.device)
            if schedule == "plain":  # it travels as it stands: nothing to sort, and no residual
                raw = get_format("bf16" if _narrows(members, buffer.dtype) else RAW[buffer.dtype])
                members = [
                    replace(m, format=raw, answer=raw, numel=p.numel(), live=None)
                    for m, p in zip(members, parameters, strict=True)
                ]
        bucket = self._bucket(members, buffer, self.residual)
        route = self._route(schedule, bucket, buffer.device)
        if self.answer_residual is not None:
            bucket = bind_answers(bucket, route.plans, self.answer_residual, self.recipe.unit, buffer.device)
        known = Known(tuple(map(id, parameters)), bucket, route, buffer.numel() * buffer.element_size())
        self._known = {place: each for place, each in self._known.items() if place[1] == phase}
        self._known[grads.index(), phase] = known
        return known

    def loses(self, parameters: Sequence[Tensor], nbytes: int) -> bool:
        """Whether schedule auto gains nothing in any bucket, by measurement. All ranks together.

        It asks about the first bucket, if buckets have `nbytes`, and about one of all parameters. float32 that travels
        as bfloat16 gains, too, where that saves more time than the hooks of all buckets take.
        """
        dtypes, devices = {p.dtype for p in parameters}, {p.device for p in parameters}
        if len(dtypes) != 1 or len(devices) != 1 or not dtypes <= RAW.keys():
            return False
        (dtype,), (device,) = dtypes, devices
        self._find_levels()
        buckets: list[list[Tensor]] = [[]]
        for p in reversed(parameters):  # as DDP fills them
            if sum(each.numel() for each in buckets[-1]) * dtype.itemsize >= nbytes:
                buckets.append([])
            buckets[-1].append(p)
        for some in (buckets[0], parameters):
            numel = sum(p.numel() for p in some)
            if self._choose(self._members_of(some, 0), numel, dtype, device) != "plain":
                return False
        numel = sum(p.numel() for some in buckets if _narrows(self._members_of(some, 0), dtype) for p in some)
        if not numel:
            return True
        whole, half = (link.sums(self.transport, kind, device) for kind in (dtype, torch.bfloat16))
        return whole.nanoseconds(4 * numel) <= half.nanoseconds(2 * numel) + len(buckets) * HOOK_NANOSECONDS

    def forget(self) -> None:
        """The format has changed: make all buckets anew. Recipes that adapt have no residual of the answer."""
        self._known.clear()

    def lay(self, known: Known, buffer: Tensor) -> Laid:
        """Tensors and messages of a bucket in `buffer`."""
        laid = known.laid
        if laid is not None and laid.buffer.data_ptr() == buffer.data_ptr() and laid.buffer.dtype == buffer.dtype:
            return laid
        plain = self.recipe.schedule == "auto" and known.route.name == "plain"
        coding, weight = Coding() if plain else self._coding(), self.recipe.feedback.weight
        laid = lay(known.bucket, known.route.plans, buffer, coding, weight, self.transport, self.backend)
        known.laid = laid
        if buffer.is_cuda:
            # An error may free it before the stream that the exchange is on has passed it.
            buffer.record_stream(torch.cuda.current_stream(buffer.device))
        return laid

    def settle(self) -> None:
        """All buckets of a step have come."""
        if self.answer_residual is not None:
            self.answer_residual.settle()
        if self.recipe.schedule == "auto" and self._known and not self._reported:
            self._reported = True
            self._report()

    def _report(self) -> None:
        """Once, on rank 0: how schedule auto decided."""
        if self.transport.rank:
            return
        routes: dict[str, list[int]] = {}
        for known in self._known.values():
            routes.setdefault(known.route.name, []).append(known.nbytes)
        chosen = ", ".join(f"{name} for {len(sizes)} buckets of {sum(sizes)} bytes" for name, sizes in routes.items())
        if "plain" in routes:
            plain = {k.bucket.sources[0].format.name: None for k in self._known.values() if k.route.name == "plain"}
            _log.warning(
                "commq: schedule auto chose %s: by measurement, compression with %s would be slower than the plain "
                "all-reduce there, so these buckets travel uncompressed, in %s",
                chosen,
                self.recipe.format,
                " and ".join(plain),
            )
        else:
            _log.info("commq: schedule auto chose %s", chosen)

    def _find_levels(self) -> None:
        """Whether ranks of one host have a format of their own; the first time, all ranks together."""
        if self._two_levels is None:
            wants = self.recipe.schedule in ("two_hop", "auto")
            self._two_levels = wants and find_hosts(self.transport).has_two_levels

    def _members_of(self, parameters: Sequence[Tensor], phase: int) -> list[Member]:
        members, offset = [], 0
        for p in parameters:
            name, first_unit = self.member(p)
            fmt, answer = self.recipe.formats_of(name, tuple(p.shape), p.numel(), phase)
            fmt, answer = self.adaptation.now(fmt), self.adaptation.now(answer)
            live = self._live.get(name) if fmt.kind != "raw" else None
            numel = p.numel() if live is None else live.numel()
            members.append(Member(name, offset, numel, fmt, answer, first_unit, live))
            offset += p.numel()
        return members

    def _choose(self, members: list[Member], numel: int, dtype: torch.dtype, device: torch.device) -> str:
        """By schedule auto. Sources decide; residuals and tables come with the bucket that is chosen."""
        unbound = Residual(self.recipe.feedback, self.recipe.format.block)
        trial = self._bucket(members, torch.empty(numel, dtype=dtype, device="meta"), unbound)
        return self._route("auto", trial, device, narrow=_narrows(members, dtype)).name

    def _bucket(self, members: list[Member], buffer: Tensor, residual: Residual) -> Bucket:
        return make_bucket(
            members,
            self.recipe,
            residual,
            world_size=self.transport.world_size,
            buffer=buffer,
            two_levels=bool(self._two_levels),
        )

    def _route(self, name: str, bucket: Bucket, device: torch.device, *, narrow: bool = False) -> Route:
        if not bucket.sources:  # no elements
            name = "two_shot"
        return find_route(
            name,
            bucket.sources,
            self._coding(),
            self.transport,
            device=device,
            backend=self.backend,
            narrow=narrow,
        )

    def _coding(self) -> Coding:
        return Coding(rounding=self.recipe.rounding, rotation=self.recipe.rotation, seed=self.recipe.seed)

    def _check(self, parameters: list[Tensor], buffer: Tensor) -> None:
        if buffer.layout != torch.strided or any(p.is_complex() for p in parameters):
            raise TypeError(
                f"rank {self.transport.rank}: a bucket holds sparse or complex gradients, expected dense real ones; "
                "use Embedding(sparse=False) and real parameters, or keep those parameters out of this DDP module"
            )
        if buffer.dtype not in RAW:
            raise TypeError(
                f"rank {self.transport.rank}: gradients are {buffer.dtype}, expected float32, bfloat16 or float16"
            )


def _narrows(members: Sequence[Member], dtype: torch.dtype) -> bool:
    """Whether a bucket that schedule auto sends plain is summed as bfloat16: not if some of it is to stay exact."""
    return dtype == torch.float32 and all(m.format.kind != "raw" or m.format.name == "bf16" for m in members)
