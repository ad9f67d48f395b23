"""A plan in words: how long a run is, and which rows fit."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from launcher.plan import planning, summary
from launcher.plan.planning import Planned
from launcher.plan.starts import Phase, Restarts, StartTime
from launcher.plan.summary import Longest, _sureness, binary, find_longest, plan_lines, plan_tables, show_longest
from tests.unit.plan.test_plan import TINY, config, plan_of
from trainer.errors import ConfigError
from trainer.plan.forecast import Length
from trainer.plan.longest import LongestRow, PlannedRanks
from trainer.plan.needs import ALLOWANCES, ESTIMATES, GpuMemory, HostMemory

KNOWN = Length(1200, 2.0, 4_000_000, 2_000_000, counted=True, compiled=True, file_bytes=3 * 2**20, steps_of_epoch=600)
UNKNOWN = Length(None, 2.0, None, None, counted=False, compiled=False, file_bytes=0)
GUESSED = Length(1200, 0.5, None, 2_000_000, counted=False, compiled=False, file_bytes=3 * 2**20, steps_of_epoch=600)
ROWS = "of 32 rows of 512 tokens"


def said(length: Length, *settings: str, **planned: Any) -> dict[str, str]:
    given = config("train.global_batch=32", "data.sequence_length=512", *settings)
    plan = plan_of(given, {**TINY, "model_type": "llama", "max_position_embeddings": 512}, 1, 1, None)
    start = SimpleNamespace(phases={}, run="sft", ranks=1, seconds=60.0)
    facts = {"gpu": None, "whose": None, "pictures": None, "forecast": None, "restarts": None, "start": start}
    made: Any = SimpleNamespace(plan=plan, length=length, **facts | planned)
    lines = dict[str, str]()
    for name, text in plan_lines(made, given):
        lines[name] = f"{lines[name]} {text}" if name in lines else str(text)
    return lines


@pytest.mark.parametrize(
    ("length", "settings", "words"),
    [
        (KNOWN, [], f"about 2 epochs, about 4 M tokens, 1,200 steps {ROWS}"),
        (KNOWN, ["train.steps=null", "train.epochs=2"], f"2 epochs, about 4 M tokens, 1,200 steps {ROWS}"),
        (GUESSED, [], f"about 0.5 epochs, about 1,200 steps {ROWS}"),
        (UNKNOWN, [], f"2 epochs; how many steps {ROWS} is not known before the data is compiled"),
        (Length(10, None, None, None, True, False, 0), [], f"10 steps {ROWS}"),
    ],
)
def test_the_length_of_a_run_is_told_as_far_as_it_is_known(length: Length, settings: list[str], words: str) -> None:
    assert said(length, *settings)["length"] == words


@pytest.mark.parametrize(
    ("length", "rhythm", "data", "time"),
    [
        (KNOWN, "every 150 steps", "2 M tokens an epoch, compiled", "the GPU is not known: --gpu H100"),
        (GUESSED, "about every 150 steps", "some 2 M tokens an epoch, by the size of the files: 3.0 MiB", "the GPU is"),
        (UNKNOWN, "not known in steps before", "not known before it is compiled", "the number of steps is not known"),
    ],
)
def test_what_comes_so_often_an_epoch_the_data_and_the_time_are_told_as_far_as_they_are_known(
    length: Length, rhythm: str, data: str, time: str
) -> None:
    lines = said(length, "data.held_out=0.1", "eval.per_epoch=4")
    assert lines["rhythm"].startswith(f"eval.per_epoch: 4 is {rhythm}")
    assert lines["data"].startswith(data)
    assert lines["time"].startswith(f"no estimate, as {time}")
    both = said(
        length, "data.held_out=0.1", "eval.per_epoch=4", "checkpoint.per_epoch=1200", "cluster.gpus_per_worker=0"
    )
    assert "checkpoint.per_epoch: 1200 is" in both["rhythm"]
    if length.steps_of_epoch:
        assert both["rhythm"].endswith("every 1 steps")
        assert both["time"] == "no estimate, as no run of this store has done this work on CPUs"
        assert "only the GPU's memory is known" in said(length, gpu=SimpleNamespace(name="x", memory=2**40))["time"]


def test_events_of_an_epoch_are_about_so_often_while_its_steps_are_not_counted() -> None:
    lines = said(replace(KNOWN, counted=False), "data.held_out=0.1", "eval.per_epoch=4")
    assert lines["rhythm"] == "eval.per_epoch: 4 is about every 150 steps"


def test_a_start_has_the_phases_that_take_time_and_restarts_their_share() -> None:
    phases = {"launch": Phase(20.0, "", assumed=False), "meet": Phase(0.04, ""), "first_step": Phase(40.0, "")}

    def told(run: str | None, ranks: int, *, share: float = 0.0) -> dict[str, str]:
        start = StartTime(phases, ranks, run)
        return said(KNOWN, start=start, restarts=Restarts(50_000, 2.5, 350.0, share))

    assert (
        told(None, 1)["start"] == "about 1 min 0 s on 1 rank (launch 20.0 s, first step 40.0 s); basis: the last table"
    )
    assert told("old", 1)["start"] == "about 1 min 0 s (launch 20.0 s, first step 40.0 s), as old took on 1 rank"
    assert told("old", 2)["start"].endswith("as old took on 2 ranks; 1 rank may take another time")
    assert told("old", 1, share=9e-5)["restarts"].startswith(
        "less than 0.01% of the cost, at a failure every 50,000 GPU"
    )
    often = told("old", 1, share=0.0123)["restarts"]
    assert often.startswith("1.23% of the cost: about 2.5, each ")
    assert "at a failure every 50,000 GPU hours (--failure-every)" in often
    assert "restarts" not in said(KNOWN, start=StartTime(phases, 1, "old"))


@pytest.mark.parametrize(
    ("words", "value", "shown"),
    [
        *((summary._large, *one) for one in ((9_999, "9,999"), (31_200, "31.2 k"), (4e6, "4 M"), (2.5e13, "25 T"))),
        *((summary._flops, *one) for one in ((9_999, "9,999 FLOP"), (31_200, "31.2 kFLOP"))),
        *((summary._rounded, *one) for one in ((1_234.5, "1,234"), (12.34, "12.3"), (1, "1.0"), (0.1234, "0.12"))),
        *((lambda count: summary._each(count, "GPU"), *one) for one in ((1, "its GPU"), (2, "each of 2 GPUs"))),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_numbers_of_a_plan_are_short(words: Callable[[Any], str], value: float, shown: str) -> None:
    assert words(value) == shown


def test_a_batch_is_shown_by_what_it_is_made_of() -> None:
    def shown(*settings: str) -> dict[str, str]:
        given = config("train.global_batch=4", *settings)
        facts = plan_tables(
            plan_of(given, {**TINY, "model_type": "llama", "max_position_embeddings": 512}, 4, 4, None)
        )[0]
        return dict(zip(*(list(map(str, column.cells)) for column in facts.columns), strict=True))

    alone, shared = shown(), shown("sharding.sequence_parallel=2")
    assert (alone["ranks"], alone["rows of a step"]) == ("4", "4 rows")
    assert not [name for name in alone if name.startswith(("groups of ranks", "ranks that share", "empty rows"))]
    assert (shared["groups of ranks with rows of their own"], shared["ranks that share each row"]) == ("2", "2")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 * 2**19, "1.5 MiB"), (2**40, "1,024.0 GiB")]
)  # fmt: skip
def test_memory_is_counted_in_powers_of_two(count: int, words: str) -> None:
    assert binary(count) == words


def test_a_table_without_bytes_has_its_total_alone() -> None:
    plan = plan_of(config(), {**TINY, "model_type": "llama", "max_position_embeddings": 512}, 1, 1, None)
    received = plan_tables(plan)[-1]
    assert received.columns[0].header == "received by one rank in a step"
    assert [list(map(str, column.cells)) for column in received.columns] == [["total"], ["0 bytes"]]


@pytest.mark.parametrize(("positions", "factor"), [(None, ""), (4096, ""), (4095, "of a factor up to 2"), (1000, "5")])
def test_the_longest_rows_are_a_line_for_each_setting_with_what_they_rest_on(
    positions: int | None, factor: str
) -> None:
    first = {"train.micro_batch": 1}
    rows = [
        LongestRow({}, 1024, 2**20, 2**30),
        LongestRow(first, 0, 2**20, 2**30),
        LongestRow({**first, "train.tiled_mlp": True}, 4096, 2**21, 2**31),
    ]
    ranks = PlannedRanks(8, 4, 2**33, on_gpu=False)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show_longest(Longest(ranks, None, positions, rows)))
    cells = [" ".join(re.split(r"[\s│]+", line)).strip() for line in console.export_text().splitlines()]
    assert any(line.startswith("as they are") and "1,024" in line and "1.0 MiB" in line for line in cells)
    assert any(line.startswith("without those that follow") and "none fits" in line for line in cells)
    assert any(line.startswith("and train.tiled_mlp: True") and "4,096" in line and "2.0 GiB" in line for line in cells)
    assert "By the plan; ranks: 8, each with 8.0 GiB of the host." in cells
    told = [line for line in cells if "positions: longer documents need" in line]
    assert [line.endswith(f"{factor}.") for line in told] == ([True] if factor else [])


@pytest.mark.parametrize(
    ("settings", "gpu", "memory"),
    [(["cluster.gpus_per_worker=0"], None, 3 * 2**30), ([], "24GiB", 24 * 2**30), ([], None, None)],
)
def test_the_longest_row_is_looked_for_in_the_memory_of_a_gpu_or_of_the_host(
    settings: list[str], gpu: str | None, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**TINY, "model_type": "llama", "max_position_embeddings": 512, "architectures": ["LlamaForCausalLM"]}
        )
    )
    asked = list[PlannedRanks]()
    monkeypatch.setattr(planning, "host_memory_left", lambda: 12 * 2**30)
    monkeypatch.setattr(planning, "described_gpus", list)
    monkeypatch.setattr(summary, "longest_rows", lambda config, base, ranks: asked.append(ranks) or [])
    given = config(f"model.base={tmp_path}", "cluster.workers=2", *settings)
    if memory is None:
        with pytest.raises(ConfigError, match="^--longest: needs to know the memory of a GPU"):
            find_longest(given, gpu, None)
        return
    found = find_longest(given, gpu, None)
    assert asked == [found.ranks] == [PlannedRanks(2, 2, memory, on_gpu=gpu is not None)]
    assert (found.positions, found.gpu is None) == (512, gpu is None)


def test_what_is_counted_exactly_is_what_tensors_take() -> None:
    parts = {part.name for kind in (GpuMemory, HostMemory) for part in fields(kind)} - {"total"}
    assert parts - {*ESTIMATES, *ALLOWANCES} == {
        *("frozen_quantized", "frozen_unquantized", "frozen_whole", "frozen_tower", "dequantized_weight"),
        *("adapter_weights", "adapter_states", "gradient_buckets"),
        *("offloaded_base", "checkpoint_copy", "kept_updates", "pictures_read_ahead"),
    }


def test_what_is_counted_is_the_rest_of_what_is_estimated_and_allowed() -> None:
    sizes = dict.fromkeys((part.name for part in fields(GpuMemory)), 2**20)
    memory = GpuMemory(**{**sizes, "activations": 2**30, "context": 2**31, "total": 5 * 2**30})
    estimated, allowed = (sum(getattr(memory, name, 0) for name in names) for names in (ESTIMATES, ALLOWANCES))
    said = _sureness(cast("Planned", SimpleNamespace(plan=SimpleNamespace(memory_per_gpu=memory))))
    assert said.partition(";")[0] == binary(5 * 2**30 - estimated - allowed) == "2.0 GiB"
    assert f"; estimated {binary(estimated)} (" in said
    assert said.endswith(f"; {binary(allowed)} allowed for the device")
