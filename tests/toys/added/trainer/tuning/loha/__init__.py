"""A toy method with a setting of its own: LoHa (arXiv:2108.06098), which PEFT has, but not over 4 bits.

Its setting is read by the toy alone.
"""

from trainer.config.section import Section, setting


class LohaSettings(Section):
    """The start of the matrices."""

    spread: float = setting(
        0.1, about="Deviation that the matrices are drawn with, but for one of zeros.", example=0.2, gt=0, le=1
    )


SETTINGS = (LohaSettings,)
