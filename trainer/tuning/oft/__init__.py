"""Learnt rotations of a layer's inputs (OFT, arXiv:2306.07280, arXiv:2506.19847), and their settings."""

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
