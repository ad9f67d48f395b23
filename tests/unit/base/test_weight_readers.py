"""Linear layers that a family's own code reads are found by use, and a family's code is tried in small before it
trains.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from trainer.base.architecture import (
    BESIDE_THE_LAYERS,
    READ_BY_ITS_FAMILY,
    UNKNOWN_EXPERTS,
    Architecture,
    architecture_mismatches,
)
from trainer.base.describe import architecture_cache, meta
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.empty_model import LanguagePart
from trainer.base.describe.meta import _Reader, architecture_of
from trainer.base.describe.trial.small import small_settings
from trainer.base.describe.trial.weight_readers import paths_together, places_read, read_together
from trainer.base.find.locate import known_config
from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.model import experts
from trainer.model.documents import _CACHES

# A kind of layer whose code reads the weight of a linear layer -> the layer's name.
READ = {
    "mamba": {"dt_proj"},
    "deepseek_v32": {"weights_proj"},
    "gemma3n_text": {"correction_coefs", "prediction_coefs"},
}
DBRX: dict[str, Any] = {
    "model_type": "dbrx",
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    "d_model": 6144,
    "n_heads": 48,
    "n_layers": 40,
    "vocab_size": 100352,
    "tie_word_embeddings": False,
}


def settings(kind: str) -> dict[str, Any]:
    config: Any = CONFIG_MAPPING[kind]()
    return {**small_settings(config), "model_type": kind}


@pytest.mark.parametrize("kind", READ)
def test_a_layer_that_its_familys_code_reads_stays_whole(kind: str) -> None:
    found = read_architecture(settings(kind))
    assert {name for name, why in found.whole() if why == READ_BY_ITS_FAMILY} == READ[kind]
    assert not READ[kind] & set(found.linear_names)
    assert found.linear_names, "what is left to adapt"


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_read_in_training_alone_or_in_evaluation_alone_is_found(training: bool) -> None:
    class Own(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training == training:
                x = x + self.up_proj.weight.sum()
            return super().forward(x)

    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 20}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes))
    model.model.layers[1].mlp.__class__ = Own
    assert places_read(model) == {("Own", "up_proj")}


def test_a_layer_that_two_others_share_is_as_it_was_after_its_reads_were_watched() -> None:
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 20}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes))
    first, second = model.model.layers
    first.mlp.up_proj = second.mlp.up_proj
    assert places_read(model) == set()
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_layers_that_are_read_together_are_named_by_their_paths_where_all_of_them_are() -> None:
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 20}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes))
    places = {
        tuple(("LlamaMLP", name) for name in ("gate_proj", "up_proj")),
        tuple(("LlamaMLP", name) for name in ("gate_proj", "other_proj")),
        tuple(("LlamaAttention", name) for name in ("k_proj", "v_proj")),
    }
    assert sorted(paths_together(model, places)) == [
        tuple(f"model.layers.{layer}.{name}" for name in names)
        for layer in (0, 1)
        for names in (("mlp.gate_proj", "mlp.up_proj"), ("self_attn.k_proj", "self_attn.v_proj"))
    ]


@pytest.mark.parametrize(
    ("kind", "read", "handed_on"),
    [("deepseek_v32", {"weights_proj"}, set()), ("mamba", set(), {"out_proj"})],
)
def test_where_no_small_model_can_be_made_the_text_of_a_class_says_what_it_reads(
    kind: str, read: set[str], handed_on: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hands some weights to a kernel alone, and calls the layers where there is none."""

    def refuses(*_given: Any) -> Any:
        raise ValueError("no such size")

    monkeypatch.setattr(meta, "small_model", refuses)
    found = Architecture.from_json(architecture_of(settings(kind), None, "the base"))
    assert not found.tried
    names = {name for name, why in found.whole() if why == READ_BY_ITS_FAMILY}
    assert names >= read
    assert not names & handed_on
    kinds = {part.name.split(".")[-2]: (part.kind, part.adaptable) for part in found.parameters if part.layer == 0}
    assert {kinds[name] for name in handed_on} <= {("linear", False)}


class _Branches(nn.Module):
    """Three linear layers, of which the last one gets a tensor of its own where it is `apart`."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.apart = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.c(x.clone() if self.apart else x)


@pytest.mark.parametrize(("apart", "names"), [((False, False), "abc"), ((True, True), "ab"), ((False, True), "")])
def test_layers_read_together_are_those_that_do_in_every_module_of_their_class(
    apart: tuple[bool, ...], names: str
) -> None:
    model = nn.Sequential(*(_Branches(apart=each) for each in apart))
    expected = {tuple(("_Branches", name) for name in names)} if names else set[Any]()
    assert read_together(model, lambda: model(torch.ones(1, 2))) == expected


def test_layers_that_a_base_has_in_another_list_stay_whole() -> None:
    """All that a plan and an adapter count is counted by the decoder layers."""
    config: Any = CONFIG_MAPPING["llama"](**{**settings("llama"), "num_hidden_layers": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.model.drafting = nn.ModuleList([type(model.model.layers[0])(config, 0)])
    parts = {part.name: part for part in _Reader(model, config, "the base", config)._parameters()}
    drafting = {name: part for name, part in parts.items() if ".drafting." in name and "proj" in name}
    assert len(drafting) == 7
    assert {(part.kind, part.layer, part.whole) for part in drafting.values()} == {("small", None, BESIDE_THE_LAYERS)}
    own = [part for name, part in parts.items() if ".layers." in name and "proj" in name]
    assert {(part.kind, part.whole) for part in own} == {("linear", None)}
    norms = [part for name, part in parts.items() if "norm" in name]
    assert {(part.kind, part.whole) for part in norms} == {("small", None)}


def test_experts_that_no_rule_recognises_are_named_and_count_by_the_tokens_that_visit_them() -> None:
    found = read_architecture(DBRX)
    assert found.whole().keys() == {(name, UNKNOWN_EXPERTS) for name in ("w1", "v1", "w2")}
    assert sum(part.numel for part in found.parameters) == pytest.approx(132e9, rel=0.025)
    assert sum(part.visits * part.numel for part in found.parameters) == pytest.approx(36e9, rel=0.11)


def test_experts_that_return_what_they_get_have_no_weights_and_take_their_share_of_the_tokens() -> None:
    config = known_config("meituan-longcat/LongCat-Flash-Chat")
    found = Architecture.from_json(architecture_of(config or {}, None, "LongCat"))
    assert sum(part.numel for part in found.parameters) == pytest.approx(560e9, rel=0.025)
    seen = sum(part.visits * part.numel for part in found.parameters if part.kind != "embedding")
    assert seen == pytest.approx(27e9, rel=0.02)


def test_linear_layers_of_a_familys_own_class_that_is_a_product_are_adapted() -> None:
    assert sorted(read_architecture(settings("falcon")).linear_names) == [
        "dense",
        "dense_4h_to_h",
        "dense_h_to_4h",
        "query_key_value",
    ]


@pytest.mark.parametrize("kind", ["qwen3_vl", "mllama"])
def test_decoder_and_head_of_a_whole_class_are_the_whole_on_text(kind: str) -> None:
    config: Any = CONFIG_MAPPING[kind]()
    sizes = {"hidden_size": 32, "depth": 1, "num_hidden_layers": 1, "num_global_layers": 1, "intermediate_size": 48}
    sizes |= {"num_heads": 2, "attention_heads": 2, "out_hidden_size": 64}
    vision = {key: size for key, size in sizes.items() if hasattr(config.vision_config, key)}
    made = type(config)(text_config=small_settings(config.get_text_config()), vision_config=vision)
    torch.manual_seed(0)
    whole: Any = AutoModelForMultimodalLM.from_config(made, dtype=torch.float32).eval()
    tokens, part = torch.arange(3, 30)[None], LanguagePart.of(whole).eval()
    with torch.no_grad():
        expected = whole(input_ids=tokens, use_cache=False).logits
        found = part(input_ids=tokens, position_ids=torch.arange(27)[None], use_cache=False).logits
    assert torch.equal(found, expected)


def test_a_base_whose_documents_would_see_each_other_or_that_fails_over_4_bits_is_refused_by_a_sentence() -> None:
    found = read_architecture(settings("llama"))
    assert found.isolates_documents
    assert found.tried
    assert found.fails_packed is None
    config = parse_config(
        "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}], sequence_length: 64}\ntrain: {steps: 1}"
    )
    said = architecture_mismatches(
        config, type(found)(**{**vars(found), "isolates_documents": False, "fails_packed": "why"})
    )
    assert len(said) == 2
    assert "data.packing: documents of one row would see each other" in said[0]
    assert "quant.type: this base cannot be computed with weights in 4 bits" in said[1]


def test_experts_are_tried_in_4_bits_by_the_forward_pass_that_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings("mixtral")
    assert Architecture.from_json(architecture_of(given, None, "the base")).fails_packed is None
    linear = experts._linear
    monkeypatch.setattr(experts, "_linear", lambda *given: 2 * linear(*given))
    assert architecture_of(given, None, "the base")["fails_packed"] == "its predictions are others then"


def test_a_family_whose_layers_get_no_gradient_over_frozen_embeddings_is_refused() -> None:
    given = settings("reformer") | {"is_decoder": True, "axial_pos_embds": False}
    with pytest.raises(
        ConfigError, match="is a reformer model, which gives its layers no gradient while its embeddings"
    ):
        architecture_of(given, None, "the base")


def test_linear_layers_that_peft_takes_for_experts_are_those_of_the_class_that_people_load() -> None:
    """PEFT converts targets by the type of the whole class: it knows that of GLM-4V's mixture, and not that of its
    language model.
    """
    config: Any = CONFIG_MAPPING["glm4v_moe"]()
    given = {"model_type": "glm4v_moe", "text_config": small_settings(config.text_config)}
    assert set(architecture_of(given, None, "the base")["taken_for_experts"]) >= {"down_proj", "up_proj"}


def test_the_names_of_arguments_by_which_layers_mix_tokens_are_those_of_transformers() -> None:
    """Fails where upstream renames one: then no layer would be seen to mix tokens, and documents would see each
    other.
    """
    import inspect

    from transformers.models.bamba.modeling_bamba import BambaMixer
    from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    kinds: list[type[nn.Module]] = [BambaMixer, GPTBigCodeAttention, LlamaAttention, Qwen3NextGatedDeltaNet]
    for kind in kinds:
        assert _CACHES & inspect.signature(kind.forward).parameters.keys(), kind


@pytest.mark.parametrize(
    ("version", "refused"), [("5.20.0", True), ("5.24.0", False), ("5.25.0.dev0", False), ("6.0.0", True)]
)
def test_a_transformers_outside_of_the_range_is_refused(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture_cache.metadata, "requires", lambda name: ["transformers<6,>=5.24"])
    monkeypatch.setattr(architecture_cache.metadata, "version", lambda name: version)
    check = architecture_cache.check_transformers.__wrapped__
    if not refused:
        check()
        return
    with pytest.raises(ConfigError, match=rf"transformers {version} is installed, and .* is needed"):
        check()
