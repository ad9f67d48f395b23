"""With `checkpoint.adapters` an ordinary PEFT folder lies beside each commit, and goes with it."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop, commit
from trainer.config import Checkpoint, dump_config
from trainer.export.write import checkpoint_adapters as beside
from trainer.export.write.adapter import export_adapter
from trainer.export.write.checkpoint_adapters import AdapterWriter
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.state.checkpoint.retention import plan_removal, remove
from trainer.store.store import Store, open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

HALF = ("adapter_model.safetensors", "*token*")
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, intermediate_size=192)


def folder(run: Store, step: int) -> Path:
    return Path(run.uri.removeprefix("file://"), layout.adapter(step))


def names(run: Store, step: int) -> set[str]:
    return {path.name for path in folder(run, step).glob("*")}


def logits(base: Path, adapter: Path) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=torch.arange(3, 60)[None]).logits


def test_a_run_leaves_the_adapter_of_each_commit_that_stays(workshop: Workshop, tmp_path: Path) -> None:
    settings = ("train.steps=3", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "checkpoint.adapters=true")
    config, run = workshop.config("beside", *settings, "optim.lr=0.01"), workshop.store.sub("beside")
    run.put(layout.CONFIG, dump_config(config).encode())
    (outcome,) = launch(1, runs.run, dump_config(config), workshop.prepare(config).train, timeout=400)
    assert outcome["outcome"] == "finished"
    assert committed_steps(run) == [3, 2]
    assert (names(run, 3), names(run, 2), names(run, 1)) == (FILES, FILES, set())

    for step in (2, 3):
        export_adapter(run, open_store(str(tmp_path / f"{step}")), step)
    exported = {step: logits(workshop.base, tmp_path / f"{step}") for step in (2, 3)}
    for step in (2, 3):
        assert torch.equal(logits(workshop.base, folder(run, step)), exported[step])
    assert not torch.equal(exported[2], exported[3])

    # Retention takes it for no orphan, however old, as long as its checkpoint stays, and removes it then.
    assert plan_removal(run, Checkpoint(keep_last=2), orphan_hours=0).orphans == []
    remove(run, plan_removal(run, Checkpoint(keep_last=1), orphan_hours=0))
    assert (names(run, 3), names(run, 2)) == (FILES, set())


def test_what_a_kill_or_a_failure_left_out_is_made_up_for(workshop: Workshop) -> None:
    run, said = workshop.store.sub("killed"), list[str]()
    commit(run, workshop.config("killed"), 4)
    commit(run, workshop.config("killed"), 5)
    for name, content in {"README.md": b"trained with Capstan", "adapter_model.safetensors": b"half"}.items():
        run.put(f"{layout.adapter(5)}/{name}", content)  # of an export that was killed
    shard = layout.shard(4, "000001-000001", 0)
    run.put(shard, run.get(shard)[:-1] + b"?")
    writer = AdapterWriter(run, HALF, said.append)
    writer.write()
    writer.close(wait=True)
    assert "adapter of step 5 written beside its checkpoint" in said[0]
    assert names(run, 5) == FILES
    assert "the adapter of step 4 could not be written, which is tried again after the next commit: " in said[1]
    assert "is not whole" in said[1]
    assert names(run, 4) == set()


def test_it_keeps_nobody_waiting(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = workshop.store.sub("slow"), list[str]()
    commit(run, workshop.config("slow"), 4)
    sleeper = workshop.folder / "sleep"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(beside.sys, "executable", str(sleeper))
    writer, started = AdapterWriter(run, HALF, said.append), time.monotonic()
    for _ in range(3):
        writer.write()
    writer.close(wait=False)
    assert time.monotonic() - started < 200, "it waited for the process that sleeps"
    assert (names(run, 4), said) == (set(), [])
