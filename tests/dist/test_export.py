"""An exported adapter is an ordinary PEFT directory that holds what the run learnt."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dist.launch import launch
from tests.material import Workshop
from trainer import run_layout
from trainer.config import dump_config
from trainer.errors import ConfigError, NothingToResume, StorageError
from trainer.export import export_adapter, master_weights
from trainer.manifest import committed_steps, read_manifest
from trainer.store import Store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished run of two ranks, committed after steps 2 and 4."""
    # bitsandbytes' fused CPU kernel, which plain transformers uses where it can, wants widths that divide by 32.
    workshop = Workshop(tmp_path_factory.mktemp("export"), intermediate_size=192)
    config = workshop.config("done", "train.steps=4", "checkpoint.every_steps=2", "optim.lr=0.01", "tuning.rank=5")
    run = workshop.store.sub("done")
    run.put(run_layout.CONFIG, dump_config(config).encode())
    outcomes = launch(2, "run", dump_config(config), workshop.prepare(config).train)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}
    assert committed_steps(run) == [4, 2]
    return run


def copy(run: Store, to: Path) -> Store:
    source = Path(run.uri.removeprefix("file://"))
    shutil.copytree(source, to / "store" / source.name)
    from trainer.store import open_store

    return open_store(str(to / "store")).sub(source.name)


def test_peft_loads_the_adapter_and_finds_the_master_weights(run: Store, tmp_path: Path) -> None:
    manifest = export_adapter(run, tmp_path / "adapter")
    assert manifest.step == 4
    base: Any = AutoModelForCausalLM.from_pretrained(manifest.base["path"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    masters = master_weights(run, manifest)
    adapters = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(adapters) == len(masters) == 2 * 7 * 2
    for name, value in masters.items():
        assert torch.equal(adapters[f"base_model.model.{name}"], value.bfloat16()), name
    assert all(value.any() for value in masters.values()), "something was never trained"


def test_transformers_and_peft_give_the_trained_models_logits(run: Store, tmp_path: Path) -> None:
    export_adapter(run, tmp_path / "adapter")
    (proof,) = launch(1, "export_proof", run.uri, str(tmp_path / "adapter"))

    assert proof["adapter_logits_max_diff"] <= proof["tolerance"] < proof["adapter_logits_effect"]


def test_the_directory_has_the_tokenizer_the_settings_and_the_runs_facts(run: Store, tmp_path: Path) -> None:
    export_adapter(run, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (5, 16, "LORA")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == 259
    card = (tmp_path / "adapter/README.md").read_text()
    assert "| step | 4 |" in card
    assert "library_name: peft" in card
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_destination_that_holds_something_is_refused(run: Store, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="is not empty"):
        export_adapter(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_checkpoint_is_passed_over_and_none_at_all_is_an_error(run: Store, tmp_path: Path) -> None:
    ours = copy(run, tmp_path)
    for step, outcome in ((4, 2), (2, StorageError)):
        key = read_manifest(ours, step).shards[0].key
        ours.put(key, ours.get(key)[:-1] + b"\x7f")
        if isinstance(outcome, int):
            assert export_adapter(ours, tmp_path / "older").step == outcome
        else:
            with pytest.raises(outcome, match="is whole"):
                export_adapter(ours, tmp_path / "none")
    for step in (4, 2):
        ours.delete(run_layout.manifest(step))
    with pytest.raises(NothingToResume, match="has no committed checkpoint"):
        export_adapter(ours, tmp_path / "none")
    assert not (tmp_path / "none").exists()
