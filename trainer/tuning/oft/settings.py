"""The settings of the section `tuning` that oft alone reads."""

from trainer.config.section import Section, setting


class OftSettings(Section):
    """Its rotations."""

    block: int = setting(
        32,
        about=(
            "Number of a layer's inputs that are rotated together. A layer has inputs / block rotations, with block *"
            " (block - 1) / 2 numbers each."
        ),
        example=32,
        ge=2,
        le=1024,
        unit="inputs",
    )


SETTINGS = (OftSettings,)
