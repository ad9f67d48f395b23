"""transformers' own grouped products of experts, of any sizes."""

from transformers.integrations import moe


def multiply_expert_by_expert() -> None:
    """Have transformers' default experts, in this process, take each expert's rows apart, as torch's kernel takes no
    odd sizes.

    These are the bits of the forward pass in trainer/model/experts.py. transformers' eager experts round every expert's
    part of a token to the type of the model before they add the next one.
    """
    moe._can_use_grouped_mm = lambda *_: False
