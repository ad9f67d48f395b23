"""The settings of the section `objective` that sft alone reads."""

from trainer.config.section import Section, setting


class SftSettings(Section):
    """What is beside the next-token loss, or in its place."""

    z_loss: float = setting(
        0.0,
        about="sft: weight of log(Z)^2 beside the next-token loss, with Z the sum of exp over the logits.",
        example=1e-4,
        ge=0,
        le=1,
    )
    dft: bool = setting(
        False,
        about="sft: weigh the loss of each target by its probability, through which no gradient goes (dynamic fine-tuning, arXiv:2508.05629).",
        example=True,
    )


SETTINGS = (SftSettings,)
