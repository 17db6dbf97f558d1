"""The GPT: it sees no future, and it learns."""

import math
from itertools import pairwise

import torch

from commq.train.config import ModelConfig, OptimizerConfig
from commq.train.model import GPT, next_byte_loss, rotate, rotation_table
from commq.train.optimizer import learning_rate, make_optimizer

CPU = torch.device("cpu")
TINY = ModelConfig(layers=2, dim=32, heads=2, context=16)


def test_a_later_byte_changes_no_earlier_logit():
    model = GPT(TINY)
    tokens_BT = torch.randint(256, (3, 16))
    before_BTV = model(tokens_BT)
    for place in range(16):
        changed_BT = tokens_BT.clone()
        changed_BT[:, place] = (changed_BT[:, place] + 1) % 256
        after_BTV = model(changed_BT)
        assert torch.equal(after_BTV[:, :place], before_BTV[:, :place])
        assert not torch.equal(after_BTV[:, place], before_BTV[:, place])


def test_attention_scores_depend_on_the_distance_alone():
    q_K, k_K = torch.randn(2, 16)
    q_TK, k_TK = (rotate(x_K.expand(32, 16), *rotation_table(32, 16, CPU)) for x_K in (q_K, k_K))
    scores_TT = q_TK @ k_TK.T
    torch.testing.assert_close(scores_TT[1:, 1:], scores_TT[:-1, :-1])  # float32's own tolerance


def test_the_first_loss_is_that_of_guessing():
    tokens_BT = torch.randint(256, (8, 17))
    loss = next_byte_loss(GPT(TINY)(tokens_BT[:, :-1]), tokens_BT[:, 1:])
    assert abs(loss.item() - math.log(256)) < 0.1  # logits start near zero, so the loss does near ln 256


def test_loss_falls_with_both_optimizers():
    text_BT = torch.tensor(list(b"a rose is a rose is a rose is a rose is a rose is a "))[None, :17].repeat(4, 1)
    for name, lr in (("adamw", 1e-2), ("sgd", 0.2)):
        model, config = GPT(TINY), OptimizerConfig(optimizer=name, lr=lr, warmup=5)
        optimizer = make_optimizer(model, config)
        for step in range(1, 61):
            optimizer.param_groups[0]["lr"] = learning_rate(step, 60, config)
            optimizer.zero_grad()
            loss = next_byte_loss(model(text_BT[:, :-1]), text_BT[:, 1:])
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5 * math.log(256), name


def test_learning_rate_rises_and_falls():
    config = OptimizerConfig(lr=1.0, warmup=10, final_lr=0.1)
    rates = [learning_rate(step, 100, config) for step in range(1, 101)]
    assert rates[:10] == [step / 10 for step in range(1, 11)]
    assert all(later < earlier for earlier, later in pairwise(rates[9:]))
    assert rates[-1] == 0.1
