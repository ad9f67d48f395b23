"""The settings of the section `objective` that sft alone reads."""

from trainer.config.section import Section, setting


class SftSettings(Section):
    """A term beside the next-token loss."""

    z_loss: float = setting(
        0.0,
        about="sft: weight of log(Z)^2 beside the next-token loss, with Z the sum of exp over the logits.",
        example=1e-4,
        ge=0,
        le=1,
    )


SETTINGS = (SftSettings,)
