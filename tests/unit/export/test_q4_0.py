"""Codes of Q4_0: a scale and 32 codes a block, which gguf reads as the weights or, rounded, as what was learnt too."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from trainer.config import parse_config
from trainer.export.gguf import q4_0
from trainer.export.gguf.q4_0 import BLOCK, blocks, write_q4_0
from trainer.export.write.as_stored import CodesMoved
from trainer.model.held import dither

CONFIG = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: a}]}\ntrain: {steps: 1}\n"


def decoded(made: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(made.numpy(), GGMLQuantizationType.Q4_0))


def steps(values: Tensor) -> Tensor:
    """The size of a code of each weight: an eighth of the largest weight of its block, in fp16."""
    largest = values.view(len(values), -1, BLOCK).abs().amax(-1)
    return (largest / 8).half().float().repeat_interleave(BLOCK, 1)


def drawn(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def test_codes_are_the_nearest_to_the_weights_and_to_the_sums() -> None:
    values, change = drawn(3, 2 * BLOCK), 0.2 * drawn(5, 2 * BLOCK)[:3]
    made, moved = blocks(values, torch.zeros_like(values), None)
    assert (made.shape, moved) == ((3, 2 * (2 + BLOCK // 2)), 0)
    # Codes reach from -8 to 7: a weight as large as the largest one of its block, of the other sign, is cut.
    inside = (decoded(made) / steps(values)).abs() < 6.5
    assert inside.sum() > 150
    assert ((decoded(made) - values).abs() <= 0.501 * steps(values))[inside].all()
    summed, moved = blocks(values, change, None)
    assert ((decoded(summed) - values - change).abs() <= 0.501 * steps(values))[inside].all()
    assert moved == int((decoded(summed) != decoded(made)).sum()) > 20


def test_a_dither_moves_codes_so_that_their_mean_is_what_was_learnt() -> None:
    values = torch.linspace(-4, 4, BLOCK).repeat(400, 1)
    change = torch.full_like(values, 0.1).where(values.abs() < 3, 0.0)
    at = dither.thresholds("blk.0.x", torch.arange(400), torch.arange(BLOCK))
    made, moved = blocks(values, change, at)
    kept = decoded(blocks(values, torch.zeros_like(values), None)[0])
    gaps = decoded(made) - kept
    assert gaps.mean(0).numpy() == pytest.approx(change[0].numpy(), abs=0.035)
    assert set((gaps / steps(values)).round().unique().tolist()) == {0.0, 1.0}
    assert moved == int(gaps.count_nonzero())


def test_a_block_of_zeros_takes_its_scale_from_what_was_learnt() -> None:
    change = drawn(1, BLOCK)
    made, _ = blocks(torch.zeros(1, BLOCK), change, None)
    assert (decoded(made) - change).abs().median() <= 0.501 * steps(change)[0, 0]


def file_of(path: Path, tensors: dict[str, Any], **more: Any) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(1)
    for name, value in more.items():
        writer.add_uint32(name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("at_once", [1, 2**22])
def test_matrices_of_layers_become_q4_0_and_everything_else_stays_or_becomes_q8_0(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q4_0, "_AT_ONCE", at_once)
    matrix, learnt = drawn(4, 64).numpy().astype(np.float16), (0.3 * drawn(6, 64)[:4]).numpy().astype(np.float16)
    odd, norm = matrix[:, :48].copy(), np.arange(64, dtype=np.float32)
    names = {"blk.0.ffn_up.weight": matrix, "token_embd.weight": matrix, "blk.0.odd.weight": odd, "blk.0.norm": norm}
    names["blk.0.one.weight"] = matrix[:, :32].copy()
    kept = file_of(tmp_path / "kept.gguf", names, **{"llama.block_count": 1})
    change = file_of(tmp_path / "change.gguf", {"blk.0.ffn_up.weight": learnt})
    moved = CodesMoved()
    write_q4_0(kept, change, tmp_path / "made.gguf", "nearest", moved)
    read = GGUFReader(tmp_path / "made.gguf")
    found = {tensor.name: tensor for tensor in read.tensors}
    types = GGMLQuantizationType
    assert {name: one.tensor_type for name, one in found.items()} == dict(
        zip(names, (types.Q4_0, types.Q8_0, types.F16, types.F32, types.Q4_0), strict=True)
    )
    made, differing = blocks(torch.from_numpy(matrix).float(), torch.from_numpy(learnt).float(), None)
    assert found["blk.0.ffn_up.weight"].data.tobytes() == made.numpy().tobytes()
    assert (moved.codes, moved.moved) == (matrix.size + 4 * 32, differing)
    whole = gguf.dequantize(found["token_embd.weight"].data, types.Q8_0)
    assert np.abs(whole - matrix).max() < 0.02
    assert np.array_equal(found["blk.0.odd.weight"].data, odd)
    assert np.array_equal(found["blk.0.norm"].data, norm)
    told = {name: field.contents() for name, field in read.fields.items()}
    assert told["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert told["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert (told["general.architecture"], told["llama.block_count"]) == ("llama", 1)
    assert told["tokenizer.ggml.tokens"] == ["a", "b"]


def test_a_scale_is_that_of_the_largest_weight_with_its_sign() -> None:
    values, change = torch.zeros(1, 2, 32), torch.full((1, 2, 32), 100.0)
    values[0, 0, 3], values[0, 0, 7], values[0, 1, 5] = 16.0, -5.0, -24.0
    assert q4_0._scales(values, change).tolist() == [[-2.0, 3.0]]


def test_what_is_learnt_of_a_matrix_is_in_one_of_the_two_models_and_everything_else_in_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both are added up; so a change that was in both would be there twice."""
    kinds = {"layer.weight": "linear", "experts.up": "experts", "norm.weight": "small", "head.weight": "head"}
    parts = [SimpleNamespace(name=name, shape=(2, 2), kind=kind) for name, kind in kinds.items()]
    base: Any = SimpleNamespace(architecture=SimpleNamespace(parameters=parts))
    updates: Any = {"layer.weight": "learnt", "norm.weight": "learnt too"}
    written = dict[str, Any]()
    monkeypatch.setattr(q4_0, "find_all_weights", lambda base: None)
    monkeypatch.setattr(q4_0, "files_with", lambda base, weights, given: given)
    monkeypatch.setattr(q4_0, "open_store", lambda folder: Path(folder).name)
    monkeypatch.setattr(q4_0, "write_files", lambda base, config, files, store, told: written.update({store: files}))
    q4_0.write_sides(base, parse_config(CONFIG), updates, tmp_path / "kept", tmp_path / "change")
    assert written["kept"] == {"norm.weight": "learnt too"}
    assert sorted(written["change"]) == ["experts.up", "layer.weight"]


class _Times:
    """An update that multiplies each row by two more than its number."""

    shape = (4, 3)

    def apply_to(self, rows: Tensor, first: int) -> None:
        values = rows.view(-1, 3)
        values.mul_(torch.arange(first + 2, first + 2 + len(values))[:, None])


class _Adds:
    """An update that adds its number to each row."""

    shape = (4, 3)

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows.view(-1, 3).add_(self.change(first, len(rows) // 3))

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return torch.arange(first, first + rows).float()[:, None].expand(rows, 3)[:, columns]


@pytest.mark.parametrize(
    ("update", "found"), [(None, [0, 0]), (_Times(), [3 * 1.5, 4 * 1.5]), (_Adds(), [2, 3])], ids=["none", "any", "add"]
)
def test_a_weight_is_replaced_by_what_its_update_adds_to_these_rows(update: Any, found: list[float]) -> None:
    added, rows = q4_0._Added(update, (4, 3)), torch.full((2 * 3,), 1.5)
    added.apply_to(rows, 2)
    assert added.shape == (4, 3)
    assert rows.view(2, 3).tolist() == [[value] * 3 for value in found]


@pytest.mark.parametrize("at_once", [64, 3 * 64, 2**22])
def test_a_dither_is_that_of_the_place_in_whatever_pieces_a_matrix_is_coded(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q4_0, "_AT_ONCE", at_once)
    matrix, learnt = drawn(8, 64).half(), (0.1 * drawn(9, 64)[:8]).half()
    kept = file_of(tmp_path / "kept.gguf", {"blk.0.x.weight": matrix.numpy()})
    change = file_of(tmp_path / "change.gguf", {"blk.0.x.weight": learnt.numpy()})
    moved = CodesMoved()
    write_q4_0(kept, change, tmp_path / "made.gguf", "dither", moved)
    at = dither.thresholds("blk.0.x.weight", torch.arange(8), torch.arange(64))
    made, differing = blocks(matrix.float(), learnt.float(), at)
    (found,) = GGUFReader(tmp_path / "made.gguf").tensors
    assert found.data.tobytes() == made.numpy().tobytes()
    assert moved.moved == differing > 0


@pytest.mark.parametrize(
    ("stored", "kind"), [(["BF16", "F32"], "bf16"), (["F16"], "f16"), (["F32"], "f16"), (["F16", "I64"], "f16")]
)
def test_a_model_is_converted_beside_its_folder_in_the_16_bits_that_the_base_has(
    stored: list[str], kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = list[Any]()
    monkeypatch.setattr(q4_0, "convert", lambda *given: done.append(given))
    base: Any = SimpleNamespace(tensors={str(n): SimpleNamespace(dtype=dtype) for n, dtype in enumerate(stored)})
    assert q4_0.convert_side(tmp_path / "kept", base, parse_config(CONFIG)) == tmp_path / "kept.gguf"
    assert done == [(tmp_path / "kept", kind, tmp_path / "kept.gguf", "a")]
