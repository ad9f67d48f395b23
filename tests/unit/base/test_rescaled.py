"""Rotary positions that a run scales: the configuration that the model is built by, compared, exported and served
with.
"""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from tests.material import Workshop
from trainer.base.describe.language_model import model_config
from trainer.base.find.locate import base_files, resolve_base
from trainer.base.find.small_files import rescaled
from trainer.config.model import RopeScaling
from trainer.errors import ConfigError
from trainer.export.write.merged import merged_config
from trainer.plan.resolve import resolve

YARN = ("model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=4")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("rescaled"))


def scaled(tree: dict[str, Any], **given: Any) -> dict[str, Any]:
    return rescaled(tree, RopeScaling(**given))


def test_a_base_whose_positions_are_exceeded_says_which_scaling_to_set_and_has_them_with_it(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"Lower it, or set model.rope_scaling: \{rope_type: yarn, factor: 4\}"):
        resolve(workshop.config("far", "data.sequence_length=1000"))
    config = workshop.config("farther", "data.sequence_length=1000", *YARN)
    base = resolve(config).base
    assert base.architecture.positions == 1024
    assert base.fingerprint != resolve_base(workshop.config("near").model).fingerprint
    assert json.loads(merged_config(base, []))["rope_parameters"]["factor"] == 4
    rotary = model_config(base_files(config.model), None).rope_parameters
    assert rotary == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    assert {path.name for path in base.directory.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(ConfigError, match=r"raise model.rope_scaling.factor"):
        resolve(workshop.config("too-far", "data.sequence_length=2000", *YARN))


@pytest.mark.parametrize(
    ("given", "tree", "expected", "positions"),
    [
        ({"rope_type": "linear", "factor": 2}, {}, {"rope_type": "linear", "factor": 2.0}, 4096),
        (
            {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4},
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 512,
                    "low_freq_factor": 1,
                    "high_freq_factor": 2,
                }
            },
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            512 * 32,
        ),
        (
            {"rope_type": "yarn", "factor": 3, "original_max_position_embeddings": 100},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 100},
            300,
        ),
        (
            {"rope_type": "yarn", "factor": 2.3, "original_max_position_embeddings": 100},
            {
                "rope_scaling": {
                    "type": "yarn",
                    "rope_type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 512,
                    "attention_factor": 1.5,
                    "beta_fast": 16,
                    "beta_slow": 2,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.5,
                    "truncate": False,
                    "partial_rotary_factor": 0.5,
                }
            },
            {
                "rope_type": "yarn",
                "factor": 2.3,
                "original_max_position_embeddings": 100,
                "partial_rotary_factor": 0.5,
            },
            230,  # the product in floating point is below it
        ),
    ],
    ids=["linear", "llama3 again", "yarn", "yarn again"],
)
def test_the_scaling_takes_the_place_of_the_bases_own(
    given: dict[str, Any], tree: dict[str, Any], expected: dict[str, Any], positions: int
) -> None:
    made = scaled({"model_type": "llama", "max_position_embeddings": 2048, **tree}, **given)
    assert made["rope_parameters" if "rope_parameters" in tree else "rope_scaling"] == expected
    assert made["max_position_embeddings"] == positions
    AutoConfig.for_model(**made)


def test_positions_that_stand_beside_the_scaling_follow_it() -> None:
    """Phi-3 has them there: its class reads them from the configuration itself."""
    tree = {"model_type": "phi3", "max_position_embeddings": 4096, "original_max_position_embeddings": 2048}
    made = scaled(tree, rope_type="yarn", factor=2, original_max_position_embeddings=1024)
    assert (made["original_max_position_embeddings"], made["max_position_embeddings"]) == (1024, 2048)
    assert scaled(tree, rope_type="yarn", factor=2)["max_position_embeddings"] == 4096


def test_layers_with_a_window_keep_their_own() -> None:
    own = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    made = scaled(
        {"text_config": {"rope_parameters": own, "max_position_embeddings": 512}}, rope_type="linear", factor=8
    )["text_config"]
    assert made["rope_parameters"]["full_attention"] == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert made["rope_parameters"]["sliding_attention"] == own["sliding_attention"]
    with pytest.raises(ConfigError, match=r"none for full_attention"):
        scaled(
            {"rope_parameters": {"sliding_attention": {}}, "max_position_embeddings": 4}, rope_type="linear", factor=8
        )
    with pytest.raises(ConfigError, match=r"Set model.rope_scaling.original_max_position_embeddings"):
        scaled({}, rope_type="linear", factor=8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("rope_type=yarn",), "yarn needs model.rope_scaling.factor"),
        (("rope_type=llama3", "factor=2"), "llama3 needs model.rope_scaling.low_freq_factor"),
        (("factor=2",), "model.rope_scaling.factor: has no effect without model.rope_scaling.rope_type"),
        (
            ("rope_type=linear", "factor=2", "beta_fast=3"),
            "model.rope_scaling.beta_fast: has no effect with rope_type: linear",
        ),
        (("rope_type=dynamic", "factor=2"), "dynamic frequencies follow from the longest row so far"),
    ],
    ids=str,
)
def test_a_setting_that_is_missing_or_idle_is_refused(
    workshop: Workshop, settings: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        workshop.config("wrong", *(f"model.rope_scaling.{setting}" for setting in settings))


def test_longrope_wants_rows_of_one_document(workshop: Workshop) -> None:
    factors = ("short_factor=[1, 1, 1, 1, 1, 1, 1, 1]", "long_factor=[1, 2, 2, 2, 3, 3, 4, 4]")
    longrope = [f"model.rope_scaling.{one}" for one in ("rope_type=longrope", "factor=4", *factors)]
    with pytest.raises(ConfigError, match="frequencies by the longest document of a row"):
        resolve(workshop.config("longrope", *longrope))
    base = resolve(workshop.config("longrope", *longrope, "data.packing=false")).base
    assert base.architecture.positions == 1024
    merged = json.loads(merged_config(base, []))["rope_parameters"]
    assert (merged["rope_type"], merged["long_factor"]) == ("longrope", [1, 2, 2, 2, 3, 3, 4, 4])
