"""`rounding=gptq`: codes whose errors cancel on what a layer reads, of a model that is computed a layer at a time."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.material import Workshop, commit, make_base
from tests.stored import read_files, store_as
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import DTYPES
from trainer.errors import ConfigError
from trainer.export.destination import ExportProgress
from trainer.export.format import find_format
from trainer.export.proof.rows import training_rows
from trainer.export.write import calibrated
from trainer.export.write.calibrated import calibrate, rounded
from trainer.model.held import dither
from trainer.model.held.codes import VALUES, Numbers
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import whole_checkpoint
from trainer.store.store import open_store
from trainer.tuning.method import method_of

ROWS, COLUMNS = 40, 200
SMALL = ("tuning.alpha=0.05", "quant.type=stored", "model.dtype=fp32")


def blocks(folder: Path, inputs: Tensor, width: int) -> Sequence[Any]:
    """The sums of these inputs (tokens, columns) in blocks of a width, as `calibrate` keeps them."""
    found, seen = calibrated.Calibration(folder), torch.ones(1, len(inputs), dtype=torch.bool)
    before, calibrated._BLOCK = calibrated._BLOCK, width
    try:
        calibrated._keep(found, "w", seen, nn.Identity(), (inputs[None],))
    finally:
        calibrated._BLOCK = before
    return found.blocks("w")


@pytest.mark.parametrize("numbers", get_args(Numbers))
@pytest.mark.parametrize("width", [1024, 96])
def test_errors_cancel_on_the_inputs(
    tmp_path: Path, numbers: Numbers, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.Generator().manual_seed(3)
    directions = torch.randn(20, COLUMNS, generator=drawn)
    inputs = torch.randn(500, 20, generator=drawn) @ directions
    inputs += 0.3 * torch.randn(500, COLUMNS, generator=drawn)
    values = torch.tensor(VALUES[numbers]).nan_to_num(0.0)
    codes = torch.randint(1, len(values) - 1, (ROWS, COLUMNS), generator=drawn).byte()
    if numbers == "e4m3":
        codes = codes % 128 % 100
    scales = 0.01 * (torch.rand(ROWS, COLUMNS, generator=drawn) + 0.5)
    change = torch.randn(ROWS, 4, generator=drawn) @ directions[:4]  # an adapter looks at what inputs have in common
    steps = 0.03 * change / change.abs().mean() * 0.01 / scales
    at = dither.thresholds("w", torch.arange(ROWS), torch.arange(COLUMNS))

    def error(found: Tensor) -> float:
        wrong = (values[found.int()] - values[codes.int()] - steps) * scales
        return float((wrong @ inputs.T).square().sum())

    found = rounded(numbers, codes, steps, scales, blocks(tmp_path, inputs, width))
    others = [dither.moved(numbers, codes, steps, at), codes]
    assert error(found) < 0.5 * min(map(error, others))
    assert torch.equal(rounded(numbers, codes, 0 * steps, scales, blocks(tmp_path, inputs, width)), codes)
    if (numbers, width) == ("int4", 96):
        errors = list[float]()
        for passes in (0, 1):
            monkeypatch.setattr(calibrated, "_PASSES", passes)
            errors.append(error(rounded(numbers, codes, steps, scales, blocks(tmp_path, inputs, width))))
        assert errors[0] > errors[1] > error(found), "a second look at each code finds better ones"


def test_the_columns_that_come_make_up_for_the_error_of_each_as_in_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In runs of columns: it is the same as one column after another."""
    monkeypatch.setattr(calibrated, "_PASSES", 0)
    drawn = torch.Generator().manual_seed(5)
    inputs = torch.randn(300, 30, generator=drawn) @ torch.randn(30, COLUMNS, generator=drawn)
    codes = torch.randint(2, 14, (ROWS, COLUMNS), generator=drawn).byte()
    scales = 0.01 * (torch.rand(ROWS, COLUMNS, generator=drawn) + 0.5)
    steps = 0.4 * torch.randn(ROWS, COLUMNS, generator=drawn)
    (block,) = blocks(tmp_path, inputs, 1024)
    found = rounded("int4", codes, steps, scales, [block])
    assert torch.allclose(block.factor.T @ block.factor @ block.products, torch.eye(COLUMNS), atol=0.02)
    sought, expected = (codes - 8.0 + steps) * scales, codes.clone()
    for column in range(COLUMNS):
        nearest = (sought[:, column] / scales[:, column]).round().clamp(-8, 7)
        expected[:, column] = (nearest + 8).byte()
        error = (sought[:, column] - nearest * scales[:, column]) / block.factor[column, column]
        sought[:, column + 1 :] -= error[:, None] * block.factor[column, column + 1 :]
    assert (found == expected).float().mean() > 0.99
    plain = (codes + steps).round().clamp(0, 15).byte()
    assert (found == plain).float().mean() < 0.9, "the control"


@pytest.mark.parametrize("kind", ["qwen2", "llama-tied"])
def test_a_layer_at_a_time_reads_what_the_whole_model_reads(tmp_path: Path, kind: str) -> None:
    workshop = Workshop(tmp_path, kind)
    config = workshop.config("done", f"model.base={workshop.base}", "quant.type=none", "model.dtype=fp32")
    run = workshop.store.sub("done")
    commit(run, config, dataset=workshop.prepare(config).train)
    base, manifest = resolve_base(config.model), whole_checkpoint(run, None)
    updates = method_of(config).updates(LearntWeights(run, manifest, DTYPES["fp32"]), base.architecture)
    rows = training_rows(run, config, manifest, 5)
    assert len(rows) == 5
    assert len({len(row) for row in rows}) > 1
    (tmp_path / "sums").mkdir()
    said = list[str]()
    found = calibrate(base, updates, rows, tmp_path / "sums", said.append)
    assert found.files.keys() == updates.keys()
    assert said == ["rounding: looked at the inputs of 2 of 2 layers"]

    find_format("merged").write(
        run, open_store(str(tmp_path / "merged")), None, ExportProgress(lambda done, total: None, lambda sentence: None)
    )

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    name, inputs = "model.layers.1.mlp.down_proj", list[Tensor]()
    model.get_submodule(name).register_forward_pre_hook(lambda _module, given: inputs.append(given[0][0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    read = torch.cat(inputs)
    products = torch.cat([part.flatten() for part in load_file(found.files[f"{name}.weight"]).values()])
    expected = read.T @ read
    expected.diagonal().add_(0.01 * float(expected.diagonal().mean()))
    assert (products - expected.flatten()).abs().max() < 0.02 * expected.abs().max()  # the merge is in bf16


def test_an_export_rounds_by_the_runs_rows_and_gives_the_same_bytes_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    plain = make_base(tmp_path / "plain", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    base = store_as(plain, tmp_path / "int4", "int4-32")
    config = workshop.config("done", f"model.base={base}", *SMALL)
    run, found = workshop.store.sub("done"), []
    commit(run, config, dataset=workshop.prepare(config).train)
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    for name in ("gptq", "again"):
        form = find_format("merged", ["as=stored", "rounding=gptq"])
        written = form.write(run, open_store(str(tmp_path / name)), None, quiet)
        assert 0 < written.facts["codes_changed"] < written.facts["codes"]
        found.append(read_files(tmp_path / name))
    find_format("merged", ["as=stored"]).write(run, open_store(str(tmp_path / "dither")), None, quiet)
    dithered, before = read_files(tmp_path / "dither"), read_files(base)
    assert all(torch.equal(found[0][key], found[1][key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], found[0][key])}
    assert changed <= {key for key in before if not torch.equal(before[key], dithered[key])}
    assert not all(torch.equal(dithered[key], found[0][key]) for key in changed)


@pytest.mark.parametrize(("layers", "told"), [(9, [9]), (10, [10]), (25, [10, 20, 25])])
def test_a_model_of_many_layers_says_at_times_how_far_it_is(layers: int, told: list[int]) -> None:
    said = list[str]()
    for number in range(layers):
        layer = nn.Linear(2, 2)
        calibrated._drop(number, layers, said.append, layer, None, None)
        assert layer.weight.is_meta
    assert said == [f"rounding: looked at the inputs of {number} of {layers} layers" for number in told]


def test_a_base_without_layers_that_follow_each_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = SimpleNamespace(directory=tmp_path)
    monkeypatch.setattr(calibrated, "model_config", lambda folder, layers: None)
    monkeypatch.setattr(calibrated, "unfilled_model", lambda *_, **how: nn.Linear(2, 2))
    for found in (None, nn.ModuleList()):
        monkeypatch.setattr(calibrated, "decoder_layers", lambda model, found=found: found)
        with pytest.raises(ConfigError, match="a layer at a time, and this one has no layers. Leave rounding out"):
            calibrate(base, {}, [torch.tensor([1])], tmp_path, lambda sentence: None)


def test_what_cannot_be_rounded_so_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounding: gptq is for as=stored"):
        find_format("merged", ["as=int4", "rounding=gptq"])
    workshop = Workshop(tmp_path)
    plain = make_base(tmp_path / "plain", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    config = workshop.config("gptq", f"model.base={store_as(plain, tmp_path / 'gptq', 'gptq-4')}", *SMALL[:1])
    run = workshop.store.sub("gptq")
    commit(run, config, dataset=workshop.prepare(config).train)
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    with pytest.raises(ConfigError, match="stores the transpose of"):
        find_format("merged", ["as=stored", "rounding=gptq"]).write(run, open_store(str(tmp_path / "out")), None, quiet)
    seen, manifest = workshop.config("seen", "data.format=pictures"), whole_checkpoint(run, None)
    with pytest.raises(ConfigError, match="rounding: gptq computes the base over tokens alone"):
        training_rows(run, seen, manifest, 5)
