"""DPO, with h = log p(c|x) / q(c|x) - log p(r|x) / q(r|x), where q is the reference, the base without what learns:

    sigmoid   -(1 - e) log s(beta h) - e log s(-beta h), e the label smoothing       DPO, arXiv:2305.18290, equation 7
    hinge     max(0, 1 - beta h)                                                     RSO, arXiv:2309.06657, section 3.2
    ipo       (h - 1 / (2 beta))^2                                                   IPO, arXiv:2310.12036, equation 17
    apo_zero  1 - s(beta c) + s(beta r)                                              APO, arXiv:2408.06266, section 3
    apo_down  s(beta c) + 1 - s(beta h)                                              the same

where c and r are log p / q of the chosen and of the rejected answer, and h = c - r.

To each of them `sft_weight` adds so many times -log p(c|x) / |c|, the chosen answer's next-token loss, where |c| is the
number of its trained tokens (RPO, arXiv:2404.19733, equation 1). The reward of an answer is beta log p(y|x) / q(y|x).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trainer.config.section import Section, setting
from trainer.tuning.objective.pairs import Judged, PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tuning.objective.pairs import Sides


class DpoSettings(Section):
    """Its function of the margin."""

    loss_type: Literal["sigmoid", "hinge", "ipo", "apo_zero", "apo_down"] = setting(
        "sigmoid",
        about=(
            "dpo: the form of the loss. sigmoid, hinge and ipo depend only on the margin between the chosen and the"
            " rejected answer. apo_zero makes chosen answers more likely and rejected ones less likely; apo_down"
            " makes both less likely."
        ),
        example="ipo",
    )
    sft_weight: float = setting(
        0.0,
        about=(
            "dpo: weight of the chosen answer's next-token loss, which is added to the loss of dpo and keeps the"
            " chosen answers likely (arXiv:2404.19733). 0 turns it off."
        ),
        example=0.1,
        ge=0,
        le=100,
    )


def dpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    """The formulas of the module's docstring."""
    from torch.nn.functional import logsigmoid, relu

    assert reference is not None
    chosen, rejected = (mine.log_p - base for mine, base in zip(answers, reference, strict=True))
    margin = chosen - rejected
    match given.loss_type:
        case "sigmoid":
            straight, swapped = logsigmoid(given.beta * margin), logsigmoid(-given.beta * margin)
            losses = -(1 - given.label_smoothing) * straight - given.label_smoothing * swapped
        case "hinge":
            losses = relu(1 - given.beta * margin)
        case "apo_zero":
            losses = 1 - (given.beta * chosen).sigmoid() + (given.beta * rejected).sigmoid()
        case "apo_down":
            losses = 1 + (given.beta * chosen).sigmoid() - (given.beta * margin).sigmoid()
        case _:  # ipo
            losses = (margin - 1 / (2 * given.beta)).square()
    if given.sft_weight:
        losses = losses - given.sft_weight * answers[0].mean
    return Judged(losses, (given.beta * chosen, given.beta * rejected), ((chosen + rejected) / 2,))


def mismatches(given: Any) -> list[str]:
    """A sentence for a smoothing that the other settings leave without a meaning."""
    found, smoothing = list[str](), f"objective.label_smoothing: {given.label_smoothing}"
    if given.label_smoothing and given.loss_type != "sigmoid":
        found.append(
            f"{smoothing} has no effect with objective.loss_type: {given.loss_type}. Remove it, or set loss_type:"
            " sigmoid."
        )
    if given.label_smoothing >= 0.5:
        found.append(
            f"{smoothing} would have most pairs be the wrong way round. It is below 0.5 with objective.name:"
            f" {given.name}."
        )
    return found


PAIR_LOSSES = {
    "dpo": PairLoss(
        {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "sft_weight": 0.0},
        dpo,
        more=("log_ratio",),  # the mean of log p / q over the answers of a pair, in nats an answer
        reads_reference=True,
        settings=DpoSettings,
        mismatches=mismatches,
    )
}
ABOUT = {"dpo": "to prefer chosen answers over rejected ones, compared with a reference (data.format: preference)"}
