"""Packed documents do not see each other in any layer of any family: those that transformers keeps apart itself, and
those that only trainer/model/documents.py does."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import varlen
from torch.utils.checkpoint import CheckpointError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.nemotron_h import modeling_nemotron_h

from tests.families import FAMILIES, QUICK, SIZES, rows
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.meta import _Reader
from trainer.model.attention import FLEX, SINKS, VARLEN, Attention, choose_attention, no_mask, varlen_attention
from trainer.model.documents import (
    _with_borders,
    keep_documents_apart,
    knows_borders,
    mixers,
    recomputed,
    sdpa_mask_of_row,
)
from trainer.model.kernels.attention import FLASH, unable
from trainer.model.kernels.flex import block_mask_of_row, flex_attention_capped
from trainer.model.parts import body
from trainer.model.rows.row import (
    AtWork,
    Documents,
    _Known,
    batches,
    described,
    lengths_known,
    of_all_tokens,
    set_documents_apart,
)

_LATENT = {
    key: FAMILIES["deepseek-v3"][key]
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}
_INDEXED = {
    "num_key_value_heads": 4,
    "index_n_heads": 32,
    "index_head_dim": 12,
    "index_topk": 5,
    "first_k_dense_replace": 2,
}
# Layers that none of the other families has.
KINDS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "afmoe": {
        "model_type": "afmoe",
        "num_dense_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    # Every token sees but a few keys, which a layer of its own picks.
    "deepseek-v32": {"model_type": "deepseek_v32", **_LATENT, **_INDEXED},
    # Some keys are those of whole stretches of tokens.
    "deepseek-v4": {
        "model_type": "deepseek_v4",
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
    },
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    # Linear attention without a convolution.
    "minimax": {"model_type": "minimax", "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 3},
}
LENGTHS = (23, 30, 11, 1)  # of the row's documents: longer than the windows and the chunks of the bases
A = LENGTHS[0]
# The kernels that would compute something else than a base's own attention.
# Latent attention has heads wider than flash_attention_4 takes.
_LATENT = ("deepseek-v2", "deepseek-v3", "glm4-moe-lite", "kimi-linear")
UNABLE = {
    **{kind: {"flash_attention_4"} for kind in _LATENT},
    "deepseek-v32": {*FLASH, "varlen"},
    "deepseek-v4": {*FLASH, "varlen", "sdpa"},
    "gemma2": {"flash_attention_4", "varlen", "sdpa"},
    "gpt-oss": {*FLASH, "varlen"},
    "llama4": {*FLASH, "varlen"},
    "mimo-v2-flash": {*FLASH, "varlen"},
}
# The families that need flex_attention, for caps or sinks, and for which alone it is.
NEED_FLEX = {"gemma2", "gpt-oss", "mimo-v2-flash"}
# Families whose documents transformers alone, with position_ids, lets see each other.
LEAKING = (
    "afmoe",
    "deepseek-v4",
    "gpt-oss",
    "granitemoe-hybrid",
    "kimi-linear",
    "lfm2",
    "minimax",
    "nemotron-h",
    "qwen3-next",
    "qwen3_5",
    "qwen3_5-moe",
)
# The layers that take documents in batches, where a base has any: the paths in the decoder.
IN_BATCHES = {
    "deepseek-v4": ["layers.0.self_attn", "layers.1.self_attn"],
    "granitemoe-hybrid": ["layers.0.mamba"],
    "kimi-linear": ["layers.0.self_attn", "layers.1.self_attn"],
    "lfm2": ["layers.0.conv"],
    "llama4": ["layers.2.self_attn"],
    "minimax": ["layers.0.self_attn"],
    "nemotron-h": ["layers.0.mixer"],
    "qwen3-next": ["layers.0.linear_attn", "layers.2.linear_attn"],
    "qwen3_5": ["layers.0.linear_attn"],
    "qwen3_5-moe": ["layers.0.linear_attn"],
}


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def flex() -> None:
    """As a GPU's rank registers it, where a base needs it."""
    AttentionInterface.register(FLEX, flex_attention_capped)
    AttentionMaskInterface.register(FLEX, block_mask_of_row)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small products are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind: str, kernel: str = "eager", apart: bool = True) -> Any:
    torch.manual_seed(7)
    config = AutoConfig.for_model(**settings(kind))
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=kernel, experts_implementation="eager"
    )
    if apart:
        keep_documents_apart(model)
    return model.eval()


def settings(kind: str) -> dict[str, Any]:
    return {"tie_word_embeddings": False, **SIZES, **KINDS[kind]}


def hidden(model: Any, ids: Tensor, lengths: tuple[int, ...] = LENGTHS, **given: Any) -> Tensor:
    """(T, H) of one row of documents."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return model.model(input_ids=ids, position_ids=positions, use_cache=False, **given).last_hidden_state[0]


def of_two_answers(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The third document, which goes on from the first tokens of the second one; as it is in the row, and behind a copy
    of them.
    """
    _, prompt, answer, _ = ids.split(LENGTHS, dim=1)
    shared, begin = prompt.shape[1] - 3, A + LENGTHS[1]
    prefixes = ((0, 0), (0, 0), (A, shared), (0, 0))
    begins = (tokens for _, tokens in prefixes)
    positions = torch.cat([torch.arange(b, b + length) for b, length in zip(begins, LENGTHS, strict=True)])[None]
    with lengths_known(LENGTHS, prefixes=prefixes):
        found = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    alone = torch.cat([prompt[:, :shared], answer], dim=1)
    return found[begin : begin + LENGTHS[2]], hidden(model, alone, (alone.shape[1],))[shared:]


def row(seed: int = 1) -> tuple[Tensor, Tensor]:
    """A row of random tokens, and the same row with another first document."""
    draw = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(3, SIZES["vocab_size"], (1, sum(LENGTHS)), generator=draw) for _ in range(2))
    return one, torch.cat([other[:, :A], one[:, A:]], dim=1)


def close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of additions, which a matrix product or an expert may choose by how many rows it has."""
    return float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("kind", rows(KINDS, [*QUICK, *(KINDS.keys() - FAMILIES.keys())]))
@torch.no_grad()
def test_a_document_is_what_it_is_alone_whatever_else_is_in_the_row(kind: str) -> None:
    """With every kernel that computes the base's attention on a CPU; all give the same."""
    facts, found = read_architecture(settings(kind)), list[Tensor]()
    assert facts.isolates_documents
    # Lightning indexers pick keys by scores of all tokens, outside of the attention function.
    assert (facts.fails_shared is None) == (kind != "deepseek-v32")
    assert (facts.fails_prefix is None) == (kind not in IN_BATCHES)
    assert unable(facts.attention_needs).keys() - {"flex_attention"} == UNABLE.get(kind, set())
    assert ("flex_attention" not in unable(facts.attention_needs)) == (kind in NEED_FLEX)
    kernels = [
        choose_attention(kernel, CPU, torch.float32, facts.attention_needs).name
        for kernel in {"sdpa", "eager"} - unable(facts.attention_needs).keys()
    ]
    # PyTorch computes flex_attention on a CPU too, without gradients.
    for kernel in [*kernels, *([FLEX] if kind in NEED_FLEX else [])]:
        model = build(kind, kernel)
        one, other = row()
        packed, changed = hidden(model, one), hidden(model, other)
        assert not close(changed[:A], packed[:A])
        assert close(changed[A:], packed[A:])
        alone = [hidden(model, document, (document.shape[1],)) for document in one.split(LENGTHS, dim=1)]
        assert close(packed, torch.cat(alone))
        if facts.fails_prefix is None:
            assert close(*of_two_answers(model, one))
        found.append(packed)
    assert all(close(found[0], other) for other in found[1:])


def test_sdpa_with_sinks_has_eager_attentions_gradients() -> None:
    choose_attention("sdpa", torch.device("cpu"), torch.float32, read_architecture(settings("gpt-oss")).attention_needs)
    gradients = list[dict[str, Tensor]]()
    for kernel in ("eager", SINKS):
        model = build("gpt-oss", kernel)
        _loss(hidden(model, row()[0])).backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    eager, ours = gradients
    assert eager.keys() == ours.keys()
    assert any("sinks" in name and gradient.any() for name, gradient in ours.items())
    for name, gradient in eager.items():
        assert float((ours[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@torch.no_grad()
def test_sdpa_computes_each_document_without_a_mask_unless_a_window_is_narrower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, masks = functional.scaled_dot_product_attention, list[Tensor | None]()

    def spied(*arguments: Any, attn_mask: Tensor | None = None, **given: Any) -> Tensor:
        masks.append(attn_mask)
        return plain(*arguments, attn_mask=attn_mask, **given)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spied)
    for kind, masked in (("llama", False), ("qwen3-next", False), ("mistral", True)):
        hidden(build(kind, "sdpa"), row()[0])
        assert {mask is not None for mask in masks} == {masked}, kind
        masks.clear()


@pytest.mark.parametrize("kind", LEAKING)
@torch.no_grad()
def test_the_control_without_us_it_is_not(kind: str) -> None:
    model = build(kind, apart=False)
    one, other = row()
    assert not close(hidden(model, other)[A:], hidden(model, one)[A:])


@pytest.mark.parametrize("kind", ["gemma3", "deepseek-v32", *IN_BATCHES])
def test_layers_that_know_no_borders_are_found_by_what_they_are(kind: str) -> None:
    model = build(kind, apart=False)
    every = {id(module): path for path, module in model.model.named_modules()}
    found = [every[id(mixer)] for mixer in mixers(model) if not knows_borders(mixer)]
    assert found == IN_BATCHES.get(kind, [])


@pytest.mark.parametrize("kind", ["gpt-oss", "kimi-linear", "llama4", "nemotron-h", "qwen3-next"])
def test_gradients_are_the_sum_of_those_of_the_documents_alone_also_when_layers_are_recomputed(kind: str) -> None:
    """Both rows are forward before either is backward, as with the two passes of a preference loss."""
    rows = [(row(seed)[0], lengths) for seed, lengths in ((3, LENGTHS), (4, (11, 54)))]
    alone = build(kind, apart=False)
    for ids, lengths in rows:
        for document in ids.split(lengths, dim=1):
            _loss(hidden(alone, document, (document.shape[1],))).backward()
    wanted = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.grad is not None}
    for again in (recomputed, None):
        model = build(kind).train()
        given = {"use_reentrant": False, **({"context_fn": again} if again else {})}
        model.activation_checkpointing_enable(given)
        losses = [_loss(hidden(model, ids, lengths)) for ids, lengths in rows]
        right = True
        try:
            for loss in losses:
                loss.backward()
        except CheckpointError:  # torch sees that other shapes are computed than before
            right = False
        right = right and all(
            parameter.grad is None or float((parameter.grad - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm())
            for name, parameter in model.named_parameters()
        )
        assert right == (again is not None or kind not in IN_BATCHES), "the control: layers forget their row"


def _loss(states: Tensor) -> Tensor:
    """The sum over tokens of something that is not the same for all of a state's elements."""
    return (states * torch.linspace(-1, 1, states.shape[1])).tanh().sum()


@pytest.mark.parametrize(("kind", "fails"), [("yarn", False), ("dynamic", True), ("longrope", True)])
def test_frequencies_that_follow_from_the_longest_position_are_not_shared(kind: str, fails: bool) -> None:
    for rotary in ({"rope_type": kind}, {"full_attention": {"rope_type": kind}, "sliding_attention": {}}):
        reader = _Reader(*[cast(Any, SimpleNamespace(rope_parameters=rotary))] * 4)
        found = reader._fails_shared(cast(Any, SimpleNamespace(fails_shared=None)))
        assert (found is not None and f"rope_type: {kind}" in found) is fails


@torch.no_grad()
def test_a_base_that_takes_no_positions_computes_one_document_with_padding_behind_it() -> None:
    bloom = {"model_type": "bloom", "n_layer": 2, "n_head": 4, **SIZES}
    assert not read_architecture(bloom).isolates_documents
    assert read_architecture(bloom).fails_shared == "a small model of its kind predicts otherwise then"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**bloom), dtype=torch.float32).eval()
    keep_documents_apart(model)
    tokens, positions = row()[0], torch.cat([torch.arange(A), torch.arange(sum(LENGTHS) - A)])[None]
    padded = body(model)(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[0]
    alone = body(model)(input_ids=tokens[:, :A], position_ids=positions[:, :A], use_cache=False).last_hidden_state[0]
    assert close(padded[:A], alone)


def test_documents_of_like_length_share_a_batch() -> None:
    assert batches([5]) == [[0]]
    assert batches([23, 30, 11, 1]) == [[1, 0], [2], [3]]
    assert batches([7, 100, 8, 75, 74]) == [[1, 3], [4], [2, 0]]
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 500, (int(torch.randint(1, 40, (), generator=draw)),), generator=draw).tolist()
        found = batches(lengths)
        assert sorted(document for batch in found for document in batch) == list(range(len(lengths)))
        assert sum(len(batch) * lengths[batch[0]] for batch in found) <= 4 / 3 * sum(lengths)


@torch.no_grad()
def test_borders_that_other_layers_need_do_not_reach_a_layer_that_takes_batches() -> None:
    """transformers refuses them where flash-linear-attention is not installed."""
    one, _ = row()
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        hidden(build("qwen3-next", apart=False), one, cu_seq_lens_q=borders)
    model = build("qwen3-next")
    assert torch.equal(hidden(model, one, cu_seq_lens_q=borders), hidden(model, one))


def test_projections_are_called_where_mamba_ssm_would_take_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed weight is no matrix, and an adapter beside a weight is not in it."""

    def fused(*_arguments: Any, **_given: Any) -> Any:
        raise AssertionError("the kernel that projects too")

    monkeypatch.setattr(modeling_nemotron_h, "mamba2_split_conv1d_scan_combined", fused)
    one, _ = row()
    with pytest.raises(AssertionError, match="projects too"):
        hidden(build("nemotron-h", apart=False).train(), one)
    model = build("nemotron-h").train()
    states = hidden(model, one)
    assert all(module.training for module in model.modules())
    assert torch.equal(states, hidden(model.eval(), one))


@pytest.mark.parametrize("kind", rows(KINDS, [*QUICK, *(KINDS.keys() - FAMILIES.keys())]))
@torch.no_grad()
def test_cu_seqlens_reach_the_attention_of_every_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's varlen kernel, in plain operations here, as it takes no tensors on a CPU."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, no_mask)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model, (one, _) = build(kind, VARLEN), row()
    given = Attention(VARLEN, "").arguments(torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS))
    if "varlen" in UNABLE.get(kind, ()):
        with pytest.raises((AssertionError, TypeError)):  # the control: that kernel is not taken for this base
            hidden(model, one, **given)
    else:
        assert close(hidden(model, one, **given), hidden(build(kind), one))


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, keys: Tensor, _longest: int, _most: int, **given: Any
) -> Tensor:
    """PyTorch's varlen_attn in plain operations, as it takes no tensors on a CPU: (T, heads, size) each."""
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert torch.equal(borders, keys)
    (left, right), results = given["window_size"], []
    for begin, end in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        parts = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (back >= -right) & ((back <= left) if left >= 0 else True)
        attended = functional.scaled_dot_product_attention(
            *parts, attn_mask=seen, scale=given["scale"], enable_gqa=given["enable_gqa"]
        )
        results.append(attended.transpose(0, 1))
    return torch.cat(results)


varlen_attn.__signature__ = inspect.signature(varlen.varlen_attn)  # type: ignore[attr-defined]


def test_the_first_tokens_of_each_document_are_one_of_their_own() -> None:
    """Virtual tokens are; a document may have no others, and padding fewer."""
    with lengths_known((5, 2, 3, 1)):
        set_documents_apart(2)
        assert described(torch.arange(11)[None], False).lengths == [2, 3, 2, 2, 1, 1]
    assert described(torch.tensor([[0, 1, 2, 0, 1]]), False).lengths == [3, 2], "of no other row"


class _Same:
    """Peers that have the same tokens as this rank."""

    size, part = 2, 1

    def swap(self, pieces: Tensor) -> Tensor:
        assert not pieces.is_complex(), "NCCL sends no complex values"
        return pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_all_tokens_of_a_row_are_those_of_each_rank_in_order(dtype: torch.dtype) -> None:
    mine, same = torch.randn(1, 3, 4, dtype=dtype), _Same()
    assert torch.equal(of_all_tokens(mine, same), torch.cat([mine, mine], 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mask_that_a_class_left_out_before_its_body_has_the_borders_of_the_row(ranks: int) -> None:
    """A class that sees makes masks by kinds of layers, and leaves out one that is plainly causal."""
    lengths = (4, 2)
    tokens = 6 // ranks
    positions, states = torch.arange(tokens)[None], torch.zeros(1, tokens, 8)
    peers: Any = object() if ranks > 1 else None
    of_windows = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    made: dict[str, Any] = {"full_attention": None, "sliding_attention": of_windows}
    row = Documents(positions, _Known(lengths, peers))
    found = _with_borders(made, row, states)
    assert found["sliding_attention"] is of_windows
    assert torch.equal(
        found["full_attention"][0, 0], torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    )
    assert not row.unmasked
    told = Documents(positions, _Known(lengths, peers), are_told=True)
    assert _with_borders(made, told, states)["full_attention"] is None
    assert told.unmasked, "its layers compute the documents one by one"
    whole = {"sliding_attention": of_windows}
    assert _with_borders(whole, row, states) is whole


def test_a_mask_that_somebody_gives_is_left_out_of_no_row() -> None:
    """Layers that compute document by document see none, so a token that is masked would be seen."""
    seen = torch.tensor([[True, True, False, True, True, True]])
    for given, unmasked in ((None, True), (seen, False)):
        row = Documents(torch.tensor([[0, 1, 2, 3, 0, 1]]), _Known((4, 2)), are_told=True)
        with AtWork(row):
            found = sdpa_mask_of_row(batch_size=1, q_length=6, kv_length=6, attention_mask=given)
        assert (found is None, row.unmasked) == (unmasked, unmasked)
        if found is not None:
            borders = torch.block_diag(*(torch.ones(length, length).tril() for length in (4, 2))).bool()
            assert torch.equal(found[0, 0], borders & seen)


def test_borders_of_kept_keys_are_told_to_the_kernel_that_heeds_them() -> None:
    tokens, keys = torch.tensor([0, 1]), torch.tensor([0, 9])
    told = {name: Attention(name, "").arguments(tokens, 1, (keys, 9)) for name in (VARLEN, *FLASH, "sdpa")}
    assert told.pop(VARLEN) == {"cu_seq_lens_q": tokens, "cu_seq_lens_k": keys, "max_length_q": 1, "max_length_k": 9}
    assert set(map(len, told.values())) == {0}
    assert Attention(FLASH[0], "").arguments(tokens, 1)["max_length_k"] == 1
