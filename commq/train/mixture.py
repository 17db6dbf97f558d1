"""The trainer of `--experts N`: in place of its MLP each block has N of them, spread over all ranks.

A router chooses two for each token (top-2 with weights that sum to 1; Shazeer et al. 2017, GShard), and a term of the
loss keeps experts equally busy (Fedus et al. 2021, section 2.2). Tokens travel to their experts in `--activations`,
results come back in bf16 (fp32 if `--activations fp32`); what is not an expert is averaged over ranks by the recipe.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import commq
from commq.attach.experts import Experts
from commq.train.config import Config
from commq.train.data import Corpus
from commq.train.model import GPT
from commq.train.parts import CountingHandle, PartsTrainer
from commq.train.ranks import Ranks

CHOICES = 2
"""Experts of a token."""
BALANCE = 0.01
"""Weight of the term that is 1 where experts are equally busy, and more elsewhere."""


class Mixture(nn.Module):
    """A router and this rank's experts of all of them. `balance` is that of the last call, with its gradient.

    D model width, E experts, K choices, T tokens.
    """

    def __init__(self, experts: Experts, dim: int, total: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, total, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = experts
        self.balance = torch.zeros(())

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        share_TE = self.router(x_TD).float().softmax(dim=-1)
        weight_TK, choice_TK = share_TE.topk(CHOICES, dim=-1)
        total = share_TE.shape[1]
        busy_E = torch.bincount(choice_TK.flatten(), minlength=total) / choice_TK.numel()
        self.balance = total * (busy_E * share_TE.mean(dim=0)).sum()
        y_TD = self.experts(x_TD, choice_TK, weight_TK / weight_TK.sum(dim=-1, keepdim=True))
        return y_TD.view(x_BTD.shape)


class MixtureTrainer(PartsTrainer):
    """One rank of a run with `config.experts` experts in each block, as many on every rank."""

    def __init__(self, config: Config, recipe: commq.Recipe, corpus: Corpus, ranks: Ranks) -> None:
        """ValueError, the same on every rank, if experts or validation cannot be divided among the ranks."""
        for name, value in (("experts", config.experts), ("val-sequences", config.data.val_sequences)):
            if value % ranks.world_size:
                raise ValueError(
                    f"--{name} {value} with {ranks.world_size} processes; choose a multiple of {ranks.world_size}"
                )
        super().__init__(config, recipe, corpus, ranks)

    def _attach(self, model: nn.Module, recipe: commq.Recipe) -> tuple[Any, Any, Optimizer]:
        assert isinstance(model, GPT)
        for block in model.blocks:
            block.mlp = self._mixture(len(model.blocks)).to(self.ranks.device)
        names = [name for name, _ in model.named_parameters() if ".experts." in name]
        self.own = [model.get_parameter(name) for name in names]
        self.own_group = self.ranks.group
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        ddp, handle, optimizer = super()._attach(model, recipe)
        return ddp, CountingHandle(handle, self.ranks.group), optimizer

    def _mixture(self, layers: int) -> Mixture:
        """Every rank draws the weights of all experts, so that they do not depend on the number of ranks."""
        dim, total = self.config.model.dim, self.config.experts
        here = total // self.ranks.world_size
        own = range(self.ranks.rank * here, (self.ranks.rank + 1) * here)
        experts = []
        for number in range(total):
            into, out_of = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
            nn.init.normal_(into.weight, std=0.02)
            nn.init.normal_(out_of.weight, std=0.02 / (2 * layers) ** 0.5)
            if number in own:
                experts.append(nn.Sequential(into, nn.GELU(), out_of))
        dispatch = self.config.activations
        combine = "fp32" if dispatch == "fp32" else "bf16"
        return Mixture(Experts(experts, group=self.ranks.group, dispatch=dispatch, combine=combine), dim, total)

    def _loss(self, model: nn.Module, sequences: Tensor) -> Tensor:
        loss = super()._loss(model, sequences)
        if not torch.is_grad_enabled():
            return loss
        return loss + BALANCE * sum(block.mlp.balance for block in self.ddp.module.blocks)

    def _clip(self) -> Tensor:
        for parameter in self.own:
            if parameter.grad is not None:  # a sum over all ranks' tokens, whose losses are averaged
                parameter.grad.div_(self.ranks.world_size)
        return super()._clip()
