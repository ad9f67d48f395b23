"""MLPs over long rows compute a tile of tokens at a time, so that tensors wider than a hidden state exist for one tile
only.

What a token leaves an MLP with depends on no other token (Arctic Long Sequence Training, arXiv:2506.13996, section 3.1,
has sequence tiling). The backward pass of a tile computes the tile again, so a layer that is computed again in its
backward pass costs nothing more: its own recomputation ends where the MLP's input is there.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.training import MLP_TILE
from trainer.model.held.layers import dequantized_once
from trainer.model.kept import Kept, keep
from trainer.model.parts import is_experts
from trainer.processes.accelerator import is_accelerator


def mlps(layer: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside a layer that treat each token by itself: several linear layers and nothing else that
    learns, and a forward pass that takes the tokens' values alone, where whatever mixes tokens takes masks, positions
    or a cache too."""
    for child in layer.children():
        if _is_mlp(child):
            yield child
        else:
            yield from mlps(child)


def _is_mlp(module: nn.Module) -> bool:
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    of_linears = {parameter for linear in linears for parameter in linear.parameters()}
    takes_values_alone = len(inspect.signature(module.forward).parameters) == 1
    return (
        len(linears) > 1
        and takes_values_alone
        and of_linears == set(module.parameters())
        and not any(map(is_experts, module.modules()))
    )


def tile(module: nn.Module, longest: int) -> None:
    """Make an MLP compute more than `longest` tokens a tile at a time. Its values and the gradient of its input stay
    the same. Gradients of its parameters are summed over the tiles in fp32.
    """
    whole = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.numel() <= longest * x.shape[-1]:
            return whole(x)
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if learning and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # tensors without a gradient would not be saved
        x, kept = keep(x, x)
        return _Tiled.apply(x, kept, whole, *learning)  # type: ignore[return-value]

    module.forward = forward


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Kept | None, whole: Callable[[Tensor], Tensor], *learning: nn.Parameter
    ) -> Tensor:
        """x (..., T, H) -> (..., T, H)."""
        ctx.kept, ctx.whole, ctx.learning = kept, whole, learning
        ctx.random = _random_states(x.device)
        with dequantized_once():
            return torch.cat([whole(part) for part in x.flatten(0, -2).split(MLP_TILE)]).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.kept.tensors
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in ctx.learning]
        x_grad = torch.empty_like(grad)
        parts = zip(*(tensor.flatten(0, -2).split(MLP_TILE) for tensor in (x, grad, x_grad)), strict=True)
        with _randomly_as(ctx.random, x.device), torch.enable_grad(), dequantized_once():
            for part, part_grad, destination in parts:
                part = part.detach().requires_grad_()
                # A bottleneck adapter is a module of the MLP that is computed after it.
                wanted = (part, *ctx.learning)
                found, *of_parameters = torch.autograd.grad(ctx.whole(part), wanted, part_grad, allow_unused=True)
                destination.copy_(found)
                for total, one in zip(sums, of_parameters, strict=True):
                    if one is not None:
                        total += one
        learnt = (total.to(parameter.dtype) for total, parameter in zip(sums, ctx.learning, strict=True))
        return x_grad, None, None, *learnt


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators from which dropout draws: the CPU's, and a GPU's."""
    here = [torch.get_device_module(device).get_rng_state(device)] if is_accelerator(device) else []
    return [torch.get_rng_state(), *here]


@contextmanager
def _randomly_as(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, dropout draws what it drew from these states on. Outside, the generators are as before."""
    on_cpu, *on_gpu = states
    with torch.random.fork_rng([device] if on_gpu else [], device_type=device.type if on_gpu else "cuda"):
        torch.set_rng_state(on_cpu)
        for state in on_gpu:
            torch.get_device_module(device).set_rng_state(state, device)
        yield
