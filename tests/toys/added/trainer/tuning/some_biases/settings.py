"""The settings of the section `tuning` that the toy alone reads."""

from trainer.config.section import Section, setting


class SomeBiasesSettings(Section):
    """The biases that learn."""

    biases_of: list[str] = setting(
        ["q_proj"], about="The layers whose biases learn, by the ends of their paths.", example=["q_proj", "v_proj"]
    )


SETTINGS = (SomeBiasesSettings,)
