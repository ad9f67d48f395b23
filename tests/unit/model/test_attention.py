"""Packed documents do not see each other, in every attention kernel that this machine has."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.material import KINDS, SIZES
from trainer.base.architecture import Architecture, AttentionLayer
from trainer.base.describe.architecture_cache import read_architecture
from trainer.data.order.settings import Position
from trainer.errors import ConfigError
from trainer.model.attention import SINKS, choose_attention
from trainer.model.documents import keep_documents_apart
from trainer.model.head import IGNORE, LossHead
from trainer.model.kernels.attention import (
    FLASH,
    KERNELS,
    kernels_without_masks,
    kernels_without_pictures,
    unable,
    unavailable,
    uncountable,
    uncountable_mixing,
)
from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
from trainer.model.packed import PackedModel
from trainer.tuning.objective.sft import NextTokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP32 = torch.bfloat16, torch.float32
# The kernels that can run here, each with every dtype that it can run in.
CAPABILITY = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
HERE = [
    (kernel.name, dtype)
    for dtype in (BF16, FP32)
    for kernel in KERNELS
    if kernel.name not in unavailable(CAPABILITY, dtype == BF16)
]
A, B, PADDING = 23, 30, 11  # tokens of two documents and of the padding behind them


# On a CPU; on a GPU there are other kernels, and all of them are quick.
QUICK = [
    ("eager", FP32, "gemma2"),
    *(("sdpa", FP32, kind) for kind in ("llama", "mistral", "qwen3-moe", "gpt-oss")),
    ("sdpa", BF16, "llama"),
]


@pytest.fixture(
    params=[
        pytest.param(
            (kernel, dtype, kind),
            marks=pytest.mark.long if DEVICE.type == "cpu" and (kernel, dtype, kind) not in QUICK else (),
        )
        for kernel, dtype in HERE
        for kind in (
            ("llama", "gemma2", "gpt-oss")
            if kernel == "eager"
            else ("gemma2", "gpt-oss")
            if kernel == "flex_attention"
            else ("llama", "mistral", "phi3", "gemma3", "qwen3-moe", *(["gpt-oss"] if kernel == "sdpa" else []))
        )
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def model(request: pytest.FixtureRequest) -> PackedModel:
    """A small model behind the kernel; mistral's and phi3's windows are shorter than the documents."""
    kernel, dtype, kind = request.param
    attention = choose_attention(kernel, DEVICE, dtype, architecture(kind).attention_needs)
    torch.manual_seed(7)
    config = AutoConfig.for_model(**{"tie_word_embeddings": False, **SIZES, **KINDS[kind]})
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention.name, experts_implementation="eager"
    )
    head = LossHead(model.lm_head.in_features, model.lm_head.out_features, bias=False, device="meta")
    head.weight = model.lm_head.weight.requires_grad_(False)
    model.lm_head = head
    keep_documents_apart(model)
    return PackedModel(model.to(DEVICE), attention)


def architecture(kind: str) -> Architecture:
    return read_architecture({**SIZES, **KINDS[kind]})


def tolerance(model: PackedModel) -> float:
    """The relative tolerance of a sum of losses: kernels add in another order for another row length."""
    return 1e-5 if next(model.model.parameters()).dtype == FP32 else 1e-2


def row(documents: list[Tensor], trained: list[bool], padding: int = 0) -> MicroBatch:
    """Documents end to end, as the stream packs them; `trained[i]` says whether document i has targets."""
    tokens = torch.cat([*documents, torch.zeros(padding, dtype=torch.int64)])
    labels = torch.full_like(tokens, IGNORE)
    lengths = [len(document) for document in documents] + ([padding] if padding else [])
    begin = 0
    for document, wanted in zip(documents, trained, strict=True):
        if wanted:
            labels[begin : begin + len(document) - 1] = document[1:]
        begin += len(document)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return MicroBatch(
        ModelInput.of(tokens[None], positions[None], Segments.of_documents(lengths)),
        labels=labels[None],
        tokens=begin,
        targets=int((labels != IGNORE).sum()),
        bins=(Position(),),
        documents=tuple(range(len(documents))),
    ).to(DEVICE)


def documents(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, SIZES["vocab_size"], (length,), generator=generator) for length in (A, B))  # type: ignore[return-value]


def nats(model: PackedModel, batch: MicroBatch) -> Tensor:
    return NextTokens().loss(model, batch)


def loss_and_gradients(model: PackedModel, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.model.zero_grad()
    loss = nats(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


def same(one: Tensor, other: Tensor, mixture: bool) -> bool:
    """Bit for bit on a CPU; a GPU's kernels may add gradients in another order each time, and an expert's products have
    as many rows as the whole row sends to it."""
    if DEVICE.type == "cpu" and not mixture:
        return torch.equal(one, other)
    return float((one.double() - other.double()).norm()) <= 1e-3 * float(other.double().norm())


def test_another_document_in_the_row_changes_neither_loss_nor_gradients(model: PackedModel) -> None:
    before, ours = documents(1)
    other, _ = documents(2)
    assert not torch.equal(before, other)
    for order in (lambda them: [them, ours], lambda them: [ours, them]):
        trained = [document is ours for document in order(before)]
        loss, gradients = loss_and_gradients(model, row(order(before), trained, PADDING))
        changed_loss, changed_gradients = loss_and_gradients(model, row(order(other), trained, PADDING))
        mixture = hasattr(model.model.config, "num_experts_per_tok")
        assert same(loss, changed_loss, mixture)
        assert gradients.keys() == changed_gradients.keys()
        assert [name for name in gradients if not same(gradients[name], changed_gradients[name], mixture)] == []


def test_a_documents_own_tokens_do_change_its_loss(model: PackedModel) -> None:
    one, ours = documents(1)
    changed = ours.clone()
    changed[0] = (changed[0] + 1).remainder(SIZES["vocab_size"])
    assert not torch.equal(
        nats(model, row([one, ours], [False, True])), nats(model, row([one, changed], [False, True]))
    )


def test_a_packed_rows_loss_is_the_sum_of_its_documents_alone(model: PackedModel) -> None:
    first, second = documents(3)
    packed, gradients = loss_and_gradients(model, row([first, second], [True, True], PADDING))
    alone = [loss_and_gradients(model, row([document], [True])) for document in (first, second)]
    assert float(packed) == pytest.approx(sum(float(loss) for loss, _ in alone), rel=tolerance(model))
    for name, gradient in gradients.items():
        together = sum(own[name].double() for _, own in alone)
        assert isinstance(together, Tensor)
        assert float((gradient.double() - together).norm() / together.norm()) < 3 * tolerance(model), name


def test_a_row_of_padding_alone_has_no_loss_and_no_gradient(model: PackedModel) -> None:
    loss, gradients = loss_and_gradients(model, row([], [], padding=A + B))
    assert float(loss) == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


def test_auto_takes_the_fastest_kernel_and_says_why() -> None:
    chosen = choose_attention("auto", torch.device("cpu"), BF16, architecture("llama").attention_needs)
    assert chosen.name == "sdpa"
    assert chosen.why == f"no {', '.join(FLASH)}, varlen: it needs a CUDA device"


def test_a_kernel_that_would_change_the_base_is_refused() -> None:
    capping, sinking = (architecture(kind).attention_needs for kind in ("gemma2", "gpt-oss"))
    assert choose_attention("auto", torch.device("cpu"), BF16, capping).name == "eager"
    with pytest.raises(ConfigError, match="'sdpa' cannot run here: it does not cap attention logits"):
        choose_attention("sdpa", torch.device("cpu"), BF16, capping)
    assert "flash_attention_2" not in unable(capping)
    assert choose_attention("auto", torch.device("cpu"), BF16, sinking).name == SINKS
    for kernel in ("flash_attention_2", "varlen"):
        assert unable(sinking)[kernel] == "it has no attention sinks, and this base needs them"
        assert unable(replace(sinking, supports_flash=False, has_sinks=False))[kernel].startswith("it takes no mask")
    wide = replace(architecture("llama"), attention=(AttentionLayer("model.layers.0.self_attn", 0, 2, 512),))
    assert unable(wide.attention_needs)["varlen"] == "it takes heads of up to 256, and this base has some of 512"


def test_a_kernel_that_the_runs_method_or_its_rows_cannot_have_is_not_taken() -> None:
    needs, cpu = architecture("llama").attention_needs, torch.device("cpu")
    refused = {"sdpa": "the method needs another"}
    assert choose_attention("auto", cpu, BF16, needs, refused).name == "eager"
    with pytest.raises(ConfigError, match="'sdpa' cannot run here: the method needs another. Use auto."):
        choose_attention("sdpa", cpu, BF16, needs, refused)
    for masked, why in (
        (False, "it has nothing that this base needs and sdpa lacks"),
        (True, "it needs a CUDA device"),
    ):
        with pytest.raises(ConfigError, match=f"'flex_attention' cannot run here: {why}. Use auto."):
            choose_attention("flex_attention", cpu, BF16, needs, masked=masked)
    wide = replace(needs, supports_sdpa=False)
    assert choose_attention("auto", cpu, BF16, wide).name == "eager"
    assert set(kernels_without_masks(True)) == {*FLASH, "varlen"}
    assert set(kernels_without_pictures(True)) == {*FLASH, "varlen", "flex_attention"}
    assert kernels_without_masks(False) == kernels_without_pictures(False) == {}


def test_a_row_has_as_many_numbers_as_each_kernel_can_count() -> None:
    """Heads are rounded up to 32; a mask of SDPA has a number for each two tokens."""
    heads, tokens = 32, 2**31 // (32 * 128)
    for kernel in ("auto", "flash_attention_2", "varlen", "sdpa", "flex_attention"):
        assert not uncountable(kernel, tokens, heads, 128, masked=False), kernel
        assert uncountable(kernel, tokens + 1, heads, 128, masked=False), kernel
        assert uncountable(kernel, tokens + 1, heads, 97, masked=False), kernel
        assert not uncountable(kernel, tokens + 1, heads, 96, masked=False), kernel
    for kernel in ("flash_attention_3", "flash_attention_4", "eager"):
        assert not uncountable(kernel, 2**30, heads, 128, masked=True), kernel
    assert not uncountable("sdpa", 46_340, 1, 32, masked=True)
    assert uncountable("sdpa", 46_341, 1, 32, masked=True)
    assert not uncountable("sdpa", 46_341, 1, 32, masked=False)
    assert not uncountable_mixing(2**20, 2**12)
    assert uncountable_mixing(2**20 + 1, 2**12)


def test_a_kernel_that_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(
        ConfigError, match="model.attention: 'varlen' cannot run here: it needs a CUDA device. Use auto"
    ):
        choose_attention("varlen", torch.device("cpu"), BF16, architecture("llama").attention_needs)
