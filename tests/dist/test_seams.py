"""A method and an objective that the project does not know are added with one file each, and no edit elsewhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.view.status import read_generation
from tests.dist import seams
from tests.dist.launch import launch
from tests.dist.seams import TOYS
from tests.material import Workshop, tuning_misfits
from trainer import tuning
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import as_tensor
from trainer.config import Config, dump_config
from trainer.errors import ConfigError
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.store.safetensors_index import numel
from trainer.store.store import open_store
from trainer.tuning import objective

CONSTANT = ("optim.schedule=constant", "optim.warmup_steps=0", "checkpoint.every_steps=3")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A base with biases."""
    return Workshop(tmp_path_factory.mktemp("seams"), "qwen2")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name in ((tuning, "tuning"), (objective, "objective")):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(TOYS / name)])


def train(workshop: Workshop, config: Config, ranks: int, how: str = "start") -> list[float]:
    """The losses of this start's steps."""
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())  # as the launcher does before any rank starts
    launch(ranks, seams.train_with_toys, dump_config(config), workshop.prepare(config).train, how)
    records = read_generation(run, 1 if how == "start" else 2)
    return [record["loss"] for record in records["step"]]


def biases(name: str, steps: int, workshop: Workshop) -> Config:
    method = ("tuning.method=biases", "tuning.rank=16", "tuning.alpha=32")
    return workshop.config(name, *CONSTANT, *method, "optim.lr=0.01", f"train.steps={steps}")


def test_a_method_of_one_file_trains_resumes_at_another_world_size_and_exports(
    workshop: Workshop, tmp_path: Path
) -> None:
    whole = train(workshop, biases("whole", 6, workshop), ranks=2)
    assert whole[-1] < whole[0]
    first = train(workshop, biases("parts", 3, workshop), ranks=2)
    rest = train(workshop, biases("parts", 6, workshop), ranks=3, how="resume")
    assert [*first, *rest] == pytest.approx(whole, abs=2e-3)

    run = workshop.store.sub("parts")
    assert export_adapter(run, open_store(str(tmp_path / "biases"))).step == 6
    exported = load_file(tmp_path / "biases/biases.safetensors")
    base = resolve_base(workshop.config("any").model)
    assert sorted(exported) == sorted(name for name in base.tensors if name.endswith(".bias"))
    for name, values in exported.items():
        source = base.tensors[name]
        before = as_tensor(source.read(0, numel(source)), source)
        assert not torch.equal(values, before.to(values.dtype)), f"{name} has not learnt"
        assert float((values.float() - before.float()).abs().max()) < 6 * 0.011  # as far as six steps of 0.01 go


def test_a_method_that_trains_the_base_refuses_a_copy_of_it_on_every_node(workshop: Workshop) -> None:
    config = biases("any", 3, workshop)
    architecture = resolve_base(config.model).architecture
    assert tuning_misfits(config, architecture) == []
    (sentence,) = tuning_misfits(
        workshop.config("any", "tuning.method=biases", "sharding.scope=node", "tuning.rank=16", "tuning.alpha=32"),
        architecture,
    )
    assert sentence.startswith("sharding.scope: node keeps a copy of the base on every node")


@pytest.mark.long
def test_a_checkpoint_of_one_method_is_not_continued_with_another(workshop: Workshop) -> None:
    train(workshop, biases("changed", 3, workshop), ranks=1)
    with pytest.raises(AssertionError, match="has adapter method: 'biases', the configuration gives 'lora'"):
        train(workshop, workshop.config("changed", *CONSTANT, "train.steps=6"), ranks=1, how="resume")


@pytest.mark.long
def test_an_objective_of_one_file_trains_resumes_at_another_world_size_and_exports(
    workshop: Workshop, tmp_path: Path
) -> None:
    def config(name: str, steps: int, *more: str) -> Config:
        return workshop.config(name, *CONSTANT, f"train.steps={steps}", *more)

    toy = "objective.name=every_second"
    plain = train(workshop, config("plain", 3), ranks=2)
    whole = train(workshop, config("every-second", 6, toy), ranks=2)
    assert whole[:3] != pytest.approx(plain, abs=2e-3)
    first = train(workshop, config("every-second-parts", 3, toy), ranks=2)
    rest = train(workshop, config("every-second-parts", 6, toy), ranks=3, how="resume")
    assert [*first, *rest] == pytest.approx(whole, abs=2e-3)
    for record in read_generation(workshop.store.sub("every-second-parts"), 2)["step"]:
        assert round(record["rows"] * record["targets"]) == 6, (
            "a measure is summed over all rows, of which two are empty"
        )
    with pytest.raises(AssertionError, match="has objective name: 'every_second', the configuration gives 'sft'"):
        train(workshop, config("every-second-parts", 9), ranks=1, how="resume")
    exported = export_adapter(workshop.store.sub("every-second-parts"), open_store(str(tmp_path / "adapter")))
    assert exported.step == 6
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_settings_that_the_toy_does_not_read_are_refused(workshop: Workshop) -> None:
    config = workshop.config("any", "tuning.method=biases")
    with pytest.raises(ConfigError, match=r"tuning\.rank: has no effect with tuning\.method: biases"):
        tuning_misfits(config, resolve_base(config.model).architecture)
