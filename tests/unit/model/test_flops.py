"""The operations that are counted for a step are those that PyTorch's own counter sees, on a device where nothing is
computed.
"""

from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.material import Workshop, make_pairs
from trainer.base.describe.description import describe
from trainer.base.find.locate import known_config, resolve_base
from trainer.base.load.load import empty_model
from trainer.config import Config, parse_config
from trainer.model.attention import choose_attention
from trainer.model.micro_batch import MicroBatch, ModelInput, Role, Segments
from trainer.model.packed import PackedModel
from trainer.model.parts import recomputed_share
from trainer.plan.flops import AttentionWork, StepWork, work_of
from trainer.plan.gpus import find_gpu
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

TOKENS = 48
LAYERS = 8


def row(segments: int = 1, rejected: tuple[int, ...] = (), padding: int = 0) -> MicroBatch:
    """Documents of the same length, one behind the other, all of whose tokens but the first are targets."""
    length = TOKENS // segments
    tokens = torch.arange(TOKENS + padding, dtype=torch.int32)[None] % 100
    places = torch.cat([*(torch.arange(length) for _ in range(segments)), torch.arange(padding)])
    labels = torch.where((places < length - 1) & (torch.arange(TOKENS + padding) < TOKENS), tokens, -100)
    roles = [Role.REJECTED if number in rejected else Role.DOCUMENT for number in range(segments)]
    lengths, more = [length] * segments, [Role.PADDING] if padding else []
    whole = Segments((*lengths, *([padding] if padding else [])), (*roles, *more))
    return MicroBatch(
        ModelInput.of(tokens, places.int()[None], whole),
        labels=labels.int(),
        tokens=TOKENS,
        targets=int((labels != -100).sum()),
        documents=tuple(range(segments - len(rejected))),
    )


def counted(config: Config, batch: MicroBatch) -> tuple[StepWork, StepWork, Counter[str]]:
    """The work of a run, that of one that recomputes where this one does not, or the other way round, and the
    operations of one micro-batch by PyTorch's count: `linear`, and `attention` of all pairs of tokens.
    """
    base = resolve_base(config.model)
    attention = choose_attention("eager", torch.device("cpu"), torch.bfloat16, base.architecture.attention_needs)
    model, method = empty_model(base, config, attention), method_of(config)
    model.requires_grad_(False)
    method.attach(model, base.architecture, torch.bfloat16, seed=3)
    packed = PackedModel(cast(Any, model).to("meta"), attention, method.virtual.reserved)
    with FlopCounterMode(display=False) as counter:
        find_objective(config).loss(packed, batch.to(torch.device("meta"))).reshape(-1)[0].backward()
    found = Counter[str]()
    for operator, operations in counter.get_flop_counts()["Global"].items():
        found["attention" if "bmm" in str(operator) else "linear"] += operations
    share = recomputed_share(model)
    work, other = (work_of(config, base.architecture, of, "cpu") for of in (share, 1 - share))
    return work, other, found


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("flops"), num_hidden_layers=LAYERS)


@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("how", ["lora", "full", "dpo"])
def test_the_work_of_a_step_is_what_pytorch_counts(workshop: Workshop, how: str, recomputed: bool) -> None:
    settings = ["quant.type=none", f"train.activation_checkpointing={recomputed}"]
    batch = row()
    if how == "full":
        settings += ["tuning.method=full", "tuning.rank=16", "tuning.alpha=32"]
    if how == "dpo":
        rows = [{"path": str(make_pairs(workshop.folder / "pairs.jsonl"))}]
        settings += ["objective.name=dpo", "data.format=preference", f"data.train={rows}"]
        batch = row(segments=2, rejected=(1,))
    work, other, found = counted(workshop.config("flops", *settings), batch)
    linear = replace(work, attention=()).of([batch])
    # The first layer's inputs need no gradient, and PyTorch recomputes no product that nobody needs.
    assert found["linear"] <= linear <= found["linear"] * 1.07
    assert replace(other, attention=()).of([batch]) != pytest.approx(found["linear"], rel=0.1)
    # Eager attention computes all pairs of a row; those of a document count, of which one comes before the other.
    assert len(work.attention) == LAYERS
    every = sum(layer.pair for layer in work.attention) * TOKENS**2
    assert work.passes * every == pytest.approx(found["attention"], rel=0.02)
    documents = 2 if how == "dpo" else 1
    share = documents * AttentionWork(1, None).pairs(TOKENS // documents) / TOKENS**2
    assert work.of([batch]) - linear == pytest.approx(share * found["attention"], rel=0.02)


@pytest.mark.parametrize(
    ("objective", "recomputed", "passes"),
    [("sft", 0, 2), ("sft", 1, 3), ("dpo", 0, 3), ("kto", 0, 2.5), ("kto", 1, 3)],
)
def test_experts_are_multiplied_with_in_every_pass(objective: str, recomputed: int, passes: float) -> None:
    """In the forward and the backward pass and the recomputation between them, and by the reference. Of kto's rows one
    half has a survey, which is a forward pass alone, and the other half a loss.
    """
    found = known_config("Qwen/Qwen3-30B-A3B")
    assert found is not None
    rows = {"sft": "chat", "dpo": "preference", "kto": "labelled"}[objective]
    sections = ("run: {name: demo}", "model: {base: b}", "train: {steps: 1}", "data: {train: [{path: a.jsonl}]}")
    config = parse_config("\n".join(sections), [f"objective.name={objective}", f"data.format={rows}"])
    work = work_of(config, describe(found, None).architecture, recomputed, "cpu")
    assert work.products == passes
    assert work.experts == 2 * passes * 48 * 8 * 3 * 2048 * 768, "a token visits 8 experts of each layer"


def test_padding_is_no_work_and_a_window_bounds_what_a_token_sees() -> None:
    work = StepWork(token=20, target=4, attention=(AttentionWork(2, None), AttentionWork(2, 4)), passes=3)
    assert work.of([row(padding=100)]) == work.of([row()])
    assert AttentionWork(2, 4).pairs(10) == sum(min(token, 4) for token in range(1, 11))
    assert AttentionWork(2, None).pairs(10) == sum(range(1, 11))
    halves = work.of([row(segments=2)])
    pairs = sum(layer.pairs(TOKENS // 2) for layer in work.attention)
    assert halves == TOKENS * 20 + (TOKENS - 2) * 4 + 2 * 3 * 2 * pairs


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("cuda:0 (NVIDIA L40S)", 362),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name_or_not_at_all(name: str, teraflops: int | None) -> None:
    gpu = find_gpu(name)
    assert (gpu and gpu.flops) == (teraflops and teraflops * 1e12)


def test_utilisation_is_said_where_the_peak_is_known() -> None:
    assert StepWork(peak=1e12).measured(5e12, 10) == {"teraflops": 0.5, "mfu": 0.5}
    assert StepWork().measured(5e12, 10) == {"teraflops": 0.5}
    assert StepWork().measured(0, 10) == {}
