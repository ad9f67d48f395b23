"""The rows of the embedding and of the output head for the tokens of `model.add_tokens`. They learn beside an adapter.

The base's own matrices stay frozen and as they are stored. A small matrix (tokens, H), as in PEFT's trainable tokens,
replaces some of their rows or follows behind the last one. An untied head has its own. A new token starts as the mean
of the tokens that its text was split into before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from trainer.errors import ConfigError
from trainer.tuning.linear_adapters import with_peft_files
from trainer.tuning.method import Around, ExportedFiles, Method, methods_reading

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.base.find.tokenizer import TokenRow
    from trainer.config import Config, Model, Optim
    from trainer.state.checkpoint.learnt_weights import LearntWeights


SETTING = "model.add_tokens"
_ROWS = "trainable_tokens_delta"
_SAVED_AS = f"token_adapter.{_ROWS}"


@dataclass(frozen=True)
class RowsUpdate:
    """Replaces the rows `ids` of a weight by `rows` (tokens, H), fp32. `shape` may have more rows than the base."""

    shape: tuple[int, ...]
    ids: Tensor
    rows: Tensor

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[1])
        here = (self.ids >= first) & (self.ids < first + len(rows))
        rows[self.ids[here] - first] = self.rows[here].to(rows.dtype)


@dataclass(frozen=True)
class WithTokens(Around):
    """A method of low-rank adapters, and the learnt rows of some tokens."""

    model: Model

    @cached_property
    def _rows(self) -> list[TokenRow]:
        from trainer.base.find.tokenizer import find_rows

        return find_rows(self.model)

    @property
    def _ids(self) -> list[int]:
        return [row.row for row in self._rows]

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        shape = len(self.model.add_tokens), architecture.hidden
        weights = [architecture.embedding] + ([] if architecture.head_is_embedding else [architecture.head])
        return {f"{weight.removesuffix('.weight')}.{_ROWS}": shape for weight in weights}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """Gathers the embedding and the head once, one after the other, so that every rank has the same start."""
        import torch
        from torch import nn

        from trainer.tuning.tokens.layer import TokenEmbedding

        self.method.attach(model, architecture, dtype, seed)
        embedding, head = model.get_input_embeddings(), cast(Any, model.get_output_embeddings())
        assert isinstance(embedding, nn.Embedding)
        start = _means(embedding, self._rows)
        ids = torch.tensor(self._ids, device=start.device)
        layer = TokenEmbedding(embedding, ids, start)
        model.set_submodule(architecture.embedding.removesuffix(".weight"), layer)
        if architecture.head_is_embedding:
            head.learn(ids, layer.trainable_tokens_delta, start)
        else:
            start = _means(head, self._rows)
            head.learn(ids, nn.Parameter(start.clone()), start)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        rows = [parameter for name, parameter in model.named_parameters() if name.endswith(f".{_ROWS}")]
        return [*self.method.groups(model, optim), {"name": "tokens", "lr_ratio": 1.0, "params": rows}]

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Adds the rows."""
        paths = {name: name.removesuffix(f".{_ROWS}") for name in ours}
        indices = {path.rpartition(".")[2]: self._ids for path in paths.values()}
        named = {f"{paths[name]}.{_SAVED_AS}": rows for name, rows in ours.items()}
        return with_peft_files(theirs, named, trainable_token_indices=indices)

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, RowsUpdate]:
        import torch

        ids = torch.tensor(self._ids)
        shape = max(architecture.vocabulary, int(ids.max()) + 1), architecture.hidden
        return {
            name.replace(f".{_ROWS}", ".weight"): RowsUpdate(shape, ids, weights[name].float())
            for name in self.own(architecture)
        }


def _means(layer: Any, rows: Sequence[TokenRow]) -> Tensor:
    """The mean of the frozen rows of the pieces of each token, (tokens, H). Collective."""
    import torch

    from trainer.state.zero.engine import gathered

    with gathered(layer):
        means = [layer.weight[row.pieces].float().mean(0) for row in rows]
        return torch.stack(means).to(layer.weight.dtype)


def with_tokens(method: Method, config: Config) -> Method:
    if not config.model.add_tokens:
        return method
    if SETTING not in method.settings:
        raise ConfigError(
            f"{SETTING}: tuning.method: {config.tuning.method} learns no rows of tokens. Choose one of"
            f" {', '.join(methods_reading(SETTING, config.tuning))}, or remove it."
        )
    return WithTokens(method, config.model)


AROUND: dict[str, Callable[[Method, Config], Method]] = {SETTING: with_tokens}
