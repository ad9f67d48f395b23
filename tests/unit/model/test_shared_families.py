"""Each family of docs/models.md computes on ranks that share a row what one rank computes, gradients too."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES, SIZES
from tests.unit.model.test_documents import build, row, settings
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.trial.self_test import ThreadPeers
from trainer.model.rows.attention import attend_across
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_of_a_rank_has_its_own_heads_with_their_sinks_and_their_keys(kv_heads: int) -> None:
    """What a layer has a value of for each head, and not for something else, is divided with the heads."""
    torch.manual_seed(2)
    query, sinks = torch.randn(1, 4, 6, 8), torch.randn(4)
    key, value = (torch.randn(1, kv_heads, 6, 8) for _ in range(2))
    layer: Any = SimpleNamespace(
        num_key_value_groups=4 // kv_heads,
        slopes=torch.randn(4),
        scales=torch.randn(3),
        prefix=torch.randn(2, kv_heads, 5, 8),
        other=torch.randn(2, 8, 5, 8),
        layer_idx=3,
    )

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, s_aux: Tensor) -> Any:
        assert (mask, module.layer_idx, len(module.scales), module.other.shape[1]) == ("the row's", 3, 3, 8)
        before = module.prefix[:, :, :, None].transpose(0, 2)  # (5, kv_heads, 2, 1, 8) of so many heads
        groups = module.num_key_value_groups
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        prefix = before.sum((0, 2, 3)).repeat_interleave(groups, 0)[None, :, None]
        scores = query @ (key + prefix).mT + module.slopes[None, :, None, None]
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ value * module.slopes[None, :, None, None]).transpose(1, 2), None

    alone, _ = attend(layer, query, key, value, "the row's", s_aux=sinks)
    meeting, given = Barrier(2, timeout=60), [query] * 2

    def compute(part: int) -> Tensor:
        q, k, v = (tensor.chunk(2, dim=2)[part] for tensor in (query, key, value))
        return attend_across(attend, ThreadPeers(part, given, meeting), layer, q, k, v, "the row's", s_aux=sinks)[0]

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(compute, range(2)))
    assert torch.allclose(torch.cat(parts, 1), alone, atol=1e-5)
