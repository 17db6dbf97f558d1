"""AdamW whose moments are kept in 8 bits, 4 bits or FP8 codes: 0.26 or 0.14 of the memory of float32 moments.

    opt = commq.optim.AdamW8bit(model.parameters(), lr=1e-3)     # in place of torch.optim.AdamW

It takes parameter groups, LR schedulers, GradScaler, DistributedDataParallel and FSDP2: the moments of a DTensor are
DTensors, and the same on every mesh (`grid`). `adamw_step` has the arithmetic; a GPU runs it as one Triton kernel for
each parameter. State dicts hold uint8 and float32 tensors only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.optim import Optimizer

from commq.optim import adamw_step
from commq.optim.adam import check_adam
from commq.optim.adamw_step import Moments, Numbers, Part, Rounding, move, ratio, round_bfloat16
from commq.optim.grid import Grid, check_block, grid_of, has_codes, make_like
from commq.optim.moment_format import FIRST_4, FIRST_8, FIRST_FP8, ROOT_4, ROOT_8, ROOT_FP8, MomentFormat
from commq.optim.optimizer import Parameters, floats, local

_CODES = ("first_codes", "first_scales", "root_codes", "root_scales")


class LowBitAdamW(Optimizer):
    """AdamW (decoupled weight decay) with encoded moments.

    first, root: formats of the first moment and of the root of the second, of one block length.
    update_clipping: scale a parameter's step down by the rms of g / sqrt(v_hat), where that is above 1, against the
        loss spikes that follow a second moment which is behind (StableAdamW; Wortsman et al. 2023, section 3.4). The
        rms is summed shard by shard: steps on another mesh then differ in their last bits.
    stochastic_rounding: round bfloat16 parameters stochastically, so that steps below half a unit are not lost.
        Bits come from seed, the parameter's number, the step and the element.
    Parameters with fewer than 4096 elements, one dimension, or rows shorter than 64 keep float32 moments.
    backend: "auto" (Triton on a GPU if it is installed, else plain torch), "triton" or "reference"; the same bits.
    Raises ValueError for arguments that cannot be, and for a mesh that cuts through blocks. A gradient that is not
    finite, or above 1e19, makes the moments of its block, and so its parameters, NaN, as an exploded run deserves;
    GradScaler skips such steps before.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        first: MomentFormat,
        root: MomentFormat,
        update_clipping: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        check_adam(float(lr), betas, eps, weight_decay)
        if (first.block, first.bits, first.signed) != (root.block, root.bits, True):
            raise ValueError(
                f"moments in {first.name} ({first.bits} bits, block {first.block}, signed={first.signed}) and "
                f"{root.name} ({root.bits} bits, block {root.block}); expected the same bits and block in both, and "
                "a sign in the first"
            )
        if backend not in ("auto", "triton", "reference"):
            raise ValueError(f"backend={backend!r} is unknown; expected auto, triton or reference")
        self.first, self.root, self.seed, self.backend = first, root, seed, backend
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "update_clipping": update_clipping,
            "stochastic_rounding": stochastic_rounding,
        }
        self._grids: dict[int, Grid] = {}
        self._row_numbers: dict[int, Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ValueError(f"a parameter of {p.dtype}, expected float32, bfloat16 or float16")
            if has_codes(p):
                check_block(p, self.first.block)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, offset in zip(self.param_groups, self._offsets(), strict=True):
            numbered = [(offset + n, p) for n, p in enumerate(group["params"]) if p.grad is not None]
            for _, p in numbered:
                self._begin_step(p)
            factors = self._factors(group, [p for _, p in numbered]) if group["update_clipping"] else {}
            self._update_codes(group, [(n, p) for n, p in numbered if "first_codes" in self.state[p]], factors)
            plain = [(number, p) for number, p in numbered if "exp_avg" in self.state[p]]
            for clipped in (True, False):
                self._update_plain(group, [each for each in plain if (id(each[1]) in factors) == clipped], factors)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`, to the bit. Those of another first or root format have other codes: ValueError."""
        super().load_state_dict(state_dict)  # which casts to the parameters' dtype
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        ours = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, ours, strict=True):
            state = state_dict["state"].get(number)
            if state is None:
                continue
            expected = self._make_state(p)
            for key, value in expected.items():
                found = state.get(key)
                if found is None or found.shape != value.shape or found.dtype != value.dtype:
                    what = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                    raise ValueError(
                        f"state of parameter {number} of shape {tuple(p.shape)}: {key} is {what}, expected "
                        f"{value.dtype} {tuple(value.shape)}; it was saved by another optimizer, format or block"
                    )
            device = {key: "cpu" if key == "step" else local(p).device for key in expected}
            self.state[p] = {key: state[key].detach().to(device[key], copy=True) for key in expected}

    # One parameter

    def _offsets(self) -> list[int]:
        """The number of each group's first parameter."""
        offsets = [0]
        for group in self.param_groups[:-1]:
            offsets.append(offsets[-1] + len(group["params"]))
        return offsets

    def _grid(self, p: Tensor) -> Grid:
        if id(p) not in self._grids:
            self._grids[id(p)] = grid_of(p)
        return self._grids[id(p)]

    def _begin_step(self, p: Tensor) -> None:
        if not self.state[p]:
            self.state[p] = self._make_state(p)
        self.state[p]["step"] += 1

    def _make_state(self, p: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros(())}
        if not has_codes(p):
            zeros = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            return state | {"exp_avg": zeros, "exp_avg_sq": torch.zeros_like(zeros)}
        for part, fmt in (("first", self.first), ("root", self.root)):
            state[f"{part}_codes"] = make_like(p, fmt.code_bytes, torch.uint8)
            state[f"{part}_scales"] = make_like(p, fmt.blocks, torch.float32)
        return state

    def _step_of(self, p: Tensor) -> int:
        return int(self.state[p]["step"].item())

    def _moments(self, p: Tensor) -> Moments:
        return Moments(*(local(self.state[p][key]) for key in _CODES))

    def _numbers(self, group: dict[str, Any], p: Tensor) -> Numbers:
        return Numbers(
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=self._step_of(p),
        )

    def _rounding(self, group: dict[str, Any], number: int, p: Tensor) -> Rounding | None:
        if not group["stochastic_rounding"] or p.dtype != torch.bfloat16:
            return None
        if id(p) not in self._row_numbers:
            self._row_numbers[id(p)] = self._grid(p).row_numbers(local(p).device)
        return Rounding(self.seed, number, self._step_of(p), self._row_numbers[id(p)])

    def _update_codes(
        self, group: dict[str, Any], numbered: list[tuple[int, Tensor]], factors: dict[int, Tensor]
    ) -> None:
        """All parameters with codes, those at the same step together."""
        alike: dict[tuple[int, torch.device], list[tuple[int, Tensor]]] = {}
        for number, p in numbered:
            alike.setdefault((self._step_of(p), local(p).device), []).append((number, p))
        for (_, device), same in alike.items():
            parts = [
                Part(
                    local(p),
                    _grad(p),
                    self._moments(p),
                    self._grid(p),
                    factors.get(id(p)),
                    self._rounding(group, number, p),
                )
                for number, p in same
            ]
            numbers = self._numbers(group, same[0][1])
            implementation(self.backend, device).update(parts, (self.first, self.root), numbers)

    def _update_plain(
        self, group: dict[str, Any], numbered: list[tuple[int, Tensor]], factors: dict[int, Tensor]
    ) -> None:
        """All parameters with float32 moments, in a few launches together where they are at the same step."""
        steps = {self._step_of(p) for _, p in numbered}
        for step in sorted(steps):
            same = [(n, p) for n, p in numbered if self._step_of(p) == step and local(p).numel()]
            if not same:
                continue
            grads = floats([_grad(p) for _, p in same])
            first = [local(self.state[p]["exp_avg"]) for _, p in same]
            second = [local(self.state[p]["exp_avg_sq"]) for _, p in same]
            numbers = self._numbers(group, same[0][1])
            torch._foreach_mul_(first, numbers.beta1)
            torch._foreach_add_(first, grads, alpha=1.0 - numbers.beta1)
            torch._foreach_mul_(second, numbers.beta2)
            torch._foreach_addcmul_(second, grads, grads, value=1.0 - numbers.beta2)
            roots = torch._foreach_sqrt(second)
            if any(p.dtype != torch.float32 for _, p in same):
                for (number, p), m, r in zip(same, first, roots, strict=True):
                    moved = move(local(p).float(), m, r, numbers, factors.get(id(p)))
                    rounding = self._rounding(group, number, p)
                    if rounding is not None:
                        grid = self._grid(p)
                        moved = round_bfloat16(moved.view(grid.rows, grid.width), grid, rounding).view(moved.shape)
                    local(p).copy_(moved)
                continue
            parameters = [local(p) for _, p in same]
            torch._foreach_mul_(roots, numbers.inverse_root)
            torch._foreach_add_(roots, numbers.eps)
            if factors:
                factor = torch.stack([factors[id(p)] for _, p in same])
                steps_taken = list(torch._foreach_mul(first, list((factor * numbers.step_size).unbind())))
                torch._foreach_mul_(parameters, list((1.0 - factor * (numbers.lr * numbers.weight_decay)).unbind()))
                torch._foreach_div_(steps_taken, roots)
                torch._foreach_sub_(parameters, steps_taken)
                continue
            torch._foreach_mul_(parameters, 1.0 - numbers.lr * numbers.weight_decay)
            torch._foreach_addcdiv_(parameters, first, roots, value=-numbers.step_size)

    # Update clipping

    def _factors(self, group: dict[str, Any], parameters: list[Tensor]) -> dict[int, Tensor]:
        """What the learning rate of each parameter is multiplied by: 1 / max(1, rms of g / sqrt(v_hat))."""
        sums = self._sum_over_ranks(parameters, [self._excess(group, p) for p in parameters])
        found: dict[int, Tensor] = {}
        for device in dict.fromkeys(total.device for total in sums):
            here = [i for i, total in enumerate(sums) if total.device == device]
            means = torch._foreach_div([sums[i] for i in here], [float(max(1, parameters[i].numel())) for i in here])
            factors = 1.0 / torch.clamp(torch.stack(means).sqrt(), min=1.0)
            found |= {id(parameters[i]): factor for i, factor in zip(here, factors.unbind(), strict=True)}
        return found

    def _excess(self, group: dict[str, Any], p: Tensor) -> Tensor:
        numbers, grad = self._numbers(group, p), _grad(p)
        if "first_codes" in self.state[p]:
            module = implementation(self.backend, grad.device)
            found: Tensor = module.excess(grad, self._moments(p), (self.first, self.root), self._grid(p), numbers)
            return found
        g = grad.float()
        v = local(self.state[p]["exp_avg_sq"]) * numbers.beta2 + (g * g) * (1.0 - numbers.beta2)
        return ratio(g, v.sqrt(), numbers).sum()

    def _sum_over_ranks(self, parameters: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
        """Sums of whole parameters from those of shards; one exchange for all that are sharded alike."""
        totals = list(sums)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, p in enumerate(parameters):
            if isinstance(p, DTensor) and any(not place.is_replicate() for place in p.placements):
                sharded = tuple(not place.is_replicate() for place in p.placements)
                alike.setdefault((p.device_mesh, sharded), []).append(number)
        for (mesh, sharded), numbers in alike.items():
            placements: Iterable[Placement] = [Partial() if each else Replicate() for each in sharded]
            stacked = torch.stack([sums[number] for number in numbers])
            whole = DTensor.from_local(stacked, mesh, list(placements), run_check=False).full_tensor()
            for number, total in zip(numbers, whole.unbind(), strict=True):
                totals[number] = total
        return totals


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad)


def implementation(backend: str, device: torch.device) -> ModuleType:
    """`adamw_step`, or what gives the same bits faster on `device`."""
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not has_triton:
        raise RuntimeError("backend='triton': triton is not installed; pip install triton")
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and has_triton):
        return importlib.import_module("commq.optim.triton_adamw")
    return adamw_step


class AdamW8bit(LowBitAdamW):
    """Block-wise dynamic 8-bit moments, block 256 (Dettmers et al. 2021), the second as its root. See LowBitAdamW."""

    def __init__(self, params: Parameters, lr: float | Tensor = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"first": FIRST_8, "root": ROOT_8} | options)


class AdamW4bit(LowBitAdamW):
    """4-bit moments, block 128; the root of the second is linear and never zero (Li et al. 2023). See LowBitAdamW."""

    def __init__(self, params: Parameters, lr: float | Tensor = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"first": FIRST_4, "root": ROOT_4} | options)


class AdamWFp8(LowBitAdamW):
    """Moments as e4m3 numbers, block 256, the second as its root and never zero. See LowBitAdamW."""

    def __init__(self, params: Parameters, lr: float | Tensor = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **{"first": FIRST_FP8, "root": ROOT_FP8} | options)
