"""The settings by which a proof computes the model that was trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import Config, Model, parse_config
from trainer.export.proof import models
from trainer.export.proof.sides import FreeMemory
from trainer.store.store import open_store


class _Assembled(Exception):
    """The model would be made now."""


@pytest.mark.parametrize("streamed", [False, True])
def test_what_made_the_training_faster_is_off_and_a_model_that_memory_does_not_hold_comes_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    config = parse_config("""
run: {name: a}
model: {base: b, attention: flash_attention_2, kernels: liger, dtype: bf16}
data: {train: [{path: c}], sequence_length: 64}
quant: {type: nf4, cache: true}
train: {steps: 1, products: fp8}
sharding: {sequence_parallel: 2}
""")
    given = list[Config]()

    def of(config: Config, base: Any) -> Any:
        given.append(config)
        raise _Assembled

    monkeypatch.setattr(models.Resolved, "of", of)
    monkeypatch.setattr(models, "join", lambda: None)
    nothing: Any = None
    trained = models.Trained(nothing, nothing, config, nothing, tmp_path if streamed else None)
    with pytest.raises(_Assembled):
        trained.logits("fp32")
    (used,) = given
    assert (used.model.attention, used.model.kernels, used.model.dtype) == ("auto", "none", "fp32")
    assert (used.train.products, used.quant.cache, used.sharding.sequence_parallel) == ("plain", False, 1)
    assert used.sharding.deepspeed == ("zero3_offload_cpu" if streamed else "auto")


@pytest.mark.parametrize(("rows", "vocabulary"), [([], 100), ([(40, "a")], 100), ([(100, "a"), (120, "b")], 121)])
def test_the_embedding_has_a_row_for_each_token_that_was_added(
    rows: list[tuple[int, str]], vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_rows", lambda model: rows)
    config: Any = SimpleNamespace(model=None)
    base: Any = SimpleNamespace(architecture=SimpleNamespace(vocabulary=100))
    nothing: Any = None
    assert models.Trained(nothing, nothing, config, base).vocabulary == vocabulary


def test_a_base_is_read_where_it_lies_unless_the_run_has_another_description_of_it(tmp_path: Path) -> None:
    store, directory = open_store(str(tmp_path / "files")), tmp_path / "small"
    store.put("config.json", b"{}")
    store.put("model.safetensors", b"weights")
    directory.mkdir()
    base: Any = SimpleNamespace(store=store, directory=directory)
    for content in (b"{}", b'{"model_type": "llama"}'):
        (directory / "config.json").write_bytes(content)
        with models.base_directory(base) as found:
            assert (found == tmp_path / "files") is (content == b"{}")
            assert (found / "config.json").read_bytes() == content
            assert (found / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (["BF16", "BF16"], torch.bfloat16),
        (["BF16", "F32"], torch.float32),
        (["BF16", "F16"], torch.float32),
        (["I32"], torch.float32),
    ],
)
def test_a_base_is_held_in_the_type_that_loses_nothing_of_its_files(stored: list[str], held: torch.dtype) -> None:
    base: Any = SimpleNamespace(weights={str(at): SimpleNamespace(dtype=dtype) for at, dtype in enumerate(stored)})
    assert models.held_in(base) == held


@pytest.mark.parametrize(("gpus", "free"), [(0, 0), (2, 7)])
def test_the_room_on_a_gpu_is_asked_for_in_a_process_of_its_own_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, free: int
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(models, "local_gpus", lambda: gpus)
    monkeypatch.setattr(models, "aside", lambda device, work: (asked.append((device, work)), 7)[1])
    monkeypatch.setattr(models, "host_memory_left", lambda: 40)
    nothing: Any = None
    assert models.Trained(nothing, nothing, nothing, nothing).room == FreeMemory(free, 40)
    assert asked == ([("gpu", models._free_gpu_memory)] if gpus else [])


@pytest.mark.parametrize(
    ("stored", "sees", "recoded", "refused"),
    [
        ((False, False), False, False, ""),
        ((True, False), False, False, "what is stored in 4 or 8 bits is read whole"),
        ((False, True), True, False, "what is stored in 4 or 8 bits is read whole"),
        ((False, False), False, True, "what is stored in 4 or 8 bits is read whole"),
        ((False, False), True, False, "rows with pictures need the whole class"),
    ],
)
def test_an_export_has_room_for_the_wider_of_the_types_and_may_come_a_layer_at_a_time_unless_something_needs_it_whole(
    monkeypatch: pytest.MonkeyPatch, stored: tuple[bool, bool], sees: bool, recoded: bool, refused: str
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(models, "exported_side", lambda *given, **more: (given, more))
    monkeypatch.setattr(models.Trained, "_aside", lambda self, side, work, *arguments: asked.append((side, arguments)))
    monkeypatch.setattr(models.Trained, "sees", sees)
    for dtype, held in (("bf16", "BF16"), ("fp32", "BF16"), ("bf16", "F32")):
        base: Any = SimpleNamespace(
            architecture="model",
            stored=SimpleNamespace(quantized=stored[0], decoded=stored[1]),
            weights={"a": SimpleNamespace(dtype=held)},
        )
        config: Any = SimpleNamespace(quant="quant", model=SimpleNamespace(dtype=dtype))
        nothing: Any = None
        models.Trained(nothing, nothing, config, base).exported(print, 1, packed=True, recoded=recoded)
    sides = [side for side, _ in asked]
    assert [given for given, _ in sides] == [("model", "quant", size) for size in (2, 4, 4)]
    assert [more for _, more in sides] == [{"packed": True, "refused": refused}] * 3
    assert [arguments for _, arguments in asked] == [(1,)] * 3


def test_a_folder_of_codes_takes_the_place_of_a_base_whatever_revision_that_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "resolve_base", lambda model: (model.base, model.revision))
    config: Any = SimpleNamespace(model=Model(base="me/b", revision="v2"))
    nothing: Any = None
    merged: Any = models.merged_base(models.Trained(nothing, nothing, config, nothing), tmp_path)
    assert merged.base == (str(tmp_path), None)
    assert merged.config is config
