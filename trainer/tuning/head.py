"""A small head that learns beside a method and replaces the language model's head, for objectives that need one.

It has the name that it has in transformers' classes for such models. PEFT's folder holds it as one of
`modules_to_save`: whole, beside the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.tuning.linear_adapters import LABELS, LowRank, low_rank_methods, with_peft_files
from trainer.tuning.method import Around, ExportedFiles, Method, innermost

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Config, Model, Optim
    from trainer.config.objective import Head
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


MODULE = "score"
"""Its name in transformers' classes."""
_WEIGHT, _BIAS = f"{MODULE}.weight", f"{MODULE}.bias"


@dataclass(frozen=True)
class WithHead(Around):
    """A method whose adapters PEFT saves, and a head with one output for each of `labels`, or a single output."""

    head: Head
    objective: str
    labels: Sequence[str]
    model: Model

    @property
    def unmergeable(self) -> str:
        return f"{self.head.what.lower()}'s head is no part of a language model, which a merge would be"

    @cached_property
    def padding(self) -> int | None:
        """The padding token. transformers' classes with such a head read the last token before it."""
        from trainer.base.find.locate import base_files
        from trainer.base.find.tokenizer import read_tokenizer

        directory = base_files(self.model)
        found: Any = read_tokenizer(directory, self.model.base, self.model.tokens).pad_token_id
        return found

    @property
    def outputs(self) -> int:
        return max(1, len(self.labels))

    def mismatches(self, architecture: Architecture) -> list[str]:
        found = self.method.mismatches(architecture)
        if self.head.transformers_class not in architecture.heads:
            found.append(
                f"objective.name: {self.objective} needs a base for which transformers has a class with such a head "
                f"({self.head.transformers_class}), and it has none of a known form for this one. Give another base."
            )
        return found

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        bias: dict[str, tuple[int, ...]] = {_BIAS: (self.outputs,)} if self.head.biased else {}
        return {_WEIGHT: (self.outputs, architecture.hidden), **bias}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """The head starts as in transformers: normally distributed, with the family's standard deviation."""
        import torch
        from torch import nn

        self.method.attach(model, architecture, dtype, seed)
        device = next(model.parameters()).device
        deviation = getattr(model.config.get_text_config(), "initializer_range", 0.02)
        drawn = torch.randn(self.outputs, architecture.hidden, generator=torch.Generator().manual_seed(seed))
        head = nn.Linear(architecture.hidden, self.outputs, bias=self.head.biased, device=device, dtype=dtype)
        head.weight.data.copy_(drawn * deviation)
        if self.head.biased:
            head.bias.data.zero_()
        model.add_module(MODULE, head)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        head = list(model.get_submodule(MODULE).parameters())
        return [*self.method.groups(model, optim), {"name": "head", "lr_ratio": 1.0, "params": head}]

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Adds the head, and the file with the names of its outputs."""
        settings = {"modules_to_save": [MODULE], "task_type": self.head.task}
        exported = with_peft_files(theirs, ours, **settings)
        names = json.dumps(dict(enumerate(self.labels)), indent=2, ensure_ascii=False).encode()
        beside = {LABELS: names} if self.labels else {}
        return replace(exported, what=f"{self.head.what}'s head and LoRA adapter", files={**beside, **exported.files})


def head_of(method: Method) -> WithHead | None:
    """The head that learns beside the run's `method`, under any other wrappers; None if there is none."""
    while isinstance(method, Around):
        if isinstance(method, WithHead):
            return method
        method = method.method
    return None


def outputs(model: PackedModel, row: MicroBatch, places: Tensor) -> Tensor:
    """The outputs of the head at these places of a whole packed row, (places, outputs) fp32.

    Ranks that share the row all get the same outputs, so only one of them may count what follows."""
    hidden = model.hidden(row.input)[0]
    here = places.to(hidden.device) - row.input.first
    mine = (here >= 0) & (here < len(hidden))
    found = model.model.get_submodule(MODULE)(hidden.index_select(0, here.clamp(0, len(hidden) - 1))).float()
    return model.total(found * mine[:, None], row.input)


def with_head(method: Method, config: Config) -> Method:
    from trainer.config.objective import HEADS

    name, head = config.objective.name, HEADS.get(config.objective.name)
    if head is None:
        return method
    if not isinstance(innermost(method), LowRank):
        raise ConfigError(
            f"tuning.method: {config.tuning.method} has no adapter that PEFT keeps beside a head, as objective.name:"
            f" {name} wants one. Choose one of {', '.join(low_rank_methods(config.tuning))}."
        )
    if config.model.add_tokens:
        raise ConfigError(
            f"model.add_tokens: new tokens need rows of the output head, which objective.name: {name} replaces by"
            " a head of its own. Remove them; if a template needs them, give a base that has them."
        )
    if config.tuning.start:
        raise ConfigError(
            f"tuning.start: an adapter has no head for objective.name: {name} to begin with. Merge that adapter"
            " (capstan export --format merged), and give the result as model.base."
        )
    # Where a head is not `labelled`, the rows have no class, and so no labels may be set.
    return WithHead(method, head, name, config.data.labels or (), config.model)


AROUND: dict[str, Callable[[Method, Config], Method]] = {"objective.name": with_head}
