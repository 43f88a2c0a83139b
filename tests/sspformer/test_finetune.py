"""Fine-tuning on one site: repeatable to the bit, only what the plan says moves, and it learns."""

from __future__ import annotations

import pytest
import torch

from sspformer.contract.errors import Code, Refused
from sspformer.data.cohort import Cohort
from sspformer.finetune import slice_batch, train
from sspformer.model.assembly import Head, trainable_names
from sspformer.tasks.denoise import Denoise
from tests.phantom import MINI


def tune(cohort: Cohort, seed: int = 1, steps: int = 4, part: str = "head", rate: float = 2e-3, **more):
    torch.manual_seed(0)
    head = Head(MINI)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    loss = train(head, cohort, Denoise(0.1), steps=steps, batch_slices=2, learning_rate=rate, trainable=part, seed=seed,
                 **more)  # fmt: skip
    after = {name: p.detach().clone() for name, p in head.named_parameters()}
    return before, after, loss, head


def test_equal_arguments_give_bitwise_equal_weights(cohort):
    _, first, loss, _ = tune(cohort)
    torch.rand(17)  # the global generator plays no part
    _, again, same, _ = tune(cohort)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert loss == same
    _, other, _, _ = tune(cohort, seed=2)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("part", ["head", "tail", "norms"])
def test_only_the_trainable_part_moves(cohort, part):
    before, after, _, head = tune(cohort, part=part)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    asked = set(trainable_names(head, part))
    assert moved <= asked
    # An untrained head's last layer is zero: until its weight moves, nothing reaches the norms before it.
    assert len(moved) >= 0.9 * len(asked) if part != "norms" else moved == {"tail.last.bias"}
    assert {name for name, p in head.named_parameters() if p.requires_grad} == asked
    assert not head.training


def test_the_loss_falls(cohort):
    """Against the same draws with a learning rate of nothing: a lucky draw cannot pass for learning."""
    learning: list[float] = []
    standing: list[float] = []
    tune(cohort, steps=30, rate=4e-3, on_step=lambda step, loss: learning.append(loss))
    tune(cohort, steps=30, rate=1e-12, on_step=lambda step, loss: standing.append(loss))
    assert len(learning) == 30
    assert learning[0] == standing[0]
    assert sum(learning[-8:]) < 0.95 * sum(standing[-8:])


def test_held_out_patients_are_never_trained_on(cohort, monkeypatch):
    seen: set[str] = set()
    real = Cohort.slice_at
    monkeypatch.setattr(Cohort, "slice_at", lambda self, subject, n: seen.add(subject) or real(self, subject, n))
    tune(cohort, steps=15)
    assert seen == set(cohort.train)


def test_a_batch_has_what_the_head_needs(cohort):
    picks = [(cohort.train[0], 0), (cohort.train[1], 2)]
    features, base, target, inside = slice_batch(cohort, picks, torch.device("cpu"))
    assert features.shape == (2, 16, MINI.width)
    assert base.shape == target.shape == inside.shape == (2, 1, 64, 64)
    assert features.dtype == base.dtype == target.dtype == torch.float32
    assert inside.dtype == torch.bool


def test_a_loss_that_is_not_finite_stops_with_one_line(cohort):
    head = Head(MINI)
    torch.nn.init.constant_(head.tail.last.bias, float("inf"))
    with pytest.raises(Refused, match="not finite") as caught:
        train(head, cohort, Denoise(0.1), steps=2, batch_slices=1, learning_rate=1e-3, trainable="head", seed=0)
    assert caught.value.code is Code.TENSORS
