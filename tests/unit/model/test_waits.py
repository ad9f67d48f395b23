"""A step asks nothing of its device before the exchange at its end: on `meta`, where there is nothing to be read, it
runs.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.material import Workshop, make_labelled, make_pairs
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import empty_model
from trainer.data.dataset.chapters import open_chapters
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.evaluate.losses import document_losses
from trainer.model.attention import choose_attention
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear
from trainer.model.micro_batch import MicroBatch
from trainer.model.packed import PackedModel
from trainer.processes.accelerator import onto
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

META = torch.device("meta")


def first_row(workshop: Workshop, config: Any) -> MicroBatch:
    """A row of several documents with padding, from the data as it is compiled."""
    run = workshop.store.sub(config.run.name)
    chapters = open_chapters(workshop.store, workshop.prepare(config).train, run)
    row = train_stream(config, chapters, rank=0, world_size=1).step(Position())[0]
    assert len(row.lengths) > 2
    return row


def on_meta(workshop: Workshop, config: Any) -> PackedModel:
    """The model as a GPU's rank has it, with PyTorch's varlen kernel and LoRA, but no weights."""
    base = resolve_base(config.model)
    dtype, cuda = torch.bfloat16, torch.device("cuda")
    attention = choose_attention("varlen", cuda, dtype, base.architecture.attention_needs)
    model = empty_model(base, config, attention)
    for path, module in list(model.named_modules()):
        if f"{path}.weight" in base.architecture.quantizable() and type(module) is torch.nn.Linear:
            packed = HeldLinear(module.in_features, module.out_features, Blocks("nf4"), dtype)
            for name, size in packed.sizes.items():
                part = torch.empty(size, dtype=torch.uint8, device=META)
                setattr(packed, name, torch.nn.Parameter(part, requires_grad=False))
            model.set_submodule(path, packed)
    method = method_of(config)
    model.requires_grad_(False)
    method.attach(model, base.architecture, dtype, seed=3)
    return PackedModel(cast(Any, model).to(META), attention, method.virtual.reserved)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def step(workshop: Workshop, *overrides: str) -> dict[str, torch.Tensor]:
    """The gradients of one row's loss, with the passes before it that its objective needs."""
    config = workshop.config("waits", "train.activation_checkpointing=false", *overrides)
    row, model, objective = first_row(workshop, config).to(META), on_meta(workshop, config), find_objective(config)
    if objective.survey is not None:
        with torch.no_grad():
            row = replace(row, survey=objective.survey.look(model, row))
    objective.loss(model, row).reshape(-1)[0].backward()
    return {name: part.grad for name, part in model.model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen3-next"])
def test_a_step_reads_nothing_from_its_device(tmp_path: Path, kind: str) -> None:
    """Rows of experts' matrices are whole 16 bytes here: others cost a wait, and no real base has them."""
    gradients = step(Workshop(tmp_path, kind, hidden_size=64, intermediate_size=176, moe_intermediate_size=176))
    assert gradients
    assert {part.device for part in gradients.values()} == {META}


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_nor_does_one_that_prefers(tmp_path: Path, objective: str) -> None:
    make = make_labelled if objective == "kto" else make_pairs
    rows = json.dumps([{"path": str(make(tmp_path / "rows.jsonl"))}])
    form = "labelled" if objective == "kto" else "preference"
    workshop = Workshop(tmp_path)
    assert step(workshop, f"objective.name={objective}", f"data.format={form}", f"data.train={rows}")


def test_a_step_that_reads_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a row whose targets are searched for on the device."""
    monkeypatch.setattr(MicroBatch, "places", None)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step(Workshop(tmp_path))


def test_an_evaluation_reads_its_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SimpleNamespace(documents=documents) for documents in ((0, 1), (4,), (2, 3))]
    engine = SimpleNamespace(
        evaluating=nullcontext,
        look=lambda _look, row: torch.tensor([[float(number) for number in row.documents], [1.0] * len(row.documents)]),
    )
    read, plain = list[torch.Size](), torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: read.append(self.shape) or plain(self))
    stream = SimpleNamespace(epoch=lambda _number: ([row] for row in rows))
    found = document_losses(cast(Any, engine), cast(Any, stream), lambda done: None)
    assert found.numbers.tolist() == found.nats.tolist() == [0, 1, 4, 2, 3]
    assert found.tokens.tolist() == [1] * 5
    assert read == [(2, 5)]


def test_rows_travel_from_pinned_memory_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    travelled = list[tuple[str, bool]]()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: travelled.append(("pinned", True)) or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking=False: travelled.append((str(device), non_blocking))
    )
    onto(torch.zeros(3), torch.device("cuda"))
    assert travelled == [("pinned", True), ("cuda", True)]
