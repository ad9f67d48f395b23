import json
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.compiled import compile_dataset
from trainer.config import Config, Data
from trainer.config.training import Sharding
from trainer.data.dataset.chapters import whole
from trainer.data.dataset.dataset import Dataset, ReadBlocks
from trainer.data.order import order
from trainer.data.order.order import EpochPlan, Window
from trainer.data.order.settings import Order, Position, eval_order
from trainer.data.order.stream import PAD, Stream, block_stream, eval_stream, sees_pictures
from trainer.data.source.files import expand
from trainer.errors import DataError
from trainer.model.head import IGNORE
from trainer.model.micro_batch import MicroBatch
from trainer.processes.devices import picture_readers
from trainer.store.store import open_store

LENGTH, EOS, DOCUMENTS = 32, 1000, 700


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Three windows an epoch, of one block each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW_BLOCKS", 1)
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Document n is a prompt of 2 tokens, a completion of 1 to 24 tokens and the end token; every token below is n +
    1.
    """
    return compiled(tmp_path_factory.mktemp("data"), DOCUMENTS)


def compiled(folder: Path, *sources: int) -> Dataset:
    """A data set of sources with so many documents. They are numbered through all of them."""
    rows = [{"prompt": f"{n} {n}", "completion": f" {n}" * (1 + n * 7 % 24)} for n in range(sum(sources))]
    files = [folder / f"{source}.jsonl" for source in range(len(sources))]
    for file, end, count in zip(files, accumulate(sources), sources, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[end - count : end]))
    backend = Tokenizer(models.WordLevel({str(n): n + 1 for n in range(DOCUMENTS)} | {"</s>": EOS}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    train = [{"path": str(file)} for file in files]
    data = Data.model_validate({"train": train, "format": "prompt_completion", "sequence_length": LENGTH})
    return compile_dataset(data, expand(data.train, "data.train"), tokenizer, open_store(str(folder)), "f" * 20)


def stream(dataset: Dataset, **options: Any) -> Stream:
    given: dict[str, Any] = {"weights": (1.0,), "sequence_length": LENGTH, "packing": True, "seed": 3}
    share: dict[str, Any] = {"global_batch": 24, "micro_batch": 1, "rank": 0, "world_size": 1}
    for name, value in options.items():
        (given if name in given else share)[name] = value
    return Stream(whole(dataset), Order(**given), **share)


CONFIG = Config.model_validate(
    {
        "run": {"name": "x"},
        "model": {"base": "x"},
        "data": {"train": [{"path": "x"}], "sequence_length": LENGTH},
        "train": {"steps": 1, "micro_batch": 2},
    }
)


def epoch_of(dataset: Dataset, world_size: int, **options: Any) -> list[list[MicroBatch]]:
    """All micro-batches of each step of epoch 0, in their global order: those of all ranks, then the ranks' next
    ones.
    """
    ranks = [stream(dataset, rank=rank, world_size=world_size, **options).epoch(0) for rank in range(world_size)]
    return [[batch for micro in zip(*step, strict=True) for batch in micro] for step in zip(*ranks, strict=True)]


def bins(step: list[MicroBatch]) -> list[Any]:
    return [place for batch in step for place in batch.bins]


def rows(step: list[MicroBatch]) -> list[list[int]]:
    """The rows that hold documents, in their global order."""
    rows = (row for batch in step for row in batch.input.input_ids.reshape(-1, LENGTH).tolist())
    return [row for row in rows if row[0] != PAD]


@settings(max_examples=15, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 8, 16]),
    micro_batch=st.integers(1, 3),
    global_batch=st.integers(1, 60),
)
@example(world_size=16, micro_batch=2, global_batch=24)
def test_the_global_order_knows_neither_ranks_nor_accumulation(
    dataset: Dataset, world_size: int, micro_batch: int, global_batch: int
) -> None:
    alone = epoch_of(dataset, 1, global_batch=global_batch)
    together = epoch_of(dataset, world_size, micro_batch=micro_batch, global_batch=global_batch)
    assert [rows(step) for step in together] == [rows(step) for step in alone]
    assert [bins(step) for step in together] == [bins(step) for step in alone]
    assert Counter(d for step in together for batch in step for d in batch.documents) == Counter(range(DOCUMENTS))
    for left, right in zip(alone, together, strict=True):
        assert sum(batch.targets for batch in left) == sum(batch.targets for batch in right)


@settings(max_examples=10, deadline=None)
@given(
    position=st.integers(0, 60),
    before=st.sampled_from([1, 2, 3, 8]),
    after=st.sampled_from([1, 2, 3, 8]),
)
@example(position=20, before=2, after=3)  # in the middle of the second epoch
def test_a_resume_at_another_world_size_gives_the_very_next_sample(
    dataset: Dataset, position: int, before: int, after: int
) -> None:
    """A run of epochs of some 14 steps is stopped after some steps; the next steps are those it would have taken."""

    def steps(world_size: int, start: Position, count: int) -> list[list[list[int]]]:
        ranks = [stream(dataset, rank=rank, world_size=world_size).read_from(start) for rank in range(world_size)]
        taken = [
            [batch for micro in zip(*(next(r) for r in ranks), strict=True) for batch in micro] for _ in range(count)
        ]
        return [rows(step) for step in taken]

    here = Position()
    for _ in range(position):
        here = stream(dataset, world_size=before).advance(here)
    restored = Position.from_json(json.loads(json.dumps(here.to_json())))
    assert steps(after, restored, 2) == steps(before, Position(), position + 2)[-2:]


def test_every_bin_in_turn(dataset: Dataset) -> None:
    places = [place for step in epoch_of(dataset, 2) for place in bins(step)]
    assert [place.window for place in places] == sorted(place.window for place in places)
    assert {place.window for place in places} == {0, 1, 2}
    for window in range(3):
        numbers = [place.bin for place in places if place.window == window]
        assert numbers == list(range(len(numbers)))


def test_the_last_step_has_empty_rows_and_every_rank_the_same_number_of_micro_batches(dataset: Dataset) -> None:
    steps = epoch_of(dataset, 8)
    assert all(len(step) == 24 for step in steps)
    assert 0 < len(bins(steps[-1])) < 24
    empty = next(batch for batch in steps[-1] if not batch.bins)
    assert (empty.targets, empty.documents, empty.input.max_seqlen) == (0, (), LENGTH)
    assert empty.input.input_ids.tolist() == [[PAD] * LENGTH]
    assert empty.labels.tolist() == [[IGNORE] * LENGTH]
    assert empty.input.cu_seqlens.tolist() == [0, LENGTH]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_row_is_laid_out_as_documented(dataset: Dataset, micro_batch: int) -> None:
    total = micro_batch * LENGTH
    for batch in (batch for step in epoch_of(dataset, 1, micro_batch=micro_batch) for batch in step):
        for tensor in (batch.input.input_ids, batch.labels, batch.input.position_ids):
            assert (tensor.shape, tensor.dtype) == ((1, total), torch.int32)
        borders = batch.input.cu_seqlens.tolist()
        assert (borders[0], borders[-1], batch.input.cu_seqlens.dtype) == (0, total, torch.int32)
        assert batch.input.max_seqlen == max(b - a for a, b in pairwise(borders))
        assert batch.targets == int((batch.labels != IGNORE).sum())
        # Bins begin at multiples of the sequence length, so no segment crosses one.
        assert set(range(0, total, LENGTH)) <= set(borders)
        numbers = iter(batch.documents)
        for start, end in pairwise(borders):
            ids, labels = batch.input.input_ids[0, start:end].tolist(), batch.labels[0, start:end].tolist()
            assert batch.input.position_ids[0, start:end].tolist() == list(range(end - start))
            if ids[0] == PAD:
                assert ids == [PAD] * len(ids)
                assert labels == [IGNORE] * len(ids)
            else:
                number = next(numbers)
                assert ids == [number + 1] * (len(ids) - 1) + [EOS]
                # The prompt's first token predicts its second, which is not trained; the last token predicts nothing.
                assert labels == [IGNORE, *ids[2:], IGNORE]
        assert next(numbers, None) is None
        assert sum(end - begin for begin, end in batch.input.segments.padding) == total - batch.tokens
        assert all(
            batch.input.input_ids[0, begin:end].tolist() == [PAD] * (end - begin)
            for begin, end in batch.input.segments.padding
        )


def test_an_epoch_is_followed_by_the_next_in_another_order(dataset: Dataset) -> None:
    source = stream(dataset)
    position = Position()
    for _ in epoch_of(dataset, 1):
        position = source.advance(position)
    assert position == Position(1)
    first, second = ([d for b in source.step(Position(epoch)) for d in b.documents] for epoch in (0, 1))
    assert first != second
    assert first != [d for b in stream(dataset, seed=4).step(Position()) for d in b.documents]


def test_a_resume_plans_its_window_and_those_ahead_alone(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: set[tuple[int, int]] = set()
    plain = EpochPlan._window

    def observed(self: EpochPlan, index: int) -> Window:
        planned.add((self.epoch, index))
        return plain(self, index)

    monkeypatch.setattr(EpochPlan, "_window", observed)
    next(stream(dataset, global_batch=1).read_from(Position(5, window=1, bin=3)))
    assert planned <= {(5, 1), (5, 2), (6, 0)}


def test_without_packing_every_document_has_a_row(dataset: Dataset) -> None:
    batches = [batch for step in epoch_of(dataset, 1, packing=False) for batch in step if batch.bins]
    assert len(batches) == DOCUMENTS
    assert all(len(batch.documents) == 1 for batch in batches)


def test_weights_are_visits(dataset: Dataset) -> None:
    seen = Counter(d for step in epoch_of(dataset, 1, weights=(2.0,)) for batch in step for d in batch.documents)
    assert seen == Counter(dict.fromkeys(range(DOCUMENTS), 2))


def test_the_ranks_of_a_machine_divide_its_cores_to_read_pictures(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Any]()
    monkeypatch.setattr("trainer.data.order.pictures.PictureReader", lambda *given: made.append(given) or "a reader")
    monkeypatch.setattr("trainer.data.order.stream.read_processor", lambda folder, name: f"the processor of {name}")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16))
    base: Any = SimpleNamespace(directory="here", name="base")
    data = CONFIG.data.model_copy(update={"format": "pictures"})
    config, plain = CONFIG.model_copy(update={"data": data}), stream(dataset)
    monkeypatch.setenv("WORLD_SIZE", "16")
    for local, readers in (("2", picture_readers(16, 2)), ("4", picture_readers(16, 4))):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert sees_pictures(plain, config, base, dataset.store).pictures == "a reader"
        folder, processor, budget, *others = made.pop()
        assert (folder, processor, budget) == (dataset.store, "the processor of base", data.images.read_ahead)
        assert others[0] == readers
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    sees_pictures(plain, config, base, dataset.store)
    assert made.pop()[3] == picture_readers(16, 1) > picture_readers(16, 2) > picture_readers(16, 4)
    assert [picture_readers(cores, 4) for cores in (1, 4, 8, 400)] == [0, 0, 1, 16], "a rank takes a core, too"
    assert sees_pictures(stream(dataset), CONFIG, base, dataset.store).pictures is None


def test_an_epoch_that_visits_nothing_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"epoch 0 visits no document, as weights of 1e-06 .* Raise a weight"):
        stream(dataset, weights=(1e-6,)).step(Position())


@pytest.mark.parametrize(("world_size", "parts"), [(3, 1), (4, 2)])
def test_evaluation_visits_every_document_once_with_equal_micro_batches_on_each_rank(
    dataset: Dataset, world_size: int, parts: int
) -> None:
    config = CONFIG.model_copy(update={"sharding": Sharding(sequence_parallel=parts)})
    ranks = [
        [batch for (batch,) in eval_stream(config, dataset, rank, world_size).epoch(0)] for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert Counter(d for batches in ranks for b in batches for d in b.documents) == Counter(range(DOCUMENTS))


def test_the_blocks_of_every_source_are_read_by_themselves(tmp_path: Path) -> None:
    dataset = compiled(tmp_path, 300, 40)
    order = eval_order(CONFIG, dataset.manifest)
    read = [
        [number for (batch,) in block_stream(dataset, block, order, 1).epoch(0) for number in batch.documents]
        for block in range(len(dataset.blocks) - 1)
    ]
    assert [sorted(numbers) for numbers in read] == [[*range(256)], [*range(256, 300)], [*range(300, 340)]]


def test_evaluation_has_the_same_rows_whatever_the_runs_seed_and_weights(dataset: Dataset) -> None:
    run, train = CONFIG.run.model_copy(update={"seed": 7}), CONFIG.data.train[0]
    data = CONFIG.data.model_copy(update={"train": [train.model_copy(update={"weight": 0.5})] * 2})
    other = CONFIG.model_copy(update={"run": run, "data": data})
    one, two = ([row.documents for (row,) in eval_stream(of, dataset, 0, 1).epoch(0)] for of in (CONFIG, other))
    assert one == two


def test_evaluation_reads_no_window_twice_and_none_of_a_next_epoch(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    plain = Dataset.read

    def observed(self: Dataset, numbers: np.ndarray) -> ReadBlocks:
        reads.extend(numbers.tolist())
        return plain(self, numbers)

    monkeypatch.setattr(Dataset, "read", observed)
    source = eval_stream(CONFIG, dataset, 0, 1)
    for expected in (3, 2):  # of three blocks, one a window; the last window is still there for the second time
        reads.clear()
        assert sum(len(batch.documents) for (batch,) in source.epoch(0)) == DOCUMENTS
        assert len(set(reads)) == len(reads) == expected
