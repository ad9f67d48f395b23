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
        about=(
            "sft: weigh the loss of each target by its probability, through which no gradient goes (dynamic"
            " fine-tuning, arXiv:2508.05629)."
        ),
        example=True,
    )
    eaft: float = setting(
        0.0,
        about=(
            "sft: weigh the loss of each target by this power of the model's own uncertainty, the entropy of its"
            " likeliest tokens, through which no gradient goes (entropy-adaptive fine-tuning, arXiv:2601.02151); 0 is"
            " off."
        ),
        example=1.0,
        ge=0,
        le=10,
    )
    eaft_tokens: int = setting(
        20, about="The likeliest tokens whose entropy eaft takes.", example=20, ge=2, le=1000, unit="tokens"
    )
    eaft_scale: float = setting(
        3.0,
        about="The entropy that weighs 1 with eaft. 3 is about that of 20 tokens that are as likely.",
        example=1.0,
        gt=0,
        le=100,
        unit="nats",
    )
    neftune_alpha: float = setting(
        0.0,
        about=(
            "sft: size of the noise on the embeddings of tokens in training: up to neftune_alpha / sqrt(L * H) for a"
            " document of L tokens in H dimensions (NEFTune, arXiv:2310.05914); 0 is none, 5 is usual."
        ),
        example=5.0,
        ge=0,
        le=1000,
    )


SETTINGS = (SftSettings,)
