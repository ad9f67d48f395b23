"""Virtual tokens: the positions that are reserved for them, what hides them, and the model that computes with them."""

import json
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from tests.material import KINDS, SIZES, Workshop, make_labelled, make_pairs, tuning_misfits
from tests.methods import methods_of
from tests.unit.model.test_attention import row
from tests.unit.repository.test_examples import EXAMPLES, LLAMA_8B
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.description import describe
from trainer.config import Config, Model, Tuning, load_config, parse_config
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import ID_BITS, TOKEN, Dataset, open_dataset
from trainer.data.order.settings import train_order
from trainer.data.order.stream import Stream
from trainer.errors import ConfigError
from trainer.model import attention
from trainer.model.attention import VARLEN, Attention
from trainer.model.head import LossHead
from trainer.model.micro_batch import MicroBatch, Role
from trainer.model.packed import PackedModel
from trainer.plan.plan import make_plan
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS
from trainer.tuning.method import find_method, flagged
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.sft import NextTokens
from trainer.tuning.virtual_tokens import BesideBase
from trainer.tuning.virtual_tokens.layer import _apart, add_prefixes, add_prompt, keys_and_values

METHODS = methods_of(BesideBase)
P = 5


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("virtual"))


class WithOwnTokens(Dataset):
    """A data set with a column that has for each token the token itself."""

    @classmethod
    def of(cls, dataset: Dataset) -> "WithOwnTokens":
        record: Any = SimpleNamespace(dtype="<i4", per="token", shape=[])
        column: Any = SimpleNamespace(record=record)
        return cls(
            **{**{field.name: getattr(dataset, field.name) for field in fields(dataset)}, "columns": {"own": column}}
        )

    def _read_column(self, name: str, shard: int, blocks: list[int]) -> list[NDArray[Any]]:
        return [(np.frombuffer(part, TOKEN) & ID_BITS).astype(np.int32) for part in self._read_tokens(shard, blocks)]


def documents_of(workshop: Workshop, config: Config) -> dict[int, list[tuple[list[int], list[int], list[int]]]]:
    """Number of each document of the first epoch -> ids, labels and positions of each of its segments."""
    dataset = WithOwnTokens.of(open_dataset(workshop.store, workshop.prepare(config).train))
    stream, found = Stream(whole(dataset), train_order(config), 4, config.train.micro_batch, 0, 1, epochs=1), {}
    segments = config.data.segments(find_objective(config).formats)
    for batch, *more in stream.epoch(0):
        for each in (batch, *more):
            borders = each.input.cu_seqlens.tolist()
            assert torch.equal(each.columns["own"].values, each.input.input_ids[0]), "of the same token, and 0 of none"
            assert (
                borders[-1] == each.input.input_ids.shape[1] == config.train.micro_batch * train_order(config).capacity
            )
            spans = [(begin, end) for begin, end in zip(borders, borders[1:], strict=False)]
            kept = [span for span in spans if (each.labels[0, slice(*span)] != -100).any()]
            assert len(kept) == len(each.documents) * segments
            for index, number in enumerate(each.documents):
                own = kept[index * segments : (index + 1) * segments]
                rows = (each.input.input_ids[0], each.labels[0], each.input.position_ids[0])
                found[number] = [tuple(values[b:e].tolist() for values in rows) for b, e in own]
            assert each.tokens == sum(e - b for b, e in kept) - len(kept) * train_order(config).reserved
            assert len(each.segments(Role.REJECTED)) + len(each.segments(Role.MISMATCHED)) == (
                len(each.documents) if segments == 2 else 0
            )
            if config.data.format == "labelled":
                assert each.column("desired").tolist() == [number % 3 != 2 for number in each.documents]
                assert each.segments(Role.MISMATCHED).tolist() == [
                    first + 1 for first in each.segments(Role.DOCUMENT).tolist()
                ]
    return found


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("kind", ["documents", "pairs", "labelled", "apart"])
def test_every_segment_has_its_own_reserved_positions_and_its_tokens_and_targets_as_before(
    workshop: Workshop, kind: str, micro_batch: int
) -> None:
    settings = [f"train.micro_batch={micro_batch}"]
    if kind == "pairs":
        pairs = make_pairs(workshop.folder / "pairs.jsonl", 40)
        settings += [f"data.train=[{{path: {pairs}}}]", "data.format=preference"]
    if kind == "labelled":
        rows = make_labelled(workshop.folder / "labelled.jsonl", 40)
        settings += [f"data.train=[{{path: {rows}}}]", "data.format=labelled", "data.sequence_length=96"]
    if kind == "apart":
        settings += ["data.packing=false"]
    plain = workshop.config("plain", *settings)
    virtual = with_method(plain, "prompt")
    assert workshop.prepare(plain) == workshop.prepare(virtual)  # one compiled data set for both
    expected, found = documents_of(workshop, plain), documents_of(workshop, virtual)
    assert found.keys() == expected.keys()
    for number, segments in expected.items():
        for (ids, labels, _), (longer, more, positions) in zip(segments, found[number], strict=True):
            assert longer == [0] * P + ids
            assert more == [-100] * P + labels
            assert positions == list(range(P + len(ids)))


def with_method(config: Config, method: str, **settings: Any) -> Config:
    tuning = {"method": method, "virtual_tokens": P, **settings}
    return config.model_copy(update={"tuning": type(config.tuning).model_validate(tuning)})


def test_the_reserved_positions_are_part_of_the_orders_identity_and_of_no_other_order(workshop: Workshop) -> None:
    plain = workshop.config("plain")
    assert train_order(plain).to_json().keys() == {
        "version",
        "weights",
        "sequence_length",
        "packing",
        "seed",
        "fractions",
    }
    assert train_order(with_method(plain, "prompt")).to_json()["reserved"] == P


def mismatches(kind: str, *overrides: str, method: str = "prompt", **sizes: Any) -> list[str]:
    text = (
        "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}], sequence_length: 64}\ntrain: {steps:"
        " 10}\n"
    )
    config = parse_config(text, (f"tuning.method={method}", "tuning.virtual_tokens=5", *overrides))
    return tuning_misfits(config, read_architecture({**SIZES, **KINDS[kind], **sizes}))


@pytest.mark.parametrize("method", METHODS)
def test_what_leaves_no_room_before_a_documents_beginning_is_refused(method: str) -> None:
    assert mismatches("llama", method=method) == []
    assert mismatches("llama", "data.on_too_long=split", "data.format=text", method=method) == [
        "data.on_too_long: split makes documents that begin in the middle of a text, and tuning.method: "
        f"{method} puts its virtual tokens before a text's beginning. Set it to truncate, drop or fail."
    ]
    assert mismatches("llama", method=method, max_position_embeddings=69) == []
    assert mismatches("llama", method=method, max_position_embeddings=68) == [
        "tuning.virtual_tokens: 5 before 64 tokens (data.sequence_length) exceed the base's 68 positions (config.json)."
        " Lower one of them."
    ]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_text_has_the_positions_that_virtual_tokens_leave(method: str) -> None:
    virtual = find_method(Tuning(method=method, virtual_tokens=7)).virtual
    assert (virtual.longest(100), virtual.longest(None)) == (93, None)
    assert virtual.reserved == (7 if method == "prompt" else 0)
    assert find_method(Tuning()).virtual.longest(100) == 100


def test_a_window_that_is_shorter_than_a_row_is_refused_for_a_prompt() -> None:
    (sentence,) = mismatches("mistral", sliding_window=68)
    assert (
        sentence
        == "tuning.method: prompt needs every token to see its virtual tokens, and layers of this base see 68 tokens"
        " back only (a sliding window), fewer than the 69 of tuning.virtual_tokens and data.sequence_length. Lower"
        " these, or choose another method."
    )
    assert mismatches("mistral", sliding_window=69) == []


def test_a_prefix_refuses_every_window_and_kernels_that_take_no_keys_beside_a_rows_own() -> None:
    (sentence,) = mismatches("mistral", method="prefix", sliding_window=4096)
    assert (
        sentence
        == "tuning.method: prefix gives each layer keys and values that every token sees, and layers of this base see"
        " 4096 tokens back only (a sliding window). Choose another method, such as prompt or lora."
    )
    for kernel in ("eager", "flash_attention_2"):
        (sentence,) = mismatches("llama", f"model.attention={kernel}", method="prefix")
        assert (
            sentence
            == f"model.attention: {kernel} cannot run with tuning.method: prefix: it takes no keys and values beside"
            " those of a row's own tokens. Use auto."
        )
    for kind in ("gemma2", "gpt-oss"):  # whose attention only such kernels compute
        assert any("a sliding window" in sentence for sentence in mismatches(kind, method="prefix"))


def test_a_prefix_needs_the_same_keys_and_values_in_every_layer() -> None:
    def base(*layers: tuple[int, int | None, int | None]) -> Any:
        found = [SimpleNamespace(layer=layer, key_value_heads=heads, head_size=size) for layer, heads, size in layers]
        return SimpleNamespace(attention=found, layers=2)

    method = find_method(Tuning(method="prefix"))
    assert method.mismatches(base((0, 2, 8), (1, 2, 8))) == []
    for other in (base((0, 2, 8)), base((0, 2, 8), (1, None, 8)), base((0, 2, None), (1, 2, 8))):
        (sentence,) = method.mismatches(other)
        assert sentence.startswith("tuning.method: prefix needs keys and values of the same heads")


@pytest.mark.parametrize(("found", "tokens"), [([7, 8, 9], [7, 8, 9, 7, 8]), ([], None)])
def test_virtual_tokens_start_from_a_text_again_and_again(
    found: list[int], tokens: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: lambda text: {"input_ids": found}
    )
    method: Any = find_method(
        Tuning.model_validate({"method": "prompt", "virtual_tokens": 5, "init_text": "Be brief."})
    )
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10))
    model: Any = SimpleNamespace(config=config, name_or_path="/models/small")
    if tokens is None:
        with pytest.raises(ConfigError, match=r"tuning.init_text: the base's tokenizer makes no token of it"):
            method.first_tokens(model, 3)
    else:
        assert method.first_tokens(model, 3).tolist() == tokens
    drawn: Any = find_method(Tuning.model_validate({"method": "prompt", "virtual_tokens": 500}))
    assert set(drawn.first_tokens(model, 3).tolist()) == set(range(10))
    assert drawn.first_tokens(model, 3).tolist() == drawn.first_tokens(model, 3).tolist()
    assert drawn.first_tokens(model, 3).tolist() != drawn.first_tokens(model, 4).tolist()


def test_pefts_prefix_has_the_layers_by_their_numbers_and_keys_before_values() -> None:
    method = find_method(Tuning.model_validate({"method": "prefix", "virtual_tokens": 3}))
    each = {layer: torch.arange(12.0).view(2, 1, 3, 2) + 100 * layer for layer in (11, 0, *range(1, 11))}
    weights = {f"model.layers.{layer}.self_attn.prefix": values for layer, values in each.items()}
    files = method.export(weights, Model(base="/m")).files
    (matrix,) = load(files[PEFT_WEIGHTS]).values()
    assert matrix.shape == (3, 12 * 2 * 1 * 2)
    assert matrix[0].view(12, 4).tolist() == [[100 * layer + part for part in (0, 1, 6, 7)] for layer in range(12)]
    assert matrix[2, :4].tolist() == [4, 5, 10, 11]
    said = json.loads(files[PEFT_SETTINGS])
    assert (said["num_virtual_tokens"], said["num_layers"], said["num_attention_heads"], said["token_dim"]) == (
        3,
        12,
        1,
        2,
    )


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_other_methods_are_refused_and_the_start_is_part_of_the_identity(method: str) -> None:
    config = with_method(
        parse_config("run: {name: x}\nmodel: {base: x}\ndata: {train: [{path: x}]}\ntrain: {steps: 1}"), method
    )
    assert find_method(config.tuning).identity == {"method": method, "virtual_tokens": P}
    said = with_method(config, method, init_text="Hi")
    assert find_method(said.tuning).identity == {"method": method, "virtual_tokens": P, "init_text": "Hi"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_that_is_read_in_config_json_is_that_of_transformers(kind: str) -> None:
    for given in (
        {},
        {"sliding_window": 24},
        {"sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": 0},
    ):
        settings = {"num_experts_per_tok": 2, **SIZES, **KINDS[kind], **given}
        config: Any = AutoConfig.for_model(**settings)
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        expected = getattr(config, "sliding_window", None) if slides else None
        assert read_architecture(settings).sliding_window == (
            None if kind in ("llama", "llama-tied", "ragged", "speck") else expected
        )


def test_plan_counts_the_positions_of_virtual_tokens() -> None:
    plain = load_config(
        EXAMPLES / "8b-prompt.yaml", ("tuning.method=lora", "tuning.virtual_tokens=20", "tuning.init_text=null")
    )
    ours = load_config(EXAMPLES / "8b-prompt.yaml")
    pairs = load_config(EXAMPLES / "8b-prompt.yaml", ("data.format=preference", "objective.name=orpo"))
    plans = [make_plan(config, describe(LLAMA_8B, None), 1, 1, None) for config in (plain, ours, pairs)]
    assert [plan.batch.tokens for plan in plans] == [16 * 4096, 16 * (4096 + 100), 16 * (4096 + 200)]
    activations = [plan.memory_per_gpu.activations for plan in plans]
    assert activations == [activations[0] * (4096 + more) // 4096 for more in (0, 100, 200)]
    assert plans[1].checkpoint_bytes == 12 * 100 * 4096
    prefix = make_plan(load_config(EXAMPLES / "8b-prefix.yaml"), describe(LLAMA_8B, None), 1, 1, None)
    assert prefix.batch.tokens == 16 * 4096
    assert prefix.checkpoint_bytes == 12 * 32 * 2 * 8 * 50 * 128


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    **_: Any,
) -> Tensor:
    """PyTorch's kernel for GPUs in plain operations: documents one at a time, each causal from its last token
    backwards.
    """
    out = []
    for n in range(len(cu_q) - 1):
        q, k, v = query[cu_q[n] : cu_q[n + 1]], key[cu_k[n] : cu_k[n + 1]], value[cu_k[n] : cu_k[n + 1]]
        assert len(q) <= max_q
        assert len(k) <= max_k
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(params=["sdpa", "varlen"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """SDPA, and the varlen kernel's own path with slow products in the place of the GPU's."""
    if request.param == "sdpa":
        return Attention("sdpa", "")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    AttentionInterface.register(VARLEN, attention.varlen_attention)
    AttentionMaskInterface.register(VARLEN, attention.no_mask)
    return Attention(VARLEN, "")


def model_of(kernel: Attention, kind: str) -> PackedModel:
    torch.manual_seed(7)
    settings = {"tie_word_embeddings": False, **SIZES, **KINDS[kind]}
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**settings),
        dtype=torch.float32,
        attn_implementation=kernel.name,
        experts_implementation="eager",
    )
    head = LossHead(model.lm_head.in_features, model.lm_head.out_features, bias=False, device="meta")
    head.weight = model.lm_head.weight
    model.lm_head = head
    return PackedModel(model.requires_grad_(False), kernel)


def with_virtual_tokens(packed: PackedModel, method: str) -> tuple[PackedModel, list[nn.Parameter], list[Any]]:
    """The model with virtual tokens of random numbers, these, and the modules that can switch them off."""
    torch.manual_seed(8)
    if method == "prefix":
        layers: list[Any] = [layer.self_attn for layer in packed.model.model.layers]
        add_prefixes(
            packed.model, layers, [torch.randn(2, SIZES["num_key_value_heads"], P, layers[0].head_dim) for _ in layers]
        )
        return packed, [layer.prefix for layer in layers], layers
    prompt = add_prompt(packed.model, torch.randn(P, SIZES["hidden_size"]))
    return PackedModel(packed.model, packed.attention, P), [prompt.weight], [prompt]


def reserved(documents: list[Tensor], trained: list[bool], positions: int, padding: int) -> MicroBatch:
    before = torch.zeros(positions, dtype=torch.int64)
    batch = row([torch.cat([before, document]) for document in documents], trained, padding)
    for begin in batch.input.cu_seqlens.tolist()[:-1]:
        batch.labels[0, begin : begin + positions] = -100
    return batch


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3-moe", marks=pytest.mark.long)])
@pytest.mark.parametrize("method", METHODS)
def test_documents_see_their_own_virtual_tokens_and_no_other_document(
    kernel: Attention, method: str, kind: str
) -> None:
    """In losses and gradients; and the base's own losses where they are switched off."""
    base = model_of(kernel, kind)
    torch.manual_seed(9)
    one, other, ours = (torch.randint(3, SIZES["vocab_size"], (length,)) for length in (23, 23, 3))
    plain = [float(NextTokens().loss(base, row([document], [True]))) for document in (one, ours)]
    packed, learnt, switches = with_virtual_tokens(base, method)

    def loss_and_gradients(documents: list[Tensor], trained: list[bool], padding: int = 0) -> list[Tensor]:
        packed.model.zero_grad()
        loss = NextTokens().loss(packed, reserved(documents, trained, packed.reserved, padding))
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in learnt if parameter.grad is not None)]

    together = loss_and_gradients([one, ours], [True, True], padding=11)
    alone = [loss_and_gradients([document], [True]) for document in (one, ours)]
    for packed_value, *values in zip(together, *alone, strict=True):
        torch.testing.assert_close(packed_value, values[0] + values[1], rtol=1e-5, atol=1e-5)
    before, after = (loss_and_gradients([first, ours], [False, True]) for first in (one, other))
    for value, same in zip(before, after, strict=True):
        torch.testing.assert_close(value, same, rtol=1e-6, atol=1e-7)
    broken = reserved(
        [torch.cat([one, torch.zeros(packed.reserved, dtype=torch.int64), ours])], [True], packed.reserved, 0
    )
    broken.labels[0, : -len(ours)] = -100
    with torch.no_grad():
        broken_loss = float(NextTokens().loss(packed, broken))
    assert abs(broken_loss / float(before[0]) - 1) > 1e-3, "the check would see a broken border"

    with torch.no_grad(), flagged(switches, "active" if method == "prompt" else "attends_to_prefix", False):
        off = NextTokens().loss(packed, reserved([one, ours], [True, True], packed.reserved, 2))
    assert float(off) == pytest.approx(sum(plain), rel=1e-5)
    assert abs(float(together[0]) / float(off) - 1) > 1e-3


def test_a_document_that_is_shorter_than_the_prompt_ends_where_it_did() -> None:
    assert _apart(torch.tensor([0, 9, 12]), 5).tolist() == [0, 5, 9, 12, 12]


def test_a_prefix_begins_as_the_keys_and_values_of_a_text_without_dropout_and_training_goes_on() -> None:
    sizes = {**SIZES, **KINDS["llama"], "attention_dropout": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), attn_implementation="sdpa")
    tokens = torch.tensor([3, 7, 5])
    found = keys_and_values(model.train(), tokens)
    assert model.training
    with torch.no_grad():
        cache = model.eval()(tokens[None], use_cache=True).past_key_values
    assert len(found) == sizes["num_hidden_layers"] == len(cache.layers)
    for ours, layer in zip(found, cache.layers, strict=True):
        torch.testing.assert_close(ours, torch.stack([layer.keys[0], layer.values[0]]))
