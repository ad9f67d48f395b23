"""A sharded model that can learn: the base on this rank, the run's method on it, the engine around both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.base.find.locate import Base
from trainer.base.load.load import DTYPES, LoadReport, load_model
from trainer.config import Config
from trainer.model.attention import Attention, choose_attention
from trainer.model.packed import PackedModel
from trainer.objective.objective import Objective
from trainer.ranks import Ranks
from trainer.tuning.method import method_of
from trainer.zero.engine import Engine
from trainer.zero.policy import Scope


def attention_of(config: Config, base: Base, device: torch.device) -> Attention:
    """The attention kernel for the run's settings, base and method. Raises `ConfigError` when the one that is set cannot be used."""
    dtype, refused = DTYPES[config.model.dtype], method_of(config).virtual.refused_kernels
    return choose_attention(config.model.attention, device, dtype, base.architecture, refused)


def assemble(
    base: Base,
    config: Config,
    deepspeed_config: dict[str, Any],
    ranks: Ranks,
    attention: Attention,
    scope: Scope,
    objective: Objective,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[Engine, LoadReport]:
    """Load the base, attach what learns, and put DeepSpeed around it; `log` gets rank 0's progress. Collective.

    Raises:
        CapstanError: on every rank, when one cannot read a tensor, or the files lack it or have it in another shape or type.
    """
    model, report = load_model(base, config, deepspeed_config, ranks, attention, scope, log)
    method = method_of(config)
    method.attach(model, base.architecture, DTYPES[config.model.dtype], config.run.seed)
    before = checksums(model)
    groups = method.groups(model, config.optim)
    packed = PackedModel(model, attention, method.virtual.reserved)
    engine = Engine(packed, objective.loss, groups, config.optim, deepspeed_config, ranks)
    assert checksums(model) == before, "deepspeed.initialize changed packed weights"
    return engine, report


def checksums(model: nn.Module) -> dict[str, int]:
    """A sum over this rank's bytes of each packed parameter, to show that nothing cast or moved them."""
    parts: dict[str, Tensor] = {
        name: parameter.ds_tensor  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.uint8
    }
    if not parts:
        return {}
    return dict(zip(parts, torch.stack([_sum(part) for part in parts.values()]).tolist(), strict=True))


def _sum(part: Tensor) -> Tensor:
    """The sum of words of eight bytes: torch makes a copy of what it is to add up in a wider type than it has."""
    words = len(part) // 8 * 8
    return part[:words].view(torch.int64).sum() + part[words:].sum(dtype=torch.int64)
