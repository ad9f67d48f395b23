"""The elementwise work of mixtures by our kernels, beside PyTorch's operators, in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.unit.model.test_experts import adapt, distance, pair, passes
from trainer.model import experts
from trainer.model.held.layers import HeldStack
from trainer.model.kernels import grouped, mixture

# A gate of one kernel, a gate and biases of its own, none, weighted inputs, a norm that routing weights cannot pass.
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text", "muse_spark_text")


@contextmanager
def launched() -> Iterator[None]:
    """Kernels are launched on the CPU; weights are decoded by operators, which another check is about."""
    with ExitStack() as patches:
        for module in (experts, grouped):
            patches.enter_context(patch.object(module, "can_launch", lambda device_type: True))
        yield


def values() -> None:
    """Forward and backward, of rows that are no whole portions: a sum of whole numbers is exact."""
    generator = torch.Generator().manual_seed(1)
    for rows, inner in ((5, 96), (3, 1024), (2, 1500), (1, 7)):
        both, weights = (torch.randn(*shape, generator=generator) for shape in ((rows, 2 * inner), (rows,)))
        given = both.requires_grad_(), weights.requires_grad_()
        found = mixture.gated(*given)
        grad = torch.randn(found.shape, generator=generator)
        gate, up = (part.double() for part in both.chunk(2, 1))
        expected = weights.double()[:, None] * torch.nn.functional.silu(gate) * up
        learnt = torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad.double())
        assert distance([found.detach(), *learnt[0]], [expected.detach(), *learnt[1]]) < 1e-6, (rows, inner)
    for tokens, each, width in ((5, 3, 96), (4, 8, 1500), (0, 2, 16)):
        rows = torch.randint(-9, 9, (tokens * each, width), generator=generator).float()
        places = torch.randperm(tokens * each, generator=generator)
        expected = rows[places].view(tokens, each, width).sum(1)
        for some in (rows, rows.half()):
            assert torch.equal(mixture.combined(some, places, each), expected.to(some.dtype))


def passes_of_families() -> None:
    """Whole mixtures have the values and gradients of transformers' own, also of adapters."""
    for family in FAMILIES:
        both = pair(family, "packed")
        adapt(both, 4)
        with launched(), patch.object(mixture, "combined", wraps=mixture.combined) as combined:
            found = passes(both.ours, both.our_learning)
        assert distance(found, passes(both.theirs, both.their_learning)) < 5e-6, family
        assert combined.call_count == (1 if family == "muse_spark_text" else 2)


def recomputations() -> None:
    """A mixture that is computed again ends before its down-projection, and has the same gradients to the bit."""
    made, plain, found = list[str](), HeldStack.matrices, list[list[Tensor]]()

    def counted(self: Any, first: int, last: int, by: Any = None) -> Tensor:
        made.append("down" if self is both.ours.down_proj else "up")
        return plain(self, first, last, by)

    for again in (False, True):
        both = pair("qwen3_moe", "packed")
        torch.manual_seed(3)
        adapt(both, 4)

        def whole(*given: Tensor, both: Any = both, again: bool = again) -> Tensor:
            return checkpoint(both.ours, *given, use_reentrant=False) if again else both.ours(*given)

        made.clear()
        with launched(), patch.object(HeldStack, "matrices", counted):
            found.append(passes(whole, both.our_learning))
        assert made == ["up", "down", *(["up"] if again else []), "down", "up"]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def interpret() -> None:
    values()
    passes_of_families()
    recomputations()
    print("mixtures: interpreted")
