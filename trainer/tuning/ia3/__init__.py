"""Learnt vectors that scale activations ((IA)^3, arXiv:2205.05638), and their settings."""

from trainer.config.section import Section, setting


class Ia3Settings(Section):
    """Its vectors."""

    feedforward: list[str] | None = setting(
        None,
        about=(
            "The targets whose inputs ia3 scales; it scales the outputs of the others. Default: those that end in"
            " down_proj."
        ),
        example=["down_proj"],
    )


SETTINGS = (Ia3Settings,)
