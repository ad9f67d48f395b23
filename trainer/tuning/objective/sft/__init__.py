"""Supervised fine-tuning, and its settings."""

from trainer.config.section import Section, setting


class SftSettings(Section):
    """What is beside the next-token loss, or in its place."""

    z_loss: float = setting(
        0.0,
        about="sft: weight of log(Z)^2 beside the next-token loss, where Z is the sum of exp over the logits.",
        example=1e-4,
        ge=0,
        le=1,
    )
    dft: bool = setting(
        False,
        about=(
            "sft: weigh each trained token's loss by its probability, without a gradient through the weight (dynamic"
            " fine-tuning, arXiv:2508.05629)."
        ),
        example=True,
    )
    eaft: float = setting(
        0.0,
        about=(
            "sft: weigh each trained token's loss by this power of the model's own uncertainty, the entropy of its"
            " likeliest tokens, without a gradient through the weight (entropy-adaptive fine-tuning, arXiv:2601.02151)."
            " 0 turns it off."
        ),
        example=1.0,
        ge=0,
        le=10,
    )
    eaft_tokens: int = setting(
        20, about="The number of likeliest tokens whose entropy eaft uses.", example=20, ge=2, le=1000, unit="tokens"
    )
    eaft_scale: float = setting(
        3.0,
        about="The entropy whose weight is 1 with eaft. 3 is about the entropy of 20 equally likely tokens.",
        example=1.0,
        gt=0,
        le=100,
        unit="nats",
    )
    neftune_alpha: float = setting(
        0.0,
        about=(
            "sft: size of the noise on the embeddings of tokens in training, up to neftune_alpha / sqrt(L * H) for a"
            " document of L tokens in H dimensions (NEFTune, arXiv:2310.05914). 0 turns it off, 5 is usual."
        ),
        example=5.0,
        ge=0,
        le=1000,
    )


SETTINGS = (SftSettings,)
