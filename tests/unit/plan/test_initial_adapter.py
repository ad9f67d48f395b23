"""Which adapter a run begins from stays decided, whatever becomes of the place that `tuning.start` names."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.drive.sweep import laid_out
from launcher.start.check import check, with_found
from tests.material import Workshop, commit
from tests.unit.base.test_same_base import one_weight
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config, override
from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.export.write.adapter import export_adapter
from trainer.plan.beginning import Begun, RunCheckpoint, find_beginning
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.store.store import open_store
from trainer.tuning.method import method_of


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """With the run `sft`, committed after step 4."""
    workshop = Workshop(tmp_path, "speck", shard_size="4KB")
    commit(workshop.store.sub("sft"), workshop.config("sft"), 4)
    return workshop


def sft_learns_on(workshop: Workshop) -> None:
    """It commits step 5, and removes step 4 as its retention says."""
    commit(workshop.store.sub("sft"), workshop.config("sft"), 5)
    workshop.store.sub("sft").delete_folder(layout.checkpoint(4))


@pytest.mark.parametrize("place", ["sft", "sft@4", "{}/sft", "{}/sft/checkpoints/step-000000004"])
def test_a_run_goes_on_though_the_one_that_it_began_from_has_gone_on(workshop: Workshop, place: str) -> None:
    given = workshop.config("next", f"tuning.start={place.format(workshop.folder / 'store')}")
    first = check(given, resume=False)
    config = with_found(given, first)
    assert config.tuning.start in ("sft@4", f"{workshop.folder}/store/sft/checkpoints/step-000000004")
    commit(workshop.store.sub("next"), config, dataset=workshop.prepare(config).train)
    sft_learns_on(workshop)
    resolved = check(config, resume=True)
    assert resolved.beginning is not None
    assert resolved.beginning.begun
    assert first.beginning is not None
    assert resolved.beginning.facts == first.beginning.facts
    assert with_found(config, resolved).tuning.start == config.tuning.start
    with pytest.raises(ConfigError, match="is no committed checkpoint. The run has those of steps 5"):
        resolved.beginning.check()
    assert check(given, resume=True).config.tuning.start == config.tuning.start, "as torchrun's restarts ask"
    with pytest.raises(ConfigError, match="has base start_weights"):
        check(override(config, "tuning.start=sft@5"), resume=True)
    with pytest.raises(ConfigError, match="has base start_weights"):
        check(override(config, "tuning.start=null"), resume=True)


def test_a_run_that_began_from_nothing_is_asked_to_begin_from_a_run(workshop: Workshop) -> None:
    commit(workshop.store.sub("next"), workshop.config("next"), 4)
    config = workshop.config("next", "tuning.start=sft")
    found = find_beginning(config, method_of(config))
    assert isinstance(found, RunCheckpoint)
    assert found.place == "sft@4"


def test_the_trials_of_a_sweep_begin_from_one_checkpoint(workshop: Workshop) -> None:
    given = workshop.config("sweep", "tuning.start=sft", "sweep.settings={optim.lr: {grid: [0.1, 0.01]}}")
    config, plan = laid_out(given, resume=False)
    folder = workshop.store.sub("sweep")
    folder.put(layout.CONFIG, dump_config(config).encode())
    folder.put(layout.SWEEP, json.dumps(plan.to_json()).encode())
    for trial in plan.trials:
        own = plan.config_of(config, trial)
        assert own.tuning.start == "sft@4"
        commit(workshop.store.sub(trial.run), own)
    sft_learns_on(workshop)
    assert laid_out(given, resume=True)[0].tuning.start == "sft@4"


def test_an_adapter_of_another_base_of_the_same_shape_is_refused(workshop: Workshop) -> None:
    one_weight(workshop.base)
    with pytest.raises(ConfigError, match="tuning.start: 'sft@4' was trained over another base: .* is another"):
        resolve(workshop.config("next", "tuning.start=sft"))


def test_an_adapter_that_leaves_its_base_as_it_is_is_begun_from_however_it_began(workshop: Workshop) -> None:
    folder = workshop.folder / "peft"
    export_adapter(workshop.store.sub("sft"), open_store(str(folder)))
    config = workshop.config("next", f"tuning.start={folder}")
    found = resolve(config)
    begun: Any = found.beginning
    for init in (None, True, False, "gaussian", "eva", "orthogonal"):
        begun._settings["init_lora_weights"] = init
        assert begun.differences(config, found.method, found.base) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [1, 2]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_an_adapter_that_peft_would_load_over_another_base_is_refused(
    workshop: Workshop, setting: str, value: object
) -> None:
    folder = workshop.folder / "peft"
    export_adapter(workshop.store.sub("sft"), open_store(str(folder)))
    config = workshop.config("next", f"tuning.start={folder}")
    assert resolve(config).beginning is not None
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {setting: value}))
    with pytest.raises(ConfigError, match=f"tuning.start: .* has {setting}"):
        resolve(config)


@pytest.mark.parametrize("account", ["", "somebody/", "/elsewhere/"])
def test_an_adapter_over_a_base_of_another_name_is_refused(workshop: Workshop, account: str) -> None:
    folder = workshop.folder / "adapter"
    export_adapter(workshop.store.sub("sft"), open_store(str(folder)))
    settings, given = folder / "adapter_config.json", workshop.config("next", f"tuning.start={folder}")
    described = json.loads(settings.read_text())
    name = workshop.base.name
    for same in (f"{account}{name}/", f" {account}{name.upper()}", f"{account}models\\{name.capitalize()}"):
        settings.write_text(json.dumps(described | {"base_model_name_or_path": same}))
        resolve(given)
    settings.write_text(json.dumps(described | {"base_model_name_or_path": f"{account}Other-8B"}))
    with pytest.raises(ConfigError, match=rf"was made over the base '{account}Other-8B' \(base_model_name_or_path in"):
        resolve(given)


def test_an_adapter_of_pefts_is_known_by_its_weights_and_refused_over_other_shapes(workshop: Workshop) -> None:
    folder = workshop.folder / "shaped"
    export_adapter(workshop.store.sub("sft"), open_store(str(folder)))
    given = workshop.config("next", f"tuning.start={folder}")
    found = resolve(given).beginning
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert found is not None
    assert found.facts == {"start": str(folder), "start_weights": hashlib.sha256(weights).hexdigest()}
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    name = next(name for name in header if name.endswith("lora_A.weight"))
    shape = header[name]["shape"]
    header[name]["shape"] = shape[::-1]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    (folder / "adapter_model.safetensors").write_bytes(weights[:8] + text + weights[8 + size :])
    with pytest.raises(ConfigError, match=rf"is of another base: {name} has shape \[{shape[1]}, {shape[0]}\]"):
        resolve(given)


def test_settings_of_an_adapter_that_are_nested_without_end_are_one_sentence(workshop: Workshop) -> None:
    folder = workshop.folder / "deep"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(StorageError, match="adapter_config.json is no JSON"):
        resolve(workshop.config("next", f"tuning.start={folder}"))


def test_weights_that_have_changed_since_a_run_began_from_them_are_refused(workshop: Workshop) -> None:
    config = workshop.config("dpo", "tuning.start=sft")
    begun = resolve(config).beginning
    assert begun is not None
    Begun(begun.facts, lambda: begun).check()
    with pytest.raises(ConfigError, match="has other weights than the run began from"):
        Begun({**begun.facts, "start_weights": "0" * 64}, lambda: begun).check()


def test_what_is_no_beginning_is_said_by_its_place(workshop: Workshop) -> None:
    def refused(place: str, kind: type[CapstanError], words: str) -> None:
        with pytest.raises(kind, match=f"^tuning.start: '{place}' {words}"):
            resolve(workshop.config("next", f"tuning.start={place}"))

    refused("sft@x", ConfigError, "is no name of a run. Give NAME, NAME@STEP")
    refused("nobody", ConfigError, "is no run with a checkpoint and no folder with adapter_config.json")
    refused("nobody@3", ConfigError, r"is no committed checkpoint\. The run has none\.")
    workshop.store.put(f"broken/{layout.manifest(4)}", b"{}")
    refused("broken", StorageError, "has no whole checkpoint: ")
    folder = workshop.folder / "peft"
    export_adapter(workshop.store.sub("sft"), open_store(str(folder)))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(StorageError, match="adapter_config.json is no description of an adapter"):
        resolve(workshop.config("next", f"tuning.start={folder}"))
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ConfigError, match="is an adapter of PEFT's kind IA3, and tuning.method is lora"):
        resolve(workshop.config("next", f"tuning.start={folder}"))


def test_a_checkpoint_of_another_run_is_compared_before_it_is_begun_from(workshop: Workshop) -> None:
    config = workshop.config("next", "tuning.start=sft")
    method, base = method_of(config), resolve_base(config.model)
    begun = find_beginning(config, method)
    assert isinstance(begun, RunCheckpoint)
    assert begun.differences(config, method, base) == []

    def differing(**changed: Any) -> str:
        given = {"base": {**begun.manifest.base, **changed.pop("base", {})}, **changed}
        (one,) = replace(begun, manifest=replace(begun.manifest, **given)).differences(config, method, base)
        return one

    assert "was trained over " in differing(base={"fingerprint": "other"})
    assert "is another base. Give that one." in differing(base={"layers": 1})
    assert differing(base={"add_tokens": ["<a>"]}).startswith("model.add_tokens: tuning.start: 'sft@4' has ['<a>']")
    shapes = {name: shape[::-1] for name, shape in begun.manifest.shapes.items()}
    assert differing(shapes=shapes).endswith("has learnt other parameters than these settings of tuning have.")
    (method_alone,) = replace(
        begun, manifest=replace(begun.manifest, adapter={**begun.manifest.adapter, "method": "dora", "alpha": 4.0})
    ).differences(config, method, base)
    assert method_alone.startswith("tuning.method: tuning.start: 'sft@4' has 'dora'")
    alpha = {**begun.manifest.adapter, "alpha": 4.0}
    assert differing(adapter=alpha).startswith("tuning.alpha: tuning.start: 'sft@4' has 4.0. Set tuning.alpha: 4.0")
    unknown = {**begun.manifest.adapter, "of_a_later_version": 3}
    assert differing(adapter=unknown).startswith("tuning.of_a_later_version: tuning.start: 'sft@4' has 3.")
    named = {**begun.manifest.adapter, "targets": ["q_proj", "and others"], "dropout": 0.5}
    named |= {"init": "pissa", "through": "stored"}
    same = replace(begun, manifest=replace(begun.manifest, adapter=named))
    assert same.differences(config, method, base) == [], "the layers are the same, however they are named"
    assert begun.facts["start_data"] == [begun.manifest.dataset]
    chained = replace(begun.manifest, base={**begun.manifest.base, "start_data": ["first", "second"]})
    assert replace(begun, manifest=chained).facts["start_data"] == ["first", "second", begun.manifest.dataset]
    begun.check()
    workshop.store.sub("sft").delete(begun.manifest.shards[0].key)
    with pytest.raises(StorageError, match="^tuning.start: 'sft@4' is not whole: "):
        begun.check()
