"""Writes the scaling of rotary positions (`model.rope_scaling`) into a config.json for transformers and servers.

The base's files stay unchanged. A folder of this machine's cache gets its small files with the changed config.json.
From then on it is the base's directory: all code that builds, compares, exports or merges the model reads it there.
"""

import copy
from typing import Any

from trainer.config.model import RopeScaling
from trainer.errors import ConfigError

# Keys of an earlier scaling; others, such as rope_theta, stay.
_OF_SCALING = {*RopeScaling.model_fields, "type", "mscale", "mscale_all_dim", "truncate"}
_OF_ALL_TOKENS = "full_attention"
_ORIGINAL, _POSITIONS = "original_max_position_embeddings", "max_position_embeddings"


def rescaled(config: dict[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    """The parsed config.json with `scaling` in place of the base's own.

    If kinds of layers have their own rotary parameters, only those that see all tokens get the scaling.
    `max_position_embeddings` becomes the number of positions that the base was trained for times the factor, as in
    published models with such a scaling.

    Raises:
        ConfigError: it lacks the number of positions that the base was trained for, or layers that see all tokens.
    """
    tree = copy.deepcopy(config)
    language = tree["text_config"] if isinstance(tree.get("text_config"), dict) else tree
    key = "rope_parameters" if language.get("rope_parameters") else "rope_scaling"
    before: dict[str, Any] = language.get(key) or {}
    by_kind = any(isinstance(value, dict) for value in before.values())
    if by_kind and not isinstance(before.get(_OF_ALL_TOKENS), dict):
        raise ConfigError(
            f"model.rope_scaling: the base has rotary parameters for each of {', '.join(sorted(before))}, and none for"
            f" {_OF_ALL_TOKENS}. Remove it."
        )
    own: dict[str, Any] = before[_OF_ALL_TOKENS] if by_kind else before
    original = (
        scaling.original_max_position_embeddings
        or own.get(_ORIGINAL)
        or language.get(_ORIGINAL)
        or language.get(_POSITIONS)
    )
    if not isinstance(original, int) or scaling.factor is None:
        raise ConfigError(
            "model.rope_scaling: config.json of the base does not say for how many positions it was trained. Set"
            f" model.rope_scaling.{_ORIGINAL}."
        )
    made = {name: value for name, value in own.items() if name not in _OF_SCALING} | copy.deepcopy(scaling.given)
    if scaling.rope_type == "linear":
        made.pop(_ORIGINAL, None)
    else:
        made[_ORIGINAL] = original
        if _ORIGINAL in language:
            language[_ORIGINAL] = original
    language[key] = {**before, _OF_ALL_TOKENS: made} if by_kind else made
    language[_POSITIONS] = round(scaling.factor * original)
    return tree
