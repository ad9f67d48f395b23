"""KTO, and its settings."""

from trainer.config.section import Multiple, Section, setting


class KtoSettings(Section):
    """The weights of the two kinds of answers."""

    desirable_weight: Multiple = setting(1.0, about="kto: weight of the loss of a desired answer.", example=1.33)
    undesirable_weight: Multiple = setting(
        1.0,
        about=(
            "kto: weight of the loss of an undesired answer. Each weight times the number of its answers should be"
            " about equal."
        ),
        example=0.5,
    )


SETTINGS = (KtoSettings,)
