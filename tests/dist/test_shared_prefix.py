"""A prompt that is once in a row: loss and gradients are those of answers which have a copy each."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.dist import gradients
from tests.dist.launch import launch
from tests.dist.test_gradients import distance
from tests.material import Workshop, make_labelled, make_pairs
from trainer.config import dump_config

KINDS: dict[str, tuple[str, ...]] = {
    "answers": ("data.format=answers",),
    "dpo": ("data.format=preference", "objective.name=dpo"),
    "kto": ("data.format=labelled", "objective.name=kto"),
}


def make_answers(path: Path, rows: int = 4, each: int = 8, seed: int = 6) -> Path:
    """Eight answers to each of some long prompts."""
    draw = random.Random(seed)
    words = "the ant bee cat dog emu fox gnu hen ibis jay".split()
    said = [
        {
            "prompt": " ".join(draw.choices(words, k=8)) + "? ",
            "answers": [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(each)],
        }
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    return path


@pytest.mark.long
def test_loss_and_gradients_are_those_of_copied_prompts(tmp_path: Path) -> None:
    """Of all documents in one step, as sharing packs them otherwise; at last with rows that two ranks have between
    them.
    """
    workshop, loads = Workshop(tmp_path), dict[tuple[str, bool, int], tuple[str, str, str]]()
    made = {"answers": make_answers, "dpo": make_pairs, "kto": make_labelled}
    for kind, settings in KINDS.items():
        path = made[kind](tmp_path / f"{kind}.jsonl")
        for shared, ranks in [(False, 1), (True, 1), *([(True, 2)] if kind != "kto" else [])]:
            config = workshop.config(
                f"{kind}-{shared}-{ranks}",
                *settings,
                f"data.train=[{{path: {path}}}]",
                f"data.share_prefix={shared}",
                f"sharding.sequence_parallel={ranks}",
                *("data.sequence_length=256", "train.global_batch=16", "model.dtype=fp32"),
            )
            file = tmp_path / f"{kind}-{shared}-{ranks}.safetensors"
            loads[kind, shared, ranks] = dump_config(config), workshop.prepare(config).train, str(file)
    found = dict[tuple[str, bool, int], float]()
    for ranks in (1, 2):
        mine = [case for case in loads if case[2] == ranks]
        losses = launch(ranks, gradients.first_steps, [loads[case] for case in mine], timeout=600.0)[0]
        found |= zip(mine, losses, strict=True)
    for case, loss in found.items():
        apart: Any = case[0], False, 1
        assert loss == pytest.approx(found[apart], rel=1e-5), case
        assert distance(load_file(loads[case][2]), load_file(loads[apart][2])) < 1e-5, case
