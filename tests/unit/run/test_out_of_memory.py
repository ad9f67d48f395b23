"""A GPU that runs out of memory: the run ends with exit code 4 and what was planned."""

import json
from pathlib import Path

import pytest
import torch

from tests.material import Workshop
from trainer.errors import DoesNotFit
from trainer.plan.resolve import resolve
from trainer.processes.ranks import Ranks, Team, World
from trainer.run.layout import metrics
from trainer.run.metrics import JsonLines, Metrics
from trainer.run.records import claim_generation
from trainer.run.requests import StopSignal
from trainer.train.start import Start, early_end, planned_memory


def test_out_of_memory_names_the_largest_parts_of_the_plan(tmp_path: Path):
    workshop = Workshop(tmp_path)
    config = workshop.config("large")
    run = workshop.store.sub("large")
    told = Metrics([JsonLines(run, claim_generation(run), seconds=60)])
    world = World(0, 2, 2, 0, torch.device("cpu"))
    ranks = Team(**vars(world), world=world)
    stop = StopSignal(run, watches=False, seconds=60)
    start = Start(resolve(config), ranks, workshop.store, run, 1, metrics=told, stop=stop)
    with pytest.raises(DoesNotFit) as raised, early_end(start):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    told.close()
    assert raised.value.exit_code == 4
    assert "The plan for 2 ranks is " in str(raised.value)
    assert "GiB a GPU: context 0.8 GiB, communicators 0.2 GiB, " in str(raised.value)
    assert "The plan for 1 rank is " in planned_memory(start.resolved, Ranks(0, 1, 1, 0, torch.device("cpu")))
    end = json.loads(run.get(metrics(1)).splitlines()[-1])
    assert (end["outcome"], end["reason"]) == ("failed", str(raised.value))
