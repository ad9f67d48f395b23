"""A base is tried in small before it trains: with documents that share a row, with padding, and with neither."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from trainer.base.architecture import Architecture, architecture_mismatches
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.empty_model import LanguagePart, NoLanguagePart, meta_model
from trainer.base.describe.meta import architecture_of
from trainer.base.describe.trial import self_test, small
from trainer.base.describe.trial.small import HEAD, HEADS, HIDDEN, VOCABULARY, small_model, small_settings
from trainer.base.find.locate import known_config
from trainer.config import Config, parse_config
from trainer.errors import ConfigError
from trainer.model.attention import Attention
from trainer.model.documents import keep_documents_apart
from trainer.model.micro_batch import ModelInput, Role, Segments
from trainer.model.packed import PackedModel
from trainer.model.parts import body
from trainer.model.rows.row import CannotDivide

DOCUMENT, PADDING = 11, 9


def settings(kind: str, **own: Any) -> dict[str, Any]:
    config: Any = CONFIG_MAPPING[kind]()
    return {**small_settings(config), "model_type": kind, **own}


def run(*overrides: str) -> Config:
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}], sequence_length: 64}\ntrain: {steps: 1}"
    return parse_config(text, list(overrides))


@pytest.mark.parametrize(
    ("sees", "found"),
    [
        (lambda token, other: other <= token, False),  # the tokens before itself alone
        (lambda token, other: (other < 12) | (other <= token), True),  # and the prompt of 12 tokens
        (lambda token, other: other > -1, False),  # and the answer
        (lambda token, other: (other <= token) | ((token > 5) & (other < 12)), False),  # some of the prompt
    ],
)
def test_a_class_reads_prompts_if_tokens_see_all_of_them_and_nothing_of_answers_that_follow(
    sees: Any, found: bool
) -> None:
    class Class:
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))

        def __call__(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, use_cache: bool) -> Any:
            assert token_type_ids.tolist() == [[0] * 12 + [1] * 9]
            place = torch.arange(21)
            return SimpleNamespace(logits=sees(place[:, None], place).float()[None] @ input_ids[..., None].float())

    whole: Any = Class()
    assert self_test.reads_prompts(whole) is found


@pytest.mark.parametrize("name", ["databricks/dbrx-base", "mistralai/Mistral-Small-4-119B-2603"])
def test_known_bases_with_settings_inside_of_settings_are_tried(name: str) -> None:
    found = architecture_of(known_config(name) or {}, None, name)
    assert found["tried"]
    assert found["isolates_documents"]


def test_a_rotary_dimension_that_is_a_part_of_a_head_is_as_small_as_that_part() -> None:
    config: Any = CONFIG_MAPPING["hy_v4_vl"]()
    made = small_settings(config.get_text_config())
    assert sum(made["rope_parameters"]["mrope_section"]) == made["qk_rope_head_dim"] // 2


def any_settings(**given: Any) -> PretrainedConfig:
    kind: Any = PretrainedConfig
    return kind(**given)


def test_what_differs_by_layer_stays_with_one_layer_of_each_kind() -> None:
    """Lists with an entry for each layer, numbers of layers, and what single layers have."""
    config = any_settings(
        hidden_size=4096,
        num_hidden_layers=8,
        block_pattern=["a", "a", "b", "a", "a", "b", "a", "c"],
        kept_layer_ids=[1, 2, 5, 7],
        by_number={"1": {"num_experts": 64}, "2": {"intermediate_size": 9000, "groups": 40}},
        none_by_number={},
        not_by_number={"1": 2, "a": 4096},
    )
    made = small_settings(config)
    assert made["block_pattern"] == ["a", "b", "c"]
    assert made["kept_layer_ids"] == [1, 2]
    assert made["by_number"] == {1: {"intermediate_size": 48, "groups": 40}}
    assert (made["none_by_number"], made["not_by_number"]) == ({}, {"1": 2, "a": 4096})
    assert (made["num_hidden_layers"], made["hidden_size"]) == (3, HIDDEN)
    deep = [small_settings(any_settings(hidden_size=size, num_hidden_layers=8)) for size in (HIDDEN, HIDDEN + 1)]
    assert [made["num_hidden_layers"] for made in deep] == [8, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mamba_n_heads": 128, "mamba_d_head": 64}, {"mamba_n_heads": HEADS, "mamba_d_head": HIDDEN // HEADS}),
        (
            {"n_mamba_heads": 128, "mamba_headdim": 64, "mamba_expand": 2},
            {"n_mamba_heads": HEADS, "mamba_headdim": 2 * HIDDEN // HEADS},
        ),
        (
            {"num_heads": 128, "head_dim": 64, "expand": 2, "mamba_d_ssm": 8192},
            {"num_heads": HEADS, "head_dim": 2 * HIDDEN // HEADS, "mamba_d_ssm": 2 * HIDDEN},
        ),
        ({"num_heads": 128, "head_dim": 64}, {"num_heads": HEADS, "head_dim": HEAD}),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, {"num_key_value_heads": HEADS}),
    ],
)
def test_widths_of_heads_follow_from_the_inner_width(given: dict[str, int], expected: dict[str, int]) -> None:
    made = small_settings(any_settings(hidden_size=4096, num_hidden_layers=8, **given))
    assert {key: made[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("sections", "total", "made"),
    [
        ([16, 24, 24], 8, [2, 3, 3]),
        ([1, 30, 33], 4, [1, 1, 2]),
        ([24, 20, 20], 16, [6, 5, 5]),
        ([20, 20, 24], 10, [3, 3, 4]),
    ],
)
def test_sections_of_a_rotary_dimension_are_as_small_in_proportion(
    sections: list[int], total: int, made: list[int]
) -> None:
    assert small._scaled(sections, total) == made
    assert sum(made) == total


def test_sizes_become_small_and_all_other_settings_stay() -> None:
    given = {
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "moe_intermediate_size": 9000,
        "intermediate_size": 16,
        "pad_token_id": 9000,
        "eos_token_id": 9000,
        "bos_token_id": 1,
        "use_cache": True,
        "n_group": -1,
        "hidden_act": "silu",
        "inner": {"hidden_size": 4096, "tie": False},
        "sizes_of_nothing": None,
    }
    assert small._sized(given) == {
        **given,
        "moe_intermediate_size": 48,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "inner": {"hidden_size": HIDDEN, "tie": False},
    }
    of_many = small._sized({"vocab_size": 10**6, "num_attention_heads": 64, "head_dim": 256, "num_experts": 512})
    assert of_many == {"vocab_size": VOCABULARY, "num_attention_heads": HEADS, "head_dim": HEAD, "num_experts": 6}


def test_a_class_without_a_language_model_to_take_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llama: Any = CONFIG_MAPPING["llama"](**small_settings(CONFIG_MAPPING["llama"]()))
    decoder = meta_model(llama)

    def whole(decoder: Any, head: Any) -> Any:
        return SimpleNamespace(get_decoder=lambda: decoder, get_output_embeddings=lambda: head)

    for given, why in (
        (whole(decoder.model, None), "class SimpleNamespace has no decoder with an output head"),
        (whole(torch.nn.Linear(2, 2), decoder.lm_head), "class SimpleNamespace has no decoder with an output head"),
        (whole(decoder, decoder.lm_head), "class SimpleNamespace has a decoder with an output head of its own inside"),
    ):
        with pytest.raises(NoLanguagePart) as said:
            LanguagePart.of(given)
        assert str(said.value) == why

    def refuse(_config: Any) -> Any:
        raise NoLanguagePart("class Mine has no decoder")

    monkeypatch.setattr("trainer.base.describe.meta.meta_model", refuse)
    with pytest.raises(ConfigError, match=r"^model\.base: it is a llama model, whose class Mine has no decoder\. Give"):
        architecture_of(settings("llama"), None, "it")


def test_the_head_of_a_language_part_can_be_replaced() -> None:
    llama: Any = CONFIG_MAPPING["llama"](**small_settings(CONFIG_MAPPING["llama"]()))
    model = meta_model(llama)
    part, head = LanguagePart(model.model, model.lm_head, type(model)), torch.nn.Linear(2, 2)
    part.set_output_embeddings(head)
    assert part.get_output_embeddings() is part.lm_head is head


def test_a_base_that_fails_in_the_trial_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_given: Any) -> Any:
        raise ValueError("the shapes do not fit\nat all")

    monkeypatch.setattr("trainer.base.describe.meta.try_family", fails)
    why = (
        r"it is a llama model, which cannot compute as training asks it to \(ValueError: the shapes do not fit\)\. Give"
    )
    with pytest.raises(ConfigError, match=why):
        architecture_of(settings("llama"), None, "it")
    monkeypatch.setattr("trainer.base.describe.meta.small_model", fails)
    assert not architecture_of(settings("llama"), None, "it")["tried"]
    monkeypatch.setattr("trainer.base.describe.meta.may_read_prompts", lambda _config: True)
    with pytest.raises(ConfigError, match=r"it attends in both directions"):  # as nothing shows which tokens do
        architecture_of(settings("llama"), None, "it")


def test_weights_that_text_reaches_are_random_and_all_others_take_no_memory() -> None:
    made: Any = torch.nn.Sequential(torch.nn.Linear(64, 32, device="meta"), torch.nn.Linear(1, 1, device="meta"))
    made[0].register_buffer("scale", torch.empty(8, device="meta"))
    made[0].register_buffer("none", None)
    self_test.hollow(made)
    held = [*made.parameters(), made[0].scale]
    assert [value.device.type for value in held] == ["cpu"] * 5
    assert not any(value.any() or value.requires_grad or value.untyped_storage().nbytes() > 4 for value in held)
    own = torch.nn.Parameter(torch.ones(32))
    made[0].bias = own
    for module in made:
        self_test._fill(module, ())
    weight = made[0].weight
    assert (weight.shape, weight.requires_grad) == ((32, 64), False)
    assert 0.04 < float(weight.std()) < 0.06
    assert abs(float(weight.mean())) < 0.01
    assert made[0].bias is own
    assert not made[1].weight.any()  # a single number, which may be a switch


def test_the_text_of_the_trial_lacks_the_first_tokens_and_is_as_long_as_it_has_to_be() -> None:
    for vocabulary, most in ((1000, 202), (203, 202), (50, 49)):
        model: Any = SimpleNamespace(config=any_settings(vocab_size=vocabulary))
        text = self_test.some_text(model, 400)
        assert (text.shape, int(text.min()), int(text.max())) == ((1, 400), 3, most)


def test_a_base_that_cannot_be_tried_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_given: Any) -> Any:
        raise ValueError("num_attention_heads (4) must be the same as num_key_value_heads (2).")

    monkeypatch.setattr("trainer.base.describe.meta.small_model", fails)
    found = Architecture.from_json(architecture_of(settings("llama"), None, "the base"))
    assert not found.tried
    assert found.fails_prefix == found.fails_shared == "no small model of its kind could be tried"
    (said,) = architecture_mismatches(run(), found)
    assert said.startswith(
        "data.packing: documents of one row might see each other, as the code of this base runs at no"
    )
    assert architecture_mismatches(run("data.packing=false"), found) == []
    (said,) = architecture_mismatches(run("data.packing=false", "train.micro_batch=2"), found)
    assert said.startswith("train.micro_batch: 2 documents of one row would see each other with this base")


def test_some_tokens_that_are_computed_otherwise_in_a_row_are_enough() -> None:
    """With two heads of an indexer many keys have the score 0, and which of them are taken depends on the row."""
    assert read_architecture(settings("deepseek_v32", index_n_heads=16)).isolates_documents
    assert not read_architecture(settings("deepseek_v32", index_n_heads=2)).isolates_documents


def test_a_token_that_stands_on_an_edge_is_no_leak_and_one_that_does_not_is() -> None:
    embedding = torch.nn.Embedding(8, 4)
    model: Any = type("Model", (), {"get_input_embeddings": lambda _self: embedding})()
    noise, ids = self_test._Noise(model), torch.arange(8)[None]

    def states() -> torch.Tensor:
        found = embedding(ids)
        on_edge = (found[0, 3].sum() > edge).float()
        return torch.cat([found[:, :3], found[:, 3:4] + on_edge, found[:, 4:]], 1)

    with torch.no_grad():
        edge = embedding(ids)[0, 3].sum()
        expected = states()
        other, leak = expected.clone(), expected.clone()
        other[0, 3] += 1
        leak[0, 5] += 1
        assert not noise.differs(other, expected, states)
        assert noise.differs(leak, expected, states)
        assert noise.differs(other + (leak - expected), expected, states)


@pytest.mark.parametrize("kind", ["gemma3n_text", "inkling2_text", "llama", "bloom"])
def test_padding_behind_a_document_changes_neither_it_nor_its_gradient(kind: str) -> None:
    config: Any = CONFIG_MAPPING[kind](**small_settings(CONFIG_MAPPING[kind]()))
    facts = read_architecture({**config.to_dict(), "model_type": kind})
    model = small_model(config, meta_model(config))
    tokens = torch.arange(3, 3 + DOCUMENT)[None]
    learning = [value for name, value in model.named_parameters() if name.endswith("proj.weight") or "dense" in name]

    def gradient(states: torch.Tensor) -> torch.Tensor:
        loss = states[:, :DOCUMENT].square().sum()
        grads = torch.autograd.grad(loss, learning, allow_unused=True)
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    alone = body(model)(input_ids=tokens, use_cache=False)[0]
    expected = gradient(alone)
    keep_documents_apart(model)
    packed = PackedModel(model, Attention("eager", ""), padding=facts.padding, isolates=facts.isolates_documents)
    sizes = DOCUMENT, PADDING
    row = ModelInput.of(
        torch.nn.functional.pad(tokens, (0, PADDING)),
        torch.cat([torch.arange(size) for size in sizes])[None],
        Segments(sizes, (Role.DOCUMENT, Role.PADDING)),
    )
    found = packed.hidden(row)
    assert torch.allclose(found[:, :DOCUMENT], alone, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradient(found), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_what_is_packed_in_the_trial_are_matrices_of_layers_and_stacks_of_experts_without_their_biases() -> None:
    config: Any = CONFIG_MAPPING["gpt_oss"]()
    model = small_model(config, meta_model(config))
    packed = dict(self_test._packable(model, ()))
    assert all(name.startswith("model.layers.") for name in packed), "neither the head nor the embedding"
    assert {name.rpartition(".experts.")[2] for name in packed if ".experts." in name} == {"gate_up_proj", "down_proj"}
    assert {weight.ndim for name, weight in packed.items() if ".experts." in name} == {3}
    assert {weight.ndim for name, weight in packed.items() if ".self_attn." in name} == {2}


class Body(torch.nn.Module):
    """A body of a token's embedding, to which `compute` does something by the tokens' positions."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.embedding, self._compute = torch.nn.Embedding(300, 4), compute

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor]:
        return (self._compute(self.embedding(input_ids), position_ids[..., None].float()),)


def _refuses(_states: Any, _positions: Any) -> Any:
    raise CannotDivide("it counts the tokens of a row")


OTHERWISE = "a small model of its kind predicts otherwise then"
COMPUTED = {
    "by the positions": (lambda states, positions: states * (1 + positions), None, None),
    "by the places in a row": (lambda states, _: states.cumsum(1), OTHERWISE, OTHERWISE),
    "by the length of a row": (lambda states, _: states * states.shape[1], OTHERWISE, OTHERWISE),
    "not": (_refuses, "it counts the tokens of a row", "it counts the tokens of a row"),
    "with a mistake": (
        lambda states, positions: states @ positions,
        "it raises RuntimeError then",
        "it raises RuntimeError then",
    ),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_rows_that_ranks_or_prefixes_share_are_tried_and_what_fails_is_said(how: str) -> None:
    compute, shared, prefix = COMPUTED[how]
    body: Any = Body(compute)
    lengths, plain = self_test._LENGTHS, Body(COMPUTED["by the positions"][0])
    plain.embedding = body.embedding
    tokens = torch.arange(3, 3 + sum(lengths))[None]
    documents = tokens.split(lengths, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = body if how.startswith("by") else plain

    def each_alone() -> torch.Tensor:
        return torch.cat([self_test.hidden_states(alone, one) for one in documents], dim=1)

    with torch.no_grad():
        noise: Any = self_test._Noise(body)
        assert self_test._fails_shared(noise, body, tokens, positions, each_alone) == shared
        assert self_test._fails_prefix(noise, body, documents) == prefix


def test_states_that_are_no_numbers_are_alike_to_none() -> None:
    states = torch.ones(1, 3, 2)
    lost = states.clone()
    lost[0, 1] = torch.nan
    assert self_test.are_alike(states, states * (1 + 1e-6))
    assert not self_test.are_alike(states, states * (1 + 1e-3))
    for one, other in ((lost, states), (states, lost), (lost, lost)):
        assert not self_test.are_alike(one, other)
