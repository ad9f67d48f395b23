"""`--format merged as=stored` writes the base's own files, in which only codes of trained weights are others."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.codes import FORMATS
from tests.material import Workshop, commit, make_base
from tests.stored import read_files, store_as, store_in_fp8, store_in_mxfp4
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import as_tensor
from trainer.base.rows.parameters import find_all_weights
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.destination import ExportProgress, Written
from trainer.export.format import find_format
from trainer.export.write.in_codes import write_base_in_codes
from trainer.run.folder import run_folder
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import whole_checkpoint
from trainer.store.safetensors_index import numel
from trainer.store.store import Buffer, Store, open_store
from trainer.tuning.method import method_of

# The adapters of `commit` are random. By this alpha they change a weight by a few percent of a step.
SMALL = ("tuning.alpha=0.05", "quant.type=none", "data.packing=false")
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
QUIET = ExportProgress(lambda done, total: None, lambda sentence: None)
MIXTURES, ADAPTED_EXPERTS = ("gpt-oss", "experts-int4-32", "experts-fp4-scale"), ("tuning.experts=true",)
LINEAR = [name for name in FORMATS if name not in ("llm-int8", "fp4-scale")]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("as-stored"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_base(folder / "llama", "llama", **SIZES)
    make_base(folder / "experts", "qwen3-moe", **EXPERTS)
    make_base(folder / "gpt-oss", "gpt-oss", hidden_size=64, intermediate_size=64, num_local_experts=4)
    return folder


def stored(plain: Path, name: str) -> Path:
    """The base of this name: a format over linear layers, or a mixture whose experts are in codes."""
    folder = plain / f"as-{name}"
    if folder.exists():
        return folder
    torch.manual_seed(5)
    if name == "gpt-oss":
        return store_in_mxfp4(plain / "gpt-oss", folder)
    if name.startswith("experts-"):
        return store_as(plain / "experts", folder, name.removeprefix("experts-"), only="experts")
    if name == "fp8-tiles":
        return store_in_fp8(plain / "llama", folder, (48, 80))
    return store_as(plain / "llama", folder, name)


def committed(workshop: Workshop, base: Path, *overrides: str) -> tuple[Store, Config]:
    name = f"{base.name}-{'-'.join(overrides) or 'usual'}".replace("=", "-").replace(".", "-")
    config = workshop.config(name, f"model.base={base}", *SMALL, *overrides)
    run = workshop.store.sub(config.run.name)
    if not run.list():
        commit(run, config)
    return run, config


def export(run: Store, folder: Path, *options: str) -> Written:
    return find_format("merged", ["as=stored", *options]).write(run, open_store(str(folder)), None, QUIET)


def weights(config: Config, folder: Path) -> dict[str, Tensor]:
    """The weights that a folder stands for by our reading of its format, which other tests prove, in fp32."""
    base = resolve_base(config.model.model_copy(update={"base": str(folder)}))
    sources: dict[str, Any] = find_all_weights(base).sources
    return {name: as_tensor(source.read(0, numel(source)), source).float() for name, source in sources.items()}


def merged_in_fp32(run: Store, config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the weights that a merge changes, after it."""
    architecture = resolve_base(config.model).architecture
    updates = method_of(config).updates(LearntWeights(run, whole_checkpoint(run, None), torch.bfloat16), architecture)
    found = {name: weights[name].clone() for name in updates}
    for name, update in updates.items():
        update.apply_to(found[name], 0)
    return found


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def share_kept(before: dict[str, Tensor], after: dict[str, Tensor], sought: dict[str, Tensor]) -> float:
    """The part of the sought change that the weights have made, by the one direction that it has."""
    made = sum(float((after[name] - before[name]) @ change) for name, change in sought.items())
    return made / sum(float(change @ change) for change in sought.values())


@pytest.mark.parametrize("name", [*LINEAR, "fp8-tiles", *MIXTURES])
def test_only_codes_differ_and_they_say_in_the_mean_what_the_adapter_does(
    workshop: Workshop, plain: Path, tmp_path: Path, name: str
) -> None:
    base = stored(plain, name)
    mixture = ADAPTED_EXPERTS if name in MIXTURES else ()
    run, config = committed(workshop, base, *mixture)
    written = export(run, tmp_path / "merged")

    raw, found = read_files(base), read_files(tmp_path / "merged")
    assert raw.keys() == found.keys()
    changed = {key for key in raw if not torch.equal(as_bytes(raw[key]), as_bytes(found[key]))}
    coded = {key for key in raw if key.endswith(("weight_packed", "qweight", "_blocks", ".weight"))}
    assert changed
    assert changed <= coded
    assert not any(key.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight")) for key in changed)
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "merged" / file.name).stat().st_size == file.stat().st_size
    assert (tmp_path / "merged/config.json").read_bytes() == (base / "config.json").read_bytes()

    before, after = weights(config, base), weights(config, tmp_path / "merged")
    sought = merged_in_fp32(run, config, before)
    in_codes = {name: sought[name] - before[name] for name in sought if not mixture or "experts" in name}
    assert share_kept(before, after, in_codes) == pytest.approx(1, abs=0.35)
    facts = written.facts
    assert 0 < facts["codes_changed"] < facts["codes"]
    assert facts["codes"] == sum(len(change) for change in in_codes.values())
    assert "rounded with a dither. Scales and all" in (tmp_path / "merged/README.md").read_text()

    export(run, tmp_path / "nearest", "rounding=nearest")
    nearest = weights(config, tmp_path / "nearest")
    assert "rounded to the nearest ones. Scales and all" in (tmp_path / "nearest/README.md").read_text()
    assert share_kept(before, nearest, in_codes) < 0.35 or "8" in name


@pytest.mark.parametrize("name", ["int4-32", "gptq-4", "gpt-oss", "experts-int4-32"])
def test_the_bytes_are_the_same_in_whatever_pieces_they_are_made(
    workshop: Workshop, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mixture = ADAPTED_EXPERTS if name in MIXTURES else ()
    run, _ = committed(workshop, stored(plain, name), *mixture)
    export(run, tmp_path / "whole")
    monkeypatch.setattr("trainer.base.partitions.reading.PIECE_BYTES", 1000)
    monkeypatch.setattr("trainer.base.stored.shared.moving.AT_ONCE", 200)
    export(run, tmp_path / "pieces")
    whole, pieces = read_files(tmp_path / "whole"), read_files(tmp_path / "pieces")
    assert all(torch.equal(as_bytes(whole[key]), as_bytes(pieces[key])) for key in whole)


@pytest.mark.parametrize("name", ["int4-32", "experts-int4-32"])
def test_the_bytes_are_the_same_by_whatever_number_of_ranks_the_run_was_committed(
    workshop: Workshop, plain: Path, tmp_path: Path, name: str
) -> None:
    mixture = ADAPTED_EXPERTS if name in MIXTURES else ()
    found = list[dict[str, Tensor]]()
    for ranks in (1, 2, 3):
        config = workshop.config(f"{name}-{ranks}", f"model.base={stored(plain, name)}", *SMALL, *mixture)
        run = workshop.store.sub(config.run.name)
        commit(run, config, ranks=ranks)
        assert len(list(run.list("checkpoints/"))) == ranks + 1
        export(run, tmp_path / str(ranks))
        found.append(read_files(tmp_path / str(ranks)))
    for other in found[1:]:
        assert all(torch.equal(as_bytes(found[0][key]), as_bytes(other[key])) for key in found[0])


class Killed(BaseException):
    """The end of an export that nobody handles."""


def _begins_and_is_killed(store: Store, key: str, chunks: Iterable[Buffer], size: int) -> None:
    next(iter(chunks))
    raise Killed


@pytest.mark.parametrize("head", ["llama", pytest.param("llama-tied", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "code", ["int4", *(pytest.param(code, marks=pytest.mark.long) for code in ("nvfp4", "mxfp4", "fp8"))]
)
def test_codes_of_a_base_in_16_bits_are_the_same_by_any_number_of_ranks_in_pieces_and_after_a_kill(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, head: str
) -> None:
    """One export for each number of ranks; that of two is made in small pieces, and that of three after one that was
    killed half way.
    """
    base = make_base(tmp_path / "base", head, **SIZES)
    found = list[dict[str, bytes]]()
    for ranks in (1, 2, 3):
        config = workshop.config("made", f"model.base={base}", *SMALL, f"run.store={tmp_path / str(ranks)}")
        run, folder = run_folder(config), tmp_path / f"merged-{ranks}"
        commit(run, config, ranks=ranks)
        form = find_format("merged", [f"as={code}", "rounding=dither"])
        with monkeypatch.context() as patch:
            if ranks == 2:
                patch.setattr("trainer.base.partitions.reading.PIECE_BYTES", 1000)
                patch.setattr("trainer.base.stored.shared.moving.AT_ONCE", 200)
            if ranks == 3:
                with patch.context() as during:
                    during.setattr(Store, "put_chunks", _begins_and_is_killed)
                    with pytest.raises(Killed):
                        form.write(run, open_store(str(folder)), None, QUIET)
            form.write(run, open_store(str(folder)), None, QUIET)
        files = (file for file in folder.rglob("*") if file.is_file() and file.name != "README.md")
        found.append({str(file.relative_to(folder)): file.read_bytes() for file in files})
    assert any(name.endswith(".safetensors") for name in found[0])
    assert [sorted(files) for files in found] == [sorted(found[0])] * 3
    assert not [name for name in found[0] if not found[0][name] == found[1][name] == found[2][name]]


@pytest.mark.parametrize("method", ["dora", "oft", "ia3"])
def test_methods_that_do_not_add_a_matrix_are_merged_by_the_difference_that_they_make(
    workshop: Workshop, plain: Path, tmp_path: Path, method: str
) -> None:
    base, defaults = stored(plain, "int8-zeros"), ("tuning.rank=16", "tuning.alpha=32")
    run, config = committed(workshop, base, f"tuning.method={method}", *(() if method == "dora" else defaults))
    export(run, tmp_path / "merged")
    before, after = weights(config, base), weights(config, tmp_path / "merged")
    sought = {name: change - before[name] for name, change in merged_in_fp32(run, config, before).items()}
    assert share_kept(before, after, sought) == pytest.approx(1, abs=0.15)


def test_a_base_in_16_bits_and_a_rounding_of_nothing_are_refused(
    workshop: Workshop, plain: Path, tmp_path: Path
) -> None:
    run, _ = committed(workshop, plain / "llama")
    with pytest.raises(ConfigError, match="as: stored keeps the codes of a base in 4 or 8 bits"):
        export(run, tmp_path / "merged")
    with pytest.raises(ConfigError, match="Give as=stored too"):
        find_format("merged", ["rounding=nearest"])
    with pytest.raises(ConfigError, match="as: 'kept'"):
        find_format("merged", ["as=kept"])
    assert not (tmp_path / "merged").exists()


def test_what_gptq_has_as_a_transpose_takes_only_what_adds_a_matrix(
    workshop: Workshop, plain: Path, tmp_path: Path
) -> None:
    run, _ = committed(workshop, stored(plain, "gptq-4"), "tuning.method=dora")
    with pytest.raises(ConfigError, match="this method cannot change a single row"):
        export(run, tmp_path / "merged")


@pytest.mark.parametrize("code", ["int4", "nvfp4", "mxfp4", "fp8"])
def test_a_base_in_16_bits_becomes_codes_that_say_in_the_mean_what_the_adapter_does(
    workshop: Workshop, plain: Path, tmp_path: Path, code: str
) -> None:
    base = plain / "llama"
    run, config = committed(workshop, base)
    found = {}
    for rounding in ("dither", "nearest"):
        form = find_format("merged", [f"as={code}", f"rounding={rounding}"])
        written = form.write(run, open_store(str(tmp_path / rounding)), None, QUIET)
        found[rounding] = weights(config, tmp_path / rounding)
    assert 0 < written.facts["codes_changed"] < written.facts["codes"]
    write_base_in_codes(resolve_base(config.model), config, code, open_store(str(tmp_path / "base")))
    before = weights(config, tmp_path / "base")
    given = weights(config, base)
    sought = {name: change - given[name] for name, change in merged_in_fp32(run, config, given).items()}
    assert share_kept(before, found["dither"], sought) == pytest.approx(1, abs=0.35)
    assert all(torch.equal(before[name], found["dither"][name]) for name in before if name not in sought)
    error = sum(float((before[name] - given[name]).square().sum()) for name in sought)
    assert error < (0.02 if code != "fp8" else 0.002) * sum(float(given[name].square().sum()) for name in sought)


@pytest.mark.parametrize("code", ["int4", "nvfp4", "mxfp4", "fp8"])
def test_weights_that_are_all_0_take_what_was_learnt(
    workshop: Workshop, plain: Path, tmp_path: Path, code: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain / "llama", base)
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("o_proj.weight"):
                tensor.zero_()
            elif name.endswith("up_proj.weight"):
                tensor[:, :32] = 0
        save_file(tensors, file, {"format": "pt"})
    config = workshop.config(f"zeros-{code}", f"model.base={base}", *SMALL)
    commit(workshop.store.sub(config.run.name), config)
    run, found = workshop.store.sub(config.run.name), {}
    for rounding in ("dither", "nearest"):
        form = find_format("merged", [f"as={code}", f"rounding={rounding}"])
        form.write(run, open_store(str(tmp_path / rounding)), None, QUIET)
        found[rounding] = weights(config, tmp_path / rounding)
        assert all(tensor.isfinite().all() for tensor in found[rounding].values())
    given = weights(config, base)
    for name, merged in merged_in_fp32(run, config, given).items():
        zero = given[name] == 0
        if not zero.any() or (code == "fp8" and "up_proj" in name):  # a tile of fp8 has other weights too
            continue
        change = merged[zero]
        allowed = {"int4": 0.1, "nvfp4": 0.15, "mxfp4": 0.2, "fp8": 0.03}[code] * change.norm()
        assert (found["nearest"][name][zero] - change).norm() < allowed
        assert (found["dither"][name][zero] - change).norm() < 2 * allowed
