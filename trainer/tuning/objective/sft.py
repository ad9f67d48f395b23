"""Supervised fine-tuning: the negative log-likelihood of the next token. Every target token has the same weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trainer.config.section import Section, part, setting
from trainer.tuning.objective import Objective, ObjectiveOfSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.config import ObjectiveSettings
    from trainer.model.head import LossHead
    from trainer.model.micro_batch import MicroBatch, ModelInput
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


class SftSettings(Section):
    """Losses beside the next-token loss, or in its place."""

    z_loss: float = setting(
        0.0,
        about=(
            "sft: weight of log(Z)^2, which is added to the next-token loss. Z is the sum of the exponentials of the"
            " logits."
        ),
        example=1e-4,
        ge=0,
        le=1,
    )
    dft: bool = setting(
        False,
        about=(
            "sft: multiply each trained token's loss by the token's probability, without a gradient through this"
            " weight (dynamic fine-tuning, arXiv:2508.05629)."
        ),
        example=True,
    )
    eaft: float = setting(
        0.0,
        about=(
            "sft: multiply each trained token's loss by the entropy of the model's likeliest tokens, raised to this"
            " power, without a gradient through this weight (entropy-adaptive fine-tuning, arXiv:2601.02151). 0 turns"
            " it off."
        ),
        example=1.0,
        ge=0,
        le=10,
    )
    eaft_tokens: int = setting(
        20,
        about="With eaft: the number of likeliest tokens whose entropy is used.",
        example=20,
        ge=2,
        le=1000,
        unit="tokens",
    )
    eaft_scale: float = setting(
        3.0,
        about=(
            "With eaft: the entropy at which the weight is 1. 3 nats is about the entropy of 20 equally likely tokens."
        ),
        example=1.0,
        gt=0,
        le=100,
        unit="nats",
    )
    neftune_alpha: float = setting(
        0.0,
        about=(
            "sft: size of the random noise that training adds to token embeddings: up to neftune_alpha / sqrt(L * H)"
            " for a document of L tokens and a hidden size of H (NEFTune, arXiv:2310.05914). 0 turns it off, 5 is"
            " usual."
        ),
        example=5.0,
        ge=0,
        le=1000,
    )


SETTINGS = (SftSettings,)


class NextTokens(ObjectiveOfSettings):
    """The mean of -log p over the targets, in nats. Training adds the terms of `trainer.model.head.LossTerms`.

    An evaluation leaves them out, so that its loss is a likelihood and comparable between runs.
    """

    defaults: Mapping[str, Any] = {
        "name": "sft",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "dft": False,
        "eaft": 0.0,
        "eaft_tokens": 20,
        "eaft_scale": 3.0,
        "neftune_alpha": 0.0,
    }
    formats = ("chat", "pictures", "prompt_completion", "text", "segments", "answers")
    unit = "targets"

    def __init__(self, given: ObjectiveSettings | None = None) -> None:
        from trainer.config import ObjectiveSettings

        super().__init__(given or ObjectiveSettings())
        self._own = part(self.given, SftSettings)

    @property
    def _weighing(self) -> list[str]:
        return [name for name in ("dft", "eaft") if getattr(self._own, name)]

    def mismatches(self) -> list[str]:
        others = {"label_smoothing": self.given.label_smoothing, "z_loss": self._own.z_loss, "eaft": self._own.eaft}
        wrong = [
            f"objective.{name}: has no effect with objective.{self._weighing[0]}, which weighs the plain loss of a"
            " target. Remove one of them."
            for name, given in others.items()
            if given and self._weighing and name != self._weighing[0]
        ]
        finer = {"eaft_tokens": self._own.eaft_tokens, "eaft_scale": self._own.eaft_scale}
        return wrong + [
            f"objective.{name}: has no effect without objective.eaft. Set that, or remove it."
            for name, given in finer.items()
            if not self._own.eaft and given != self.defaults[name]
        ]

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        from trainer.model.head import LossTerms

        if not model.head.training:
            return model.head(model.hidden(batch.input), batch.labels, batch.places)
        hidden = self._hidden(model, batch)
        if not self._weighing:
            terms = LossTerms(self.given.label_smoothing, self._own.z_loss)
            return model.head(hidden, batch.labels, batch.places, terms=terms)
        weights = self._uncertainty(model.head, hidden, batch) if self._own.eaft else None
        nats = model.head(hidden, batch.labels, batch.places, per_target=True)
        return (nats * ((-nats.detach()).exp() if weights is None else weights)).sum()

    def _hidden(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        if not self._own.neftune_alpha:
            return model.hidden(batch.input)
        with noise_on(model.model.get_input_embeddings(), batch.input, self._own.neftune_alpha):
            return model.hidden(batch.input)

    def _uncertainty(self, head: LossHead, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """A power of the entropy of each target's likeliest tokens, as if there were no others; (targets,)."""
        from torch import no_grad

        from trainer.model.divergence import TopK

        most = min(self._own.eaft_tokens, head.vocabulary)
        with no_grad():
            found = head(hidden, batch.labels, batch.places, top=TopK(most, head.vocabulary))
            log_p = found[:, most:-1].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return (entropy / self._own.eaft_scale) ** self._own.eaft


@contextmanager
def noise_on(embedding: nn.Module, row: ModelInput, alpha: float) -> Iterator[None]:
    """Add uniform noise in [-a, a] to the embeddings inside the context (NEFTune, arXiv:2310.05914).

    a = alpha / sqrt(L * H), where L is the number of tokens of the document and H the size of an embedding.
    transformers takes L from the longest text of a batch, with its padding. Here a document's noise does not depend on
    its neighbours.
    """
    import torch

    def add_noise(module: nn.Module, given: Any, found: Tensor) -> Tensor:
        lengths = torch.tensor(row.segments.lengths)
        tokens = lengths.repeat_interleave(lengths)[row.first : row.first + found.shape[1]]
        most = alpha / (tokens.to(found.device) * found.shape[2]).float().sqrt()
        return found + torch.empty_like(found).uniform_(-1, 1) * most.to(found.dtype)[:, None]

    with embedding.register_forward_hook(add_noise):
        yield


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    "sft": lambda given, _method: NextTokens(given)
}
ABOUT = {"sft": "the next token"}
