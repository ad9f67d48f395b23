"""Each family of docs/models.md computes on ranks that share a row what one rank computes, gradients too."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, SIZES
from tests.unit.model.test_documents import build, row, settings
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.trial.self_test import ThreadPeers
from trainer.model.rows.row import Peers, lengths_known
from trainer.tuning.virtual_tokens.layer import add_prefixes, add_prompt

QUICK = ("gemma2", "mixtral")
LENGTHS = (23, 30, 11)


def gradients(model: Any, ids: Tensor, peers: Peers | None = None) -> None:
    """Adds those of a sum over the row's hidden states, or over the slice of one of `peers`."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    weights = torch.linspace(-1, 1, ids.shape[1])[None, :, None]
    if peers is not None:
        ids, positions, weights = (values.chunk(peers.size, dim=1)[peers.part] for values in (ids, positions, weights))
    with lengths_known(LENGTHS, peers):
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    (weights * hidden.square()).sum().backward()


class InDouble:
    """torch for a family's code, which computes in fp64 what it would compute in fp32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def collected(model: Any) -> dict[str, Tensor]:
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.long) for kind in sorted(FAMILIES)]
)
def test_a_family_has_the_gradients_of_one_rank(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_architecture(settings(kind)).fails_shared is None
    # In fp64: gradients that nearly cancel out differ by more than 1e-5 in fp32, where two ranks add in another order.
    model, ids = build(kind).double(), row()[0][:, : sum(LENGTHS)]
    monkeypatch.setattr(sys.modules[type(model).__module__], "torch", InDouble())
    assert_same(model, ids)


def assert_same(model: Any, ids: Tensor) -> None:
    """That two threads which share a row of `ids` have the gradients of one."""
    meeting, given = Barrier(2, timeout=60), [ids] * 2
    gradients(model, ids)
    alone = collected(model)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: gradients(model, ids, ThreadPeers(part, given, meeting)), range(2)))
    shared = collected(model)
    assert shared.keys() == alone.keys()
    for name, expected in alone.items():
        assert float((shared[name] - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-9, name


def test_virtual_tokens_have_the_gradients_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix of one head of keys, of which each rank needs a copy, and a prompt, of which a rank may have a part."""
    monkeypatch.setitem(SIZES, "num_key_value_heads", 1)
    ids = row()[0][:, : sum(LENGTHS)]
    prompted, prefixed = (build("llama", "sdpa").double().requires_grad_(False) for _ in range(2))
    add_prompt(prompted, torch.randn(40, SIZES["hidden_size"]).double())
    layers = [layer.self_attn for layer in prefixed.model.layers]
    add_prefixes(prefixed, layers, torch.randn(len(layers), 2, 1, 5, layers[0].head_dim).double())
    assert_same(prompted, ids)
    assert_same(prefixed, ids)
