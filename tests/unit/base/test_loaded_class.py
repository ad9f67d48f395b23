"""What is trained is the class that people load: what a whole class does to text beside its language model is computed,
or refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMultimodalLM,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightRenaming

from tests.composites import make_composite
from tests.material import make_base
from trainer.base.describe import language_model
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.empty_model import LanguagePart, whole_class
from trainer.base.describe.language_model import language_names, whole_names
from trainer.base.describe.meta import architecture_of
from trainer.base.describe.trial.small import small_settings
from trainer.base.find.locate import resolve_base
from trainer.base.rows.parameters import _check_tied, find_all_weights
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.model.head import LossHead
from trainer.model.parts import body
from trainer.store.safetensors_index import TensorSource
from trainer.store.store import open_store

TOWER = {"hidden_size": 32, "depth": 1, "num_hidden_layers": 1, "num_global_layers": 1, "intermediate_size": 48}
TOWER |= {"num_heads": 2, "attention_heads": 2, "num_attention_heads": 2, "out_hidden_size": 64}
# A whole class -> settings of its own that its small model needs, and those of its language model.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cohere2_vision": ({}, {"logit_scale": 0.25}),
    "granite_docling": ({}, {"logits_scaling": 8.0}),
    "mistral_large4": ({}, {}),
    "muse_glimmer": ({}, {}),
    "llava": ({}, {}),
}


def whole_config(kind: str) -> PretrainedConfig:
    config: Any = CONFIG_MAPPING[kind]()
    own, text = KINDS[kind]
    sizes = {key: size for key, size in TOWER.items() if hasattr(config.vision_config, key)}
    settings = {**small_settings(config.get_text_config()), **text}
    return type(config)(text_config=settings, vision_config=sizes, **own)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] if kind == "mistral_large4" else []) for kind in KINDS]
)
def test_logits_are_those_of_the_class_that_people_load(kind: str) -> None:
    config = whole_config(kind)
    found = read_architecture({**config.to_dict(), "model_type": kind})
    torch.manual_seed(0)
    whole: Any = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in whole.parameters():
            value.add_(0.1 * torch.randn_like(value))
    tokens, plain = torch.arange(3, 30)[None], whole.get_output_embeddings()
    head = LossHead(plain.in_features, plain.out_features, bias=False)
    head.weight, head.bias = plain.weight, plain.bias
    head.factor, head.divisor, head.softcap = found.logit_factor, found.logit_divisor, found.softcap
    with torch.no_grad():
        expected = whole(input_ids=tokens, use_cache=False).logits
        hidden = body(LanguagePart.of(whole))(input_ids=tokens, use_cache=False).last_hidden_state
        assert torch.allclose(head(hidden), expected, rtol=1e-5, atol=1e-6)


_llava = LlavaForConditionalGeneration.forward


def _otherwise(self: Any, input_ids: Any, **given: Any) -> Any:
    return _llava(self, input_ids=input_ids.flip(1), **given)


def _with_a_bias(self: Any, **given: Any) -> Any:
    result: Any = _llava(self, **given)
    result.logits = result.logits + 1
    return result


def _blind(self: Any, **_given: Any) -> Any:
    raise ValueError("You have to specify pixel_values")


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (_otherwise, "LlavaForConditionalGeneration, which computes otherwise for text than its decoder and its head"),
        (_with_a_bias, "has more than one matrix, a factor and a cap between its last hidden states and its logits"),
        (_blind, r"which cannot compute for text alone \(ValueError: You have to specify pixel_values\)"),
    ],
)
def test_a_class_that_does_more_than_its_language_part_is_refused(
    forward: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**whole_config("llava").to_dict(), "model_type": "llava"}
    assert architecture_of(given, None, "the base")["logit_factor"] == 1
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    with pytest.raises(ConfigError, match=sentence):
        architecture_of(given, None, "the base")


@pytest.mark.parametrize(("of_decoder", "of_whole", "kept"), [(None, {"a"}, {"a"}), ({"b"}, {"a"}, {"b"})])
def test_a_language_part_keeps_in_fp32_what_its_decoder_or_else_the_whole_class_names(
    of_decoder: set[str] | None, of_whole: set[str], kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Any = AutoModelForMultimodalLM.from_config(whole_config("llava"))
    monkeypatch.setattr(whole.get_decoder(), "_keep_in_fp32_modules_strict", of_decoder)
    monkeypatch.setattr(LlavaForConditionalGeneration, "_keep_in_fp32_modules_strict", of_whole)
    assert LanguagePart.of(whole)._keep_in_fp32_modules_strict == kept


def test_names_in_a_whole_class_and_in_its_language_model_are_translated_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [("lm_head", "lm_head"), ("model.text", "model")]
    monkeypatch.setattr("trainer.base.describe.language_model._places", lambda whole, language: places)
    models: Any = (None, None)
    there, here = whole_names(*models), language_names(*models)
    pairs = {"lm_head.weight": "lm_head.weight", "model.norm.weight": "model.text.norm.weight", "model": "model.text"}
    assert {name: there(name) for name in pairs} == pairs
    assert [here(name) for name in pairs.values()] == ["lm_head.weight", "model.norm.weight", None]
    assert [here(name) for name in ("model.texts.norm.weight", "model.vision.weight")] == [None, None]
    with pytest.raises(AssertionError, match="model_norm.weight is of no part that both models have"):
        there("model_norm.weight")
    places[1] = ("model.text", "")  # the decoder is all of the language model
    assert language_names(*models)("model.text.norm.weight") == "norm.weight"
    assert whole_names(*models)("norm.weight") == "model.text.norm.weight"


def test_an_adapter_has_the_paths_that_peft_finds_or_the_names_of_files_that_it_renames_to_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"a", "old.b"}
    monkeypatch.setattr(
        language_model, "_misplaced", lambda model, saved: {path for path, there in saved.items() if there not in known}
    )
    monkeypatch.setattr(language_model, "_in_files", lambda model, path: f"old.{path}")
    model: Any = None
    assert language_model.saved_paths(model, ["a", "b", "c"]) == {"a": "a", "b": "old.b", "c": None}

    for name in ("composite_model", "model_config", "meta_model"):
        monkeypatch.setattr(language_model, name, lambda *_: None)
    assert language_model.adapter_paths("folder", None, ["a", "b", "c"]) == {
        "a": ["a", "a"],
        "b": ["b", "old.b"],
        "c": ["c", "c"],
    }
    monkeypatch.setattr(language_model, "composite_model", lambda folder: "whole")
    monkeypatch.setattr(language_model, "whole_names", lambda whole, language: {"one": "a", "two": "b"}.__getitem__)
    assert language_model.adapter_paths("folder", None, ["one", "two"]) == {"one": ["a", "a"], "two": ["b", "old.b"]}


def test_the_name_of_a_layer_in_files_is_that_of_the_rule_that_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [WeightRenaming("before", "other"), WeightRenaming("old", "new"), WeightRenaming("older", "new")]
    monkeypatch.setattr(language_model, "get_model_conversion_mapping", lambda model: ["no renaming", *rules])
    model: Any = None
    found = {path: language_model._in_files(model, path) for path in ("layers.0.new.q", "layers.0.other", "plain")}
    assert found == {"layers.0.new.q": "layers.0.old.q", "layers.0.other": "layers.0.before", "plain": "plain"}


def test_the_whole_class_is_the_one_that_architectures_names_where_it_suits() -> None:
    config: Any = CONFIG_MAPPING["dots3_note"]()
    assert whole_class(config).__name__ == "Dots3NoteForConditionalGeneration"
    for named in ("Dots3NoteForCausalLM", "LlamaForCausalLM", "MyOwnModel", "Dots3NoteModel"):
        config.architectures = [named]
        assert whole_class(config).__name__ == "Dots3NoteForConditionalGeneration"
    config = CONFIG_MAPPING["emu3"]()
    config.architectures = ["Emu3ForConditionalGeneration"]
    assert whole_class(config).__name__ == "Emu3ForConditionalGeneration"


def test_a_class_that_asks_its_language_models_output_for_pictures_is_tried_on_text() -> None:
    """Llama 4's whole class asks for a field that the output of its language model has not, in transformers 5.24."""
    config: Any = CONFIG_MAPPING["llama4"]()
    text = small_settings(config.text_config)
    found = architecture_of({"model_type": "llama4", "text_config": text}, 2, "the base")
    assert found["tried"]
    assert found["softcap"] is None


@pytest.mark.parametrize(("top", "nested"), [(False, True), (True, False)])
def test_a_head_is_tied_where_the_class_that_people_load_ties_it(top: bool, nested: bool, tmp_path: Path) -> None:
    """`tie_word_embeddings` is there twice in the settings of a whole class."""
    folder = tmp_path / "base"
    made: Any = make_composite(folder, "mistral3")
    given = json.loads((folder / "config.json").read_text())
    given["tie_word_embeddings"] = top
    given["text_config"]["tie_word_embeddings"] = nested
    (folder / "config.json").write_text(json.dumps(given))
    if top:
        with torch.no_grad():
            made.lm_head.weight.copy_(made.get_input_embeddings().weight)
        made.config.tie_word_embeddings = top
        made.save_pretrained(folder, max_shard_size="60KB")
        (folder / "config.json").write_text(json.dumps(given))
    loaded: Any = AutoModelForMultimodalLM.from_pretrained(folder)
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    base = resolve_base(Model(base=str(folder)))
    assert base.architecture.head_is_embedding == tied == top
    assert (base.architecture.head in find_all_weights(base).sources) == (not tied)


def test_a_head_inside_the_decoder_has_its_own_place_in_the_language_model() -> None:
    class Decoder(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.layers, self.lm_head = nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    class Language(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.decoder, self.head = Decoder(), nn.Linear(2, 2)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    class Whole(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.vision, self.text = nn.Linear(2, 2), Decoder()

        def get_decoder(self) -> nn.Module:
            return self.text

        def get_output_embeddings(self) -> None:
            return None

    names = {"text.lm_head.weight": "head.weight", "text.layers.0.weight": "decoder.layers.0.weight"}
    whole, language = Whole(), Language()
    assert {name: language_names(whole, language)(name) for name in names} == names
    assert {whole_names(whole, language)(name): name for name in names.values()} == names
    assert language_names(whole, language)("vision.weight") is None


def test_two_weights_in_the_files_for_one_of_the_model_are_an_error_of_loading(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", tie_word_embeddings=False)
    settings = base / "config.json"
    given = json.loads(settings.read_text())
    find_all_weights(resolve_base(Model(base=str(base))))
    settings.write_text(json.dumps({**given, "tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"has two weights for model.embed_tokens.weight, which differ, where its"):
        find_all_weights(resolve_base(Model(base=str(base))))


@pytest.mark.parametrize(
    ("place", "dtype", "is_refused"),
    [(0, "F16", True), (-1, "F16", True), (None, "F16", False), (0, "BF16", False)],
    ids=["first", "last", "equal", "of another type"],
)
def test_a_large_weight_is_compared_with_its_copy_from_its_beginning_to_its_end(
    place: int | None, dtype: str, is_refused: bool
) -> None:
    store, size = open_store("memory://"), 40 * 2**15 + 3
    one, other = bytearray(2 * size), bytearray(2 * size)
    if place is not None:
        other[place] = 1
    store.put("one", bytes(one))
    store.put("other", bytes(other))
    base: Any = SimpleNamespace(name="mine")
    weights = TensorSource(store, "one", "F16", (size,), 0), TensorSource(store, "other", dtype, (size,), 0)
    if not is_refused:
        _check_tied(base, "model.embed_tokens.weight", *weights)
        return
    with pytest.raises(
        ConfigError, match=r"^model.base: mine has two weights for model.embed_tokens.weight, which differ"
    ):
        _check_tied(base, "model.embed_tokens.weight", *weights)


def test_a_type_that_is_only_a_part_of_others_is_refused_by_their_names() -> None:
    config: Any = CONFIG_MAPPING["step3p5"]()
    with pytest.raises(
        ConfigError, match="is a step3p5 model, which transformers .* builds as a part of step3p7 alone"
    ):
        architecture_of({**config.to_dict(), "model_type": "step3p5"}, None, "the base")


def test_layers_whose_adapters_peft_finds_nowhere_in_the_whole_class_get_none() -> None:
    config: Any = CONFIG_MAPPING["inkling2"]()
    text = small_settings(config.get_text_config())
    vision = {**config.vision_config.to_dict(), "text_hidden_size": text["hidden_size"]}
    found = read_architecture({"model_type": "inkling2", "text_config": text, "vision_config": vision})
    lost = [part.name for part in found.parameters if part.kind == "linear" and not part.adaptable]
    assert lost
    assert all(name.endswith("sconv.weight_proj.weight") for name in lost)
    assert found.linear_layers().keys().isdisjoint(name.removesuffix(".weight") for name in lost)
