"""The projector of a class that sees is found without a family's name, also where its tower is as wide as its
decoder."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from trainer.base.describe.projector import projector_of

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
OF_GLM: dict[str, Any] = {"depth": 2, "num_heads": 4, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96}
OF_QWEN = {**OF_GLM, "deepstack_visual_indexes": [0, 1]}
OF_QWEN2: dict[str, Any] = {"depth": 2, "num_heads": 4, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model"}
LLAVA = {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**TOWER, "model_type": "clip_vision_model"}}
CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llava", LLAVA, ["model.multi_modal_projector"]),
    ("llava_next", LLAVA, ["model.multi_modal_projector"]),
    ("gemma3", {"text_config": TEXT, "vision_config": SIGLIP}, ["model.multi_modal_projector"]),
    ("idefics3", {**LLAVA, "vision_config": TOWER}, ["model.connector"]),
    (
        "qwen3_vl",
        {"text_config": TEXT, "vision_config": OF_QWEN},
        [f"model.visual.deepstack_merger_list.{number}" for number in (0, 1)] + ["model.visual.merger"],
    ),
    ("qwen2_vl", {"text_config": TEXT, "vision_config": OF_QWEN2}, ["model.visual.merger"]),
    (
        "glm4v",
        {"text_config": TEXT, "vision_config": OF_GLM},
        ["model.visual.downsample", "model.visual.merger"],
    ),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), CASES, ids=[kind for kind, *_ in CASES])
def test_it_is_what_turns_pictures_into_states_of_the_decoder(
    kind: str, settings: dict[str, Any], expected: list[str]
) -> None:
    found = projector_of(CONFIG_MAPPING[kind](**settings))
    assert sorted(found) == expected
    assert all(parts and all(shape for shape in parts.values()) for parts in found.values())


def test_its_weights_are_those_of_the_class() -> None:
    settings = {"text_config": TEXT, "vision_config": SIGLIP}
    (path, parts), *others = projector_of(CONFIG_MAPPING["gemma3"](**settings)).items()
    assert not others
    assert path == "model.multi_modal_projector"
    assert parts == {"mm_input_projection_weight": (64, 64), "mm_soft_emb_norm.weight": (64,)}
