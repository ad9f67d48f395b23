"""The architecture that is read off a model without weights is that of the model that transformers builds with them."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig

from tests.families import FAMILIES, QUICK, SIZES, rows
from tests.forked import forked_module, server
from trainer.base.architecture import Architecture, AttentionLayer, MixingLayer, Parameter, architecture_mismatches
from trainer.base.describe import torch_answers as elsewhere
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.attention_layers import _query_heads, attention_layers
from trainer.base.describe.empty_model import unfilled_model, with_usual_kernels
from trainer.base.describe.language_model import first_layers, model_config
from trainer.base.describe.logits import Logits, _fitted, probe_logits
from trainer.base.describe.meta import architecture_of
from trainer.base.describe.torch_answers import Question
from trainer.base.load.load import empty_model
from trainer.config import parse_config
from trainer.config.training import Train
from trainer.errors import ConfigError
from trainer.model.attention import Attention
from trainer.model.head import LossHead

# Settings of further models beside those of a Llama, by what they do to logits.
LOGITS: dict[str, dict[str, Any]] = {
    "multiplied": {"model_type": "cohere2", "logit_scale": 0.3, "tie_word_embeddings": True},
    "divided": {"model_type": "granite", "logits_scaling": 3.0},
    "divided before the head": {"model_type": "minicpm3", "dim_model_base": 24, "num_key_value_heads": 4},
    "a cap of another family": {"model_type": "llama", "final_logit_softcapping": 2.0},
}
WITH_MAMBA = ("nemotron-h", "granitemoe-hybrid")
# The linear layers that adapters sit on, of families that have others as well: routers, gates of one output, an MLP of
# the model's own.
LINEARS = {
    "qwen2-moe": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "qwen3-next": "in_proj_qkvz in_proj_ba out_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "gemma4": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj per_layer_input_gate per_layer_projection",
    "deepseek-v3": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj",
    "nemotron-h": "in_proj out_proj q_proj k_proj v_proj o_proj up_proj down_proj",
    "llama4": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "granitemoe-hybrid": "in_proj out_proj q_proj k_proj v_proj o_proj input_linear output_linear",
}

# By default.
FAMILY_ROUTES_TO = {"mixtral": 2, "llama4": 1}


def settings_of(kind: str) -> dict[str, Any]:
    return {"tie_word_embeddings": False, **SIZES, **(FAMILIES.get(kind) or LOGITS[kind])}


def built(kind: str) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(**settings_of(kind))
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def shapes(found: Architecture) -> dict[str, tuple[int, ...]]:
    return {part.name: part.shape for part in found.parameters}


@pytest.mark.parametrize("kind", rows(FAMILIES))
def test_parameters_buffers_and_ties_are_those_of_the_model_with_weights(kind: str) -> None:
    found, model = read_architecture(settings_of(kind)), built(kind)
    parameters = dict(model.named_parameters())
    assert shapes(found) == {name: tuple(value.shape) for name, value in parameters.items()}
    state = model.state_dict()
    assert {**shapes(found), **found.buffers, **{name: shapes(found)[of] for name, of in found.tied.items()}} == {
        name: tuple(value.shape) for name, value in state.items()
    }
    assert all(state[name].data_ptr() == state[of].data_ptr() for name, of in found.tied.items())
    assert model.get_input_embeddings().weight is parameters[found.embedding]
    assert model.get_output_embeddings().weight is parameters[found.tied.get(found.head, found.head)]
    assert found.layers == found.stored_layers == len({part.layer for part in found.parameters} - {None})
    assert Architecture.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_quantized_and_adapted_is_most_of_a_layer_and_no_router(kind: str) -> None:
    settings = settings_of(kind)
    found, model = read_architecture(settings), built(kind)
    for part in found.parameters:
        owner = model.get_submodule(part.name.rpartition(".")[0])
        if part.kind == "linear":
            assert type(owner) is torch.nn.Linear
            assert part.shape[0] > 1
        if part.kind == "experts":
            routed = [settings[key] for key in ("num_experts_per_tok", "moe_k", "top_k_experts") if key in settings]
            assert part.visits == (routed or [FAMILY_ROUTES_TO[kind]])[0] / part.shape[0]
        else:
            assert part.visits == 1
    inside = sum(part.numel for part in found.parameters if part.layer is not None)
    assert found.weights("linear", "experts") > 0.8 * inside
    linears = {part.name.split(".")[-2] for part in found.parameters if part.kind == "linear"}
    if kind in LINEARS:
        assert linears == set(LINEARS[kind].split())
    # Mamba's kernel may take this weight, past an adapter around the layer.
    assert linears - set(found.linear_names) == ({"out_proj"} if kind in WITH_MAMBA else set())


@pytest.mark.parametrize("kind", rows([*FAMILIES, *LOGITS], [*QUICK, *LOGITS]))
def test_logits_are_made_of_hidden_states_as_transformers_makes_them(kind: str) -> None:
    model, found = built(kind), read_architecture(settings_of(kind))
    torch.nn.init.normal_(model.lm_head.weight, std=9.0)
    ids, head = torch.arange(3, 20)[None], LossHead(found.hidden, found.vocabulary, bias=False)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        hidden, expected = model.model(ids, use_cache=False).last_hidden_state, model(ids, use_cache=False).logits
        plain = head(hidden)
        head.factor, head.divisor, head.softcap = found.logit_factor, found.logit_divisor, found.softcap
        torch.testing.assert_close(head(hidden), expected, rtol=1e-4, atol=1e-4)
        changed = settings_of(kind).get("final_logit_softcapping", 0) and kind != "a cap of another family"
        changed = changed or kind in ("granite", "granitemoe", "granitemoe-hybrid", "cohere2", *LOGITS)[:-1]
        assert torch.equal(head(hidden), expected) or kind == "divided before the head"
        assert torch.equal(plain, expected) is not bool(changed)


@pytest.mark.parametrize("kind", rows(FAMILIES))
def test_the_first_layers_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    settings = settings_of(kind)
    whole = read_architecture(settings)
    for layers in range(1, whole.layers):
        cut = read_architecture(settings, layers)
        assert (cut.layers, cut.stored_layers) == (layers, whole.layers)
        assert cut == Architecture.from_json(architecture_of(settings, layers, "the base")), "it is cut, or read again"
        kept = [part for part in whole.parameters if part.layer is None or part.layer < layers]
        # A weight beside the layers may be as wide as all of them are together.
        assert [part.name for part in cut.parameters] == [part.name for part in kept]
        inside = {part for part in kept if part.layer is not None}
        assert inside <= set(cut.parameters)
        assert [layer.window for layer in cut.attention] == [
            layer.window for layer in whole.attention if layer.layer < layers
        ]
    assert read_architecture(settings, whole.layers).layers == whole.layers
    AutoConfig.for_model(**settings).save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_config(model_config(tmp_path, 1), experts_implementation="eager")
    assert model(torch.arange(3, 20)[None], use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_that_no_file_holds_are_made_as_in_a_model_with_weights(kind: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(**settings_of(kind))
    model, full = unfilled_model(config, dtype), AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert all(value.is_meta for value in model.state_dict().values())
    made, expected = dict(model.named_non_persistent_buffers()), dict(full.named_non_persistent_buffers())
    assert made.keys() == expected.keys()
    for name, value in made.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_what_a_family_keeps_in_fp32_is_so_in_a_model_of_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"q_proj"})
    made = unfilled_model(AutoConfig.for_model(**settings_of("llama")), torch.bfloat16).state_dict()
    in_fp32 = {name for name, value in made.items() if value.dtype == torch.float32}
    assert in_fp32 == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert {value.dtype for name, value in made.items() if name not in in_fp32} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "clvp_decoder"}, "a clvp_decoder model, which is no causal language model"),
        ({"model_type": "cpmant"}, "a cpmant model, which lets tokens see later ones"),
        ({"model_type": "xlnet"}, "a xlnet model, which lets tokens see later ones"),
        ({"model_type": "blt"}, "a blt model, which has layers in several parts, none of which is the decoder"),
        ({"model_type": "zamba"}, "a zamba model, which has layers that share their weights with other layers"),
        (
            {"model_type": "bert", "is_decoder": True},
            "has more than one matrix, a factor and a cap between its last hidden states",
        ),
        (
            {"model_type": "gemma4_text", "num_hidden_layers": 6, "num_kv_shared_layers": 6},
            "takes the keys of all its layers from the model that it drafts for",
        ),
        ({"model_type": "dory"}, "a dory model, which has an output head that is no plain matrix"),
        (
            {
                "model_type": "diffusion_gemma",
                "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
            },
            "of DiffusionGemmaForBlockDiffusion, which does not generate one token after another",
        ),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attends in both directions"),
        (
            {"model_type": "qwen2_5_omni"},
            r"Only one part of it, Qwen2_5OmniThinkerForConditionalGeneration, predicts text\. Save this part in a folder",
        ),
        ({"model_type": "clip"}, "a clip model, for which transformers .* has no class that predicts tokens. Give"),
    ],
)
def test_a_model_that_is_built_otherwise_is_refused_by_name(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        architecture_of(settings, None, "the base")


@pytest.mark.parametrize(
    ("what", "instead", "reason"),
    [
        ("_Reader._kind", "small", "has no linear layers, so nothing in it can be quantized or adapted"),
        ("decoder_layers", None, "has no list of decoder layers"),
    ],
)
def test_a_model_without_layers_that_can_be_trained_is_refused(
    what: str, instead: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"trainer.base.describe.meta.{what}", lambda *_: instead)
    with pytest.raises(
        ConfigError, match=f"^model.base: the base is a llama model, which {reason}. Give another base.$"
    ):
        architecture_of(settings_of("llama"), None, "the base")


@pytest.mark.parametrize(
    ("through", "expected"),
    [
        (lambda z: z, Logits(1.0, 1.0, None)),
        (lambda z: z * 0.3, Logits(0.3, 1.0, None)),
        (lambda z: z / 3, Logits(1.0, 3.0, None)),
        (lambda z: z * 0.7 * 0.3, Logits(0.21, 1.0, None)),  # rounded twice
        (lambda z: z / 3 * 0.7, Logits(0.233333, 1.0, None)),
        (lambda z: z * (1 + 1e-3 * z.abs()), None),
        (lambda z: 30 * torch.tanh(z / 30), Logits(1.0, 1.0, 30.0)),
        (lambda z: 30 * torch.tanh(z * 0.5 / 30), Logits(0.5, 1.0, 30.0)),
        (lambda z: z * 0, None),
        (lambda z: z + 1, None),
        (lambda z: z.clamp(-5, 5), None),
        (lambda z: z.flip(-1), None),
    ],
)
def test_logits_are_a_factor_a_divisor_and_a_cap_or_are_not_known(through: Any, expected: Logits | None) -> None:
    assert _fitted(through, 8) == expected


def test_a_model_whose_logits_were_tried_computes_as_before() -> None:
    model = built("gemma2")
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        assert probe_logits(model, model.model, model.lm_head) is not None
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)


@pytest.mark.parametrize(("kind", "last"), [("llama", "mlp"), ("mixtral", "mlp"), ("olmoe", "mlp")])
def test_the_blocks_of_a_layer_are_its_attention_and_its_mlp_or_mixture(kind: str, last: str) -> None:
    found = read_architecture(settings_of(kind))
    assert found.blocks() == {
        layer: [f"model.layers.{layer}.self_attn", f"model.layers.{layer}.{last}"] for layer in range(found.layers)
    }
    experts = [part for part in found.parameters if part.kind == "experts"]
    without = replace(found, parameters=tuple(experts))
    assert [paths for paths in without.blocks().values() if experts] == [
        [f"model.layers.{layer}.{last}"] for layer in range(found.layers) if experts
    ], "a block may have nothing but experts"


@pytest.mark.parametrize(("declared", "found"), [(512, 512), (0, None), (-1, None)])
def test_a_base_that_declares_no_number_of_positions_has_no_limit(declared: int, found: int | None) -> None:
    settings = settings_of("llama") | {"max_position_embeddings": declared}
    assert architecture_of(settings, None, "a base")["positions"] == found


def test_what_not_every_kernel_computes_is_known_of_a_base() -> None:
    needs = {kind: read_architecture(settings_of(kind)).attention_needs for kind in ("llama", "gemma2", "gpt-oss")}
    assert {kind: one.caps_attention for kind, one in needs.items()} == {
        "llama": False,
        "gemma2": True,
        "gpt-oss": False,
    }
    assert {kind: one.has_sinks for kind, one in needs.items()} == {"llama": False, "gemma2": False, "gpt-oss": True}


def described(*parameters: Parameter, **given: Any) -> Architecture:
    sizes: dict[str, Any] = {"layers": 2, "stored_layers": 2, "hidden": 8, "vocabulary": 9, "positions": None}
    return Architecture(embedding="e", head="h", parameters=parameters, **{**sizes, **given})


def test_what_is_quantized_by_itself_are_matrices_one_by_one() -> None:
    assert Parameter("a", (4, 8), "linear").matrices == [32]
    assert Parameter("a", (3, 4, 8), "experts").matrices == [32, 32, 32]
    assert Parameter("a", (4, 8), "head").matrices == Parameter("a", (8,), "small").matrices == []


def test_states_are_as_wide_as_the_head_takes_them_unless_no_linear_layer_is() -> None:
    """OPT-350M has layers of 512 between an embedding and a head of others."""
    narrow = [Parameter(name, shape, "linear", 0) for name, shape in (("a", (4, 4)), ("b", (16, 4)), ("c", (4, 16)))]
    assert described().width == 8, "nothing says otherwise"
    assert described(*narrow).width == 4, "most of its layers take that"
    assert described(*narrow, Parameter("d", (16, 8), "linear", 0)).width == 8
    assert described(*narrow, Parameter("d", (16, 8), "head")).width == 4


def test_attention_is_as_wide_as_its_widest_head_and_sees_as_far_as_its_smallest_window() -> None:
    layers = [
        AttentionLayer(f"layers.{number}", number, 2, size, window)
        for number, (size, window) in enumerate([(64, None), (128, 512), (None, 128)])
    ]
    found = described(attention=tuple(layers))
    assert (found.widest_head, found.sliding_window) == (128, 128)
    assert (found.attention_needs.widest_head, described().widest_head) == (128, 0)
    assert described(attention=tuple(layers[:1])).sliding_window is None


def test_a_head_is_the_embedding_where_it_is_tied_to_that_alone() -> None:
    assert described(tied={"h": "e"}).head_is_embedding
    assert not described().head_is_embedding
    assert not described(tied={"h": "other"}).head_is_embedding


def test_layers_that_ranks_of_a_row_do_not_divide_are_computed_whole() -> None:
    exchanged: Any = ("an exchange",)
    mixing = (MixingLayer("layers.0.conv", 0), MixingLayer("layers.1.scan", 1, exchanged))
    assert described(mixing=mixing).computed_whole == {"layers.0.conv"}


def test_vectors_that_stay_as_they_are_stored_are_not_named_among_the_matrices_that_do() -> None:
    found = described(
        Parameter("layers.0.a.weight", (4, 8), "small", 0, whole="why"),
        Parameter("layers.1.a.weight", (4, 8), "small", 1, whole="why"),
        Parameter("layers.0.b.weight", (2, 2), "small", 0, whole="else"),
        Parameter("layers.0.norm.weight", (8,), "small", 0, whole="why"),
        Parameter("layers.0.c.weight", (4, 8), "linear", 0),
    )
    assert found.whole() == {("a", "why"): 64, ("b", "else"): 4}


@pytest.mark.parametrize(
    ("layers", "kinds", "shared"),
    [(None, "abab", 2), (0, "abab", 2), (4, "abab", 2), (9, "abab", 2), (3, "aba", 1), (2, "ab", 0), (1, "a", 0)],
)
def test_settings_of_the_first_layers_are_those_of_the_base_for_them(
    layers: int | None, kinds: str, shared: int
) -> None:
    given: dict[str, Any] = {"block_pattern": list("abab"), "sizes": [1, 2, 3, 4], "num_kv_shared_layers": 2}
    kind: Any = PretrainedConfig
    config, stored = first_layers(kind(num_hidden_layers=4, **given), layers)
    assert stored == 4
    found: Any = config
    assert (found.num_hidden_layers, "".join(found.block_pattern)) == (len(kinds), kinds)
    assert (found.num_kv_shared_layers, found.sizes) == (shared, [1, 2, 3, 4])


def test_a_kernel_that_this_machine_may_lack_is_taken_out_of_a_copy() -> None:
    usual, other = (AutoConfig.for_model("llama", attn_implementation=name) for name in ("sdpa", "flash_attention_2"))
    assert with_usual_kernels(usual) is usual
    made = with_usual_kernels(other)
    assert (made._attn_implementation, other._attn_implementation) == (None, "flash_attention_2")
    seeing: Any = AutoConfig.for_model("gemma3")
    seeing.vision_config._attn_implementation = "flash_attention_2"
    assert with_usual_kernels(seeing) is not seeing


def test_a_head_keeps_its_bias_and_what_scales_its_logits(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoConfig.for_model("phi", vocab_size=64, **sizes).save_pretrained(tmp_path)
    found = replace(read_architecture({"model_type": "phi", "vocab_size": 64, **sizes}), logit_factor=2.0, softcap=9.0)
    base: Any = SimpleNamespace(name="it", directory=tmp_path, architecture=found)
    config: Any = SimpleNamespace(model=SimpleNamespace(layers=None, dtype="fp32"), train=Train(steps=1))
    model = empty_model(base, config, Attention("sdpa", ""))
    head = model.get_output_embeddings()
    assert isinstance(head, LossHead)
    assert (head.factor, head.divisor, head.softcap) == (2.0, 1.0, 9.0)
    assert {"lm_head.weight", "lm_head.bias"} <= dict(model.named_parameters()).keys()
    assert model.config.use_cache is False


def test_a_package_that_a_tower_wants_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "\nIt requires the timm library but it was not found. You can install it with pip:\n`pip install timm`. Please"
    )

    def wants(*_given: Any) -> Any:
        raise ImportError(said)

    monkeypatch.setattr("trainer.base.describe.meta.whole_model", wants)
    with pytest.raises(ConfigError, match=r"needs a package that is not installed. Install it: pip install timm\.$"):
        architecture_of({"model_type": "gemma3"}, None, "the base")
    said = "cannot import name 'a' from 'b'"
    with pytest.raises(ConfigError, match=r"that is not installed \(ImportError: cannot .*\). Install it\.$"):
        architecture_of({"model_type": "gemma3"}, None, "the base")


def _seeing(kind: str, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "model_type": kind,
        "text_config": text,
        "vision_config": {**tower, "image_size": 16, "patch_size": 8},
        **more,
    }


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_base_that_reads_a_prompt_in_both_directions_is_known_by_what_its_class_does(kind: str) -> None:
    text = {**settings_of("gemma2" if kind == "gemma2" else "llama"), "model_type": kind}
    found = Architecture.from_json(architecture_of(_seeing("paligemma", text, projection_dim=64), None, "the base"))
    assert found.reads_prompts
    assert found.isolates_documents
    assert not read_architecture(settings_of("gemma2")).reads_prompts


def test_a_base_that_reads_everything_in_both_directions_is_refused() -> None:
    """Its class takes token types, which tell it where its pictures are."""
    text = {**settings_of("gemma3"), "use_bidirectional_attention": True}
    with pytest.raises(ConfigError, match="attends in both directions"):
        architecture_of(_seeing("gemma3", text), None, "the base")


def test_layers_that_cannot_be_computed_again_are_refused_before_a_rank_is_started() -> None:
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: a}], sequence_length: 64}\ntrain: {steps: 1}"
    model = replace(read_architecture(settings_of("llama")), recomputes=False)
    assert [fault.partition(":")[0] for fault in architecture_mismatches(parse_config(text), model)] == [
        "train.activation_checkpointing"
    ]
    assert not architecture_mismatches(parse_config(text, ["train.activation_checkpointing=none"]), model)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_5", "qwen3_5-moe", "llama4"])
def test_the_language_model_of_one_that_sees_is_read(kind: str) -> None:
    text = settings_of(kind)
    whole = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text, "vision_config": {}}
    # A head for another task is on the whole class, and a tokenizer's class goes by the whole's type.
    found = read_architecture(whole)
    of_whole = ("heads", "tokenizer", "weights_beside", "linears_beside", "projector")
    assert found == replace(read_architecture(text), **{name: getattr(found, name) for name in of_whole})
    assert found.weights_beside > 0  # those of the tower


@pytest.mark.parametrize(
    ("kind", "windows", "keys"),
    [
        ("mistral", [16, 16], [(2, 16)] * 2),
        ("phi3", [16, 16], [(2, 16)] * 2),
        ("gemma2", [16, None], [(2, 24)] * 2),
        ("gpt-oss", [16, None], [(2, 10)] * 2),
        ("qwen3-next", [None], [(2, 16)]),
        ("llama4", [16, 16, None], [(2, 10)] * 3),
        ("exaone4", [16, None], [(2, 10)] * 2),
        ("deepseek-v3", [None, None], [(None, None)] * 2),
        ("nemotron-h", [None], [(2, 10)]),
    ],
)
def test_the_attention_of_each_layer_is_known(
    kind: str, windows: list[int | None], keys: list[tuple[int | None, int | None]]
) -> None:
    found = read_architecture(settings_of(kind))
    assert [layer.window for layer in found.attention] == windows
    assert [(layer.key_value_heads, layer.head_size) for layer in found.attention] == keys
    assert (found.has_sinks, found.caps_attention) == (kind == "gpt-oss", kind == "gemma2")


@pytest.mark.parametrize(
    ("layer", "family", "heads"),
    [
        ({"num_heads": 3}, {"num_attention_heads": 4}, 3),  # layers may differ
        ({"num_heads": torch.ones(3), "num_attention_heads": 5, "n_heads": 7}, {"num_attention_heads": 4}, 5),
        ({"n_heads": 7}, {}, 7),
        ({}, {"num_attention_heads": 4}, 4),
        ({}, {"num_attention_heads": [4, 8]}, None),
        ({}, {}, None),
    ],
)
def test_query_heads_are_those_of_the_layer_and_else_of_its_family(
    layer: dict[str, Any], family: dict[str, Any], heads: int | None
) -> None:
    module, config = SimpleNamespace(**layer), SimpleNamespace(**family)
    assert _query_heads(module, config) == heads  # type: ignore[arg-type]


@dataclass
class _Declared:
    sliding_window: int | None = 8
    attention_chunk_size: int | None = 16
    layer_types: list[str] | None = None


@dataclass
class _Silent:
    """A family that declares nothing, though its config.json names it."""

    def __post_init__(self) -> None:
        self.sliding_window = 8


@pytest.mark.parametrize(
    ("own", "config", "windows"),
    [
        ({}, _Declared(), [8, 8, 8]),
        ({}, _Declared(sliding_window=0), [None] * 3),
        ({}, _Declared(layer_types=["full_attention", "sliding_attention", "chunked_attention"]), [None, 8, 16]),
        ({"sliding_window": 4}, _Declared(), [4, 4, 4]),
        ({"sliding_window": None}, _Declared(), [None] * 3),  # a layer that sees all, of a family with a window
        ({}, _Silent(), [None] * 3),
    ],
)
def test_the_window_is_that_of_the_kind_of_a_layer_or_its_own_or_its_familys(
    own: dict[str, Any], config: Any, windows: list[int | None]
) -> None:
    layers = [torch.nn.Module() for _ in range(3)]
    for layer in layers:
        layer.is_causal = True  # type: ignore[assignment]
        for name, value in own.items():
            setattr(layer, name, value)
    modules = {f"layers.{number}": layer for number, layer in enumerate(layers)}
    found = list(attention_layers(layers, modules, config))
    assert [(layer.path, layer.layer, layer.window) for layer in found] == [
        (f"layers.{number}", number, window) for number, window in enumerate(windows)
    ]


@pytest.mark.parametrize(("joined", "keys"), [({"qkv_proj": None}, (2, 16)), ({}, (None, None))])
def test_keys_of_joined_projections_have_the_heads_that_the_family_declares(
    joined: dict[str, Any], keys: tuple[int | None, int | None]
) -> None:
    @dataclass
    class Config:
        num_key_value_heads: int = 2

    layer: Any = torch.nn.Module()
    layer.is_causal, layer.head_dim = True, 16
    for name, value in joined.items():
        setattr(layer, name, value)
    (found,) = attention_layers([layer], {"layer": layer}, cast(Any, Config()))
    assert (found.key_value_heads, found.head_size) == keys


_TALKATIVE = """
from trainer.base.describe import meta
def talks(read=meta.architecture_of, **given):
    print("a library says something", flush=True)
    return read(**given)
meta.architecture_of = talks
"""


def test_what_the_process_that_reads_it_refuses_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(**config: Any) -> Architecture:
        given = {"base_config": config, "layers": 1, "name": "the base"}
        question = Question("base.describe.meta", "architecture_of", given, "the base", "reading")
        return Architecture.from_json(elsewhere._answer_elsewhere(question))

    settings, _ = settings_of("deepseek-v3"), server()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(elsewhere.children, "start", partial(forked_module, before=_TALKATIVE))
        assert read(**settings) == read_architecture(settings, 1)
        with pytest.raises(ConfigError, match="^model.base: the base is a t5 model, an encoder with a decoder"):
            read(model_type="t5")
    monkeypatch.setattr(elsewhere, "_SECONDS", 0.01)
    with pytest.raises(ConfigError, match=r"has not built the model of the base within 0\.01 seconds"):
        read(**settings)
    monkeypatch.undo()
    monkeypatch.setattr(elsewhere.sys, "executable", "false")
    with pytest.raises(ConfigError, match=r"cannot build the model of the base \(exit code 1\)"):
        read(**settings)


def test_a_home_that_cannot_be_written_to_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "capstan").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_architecture(settings_of("llama")).layers == 2
