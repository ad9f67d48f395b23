"""The figures that `--verify` measures, and when they prove an export. No torch, because the launcher reads them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, Literal

Rounding = Literal["dither", "nearest", "gptq"]
"""How the codes of a merge follow what was learnt: trainer/model/held/dither.py, trainer/export/write/calibrated.py."""
NOT_TRAINED = "It is not what was trained; do not use it."


@dataclass(frozen=True)
class Proof:
    """How far the exported model's predictions are from those that it must have, on rows of the run's own data.

    Attributes:
        kl: KL divergence of the next token's distributions, the mean over the places that are trained, in nats a token.
        kl_allowed: the largest divergence that rounding explains.
        kl_effect: the same divergence between the exported model and its base as it was before the training. For a
            model in fewer bits the trained model is compared with that base.
        log_prob: the mean absolute difference of the trained tokens' log-probabilities, in nats a token.
        log_prob_allowed, log_prob_effect: the same for log_prob.
        computed_in: fp32 or bf16.
        rows: the rows in words, such as "8 rows of the evaluation data".
        trained_kl: for a merged model, the divergence from the model as it was trained, over its quantized base. It has
            no bound.
        rounding_kl: for a merged model, the divergence from base and adapter side by side, whose sum is not rounded. It
            has no bound.
        compared: the two sides in words, to begin a sentence.
    """

    kl: float
    kl_allowed: float
    kl_effect: float
    log_prob: float
    log_prob_allowed: float
    log_prob_effect: float
    computed_in: str
    rows: str
    trained_kl: float | None = None
    rounding_kl: float | None = None
    compared: str = "its predictions in transformers (and PEFT) against the trained model's"

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding alone, and the adapter's own effect is large enough to compare with."""
        return self.is_alike and self.kl_allowed < self.kl_effect

    @property
    def is_alike(self) -> bool:
        return self.kl <= self.kl_allowed and self.log_prob <= self.log_prob_allowed

    @property
    def verdict(self) -> str:
        if self.holds:
            return "It is what was trained."
        if self.is_alike:
            return (
                "That proves nothing: what was learnt changes no more than rounding does. Train longer, or export"
                " without --verify."
            )
        return NOT_TRAINED

    def sentence(self) -> str:
        figures = (
            f"KL {self.kl:.2g} nats a token (allowed {self.kl_allowed:.2g}; the training's own effect is"
            f" {self.kl_effect:.2g}), log-probabilities of the trained tokens {self.log_prob:.2g} nats (allowed"
            f" {self.log_prob_allowed:.2g}, effect {self.log_prob_effect:.2g}), computed in {self.computed_in} on"
            f" {self.rows}"
        )
        if self.trained_kl is None or self.rounding_kl is None:
            return f"{self.compared}: {figures}"
        return (
            f"its predictions in transformers against PEFT's own merge: {figures}; KL {self.rounding_kl:.2g} from base"
            f" and adapter side by side, whose sum is not rounded, and {self.trained_kl:.2g} from the model as it was"
            " trained"
        )


@dataclass(frozen=True)
class KeptProof:
    """The share of what was learnt that a merge into the base's own codes keeps, on rows of the run's own data.

    Attributes:
        base_loss, adapter_loss, merged_loss: the loss of the trained tokens, in nats a token, by the base alone, with
            the adapter beside it, and merged.
        kept: the merge's gain over the base, as a share of the adapter's.
        kept_low, kept_high: where 95 % of such shares lie if other rows of the same kind are drawn.
        kl: KL divergence of the merge from base and adapter side by side, in nats a token.
        kl_effect: the same divergence of the base alone.
        rounding: how codes were rounded; `usual` is what a merge in these codes does by itself.
        through: whether the run was trained through these codes. `adapter_loss`, `kl` and `kl_effect` are then of the
            model as it was trained.
        codes, codes_changed: the codes of trained weights, and how many of them differ from the base's. tokens: how
        many trained tokens were predicted. rows: the rows in words.
    """

    base_loss: float
    adapter_loss: float
    merged_loss: float
    kept: float
    kept_low: float
    kept_high: float
    kl: float
    kl_effect: float
    rounding: Rounding
    usual: Rounding
    through: bool
    tokens: int
    computed_in: str
    rows: str
    codes: int = 0
    codes_changed: int = 0

    def told(self, facts: Mapping[str, Any]) -> "KeptProof":
        """Return the proof with the codes that an export has counted."""
        return replace(self, codes=facts["codes"], codes_changed=facts["codes_changed"])

    @property
    def gains(self) -> bool:
        """Whether the adapter predicts better than the base, and by so much that the share has a bound."""
        return self.adapter_loss < self.base_loss and isfinite(self.kept_low)

    @property
    def holds(self) -> bool:
        return self.gains and self.kept >= LEAST_KEPT

    @property
    def verdict(self) -> str:
        if self.holds:
            return "It keeps what was trained."
        if not self.gains:
            return (
                "That proves nothing: on these rows the adapter predicts hardly better than its base. Train longer, or"
                " export without --verify."
            )
        if self.through:
            return "It should have the codes of the trained model, and does not; do not use it."
        gptq = "round by rows of the run's data (rounding=gptq), " if self.rounding == "dither" else ""
        more = "" if self.rounding == self.usual else f"Leave rounding={self.rounding} out. "
        return (
            f"A merge as stored has to keep {LEAST_KEPT:.0%}. {more}What keeps more: {gptq}serve the adapter beside the"
            " base (--format peft), merge in 16 bits (without as=stored), or go on from this adapter through the codes"
            " (tuning.start, with quant.type: stored and tuning.through: stored)."
        )

    def sentence(self) -> str:
        beside = "as it was trained" if self.through else "with the adapter beside it"
        other = "the trained model" if self.through else "base and adapter side by side"
        moved = f", {self.codes_changed / self.codes:.2%} of the codes changed" if self.codes else ""
        return (
            f"it keeps {self.kept:.1%} (95 % interval {self.kept_low:.1%} to {self.kept_high:.1%}) of the adapter's"
            f" gain: {self.base_loss:.4f} nats a token by the base, {self.adapter_loss:.4f} {beside},"
            f" {self.merged_loss:.4f} merged{moved}; KL {self.kl:.2g} from {other} (the base"
            f" alone: {self.kl_effect:.2g}), computed in {self.computed_in} over {self.tokens:,} tokens of {self.rows}"
        )


LEAST_KEPT = 0.8
"""The least share of an adapter's gain that a merge as stored has to keep."""


@dataclass(frozen=True)
class ServedProof:
    """How far a server's log-probabilities are from those of its export in transformers (and PEFT), computed in fp32.

    All values are mean absolute differences in nats a token, unless they say otherwise.

    Attributes:
        server, model: the server's URL, and the name of the model that was asked.
        prompt: the difference for the `tokens` of the run's rows.
        drawn: the difference for the `draws` tokens that the server drew after them.
        largest: the largest difference of any token.
        allowed: the largest mean that rounding products to bf16 explains.
        effect: the difference that the training has made.
        from_base: the server's difference from the base alone.
        rows: the rows in words.
        from_blind: the server's difference from the export without what the tower has learnt by LoRA.
            None where it has learnt nothing, or in a merged model.
    """

    server: str
    model: str
    prompt: float
    drawn: float
    largest: float
    allowed: float
    effect: float
    from_base: float
    tokens: int
    draws: int
    rows: str
    from_blind: float | None = None

    @property
    def is_alike(self) -> bool:
        return self.prompt <= self.allowed and self.drawn <= self.allowed

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding alone, as for `Proof`."""
        return self.is_alike and self.allowed < self.effect

    @property
    def verdict(self) -> str:
        if self.holds:
            return "It serves what was exported."
        if self.is_alike:
            return (
                "That proves nothing: what was learnt changes no more than rounding does. Train longer, or leave"
                " --server out."
            )
        if self.from_base <= self.allowed:
            return "It answers as the base alone. Load the export into it, and name it behind a # of the URL."
        if self.from_blind is not None and self.from_blind <= self.allowed:
            return (
                "It ignores what the tower has learnt (vllm#23796). Start vLLM with"
                " --enable-tower-connector-lora, or serve the merged model (--format merged)."
            )
        return (
            "It serves another model, or this one over another base. Start it with the run's base, and with this"
            " export."
        )

    def sentence(self) -> str:
        return (
            f"log-probabilities of {self.model} at {self.server} against transformers (and PEFT): {self.prompt:.2g}"
            f" nats a token over {self.tokens:,} tokens, {self.drawn:.2g} over {self.draws:,} that it drew,"
            f" {self.largest:.2g} at most (allowed {self.allowed:.2g} in the mean; the training's own effect is"
            f" {self.effect:.2g}), on {self.rows}"
        )


AnyProof = Proof | KeptProof | ServedProof


def proof_of(figures: Mapping[str, Any]) -> AnyProof:
    """Return the proof that has these figures, which are the fields of one kind."""
    kinds: tuple[type[AnyProof], ...] = (Proof, KeptProof, ServedProof)
    kind = next(kind for kind in kinds if {field.name for field in fields(kind)} == figures.keys())
    return kind(**figures)
