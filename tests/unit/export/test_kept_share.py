"""The share of what was learnt that a merge as stored keeps, of logits whose probabilities are known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.export.proof.kept import kept_proof
from trainer.export.proof.rows import ProbeRow, distance

TRAINED: Any = SimpleNamespace(method=SimpleNamespace(through=False), probe=SimpleNamespace(origin="40 rows"))
ROWS = [ProbeRow(torch.zeros(1, 3, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([1, 0])) for _ in range(40)]


def saying(losses: np.ndarray) -> list[Tensor]:
    """The logits of rows whose two tokens have these losses each."""
    chances = torch.from_numpy(np.exp(-losses))
    right = torch.stack([chances.log(), (1 - chances).log()], -1)
    return [torch.stack([pair.flip(-1), pair]) for pair in right]


def test_the_share_is_the_merges_gain_over_that_of_the_adapter_and_its_bounds_are_those_of_other_rows() -> None:
    draw = np.random.default_rng(1)
    base, adapter = np.full(40, 2.0), draw.uniform(0.5, 1.5, 40)
    merged = adapter + draw.uniform(0, 0.4, 40)
    alone, beside, made = map(saying, (base, adapter, merged))
    proof = kept_proof(TRAINED, ROWS, alone, beside, made, "dither", "dither", computed_in="fp32")
    losses = (proof.base_loss, proof.adapter_loss, proof.merged_loss)
    assert losses == pytest.approx((2.0, adapter.mean(), merged.mean()))
    assert proof.kept == pytest.approx((2 - merged.mean()) / (2 - adapter.mean()))
    chosen = draw.integers(0, 40, (4000, 40))
    shares = (2 - merged)[chosen].sum(1) / (2 - adapter)[chosen].sum(1)
    assert (proof.kept_low, proof.kept_high) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.005)
    assert proof.kl == distance(beside, made, ROWS).kl > 0
    assert proof.kl_effect == distance(beside, alone, ROWS).kl
    assert (proof.tokens, proof.rows, proof.computed_in, proof.through) == (80, "40 rows", "fp32", False)


def test_an_adapter_that_predicts_no_better_has_no_bound() -> None:
    base = saying(np.full(40, 2.0))
    proof = kept_proof(TRAINED, ROWS, base, base, base, "dither", "dither", computed_in="fp32")
    assert (proof.kept, proof.kept_low, proof.gains, proof.holds) == (0.0, -np.inf, False, False)
