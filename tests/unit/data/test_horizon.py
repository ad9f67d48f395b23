"""Where a run of epochs ends when its batch changes on the way: each row is taken once, and the figures say what was
done.
"""

import random
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.material import Workshop, commit, make_data
from trainer.config import Train, override
from trainer.data.compile import prepare
from trainer.data.dataset.chapters import open_chapters
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.processes.ranks import Ranks
from trainer.run import layout
from trainer.run.metrics import Metrics
from trainer.state.checkpoint.manifest import read_manifest
from trainer.state.zero.clock import Clock
from trainer.train.horizon import Horizon, horizon_of
from trainer.train.loop import Training, train
from trainer.tuning.objective import find_objective


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("horizon"))
    made.data = make_data(made.folder / "rows.jsonl", documents=200)
    return made


@pytest.mark.parametrize(("batch", "left"), [(20, 6), (40, 3), (60, 2), (10, 12), (200, 1)])
def test_a_run_that_resumes_with_another_batch_takes_each_row_once(shop: Workshop, batch: int, left: int) -> None:
    config = shop.config("rows", "train.steps=null", "train.epochs=1", "train.global_batch=20", "data.packing=false")
    datasets = shop.prepare(config)
    chapters = open_chapters(shop.store, datasets.train, shop.store.sub("rows"))
    taken, step, position = list[int](), 0, Position()
    for settings, last in ((config, 4), (override(config, f"train.global_batch={batch}"), None)):
        stream = train_stream(settings, chapters, rank=0, world_size=1)
        horizon = horizon_of(settings.train, datasets.epochs, step, position)
        while step < (last or horizon.steps):
            taken += [document for row in stream.step(position) for document in row.documents]
            step, position = step + 1, stream.advance(position)
    assert sorted(taken) == list(range(200))
    assert (step, horizon.steps, horizon.passes(position)) == (4 + left, 4 + left, 1.0)


def windows(draw: random.Random) -> list[list[int]]:
    return [[draw.randint(1, 50) for _ in range(draw.randint(0, 4))] for _ in range(draw.randint(1, 3))] + [[7]]


def place(epoch: int, bins: list[list[int]], taken: int) -> Position:
    """The position behind so many bins of the epoch."""
    for chapter, counts in enumerate(bins):
        for window, count in enumerate(counts):
            if taken < count:
                return Position(epoch, window, taken, chapter)
            taken -= count
    return Position(epoch + 1)


@pytest.mark.parametrize("seed", range(20))
def test_any_batch_after_any_other_ends_with_the_last_row(seed: int) -> None:
    draw = random.Random(seed)
    epochs = [windows(draw) for _ in range(3)]
    sizes = [sum(map(sum, epoch)) for epoch in epochs]
    step, epoch, taken = 0, 0, 0
    while epoch < len(epochs):
        train = Train(epochs=3, steps=None, global_batch=draw.randint(1, 40))
        position = place(epoch, epochs[epoch], taken)
        horizon = horizon_of(train, epochs, step, position)
        assert horizon.passes(position) == pytest.approx(epoch + taken / sizes[epoch])
        steps = -(-(sizes[epoch] - taken) // train.global_batch) + sum(
            -(-s // train.global_batch) for s in sizes[epoch + 1 :]
        )
        assert horizon.steps == step + steps
        for _ in range(draw.randint(1, 5)):
            step, taken = step + 1, taken + train.global_batch
            if epoch < len(epochs) and taken >= sizes[epoch]:
                epoch, taken = epoch + 1, 0
    assert horizon.passes(Position(3)) == 3.0


def test_a_run_without_a_change_has_the_steps_and_the_rates_of_its_beginning() -> None:
    train, bins = Train(epochs=1.5, steps=None, global_batch=20), [[[200]], [[150]]]
    first = horizon_of(train, bins, 0, Position())
    assert first == Horizon(14, 14, bins)
    assert horizon_of(train, bins, 12, Position(1, 0, 40)) == first


@pytest.mark.parametrize("batch", [10, 40])
def test_the_learning_rate_goes_on_by_the_share_of_the_data_that_is_done(shop: Workshop, batch: int) -> None:
    optim = shop.config("rate", "optim.warmup_steps=0", "optim.schedule=linear", "optim.min_lr_ratio=0").optim
    horizon = horizon_of(Train(epochs=1, steps=None, global_batch=batch), [[[200]]], 4, Position(bin=80))
    rates = [horizon.rate(optim, step) / optim.lr for step in range(5, horizon.steps + 1)]
    assert rates == pytest.approx([1 - rows / 200 for rows in range(80 + batch, 201, batch)])
    assert all(before > after for before, after in pairwise(rates))


def test_a_batch_that_is_skipped_is_no_step() -> None:
    train, bins = Train(epochs=1, steps=None, global_batch=20), [[[200]]]
    skipped = [Position(bin=20), Position(bin=100), Position(bin=110), Position(1), Position(bin=100)]
    assert horizon_of(train, bins, 4, Position(bin=80), skipped).steps == 9
    assert horizon_of(train, bins, 9, Position(bin=200), skipped).steps == 9


@pytest.mark.parametrize(
    ("skipped", "lost"),
    [
        (Position(bin=60), 0),  # it lies behind the run
        (Position(bin=80), 1),  # the very next batch
        (Position(bin=90), 0),  # no batch of this size begins there
        (Position(bin=180), 1),
        (Position(1), 1),
        (Position(1, 0, 60), 1),  # of 75 rows, with which the run ends
        (Position(1, 0, 80), 0),
        (Position(2), 0),
    ],
    ids=str,
)
def test_a_skipped_batch_that_the_rest_of_the_run_would_take_is_no_step_of_it(skipped: Position, lost: int) -> None:
    train, bins = Train(epochs=1.5, steps=None, global_batch=20), [[[200]], [[150]]]
    horizon = horizon_of(train, bins, 4, Position(bin=80), [skipped])
    assert (horizon.steps, horizon.whole) == (14 - lost, 14)


def test_epochs_that_are_over_leave_no_steps() -> None:
    train = Train(epochs=1, steps=None, global_batch=20)
    assert horizon_of(train, [[[200]]], 15, Position(1, 0, 100)).steps == 15


def due_at(shop: Workshop, *settings: str, per_epoch: float, to: int | None = None, step: int = 0) -> list[int]:
    """The steps of a run of the shop's 200 rows after which something comes `per_epoch` times an epoch; the run begins
    at `step`, with as many steps of 20 rows behind it."""
    config = shop.config(
        "rhythm", "data.packing=false", "train.global_batch=20", f"checkpoint.per_epoch={per_epoch}", *settings
    )
    datasets = shop.prepare(config)
    stream = train_stream(
        config, open_chapters(shop.store, datasets.train, shop.store.sub("rows")), rank=0, world_size=1
    )
    position = Position()
    for _ in range(20 * step // config.train.global_batch):
        position = stream.advance(position)
    horizon, found = horizon_of(config.train, datasets.epochs, step, position), list[int]()
    while step < (to or horizon.steps):
        before, position, step = position, stream.advance(position), step + 1
        if horizon.is_due(config.checkpoint.per_epoch, before, position):
            found.append(step)
    return found


def test_what_comes_so_often_an_epoch_comes_at_even_distances_and_at_its_end(shop: Workshop) -> None:
    epochs = ("train.steps=null", "train.epochs=2")
    assert due_at(shop, *epochs, per_epoch=2) == [5, 10, 15, 20]
    assert due_at(shop, *epochs, per_epoch=4) == [3, 5, 8, 10, 13, 15, 18, 20]
    assert due_at(shop, *epochs, per_epoch=0.5) == [20]
    assert due_at(shop, "train.steps=27", per_epoch=1) == [10, 20]
    assert due_at(shop, *epochs, per_epoch=2, step=4) == [5, 10, 15, 20], "a resumed run goes on with the same steps"
    assert due_at(shop, *epochs, "train.global_batch=10", per_epoch=2, step=4) == [6, 16, 26, 36], (
        "another batch finds the same rows: 80 are behind it, and 100 are half of them"
    )


def test_three_times_in_ten_epochs_is_exactly_that() -> None:
    """As a float, 0.3 is a little less."""
    horizon = Horizon(99, 99, [])
    due = [end for end in range(1, 21) if horizon.is_due(0.3, Position(end - 1), Position(end))]
    assert due == [4, 7, 10, 14, 17, 20]


def test_epochs_to_which_a_larger_batch_has_led_are_counted_on(shop: Workshop) -> None:
    """By the smaller batch of a resume the run would have seen fewer of them."""
    config = shop.config(
        "on", "data.packing=false", "train.global_batch=20", "train.steps=30", "checkpoint.per_epoch=2"
    )
    datasets, run = shop.prepare(config), shop.store.sub("on")
    assert len(datasets.epochs) == 3
    commit(run, config, 20, datasets.train)
    run.put(layout.manifest(20), replace(read_manifest(run, 20), position=Position(2).to_json()).to_json())
    smaller = override(config, "train.global_batch=10", "train.steps=50")
    epochs = shop.prepare(smaller).epochs
    horizon = horizon_of(smaller.train, epochs, 20, Position(2))
    assert [horizon.is_due(2, Position(3, bin=rows - 10), Position(3, bin=rows)) for rows in (90, 100)] == [False, True]


class Alone(Ranks):
    """One rank without a process group."""

    def gather_tensor(self, mine: Tensor) -> Tensor:
        return mine[None]

    def total(self, counts: Tensor) -> Tensor:
        return counts


class NoModel:
    """An engine whose losses are all the same, for what the loop does around them."""

    model = nn.Module()
    seeing_operations = 0

    def __init__(self) -> None:
        self.clock = Clock(torch.device("cpu"))

    def evaluating(self) -> nullcontext[None]:
        return nullcontext()

    def loss(self, batch: Any) -> Tensor:
        return torch.ones(1)

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, lr: float) -> float:
        return 1.0


class Kept(Metrics):
    def __init__(self) -> None:
        self.records = list[tuple[str, int]]()

    def write(self, kind: str, **values: Any) -> None:
        self.records.append((kind, values["step"]))


def test_an_evaluation_whose_place_in_the_data_is_skipped_comes_with_the_next_update(shop: Workshop) -> None:
    epoch = ("train.global_batch=20", "train.steps=null", "train.epochs=1")
    config = shop.config("lost", "data.packing=false", "train.look_share=0", *epoch)
    datasets = shop.prepare(config)
    config = override(config, f"data.eval=[{{path: {shop.data}}}]", "eval.per_epoch=2")
    stream = train_stream(config, open_chapters(shop.store, datasets.train, shop.store.sub("lost")), 0, 1)
    skipped, metrics = (Position(bin=80),), Kept()
    checkpoints = SimpleNamespace(
        ready=True,
        memory=None,
        advance=lambda **_: None,
        save=lambda *_, **__: None,
        prove=lambda: None,
        finish=lambda: None,
    )
    start: Any = SimpleNamespace(
        config=config,
        objective=find_objective(config),
        ranks=Alone(0, 1, 1, 0, torch.device("cpu")),
        metrics=metrics,
        stop=SimpleNamespace(requested=0),
        pulse=lambda *_: None,
    )
    engine: Any = NoModel()
    training = Training(
        start=start,
        engine=engine,
        stream=stream,
        eval_stream=stream,
        checkpoints=checkpoints,  # pyright: ignore[reportArgumentType]
        horizon=horizon_of(config.train, datasets.epochs, 0, Position(), skipped),
        skipped=skipped,
    )
    assert [record["step"] for record in train(training, 0, Position())] == list(range(1, 10))
    assert metrics.records == [("eval", 0), ("skip", 4), ("eval", 5), ("eval", 9)], (
        "half of the rows lie in the fifth batch"
    )


@pytest.mark.parametrize(
    ("steps", "begun", "epochs"),
    [
        (6, (0, Position()), 2),
        (7, (0, Position()), 3),  # the third step of each epoch of 50 rows takes its last 10
        (7, (4, Position(1, 0, 20)), 3),
        (6, (4, Position(1, 0, 20)), 2),  # 30 rows are two steps
        (5, (4, Position(1, 0, 49)), 2),
    ],
)
def test_as_many_epochs_are_counted_as_a_run_of_steps_visits_from_its_place(
    steps: int, begun: tuple[int, Position], epochs: int, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shop.config("counted", "train.global_batch=20", f"train.steps={steps}", "checkpoint.per_epoch=1")
    monkeypatch.setattr(prepare, "_epoch_bins", lambda store, data, order, count: [[[50]]] * count)
    monkeypatch.setattr(prepare, "training_place", lambda checkpoint: begun)
    assert len(prepare._epochs_of(config, shop.store, "data")) == epochs
