"""A report of whatever a run's folder holds: nothing yet, damage, hostile texts, very many steps, or several runs."""

import errno
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from launcher.policy.trials import planned, trial_config
from launcher.report import plots, report, trained
from launcher.report.figures import other_data, read_figures
from launcher.report.history import MOST_POINTS, Columns, History, means, thinned
from launcher.report.page import FORMATS, events, loss_plot, measure_of, measure_plots, run_page
from launcher.report.plots import BEST, GREY, PLAIN, Axis, Events, Line, Series, lines, parallel, spark, tick
from launcher.report.report import (
    comparison_page,
    comparison_plots,
    differing_settings,
    keep_report,
    read_sweep_figures,
    sweep_page,
)
from launcher.report.trained import DataFigures, Settings, read_settings, repeat_figures, trained_figures
from launcher.view.sweep import EARLY, STOPPED_EARLY, read_plan
from tests import checkpoints
from tests.browser import chromium, look_at
from trainer.config import dump_config, parse_config
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.requests import request_stop
from trainer.store.store import Store, open_store

NOW = 1_800_000_000.0
CONFIG = b"run: {name: demo}\nmodel: {base: /models/b}\noptim: {lr: 0.001}\ntrack: {price_per_gpu_hour: 3.0}\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


def make_run(store: Store, *starts: list[dict[str, Any]], name: str = "demo", config: bytes = CONFIG) -> Store:
    run = store.sub(name)
    run.put(layout.CONFIG, config)
    for number, records in enumerate(starts, 1):
        run.put(layout.metrics(number), "".join(json.dumps(record) + "\n" for record in records).encode())
    return run


def start(step: int = 0, time: float = NOW, **more: Any) -> dict[str, Any]:
    facts = {"world_size": 4, "step": step, "total_steps": 20, "device": "cuda:0 (NVIDIA H100)", "start_seconds": 60.0}
    return {"kind": "start", **facts, "time": time, **more}


def step(number: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    given = {"loss": loss, "lr": 1e-3, "tokens": 1000, "targets": 900, "seconds": 10.0, "data_seconds": 1.0}
    return {"kind": "step", "step": number, **given, "time": NOW + 10 * number, **more}


def end(outcome: str, reason: str = "", time: float = NOW + 200) -> dict[str, Any]:
    return {"kind": "end", "outcome": outcome, "step": None, "reason": reason, "time": time}


def test_thinned_points_keep_the_ends_and_every_extreme() -> None:
    points = [(float(x), math.sin(x / 500)) for x in range(10_000)]
    points[0], points[-1] = (0.0, points[9][1]), (9999.0, points[-9][1])
    points[4321] = (4321.0, 9.0)
    points[7777] = (7777.0, -9.0)
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert few == sorted(few)
    assert {points[0], points[4321], points[7777], points[-1]} <= set(few) <= set(points)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]
    assert sum(y for _, y in means(points)) / len(means(points)) == pytest.approx(0.0295, abs=1e-4)
    assert [means(points)[at][0] for at in (0, -1)] == [65.0, 9999.0], "the ends of 150 stretches"
    assert means(points[:MOST_POINTS]) == []


def test_hours_of_gpus_alone_have_a_price(store: Store) -> None:
    tried = [start(device="cpu", world_size=2), step(1), step(2), end("failed", time=NOW + 20)]
    cost = read_figures(make_run(store, tried, [start(1, NOW + 100), end("finished", time=NOW + 160)])).cost
    assert cost is not None
    assert cost["hours"] == pytest.approx(4 * (60 + 60) / 3600)
    assert cost["price"] == pytest.approx(3.0 * cost["hours"])
    assert cost["lost_hours"] == 0, "the step that was lost had no GPU"
    cost = read_figures(make_run(store, tried, [start(1, NOW + 100, device="cpu", world_size=2)], name="none")).cost
    assert cost is not None
    assert (cost["device"], cost["price"], cost["price_per_hour"]) == ("CPU", None, None)
    assert cost["hours"] == pytest.approx(2 * (60 + 20 + 60) / 3600)
    assert cost["lost_hours"] == pytest.approx(2 * 10 / 3600)


def test_columns_lack_what_a_step_lacks() -> None:
    columns = Columns()
    for number, more in enumerate([{}, {"mfu": 0.5}, {"mfu": math.nan}, {"mfu": 0.25, "samples": "ab", "on": True}], 1):
        columns.add({"kind": "step", "step": number, **more})
    assert list(columns.points("mfu")) == [(2, 0.5), (4, 0.25)]
    assert columns.names == ["mfu"]
    taken = columns.cut(3)
    assert (list(columns.points("mfu")), list(taken.points("mfu"))) == ([(2, 0.5)], [(4, 0.25)])


def test_steps_that_a_restart_takes_back_are_lost_once(store: Store) -> None:
    first = [start(), *(step(number) for number in range(1, 9)), {"kind": "eval", "step": 8, "loss": 9.0, "time": NOW}]
    first += [
        more | {"step": at, "time": NOW}
        for at in (5, 6)
        for more in (
            {"kind": "measured", "by": "largest", "value": float(at)},
            {"kind": "experts", "of": "train", "shares": {"layer": [0.5, 1.5] if at == 5 else [0.0, 2.0]}},
        )
    ]
    second = [start(5, NOW + 300), step(6, 1.5), end("failed", "lost a machine: b", NOW + 310)]
    third = [start(5, NOW + 400), step(6, 1.25), step(7, 1.0), end("finished", time=NOW + 460)]
    figures = read_figures(make_run(store, first, second, third))
    assert [at.lost_steps for at in figures.starts] == [3, 1, 0]
    assert [at.outcome for at in figures.starts] == ["lost", "failed", "finished"]
    assert figures.curves["loss"].points == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 1.25), (7, 1.0)]
    assert figures.held_out == {}
    assert figures.experts == [{"layer": "layer", "experts": 2, "busiest": 1.5, "least": 0.5, "unused": 0}]
    assert figures.measured == {"largest": {"value": [(5, 5.0)]}}
    assert (figures.progress["tokens"], figures.progress["lost_seconds"]) == (7000, 40.0)
    # Four GPUs, from a minute before each start's record to its last: 140, 70 and 120 seconds.
    assert figures.cost is not None
    assert figures.cost["device"] == "NVIDIA H100"
    assert figures.cost["hours"] == pytest.approx(4 * (60 + 80 + 60 + 10 + 60 + 60) / 3600)
    assert figures.cost["price"] == pytest.approx(3.0 * figures.cost["hours"])
    assert figures.cost["lost_hours"] == pytest.approx(4 * 40 / 3600)
    # A step is ten seconds, one of which is for data. Seven count, and four were taken again.
    spent = {part["name"]: part["seconds"] for part in figures.time}
    assert spent == {
        "steps": pytest.approx(63),
        "steps: data": pytest.approx(7),
        "steps done again after a restart": pytest.approx(40),
        "the rest": pytest.approx(330 - 110),
    }
    assert [part["share"] for part in figures.time] == pytest.approx([seconds / 330 for seconds in spent.values()])


def test_a_start_whose_own_record_is_lost_went_on_from_the_state_before_its_first_step(store: Store) -> None:
    first = [start(), *(step(number) for number in range(1, 9))]
    figures = read_figures(make_run(store, first, [step(6, 1.5), end("finished")]))
    assert [(at.step, at.last_step, at.lost_steps) for at in figures.starts] == [(0, 8, 3), (5, 6, 0)]
    assert figures.curves["loss"].points[-2:] == [(5, 2.0), (6, 1.5)]


def test_time_for_evaluations_and_commits_is_apart_from_that_of_the_steps(store: Store) -> None:
    commit = {"kind": "commit", "step": 1, "stall_seconds": 0.25, "bytes": 9, "time": NOW}
    records = [start(), step(1), commit, step(2, evaluate_seconds=4.0, save_seconds=3.0), end("finished")]
    spent = {part["name"]: part["seconds"] for part in read_figures(make_run(store, records)).time}
    assert spent == {
        "steps": pytest.approx(18),
        "steps: data": pytest.approx(2),
        "waiting for a commit": pytest.approx(0.25),
        "evaluations": pytest.approx(4),
        "the rest": pytest.approx(260 - 24.25),
    }


def test_events_waits_and_energy_are_on_the_curves_with_their_words(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = {
        "exchange_seconds": 0.5,
        "forward_seconds": 3.0,
        "optimizer_seconds": 0.5,
        "save_seconds": 0.0,
        "device_watts": 360.0,
    }
    first = [start(), *(step(number, **waits) for number in range(1, 9))]
    first += [{"kind": "commit", "step": at, "stall_seconds": 0.25, "bytes": 9, "time": NOW} for at in (5, 8)]
    second = [start(5, NOW + 300, world_size=2), {"kind": "change", "setting": "optim.lr", "old": 1, "new": 2}]
    second += [*(step(number, **waits) for number in (6, 7)), {**end("failed", "rank 3 was killed"), "died": 3}]
    third = {**start(5, NOW + 600, world_size=3), "restored": "neighbour", "read_bytes": 7}
    run = make_run(store, first, second, [third, step(6, **{**waits, "data_seconds": 0.0}), end("finished")])
    run.put(layout.evaluation(6), json.dumps({"step": 6, "sets": {}}).encode())
    run.put(layout.manifest(5), b"{}")
    figures = read_figures(run)
    page = run_page(figures)
    for words in (
        "commit of step 5",
        "evaluation of step 6",
        "start 1, it ended without a word",
        "start 2, rank 3 was killed",
        "start 2 on 2 ranks; optim.lr",
        "start 3 on 3 ranks, from another machine",
    ):
        assert words in page
    assert [(at.restored, at.read_bytes) for at in figures.starts] == [(None, None), (None, None), ("neighbour", 7)]
    assert figures.over_steps["waits"] == {
        "for data": [*((number, 1.0) for number in range(1, 6)), (6, 0.0)],
        "for other ranks": [(number, 0.5) for number in range(1, 7)],
        "for commits": [(5, 0.25)],
    }
    assert [(commit["step"], commit["bytes"], commit["stall_seconds"]) for commit in figures.commits] == [(5, 9, 0.25)]
    # A step is 10 seconds at 360 W, so 1 Wh for each of its ranks: four of the first start, and three of the third.
    energy = [4, 8, 12, 16, 20, 23]
    assert figures.over_steps["energy"]["all ranks"] == [(at, pytest.approx(sum_)) for at, sum_ in enumerate(energy, 1)]
    assert {"Waits of a step", "Energy of the steps so far"} <= set(re.findall(r'aria-label="([^"]*)"', page))
    assert [entry.name for entry in measure_plots(figures)[0].legend] == ["training", "restart", "ranks lost"]
    assert list(events(figures).lost) == [8, 7], "the third start has lost none"
    monkeypatch.setattr("launcher.report.page._FEW_RESTARTS", 0)
    assert [entry.name for entry in measure_plots(figures)[0].legend] == ["training"], "they would hide the line"


def test_a_run_that_was_resumed_and_took_no_step_is_where_it_went_on(store: Store) -> None:
    run = make_run(store, [start(4)], [start(6, NOW + 300)], [end("failed", "refused", NOW + 400)])
    figures = read_figures(run)
    assert figures.progress["step"] == 6
    assert [at.number for at in figures.restarts] == [2], "the third one has not begun to train"
    assert [at.outcome for at in figures.starts] == ["lost", "lost", "failed"]
    assert figures.to_json()["restart_count"] == 1
    assert [at.outcome for at in read_figures(make_run(store, RUNNING, name="runs")).starts] == [""]


def test_a_start_lost_ranks_whoever_has_told_so_and_has_machines_not_ranks(store: Store) -> None:
    lost = [{**end("failed", "rank 3 was killed"), "died": 3, "died_at": NOW + 5}, end("failed", "the run ended")]
    (found,) = read_figures(make_run(store, [start(machines=["a", "a", "b", "b"]), *lost])).starts
    assert (found.lost, found.reason, found.died_at, found.machines) == (True, "the run ended", NOW + 5, 2)


def test_the_newest_checkpoints_are_shown_and_a_commit_whose_record_is_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.report.figures._MOST_CHECKPOINTS", 2)
    commit = {"kind": "commit", "step": 1, "seconds": 2.0, "bytes": 9, "time": NOW}
    run = make_run(store, [*RUNNING, commit])
    for at in (1, 2, 3):
        run.put(layout.manifest(at), b"{}")
    figures = read_figures(run)
    assert [found["step"] for found in figures.checkpoints] == [3, 2]
    assert [(found["step"], found["bytes"]) for found in figures.commits] == [(1, 9), (2, None), (3, None)]
    assert set(figures.curves) == {"loss", "lr"}, "a part of a step's time is no measure"


def test_answers_are_those_of_the_first_step_and_of_the_newest(store: Store) -> None:
    run = make_run(store, RUNNING)
    for at in range(0, 900, 100):
        run.put(layout.samples(at), json.dumps({"prompt": "why?", "adapter": f"answer {at}"}).encode())
    assert [found.step for found in read_figures(run).samples] == [0, 400, 500, 600, 700, 800]
    many = "\n".join(json.dumps({"prompt": f"why {number}?", "adapter": "so"}) for number in range(14))
    run.put(layout.samples(900), many.encode())
    newest = read_figures(run).samples[-1]
    assert (newest.step, len(newest.samples), newest.left_out) == (900, 12, 2)


def test_answers_to_a_prompt_are_beside_each_other_over_steps_and_checkpoints_have_their_proof(store: Store) -> None:
    run = make_run(store, RUNNING)
    for at in (1, 2):
        run.put(layout.samples(at), json.dumps({"prompt": "why?", "base": "B", "adapter": f"answer {at}"}).encode())
    run.put(layout.manifest(2), b"{}")
    page = run_page(read_figures(run))
    assert page.count(">why?<") == page.count(">B<") == 1
    assert page.index("answer 1") < page.index("answer 2")
    assert layout.manifest(2) in page[page.index("Checkpoints") :]


def test_a_checkpoint_is_shown_with_the_hash_of_its_first_shard(store: Store) -> None:
    run = make_run(store, RUNNING)
    written = checkpoints.commit(run, 2, eval_loss=1.5)
    (found,) = read_figures(run).checkpoints
    assert (found["step"], found["shards"], found["eval_loss"], found["problem"]) == (2, 2, 1.5, "")
    assert found["sha256"] == written.shards[0].sha256
    assert found["bytes"] == sum(shard.size for shard in written.shards)
    trained = read_figures(run).trained
    assert (trained["trainable"], trained["base"], trained["optimizer"]) == (4 * 5, "/models/b", "adamw")
    assert trained["stored"] == "nf4, single quantization"
    (note,) = (note for note in read_figures(run).notes if "counts" in note)
    assert note.startswith("The counts of the train data are not known: ")
    assert written.dataset in note


def test_an_adapter_that_began_from_another_one_names_it() -> None:
    written = checkpoints.manifest(2)
    base, adapter = {**written.base, "start": "first@100"}, {"method": "rslora", "rank": 4}
    written = replace(written, base=base, adapter=adapter)
    found = trained_figures(Settings({"tuning": {"method": "lora"}}, None), written, History())
    assert (found["method"], found["settings"]) == ("rslora", {"rank": 4, "start": "first@100"})


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ("quant: {type: nf4, double: true}", "nf4, double quantization"),
        ("quant: {type: fp4, double: false}", "fp4, single quantization"),
        ("quant: {type: stored}", "as its files have it"),
        ("quant: {type: none}", "as it is stored"),
    ],
)
def test_before_a_checkpoint_the_base_is_held_as_the_settings_say(store: Store, settings: str, stored: str) -> None:
    run = make_run(store, RUNNING, config=CONFIG + f"{settings}\n".encode())
    assert read_figures(run).trained["stored"] == stored


def test_experts_have_the_loads_of_the_newest_steps_of_training(store: Store) -> None:
    def visits(step: int, of: str, *shares: float) -> dict[str, Any]:
        return {"kind": "experts", "step": step, "of": of, "shares": {"layer": shares}, "time": NOW}

    records = [visits(1, "train", 1, 1, 1, 1), visits(2, "train", 1.5, 0.5, 0, 0), visits(2, "eval", 0.5, 1.5, 0, 0)]
    skipped = [{"kind": "skip", "step": 2, "time": NOW}, {"kind": "save_failed", "step": 2, "time": NOW}]
    figures = read_figures(make_run(store, [*RUNNING, *records, *skipped]))
    assert figures.experts == [{"layer": "layer", "experts": 4, "busiest": 3.0, "least": 0.0, "unused": 2}]
    assert (figures.skipped_steps, figures.failed_saves) == ([2], 1)
    even = read_figures(make_run(store, [*RUNNING, visits(1, "train", 0.75, 0.25)], name="even"))
    assert [(one["busiest"], one["least"], one["unused"]) for one in even.experts] == [(1.5, 0.5, 0)]


RUNNING = [start(), step(1), step(2)]


@pytest.mark.parametrize(
    ("starts", "texts"),
    [
        ([], ["demo", "No step is recorded"]),
        ([[]], ["demo", "No step is recorded"]),
        ([[start()]], ["No step is recorded"]),
        ([RUNNING], ["2.0000", "GPU hours"]),
        ([[*RUNNING, end("failed", "rank 3 hangs")]], ["rank 3 hangs", "failed"]),
        ([[step(1, math.nan), step(1, math.inf), step(2, grad_norm=math.inf), step(3, lr="x")]], ["2.0000"]),
        ([[*RUNNING, {"kind": "commit"}, {"kind": "commit", "step": 1, "bytes": "many"}, {"kind": "eval"}]], ["2.0000"]),
        ([[*RUNNING, {"kind": "experts", "step": 1, "shares": {"a": [], "b": ["x"], "c": [0, 0]}}]], ["2.0000"]),
        ([[*RUNNING, {"kind": "plan", "parameters": {}, "memory_per_gpu": {"total": "much"}}]], ["2.0000"]),
        ([[start(data={"train": 5, "eval": "gone"}), step(1)]], ["The counts of the eval data are not known"]),
    ],
)  # fmt: skip
def test_whatever_there_is_is_a_page(store: Store, starts: list[list[dict[str, Any]]], texts: list[str]) -> None:
    page = run_page(read_figures(make_run(store, *starts)))
    for text in texts:
        assert text in page
    assert ('class="chart"' in page) == any(record["kind"] == "step" for records in starts for record in records)


@pytest.mark.parametrize(("unit", "word"), [("texts", "text"), ("words", "word"), ("decisions", "decision on a class")])
def test_a_run_over_classes_has_its_accuracy_on_tiles_and_a_loss_a_text(store: Store, unit: str, word: str) -> None:
    steps = [step(number, accuracy=share, **{unit: 8}) for number, share in ((1, 0.5), (2, 0.875))]
    for one in steps:
        del one["targets"]
    held_out = {"kind": "eval", "step": 2, "loss": 0.4, "accuracy": 0.75, "macro_f1": 0.7, unit: 9}
    figures = read_figures(make_run(store, [start(), *steps, held_out]), lambda: NOW)
    page = run_page(figures)
    assert f"nats a {word}" in page
    assert "target token" not in page
    tiles = page.partition('class="tiles"')[2].partition("</dl>")[0]
    assert re.findall(r"<dt>([^<]*accuracy)</dt><dd><data[^>]*>([\d.]+%)", tiles) == [
        ("accuracy", "87.5%"),
        ("held-out accuracy", "75.0%"),
    ]
    assert unit not in figures.curves | figures.held_out, "a count is no measure"


def test_the_table_of_starts_is_whole_on_a_phone(store: Store, tmp_path: Path) -> None:
    lost = end("failed", "RuntimeError: rank 3 was lost as it gathered model.layers.17.mlp.down_proj.weight")
    wide = {"sequence_parallel": 2, "world_size": 1024}
    run = make_run(store, [start(**wide), step(1), step(2), lost], [start(step=1, time=NOW + 300, **wide), step(2)])
    page = tmp_path / "page.html"
    page.write_text(run_page(read_figures(run, lambda: NOW)))
    with chromium() as browser:
        for width in (390, 320):
            assert look_at(browser, page, width=width).wrong == []
        tab = browser.new_page(viewport={"width": 390, "height": 900})
        tab.goto(page.as_uri())
        cut = "[...document.querySelectorAll('.scroll')].filter(it => it.scrollWidth > it.clientWidth).length"
        assert tab.evaluate(cut) == 0
        heads = "[...document.querySelectorAll('.starts td[data-head]')].map(it => getComputedStyle(it, '::before').content)"
        assert tab.evaluate(heads)[:3] == ['"start"', '"began, UTC"', '"from step"']
        tab.close()


def test_memory_is_shown_beside_the_plan(store: Store) -> None:
    sizes = {"activations": 6_000_000_000, "context": 4_000_000_000, "logits": 0, "total": 10_000_000_000}
    plan = {"kind": "plan", "device": "cuda", "memory_per_gpu": sizes, "memory_per_host": {"total": 0}, "time": NOW}
    peaks = [step(at, device_peak_bytes=at * 10**9, host_peak_bytes=10**9) for at in (1, 9, 3)]
    figures = read_figures(make_run(store, [start(), plan, *peaks]))
    assert [(at["of"], at["planned"], at["measured"]) for at in figures.memory] == [
        ("one GPU", 10_000_000_000, 9_000_000_000),
        ("rank 0's process on its host", None, 1_000_000_000),
    ]
    assert sum(figures.memory[0]["planned_parts"].values()) == figures.memory[0]["planned"]
    assert "10.0 GB" in run_page(figures)
    on_cpus = read_figures(make_run(store, [start(), {**plan, "device": "cpu"}], name="cpus"))
    assert [(at["of"], at["planned"]) for at in on_cpus.memory] == [("one rank", 10_000_000_000)]


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("count", 12_345, "12,345"),
        ("large", 9_999, "9,999"),
        ("large", 20_000, "20k"),
        ("number", 0.123456, "0.1235"),
        ("loss", 2.5, "2.5000"),
        ("signed", 0.25, "+0.2500"),
        ("percent", 0.125, "12.5%"),
        ("duration", 9.5, "9.50 s"),
        ("hours", 0.05, "0.0500"),
        ("hours", 1_234.5, "1,234.50"),
        ("energy", 999, "999 Wh"),
        ("energy", 1_500, "1.50 kWh"),
        ("money", 1_234.5, "1,234.50"),
        ("bytes", 2_500, "2.5 kB"),
        ("when", 86_399, "1970-01-01 23:59"),
    ],
)
def test_a_figure_is_shown_as_its_kind_is_read(kind: str, value: float, shown: str) -> None:
    assert FORMATS[kind](value) == shown


@pytest.mark.parametrize(
    ("name", "written", "drawn", "unit"),
    [
        ("mfu", 0.5, 50.0, "%"),
        ("device_peak_bytes", 3 * 2**30, 3.0, "GiB, peak so far"),
        ("host_peak_bytes", 2**29, 0.5, "GiB, peak so far"),
        ("device_watts", 400.0, 400.0, "W"),
        ("an_own", 2.0, 2.0, ""),
    ],
)
def test_a_measure_is_drawn_in_its_unit(name: str, written: float, drawn: float, unit: str) -> None:
    measure = measure_of(name)
    assert (measure.scaled([(1, written)]), measure.unit) == ([(1, drawn)], unit)


def test_a_start_that_never_trained_takes_no_energy_and_waits_have_the_names_that_they_are_recorded_by(
    store: Store,
) -> None:
    commits = [{"kind": "commit", "step": 1, "bytes": 9, "time": NOW}]
    first = [start(), step(1, device_watts=360.0, own_seconds=0.5), *commits]
    refused = [end("failed", "refused")]
    figures = read_figures(make_run(store, first, refused, [start(1, world_size=2), step(2, device_watts=360.0)]))
    assert figures.over_steps["energy"] == {"all ranks": [(1, 4.0), (2, 6.0)]}
    assert figures.over_steps["waits"] == {"for data": [(1, 1.0), (2, 1.0)], "own": [(1, 0.5)]}


def test_lines_of_evaluations_have_the_names_of_their_sets_and_what_stays_0_has_none(store: Store) -> None:
    evals = [{"kind": "eval", "step": 2, "loss": 1.0, **of} for of in ({}, {"set": "general"})]
    unused = [step(at, experts_unused=0, expert_load=1.5) for at in (1, 2)]
    figures = read_figures(make_run(store, [start(), *unused, *evals]))
    plot = loss_plot(figures, wide=False)
    assert plot is not None
    assert [entry.name for entry in plot.legend] == ["training", "held out", "held out: general"]
    titles = [plot.title for plot in measure_plots(figures)]
    assert measure_of("expert_load").title in titles
    assert measure_of("experts_unused").title not in titles


def test_energy_is_that_of_all_gpu_hours_at_the_mean_power_of_the_steps(store: Store) -> None:
    steps = [step(1), step(2, device_watts=400.0), step(3, device_watts=100.0, seconds=20.0)]
    figures = read_figures(make_run(store, [start(), *steps], [start(step=3, time=NOW + 300)]))
    assert figures.cost is not None
    assert figures.cost["watts"] == pytest.approx((400 * 10 + 100 * 20) / 30)
    assert figures.cost["energy"] == pytest.approx(200 * figures.cost["hours"])
    page = run_page(figures)
    assert f"{figures.cost['energy']:.3g} Wh<" in page
    assert "Power of rank 0" in page
    untold = read_figures(make_run(store, [start(), step(1)], name="untold"))
    assert untold.cost is not None
    assert untold.cost["energy"] is None
    assert "cost/energy" not in run_page(untold)


def test_damage_is_named_and_the_rest_shown(store: Store) -> None:
    run = make_run(store, RUNNING)
    run.put(layout.metrics(1), run.get(layout.metrics(1)) + b'{"kind": "st')
    run.put(layout.settings(1), b"\xff{")
    run.put(layout.manifest(2), b"{}")
    run.put(layout.evaluation(1), b'{"step": "x"}')
    run.put(layout.evaluation(2), b'{"step": 2, "sets": {"a": {"adapter": {"loss": NaN}}}, "later": 1}')
    run.put(layout.samples(2), b'torn\n{"prompt": "p", "adapter": "answer"}\n')
    figures = read_figures(run)
    page = run_page(figures)
    for key in (layout.settings(1), layout.manifest(2), layout.evaluation(1), layout.samples(2)):
        assert any(key in note for note in figures.notes), (key, figures.notes)
    assert "answer" in page
    assert [found.step for found in figures.evaluations] == [2]
    json.dumps(figures.to_json(), allow_nan=False)


def test_no_text_of_a_run_becomes_markup_or_a_secret_shown(store: Store) -> None:
    hostile = "</title></style><script>alert(1)</script>&\u202e\ud800"
    config = CONFIG + b"cluster: {ray: {runtime_env: {env_vars: {HF_TOKEN: hf_hidden}}}}\n"
    records = [
        start(device=hostile),
        step(1, **{hostile: 1.0}),
        {"kind": "eval", "step": 1, "set": hostile, "loss": 1.0, "time": NOW},
    ]
    run = make_run(store, [*records, end("failed", hostile)], config=config)
    run.put(layout.samples(1), json.dumps({"prompt": hostile, "adapter": hostile * 500}).encode())
    for page in (run_page(read_figures(run)), comparison_page([read_figures(run)] * 2)):
        assert b"<script" not in page.encode()
        assert "hf_hidden" not in page
        assert "alert(1)" in page
        assert re.findall(r'(?:href|src)="(?!data:,)', page) == []


def test_very_many_steps_are_a_small_page_that_shows_each_spike(store: Store) -> None:
    many = 20_000
    measures = {f"measure_{number}": 1.0 for number in range(10)} | {"mfu": 0.4}
    records = [step(at, 99.0 if at == 12_345 else 1 + at % 7 / 10, **measures) for at in range(1, many + 1)]
    run = make_run(store, [start(), *records])
    figures = read_figures(run)
    page = run_page(figures)
    assert len(page) < 1_000_000
    assert (12_345, 99.0) in figures.curves["loss"].points
    assert figures.curves["loss"].steps == many
    assert "lowest and highest" in page
    (used,) = (plot for plot in measure_plots(figures) if plot.title == measure_of("mfu").title)
    paths = re.findall(r'class="series [^>]*><path d="([^"]*)"', used.svg)
    heights = [set(re.findall(r"[\d.]+", path)[1::2]) for path in paths]
    assert len(heights) == 2
    assert len(set.union(*heights)) == 1, "the mean of a flat measure lies on it"


def test_a_log_axis_has_round_ticks_and_a_flat_line_is_drawn() -> None:
    trials = Series("trials", [(1e-5, 2.0), (1e-3, 1.0), (0.1, 3.0)], "dots")
    plot = lines("Loss by rate", [trials], unit="nats", x=Axis("optim.lr", log=True))
    assert plot is not None
    assert {"1e-5", "1e-4", "0.001", "0.01", "0.1"} <= set(re.findall(r"<text[^>]*>([^<]+)<", plot.svg))
    assert re.findall(r"<title>(.*?)</title>", plot.svg) == [
        "trials: 2 at 1e-05",
        "trials: 1 at 0.001",
        "trials: 3 at 0.1",
    ]
    both = lines("Both", [Series("low", [(1, 1.0), (2, 2.0)]), Series("high", [(1, 500.0), (2, 900.0)])], unit="")
    assert both is not None
    assert {"200", "800"} <= set(re.findall(r"<text[^>]*>([^<]+)<", both.svg)), "every series is within its bounds"
    flat = lines("Flat", [Series("one", [(1, 5.0), (2, 5.0)]), Series("none", [(1, math.nan)])], unit="")
    assert flat is not None
    assert [entry.name for entry in flat.legend] == ["one"]
    assert lines("Nothing", [Series("none", [])], unit="") is None


def test_events_are_upright_lines_with_names_and_marks_above_or_below() -> None:
    happened = Events(
        {3: ("start 2", "with 2 ranks"), 7: ("start 3", "with 3 ranks")}, {5: "kept"}, {6: "judged"}, {8: "lost one"}
    )
    restarts, *marks = happened.drawn(1.0, 9.0)
    assert [(at, value) for at, value in restarts.points if not math.isnan(value)] == [
        *((3, 1.0), (3, 9.0)),
        *((7, 1.0), (7, 9.0)),
    ]
    assert [(one.look, one.points, one.words) for one in marks] == [
        ("commit", [(5, 1.0)], ["kept"]),
        ("evaluation", [(6, 9.0)], ["judged"]),
        ("lost", [(8, 9.0)], ["lost one"]),
    ]
    plot = lines("Loss", [Series("one", [(1, 1.0), (9, 9.0)])], unit="", events=happened)
    assert plot is not None
    assert {"with 2 ranks", "with 3 ranks", "kept", "judged", "lost one"} <= set(
        re.findall(r"<title>(.*?)</title>", plot.svg)
    )
    assert {"start 2", "start 3"} <= set(re.findall(r"<text[^>]*>([^<]+)<", plot.svg))
    looks = [entry.css for entry in plot.legend]
    assert looks == ["series line color-0", "series restart", "series commit", "series evaluation", "series lost"]


@pytest.mark.parametrize(("points", "begins_at_0"), [([(1, 1.0), (100, 2.0)], True), ([(50, 1.0), (100, 2.0)], False)])
def test_an_axis_of_steps_begins_at_0_where_little_is_left_of_the_first(
    points: list[tuple[float, float]], begins_at_0: bool
) -> None:
    plot = lines("Loss", [Series("one", points)], unit="")
    assert plot is not None
    assert ("0" in re.findall(r"<text[^>]*>([^<]+)<", plot.svg)) == begins_at_0


def test_ticks_of_an_axis_are_told_apart_and_few_powers_of_ten_have_more_of_them() -> None:
    assert plots._log_ticks(1, 30) == [1, 2, 5, 10, 20]
    assert plots._log_ticks(1e-4, 1.0) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0])
    assert plots._log_ticks(3, 4) == [3]
    assert (plots._digits(0.0, 1.0), plots._digits(9_999.0, 10_000.0)) == (4, 6)


def test_a_line_beyond_the_colours_is_dashed_and_a_mean_has_the_colour_of_its_extremes() -> None:
    points, names = [(1, 1.0), (2, 2.0)], [f"run {number}" for number in range(7)]
    every = [Series("extremes", points, "faint"), *(Series(name, points) for name in [*names, "one more"])]
    plot = lines("Many", every, unit="", events=Events(commits={2: "commit of step 2"}))
    assert plot is not None
    assert [entry.css for entry in plot.legend] == [
        "series faint color-0",
        *(f"series line color-{number}" for number in range(7)),
        "series line color-0 again",
        "series commit",
    ]
    assert [entry.marks for entry in plot.legend] == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (9999, "9999"), (12_345, "12.35k"), (-2e6, "-2M"), (3e9, "3G"), (1.5e-5, "1.5e-5"), (0.001, "0.001")],
)
def test_a_tick_is_short(value: float, shown: str) -> None:
    assert tick(value) == shown


def test_a_line_in_a_table_goes_from_its_first_point_to_its_last_and_from_the_lowest_to_the_highest() -> None:
    (points,) = re.findall('points="([^"]*)"', spark([(10, 0), (20, 5), (30, 10)], width=100, height=24))
    assert points == "0.0,24.0 50.0,12.0 100.0,0.0"
    assert spark([(10, 0.0)]) == ""


def test_trials_lie_between_the_ends_of_each_axis_by_their_values() -> None:
    trials = [Line(str(at), {"rank": 8 * at, "lr": 10.0**-at, "loss": 4.0 - at}, PLAIN) for at in (1, 2, 3)]
    plot = parallel("Trials", ["rank", "lr", "loss"], trials, logarithmic=["lr"])
    assert plot is not None
    paths = re.findall('d="M([^"]*)"><title>[0-9]:', plot.svg)
    places = [[tuple(map(float, point.split())) for point in path.split("L")] for path in paths]
    left, middle, right = zip(*places, strict=True)
    assert [{x for x, _ in axis} for axis in (left, middle, right)] == [{110.0}, {480.0}, {850.0}]
    for axis, rises in ((left, True), (middle, False), (right, False)):
        (first, second, third) = (y for _, y in axis)
        assert (first > third) == rises, "what is larger is higher, so it has a smaller y"
        assert second == pytest.approx((first + third) / 2, abs=0.1), "the second value is half way"


@pytest.fixture
def two(store: Store) -> list[Store]:
    ended = [end("finished")]
    other = CONFIG.replace(b"0.001", b"0.01").replace(b"demo", b"other")
    return [
        make_run(store, [start(), *(step(at, 3 - at / 10) for at in range(1, 21)), *ended]),
        make_run(store, [start(), *(step(at, 3 - at / 20) for at in range(1, 21)), *ended], name="other", config=other),
    ]


def test_losses_of_different_objectives_have_plots_of_their_own_and_lists_are_words(store: Store) -> None:
    """A repr of all that a source may be would push the values off the page, and a DPO loss is no likelihood."""
    runs = []
    for name, more in (
        ("one", b""),
        ("two", b"objective: {name: dpo, beta: 0.1}\n"),
        ("three", b"objective: {name: dpo, beta: 0.5}\n"),
    ):
        other = (
            CONFIG.replace(b"demo", name.encode())
            + b"data: {train: [{path: %s.jsonl, weight: 1.0, fields: {}}]}\n" % name.encode()
            + more
        )
        records = [
            start(),
            step(1, 3.0),
            step(2, 2.0),
            {"kind": "eval", "step": 2, "loss": 1.0},
            {"kind": "eval", "step": 2, "loss": 1.0, "set": "general"},
        ]
        runs.append(read_figures(make_run(store, records, name=name, config=other)))
    titles = [plot.title for plot in comparison_plots({run.name: run for run in runs})]
    assert titles[:7] == [
        "Loss: name sft",
        "Loss: name dpo, beta 0.1",
        "Loss: name dpo, beta 0.5",
        "Held-out loss: name sft",
        "Held-out loss: name dpo, beta 0.1",
        "Held-out loss: name dpo, beta 0.5",
        "Held-out loss: general",
    ]
    assert differing_settings(runs)["data.train"] == ['["one.jsonl"]', '["two.jsonl"]', '["three.jsonl"]']


def test_a_set_is_said_to_be_other_data_where_it_changes_and_not_again() -> None:
    seen = [("eval", 1, "a"), ("eval", 2, "b"), ("own", 3, "a"), ("eval", 4, "b"), ("eval", 5, None), ("eval", 6, "a")]
    assert [(line.partition(" ")[0], re.findall(r"step (\d+)", line)) for line in other_data(seen)] == [
        ("eval", ["2"]),
        ("eval", ["6"]),
    ]


def test_a_set_whose_file_was_changed_between_starts_or_evaluations_is_said(store: Store) -> None:
    first, second = (start(at, data={"train": "t", "eval": data}) for at, data in ((0, "a"), (1, "b")))
    run = make_run(store, [first, step(1)], [second, step(2), end("finished")])
    for at, data in ((1, "a"), (2, "a"), (3, "b")):
        found = {"step": at, "sets": {"general": {"data": data, "documents": 9, "trained_on": at}, "old": {}}}
        run.put(layout.evaluation(at), json.dumps(found).encode())
    said = [note for note in read_figures(run).notes if "other data" in note]
    assert said == [
        "eval is other data from step 1 on, so its losses do not compare with those before.",
        "general is other data from step 3 on, so its losses do not compare with those before.",
    ]
    assert "general (3 of 9 documents are in the training data)" in run_page(read_figures(run))


def test_held_out_losses_over_other_data_have_plots_of_their_own(store: Store) -> None:
    evaluated, general = {"kind": "eval", "step": 1, "loss": 1.0, "set": "general"}, "eval.sets.general"
    runs = [
        read_figures(make_run(store, [start(), step(1), evaluated, {**evaluated, "step": 2}], name=name))
        for name in ("one", "two", "three")
    ]
    runs = [
        replace(run, data=[DataFigures(of, at, 1, 1, 1, [], {}, []) for of, at in (("train", "t"), (general, key))])
        for run, key in zip(runs, "aba", strict=True)
    ]
    plots = {plot.title: plot for plot in comparison_plots({run.name: run for run in runs})}
    assert {title: [entry.name for entry in plot.legend] for title, plot in plots.items() if "Held-out" in title} == {
        "Held-out loss: general: data of one": ["one", "three"],
        "Held-out loss: general: data of two": ["two"],
    }
    assert "The runs have other data for: general." in comparison_page(runs)
    assert "other data" not in comparison_page(runs[::2])


@pytest.mark.long
def test_several_runs_are_one_comparison(two: list[Store], tmp_path: Path) -> None:
    page = comparison_page([read_figures(run) for run in two])
    rows = re.findall(r"<tr><th scope=\"row\"><code>(.*?)</code></th>(.*?)</tr>", page)
    assert [
        (setting.replace("<wbr>", ""), re.findall('<td class="text">(.*?)</td>', cells.replace("<wbr>", "")))
        for setting, cells in rows
    ] == [("optim.lr", ["0.001", "0.01"])]
    assert 'data-of="runs/1/progress/loss_last">2.0000<' in page
    path = tmp_path / "comparison.html"
    path.write_text(page, encoding="utf-8")
    with chromium() as browser:
        for width in (1400, 400):
            look = look_at(browser, path, width=width)
            assert (look.wrong, look.plots) == ([], ["Loss", "Learning rate"])


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, write_text = tmp_path / "page.html", Path.write_text
    page.write_text("old")

    def full(self: Path, text: str, encoding: str) -> int:
        write_text(self, text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report._write(page, "the new page")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("page.html", "old")]


def test_a_page_is_written_to_what_is_no_file_as_it_is() -> None:
    reads, writes = os.pipe()
    report._write(Path(f"/proc/self/fd/{writes}"), "the page")
    os.close(writes)
    assert os.read(reads, 99) == b"the page"
    os.close(reads)


def test_runs_that_share_a_name_are_told_apart_by_their_place_which_is_no_setting_that_differs() -> None:
    runs: Any = [
        SimpleNamespace(name=name, run=place, settings={"run": {"name": name, "store": place}, "seed": seed})
        for name, place, seed in (("a", "s3://x/a", 1), ("b", "s3://x/b", 1), ("a", "/y/a", 2))
    ]
    assert report.distinct_names(runs) == ["s3://x/a", "b", "/y/a"]
    assert differing_settings(runs) == {"seed": ["1", "1", "2"]}


@pytest.mark.parametrize(("mode", "ranked"), [("min", [2, 3, 1]), ("max", [2, 1, 3])])
def test_the_best_trials_come_first_as_the_mode_says(mode: str, ranked: list[int]) -> None:
    values = {1: 9.0, 2: 5.0, 3: 1.0, 4: None}
    trials = [
        SimpleNamespace(number=number, run=f"s-{number}", value=value, settings={"lr": 1.0}, state=state)
        for (number, value), state in zip(
            values.items(), ("finished", "finished", "failed", STOPPED_EARLY), strict=True
        )
    ]
    status: Any = SimpleNamespace(mode=mode, trials=trials, best=2, metric="eval")
    assert [trial.number for trial in report._ranked(status)] == ranked, "the best one first, whatever it is best by"
    drawn: Any = [report._line(status, trial) for trial in status.trials]
    assert [line.css for line in drawn] == [PLAIN, BEST, GREY, GREY]
    assert drawn[0].values == {"lr": 1.0, "eval": 9.0}


def test_the_command_writes_where_it_says(two: list[Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "runs/demo/report.html"
    assert str(kept) in invoke("demo", "--dry-run").stderr
    assert not kept.exists()
    assert str(kept) in invoke("demo").stderr
    assert kept.read_text().startswith("<!doctype html>")
    assert "report.html" in invoke("demo", "other").stderr
    assert "2 runs compared" in (tmp_path / "report.html").read_text()
    assert invoke("demo", "-o", "-").stdout.startswith("<!doctype html>")
    told = json.loads(invoke("demo", "other", "--json").stdout)
    assert [run["progress"]["loss_last"] for run in told["runs"]] == [1.0, 2.0]
    assert told["written"] is None
    assert isinstance(invoke("demo", "-o", tmp_path / "none/a.html").exception, StorageError)


def test_a_report_that_fails_ends_no_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    keep_report(make_run(store, name="unborn"), said.append)
    assert said == []
    run = make_run(store, RUNNING)
    keep_report(run, said.append)
    assert run.exists(layout.REPORT)

    def fails(*_: object) -> None:
        raise StorageError("the bucket is away")

    monkeypatch.setattr(Store, "put", fails)
    keep_report(run, said.append)
    assert re.fullmatch(
        "the report could not be written, .* the bucket is away. `capstan report demo .*` tries again.", said[1]
    )


def make_sweep(store: Store) -> tuple[Store, dict[int, list[float]]]:
    """A sweep of 8 trials, of which the third fails and the fifth is stopped early; and the held-out losses of each."""
    settings = {"optim.lr": {"log_uniform": [1e-5, 1e-2]}, "tuning.rank": {"grid": [8, 16]}}
    tree = {
        "run": {"name": "search", "store": store.uri},
        "model": {"base": "/models/b"},
        "data": {"train": [{"path": "train.jsonl"}], "held_out": 0.1},
        "train": {"steps": 20},
        "eval": {"every": 10},
        "sweep": {"settings": settings, "samples": 4},
    }
    config = parse_config(yaml.safe_dump(tree))
    folder, plan, losses = store.sub("search"), planned(config), dict[int, list[float]]()
    folder.put(layout.CONFIG, dump_config(config).encode())
    folder.put(layout.SWEEP, json.dumps(plan.to_json()).encode())
    for trial in plan.trials:
        lr, rank = trial.settings["optim.lr"], trial.settings["tuning.rank"]
        final = 2 + abs(math.log10(lr) + 3) - rank / 100
        losses[trial.number] = [final + 1, final][: 1 if trial.number == 5 else 2]
        evals = [
            {"kind": "eval", "step": 10 * at, "loss": loss, "time": NOW}
            for at, loss in enumerate(losses[trial.number], 1)
        ]
        steps = [step(at, final + 1 / at) for at in range(1, 10 * len(evals) + 1)]
        outcome = {3: end("failed", "rank 1 hangs"), 5: end("stopped", "early")}.get(trial.number, end("finished"))
        run = make_run(
            store,
            [start(), *steps, *evals, outcome],
            name=trial.run,
            config=dump_config(trial_config(config, trial)).encode(),
        )
        if trial.number == 5:
            request_stop(run, by=EARLY)
    return folder, losses


def test_a_run_of_many_steps_is_compared_by_its_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "lines", lambda _, series, unit, note: ([list(one.points) for one in series], note))
    many, few = [(float(step), 1.0) for step in range(9)], [(1.0, 5.0)]
    runs: Any = {
        name: SimpleNamespace(curves={"loss": SimpleNamespace(points=points, means=found)})
        for name, points, found in (("long", many, [(4.0, 1.0)]), ("short", few, []))
    }
    assert report._overlaid(runs, "loss") == ([[(4.0, 1.0)], few], "Means of stretches of steps")


def test_a_setting_that_is_tried_at_0_has_a_plot_and_wide_or_doubled_values_a_logarithmic_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "lines", lambda title, series, unit, x: x.log)

    def is_logarithmic(*values: float) -> Any:
        trials = [SimpleNamespace(settings={"a": value}, value=2.0, state="finished") for value in values]
        status: Any = SimpleNamespace(trials=trials, metric="eval/loss")
        return report._by_setting(status, "a", logarithmic=False)

    tried = ((0.0, 0.5), (1e-5, 1e-2), (8, 16, 32), (1, 2, 5), (1, 2))
    assert [is_logarithmic(*values) for values in tried] == [False, True, True, False, False]


@pytest.mark.long
def test_a_sweep_is_a_page_of_its_trials_and_of_what_the_result_depends_on(store: Store, tmp_path: Path) -> None:
    folder, losses = make_sweep(store)
    trials = read_plan(folder).trials
    page = sweep_page(read_sweep_figures(folder, lambda: NOW))
    shown = {of: (float(value), text) for value, of, text in re.findall(r'value="(.*?)" data-of="(.*?)">(.*?)<', page)}
    told = {number: values[-1] for number, values in losses.items()}
    best = min((number for number in told if number != 3), key=lambda number: told[number])
    assert re.findall(r'<tr class="best"><th scope="row">search-(\d+)<', page) == [str(best)]
    assert "failed: rank 1 hangs" in page
    wanted: dict[str, float] = {"made": NOW, f"trials/{best - 1}/value_step": 20}
    for number, values in losses.items():
        wanted |= {f"trials/{number - 1}/step": 10 * len(values), f"trials/{number - 1}/value": values[-1]}
    # All trials but the failed one have reached step 10.
    at_ten = {number: values[0] for number, values in losses.items() if number != 3}
    counted = [(trial.settings, at_ten[trial.number]) for trial in trials if trial.number in at_ten]
    of_ranks = [[loss for tried, loss in counted if tried["tuning.rank"] == rank] for rank in (8, 16)]
    for at, of_rank in enumerate(of_ranks):
        wanted |= {f"sensitivity/0/means/{at}/mean": fmean(of_rank), f"sensitivity/0/means/{at}/trials": len(of_rank)}
    wanted["sensitivity/0/spread"] = abs(fmean(of_ranks[0]) - fmean(of_ranks[1]))
    rates, ranks = (
        np.array(column).argsort().argsort()
        for column in zip(*((tried["optim.lr"], loss) for tried, loss in counted), strict=True)
    )
    wanted["sensitivity/1/correlation"] = float(np.corrcoef(rates, ranks)[0, 1])
    wanted |= {f"sensitivity/{at}/{name}": n for at in (0, 1) for name, n in (("trials", len(counted)), ("step", 10))}
    assert {of: value for of, (value, _) in shown.items()} == pytest.approx(wanted)
    del shown["made"]
    assert all(float(text) == pytest.approx(value, abs=6e-5) for value, text in shown.values())
    # Each dot of a plot is a trial's last value over its setting.
    dots = re.findall(r"<title>(?:finished|failed|stopped early): (\S+) at (\S+)</title>", page)
    values = [
        (f"{told[trial.number]:.6g}", f"{float(value):g}") for trial in trials for value in trial.settings.values()
    ]
    assert sorted(dots) == sorted(values)
    path = tmp_path / "sweep.html"
    path.write_text(page, encoding="utf-8")
    with chromium() as browser:
        for width, scheme in ((1400, "light"), (400, "dark")):
            look = look_at(browser, path, width=width, scheme=scheme)
            assert (look.wrong, look.plots) == (
                [],
                [
                    "By optim.lr",
                    "By tuning.rank",
                    "Trials over their settings",
                    "Loss",
                    "Held-out loss",
                    "Learning rate",
                ],
            )


def test_a_sweep_is_reported_by_its_name_and_beside_other_runs_by_its_trials(store: Store) -> None:
    folder, _ = make_sweep(store)
    told = json.loads(invoke(folder.uri, "--json").stdout)
    assert [trial["state"] for trial in told["sweep"]["trials"]].count("finished") == 6
    said: list[str] = []
    keep_report(folder, said.append)
    assert "search/report.html" in said[0]
    beside = json.loads(invoke(folder.uri, f"{store.uri}/search-1", "--json").stdout)
    assert [run["name"] for run in beside["runs"]] == [*(f"search-{number}" for number in range(1, 9)), "search-1"]


def test_a_comparison_has_the_newest_evaluation_of_each_run_with_its_interval(store: Store) -> None:
    runs = [make_run(store, RUNNING, name=name) for name in ("one", "two")]
    for step_of, loss in ((1, 3.0), (2, 2.5)):
        found = {"adapter": {"loss": loss}, "difference": -0.25, "interval": [-0.3, -0.2]}
        tasks = {"local": {"acc": {"adapter": 0.5, "stderr": 0.125}}}
        sets = {"legal": found, **({"earlier": found} if step_of == 1 else {})}
        runs[0].put(layout.evaluation(step_of), json.dumps({"step": step_of, "sets": sets, "tasks": tasks}).encode())
    page = comparison_page([read_figures(run) for run in runs])
    words = re.sub(r"<[^>]+>", "", page)
    assert "2.5000 (-0.2500; -0.3000 to -0.2000)" in words
    assert "0.5 ± 0.125" in words
    assert "3.0000 (" not in words
    assert "earlier" not in words
    assert "<h2>Evaluations</h2>" not in comparison_page([read_figures(runs[1])] * 2)


def test_the_newest_settings_are_shown_with_a_command_for_a_run_of_another_name(store: Store) -> None:
    run = store.sub("demo-again")
    keys = [layout.SUBMITTED, layout.CONFIG, layout.settings(2), layout.settings(10)]
    for seed, key in enumerate(keys):
        run.put(key, f"run: {{name: demo-again, seed: {seed}}}".encode())
        settings = read_settings(run, [])
        assert (settings.key, settings.get("run.seed")) == (key, seed)
    repeat = repeat_figures(run, settings, None)
    assert repeat is not None
    assert repeat["command"] == "capstan train run.yaml run.name=demo-again-again"
    assert repeat["snapshot"] is None
    run.put(layout.SNAPSHOT, b"code")
    kept = repeat_figures(run, settings, None)
    assert kept is not None
    assert kept["snapshot"] == layout.SNAPSHOT


def test_data_is_that_of_the_newest_start_with_its_sources_counts_and_some_remarks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = SimpleNamespace(
        documents=9,
        tokens=99,
        targets=90,
        left_out=None,
        sources=[SimpleNamespace(files=["a.jsonl"], documents=9, tokens=99, targets=90)],
        counters=[("rows", 12), ("dropped", 0), ("split", None), ("own_count", 2)],
        bad_rows=[f"line {number}" for number in range(9)],
    )
    asked = list[str]()
    monkeypatch.setattr(trained, "read_manifest", lambda root, fingerprint: asked.append(fingerprint) or compiled)
    sections = b"data: {train: [{path: mine.jsonl}], held_out: 0.1}\neval: {sets: {own: {path: own.jsonl}}}\n"
    records = [start(data={"train": "newer", "eval": "held", "eval.sets.own": "o"}), step(1)]
    run = make_run(store, records, config=CONFIG + sections)
    checkpoints.commit(run, 1)
    found = read_figures(run).data
    assert asked == ["newer", "held", "o"]
    assert [of.sources[0]["path"] for of in found] == ["mine.jsonl", "mine.jsonl", "own.jsonl"]
    counts = {"rows read": 12, "too long or too short, left out": 0, "own count": 2}
    assert (found[0].counts, found[0].remarks) == (counts, [f"bad row: line {number}" for number in range(5)])
