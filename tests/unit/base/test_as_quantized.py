"""`capstan dequantize` writes a base as a run in 4 or 8 bits computes with it, to the last bit; tests/dist/test_load.py
has the other families.
"""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from tests.material import Workshop, make_base
from tests.nf4 import dequantized
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import as_tensor
from trainer.base.rows.parameters import find_all_weights
from trainer.base.stored.shared.cached_values import LastMade
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.write.as_quantized import AsQuantized, write_as_quantized
from trainer.model.held.formats.blocks import Blocks
from trainer.store.safetensors_index import numel
from trainer.store.store import open_store


class StoredValues:
    dtype = "F32"

    def __init__(self, values: torch.Tensor) -> None:
        self.shape, self._values = tuple(values.shape), values.flatten()

    def read(self, begin: int, end: int) -> bytearray:
        return bytearray(self._values[begin:end].numpy().tobytes())


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    base = resolve_base(config.model)
    found = find_all_weights(base).sources
    return {name: as_tensor(one.read(0, numel(one)), one).view(one.shape) for name, one in found.items()}  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "quant", [("nf4", 64, False), ("nf4", 64, True), ("fp4", 128, True), ("int8", 64, False)], ids=str
)
def test_a_base_is_written_as_bitsandbytes_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: tuple[str, int, bool], dtype: str
) -> None:
    """Its rows are not whole blocks, and are read in pieces of a few."""
    monkeypatch.setattr("trainer.base.partitions.reading.PIECE_BYTES", 2048)
    kind, block, double = quant
    workshop = Workshop(tmp_path)
    make_base(workshop.base, "ragged", torch.float32 if dtype == "fp32" else torch.bfloat16)
    given = f"model.dtype={dtype}", f"quant={{type: {kind}, block_size: {block}, double: {str(double).lower()}}}"
    config = workshop.config("written", *given)
    write_as_quantized(config, open_store(str(tmp_path / "there")), lambda done, total: None)
    expected, found = weights_of(config), weights_of(workshop.config("x", f"model.base={tmp_path}/there"))
    linear = resolve_base(config.model).architecture.quantizable()
    assert len(linear) == 7
    for name, weight in expected.items():
        right = dequantized(weight, kind, block, double) if name in linear else weight
        assert torch.equal(found[name], right), name
        assert (name in linear) is not torch.equal(found[name], weight), name


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("first", "rows"), [(0, 12), (3, 2), (2, 6), (5, 7), (11, 1)])
def test_each_matrix_of_a_stack_is_quantized_by_itself_in_the_type_of_the_model(
    monkeypatch: pytest.MonkeyPatch, first: int, rows: int, double: bool
) -> None:
    """Four rows of 40 are two and a half blocks, and asked for are rows of one matrix or of several."""
    monkeypatch.setattr("trainer.base.partitions.reading.PIECE_BYTES", 512)
    stack = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 8, 64]).view(3, 1, 1)
    name, source = "experts", StoredValues(stack)
    weight = AsQuantized(name, source, (3, 4, 40), Blocks("nf4", 64, double), torch.bfloat16, LastMade[torch.Tensor]())
    found = torch.zeros(rows * 40)
    weight.apply_to(found, first)
    right = torch.cat([dequantized(one.bfloat16(), "nf4", 64, double) for one in stack])
    assert torch.equal(found.view(rows, 40), right[first : first + rows].float())


def test_a_type_that_has_no_room_for_the_weights_is_refused(tmp_path: Path) -> None:
    config = Workshop(tmp_path).config("wide", "model.dtype=fp32", "quant.type=nf4")
    with pytest.raises(ConfigError, match=r"model\.dtype: fp32 computes with weights .* no room .* bf16"):
        write_as_quantized(config, open_store(str(tmp_path / "there")), lambda done, total: None)
    assert not open_store(str(tmp_path / "there")).list()


@pytest.mark.usefixtures("forked_modules")
def test_the_command_writes_once_and_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workshop = Workshop(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"run: {{name: run, store: runs}}\nmodel: {{base: {workshop.base}, dtype: bf16}}\ndata: {{train: [{{path:"
        " x}]}\ntrain: {steps: 1}\n"
    )
    command = ["dequantize", "run.yaml", "there/"]
    assert "nothing written" in CliRunner().invoke(app, [*command, "--dry-run"]).output
    refused = CliRunner().invoke(app, [*command, "quant.type=none"])
    assert "quant.type: none computes with" in str(refused.output) + str(refused.exception)
    written = CliRunner().invoke(app, command)
    assert "in nf4 as the run computes with it, in" in written.output, written
    again = CliRunner().invoke(app, command)
    assert "is not empty" in again.output + str(again.exception)
