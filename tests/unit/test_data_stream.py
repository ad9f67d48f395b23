import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainer.config import Data
from trainer.data.compile import compile_dataset
from trainer.data.dataset import Dataset
from trainer.data.sources import expand
from trainer.data.stream import IGNORED, MicroBatch, Position, Stream, eval_stream
from trainer.errors import DataError
from trainer.store import open_store

LENGTH, PAD, EOS, DOCUMENTS = 32, 999, 1000, 700


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Document n is a prompt of 2 tokens, a completion of 1 to 24 tokens and the end token; every token below is n."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"{n} {n}", "completion": f" {n}" * (1 + n * 7 % 24)} for n in range(DOCUMENTS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backend = Tokenizer(models.WordLevel({str(n): n for n in range(DOCUMENTS)} | {"</s>": EOS}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    data = Data.model_validate(
        {"train": [{"path": str(folder / "a.jsonl")}], "format": "prompt_completion", "sequence_length": LENGTH}
    )
    files = expand(data.train, "data.train")
    return compile_dataset(data, files, tokenizer, open_store(str(folder)), "f" * 20)


def stream(dataset: Dataset, **options: Any) -> Stream:
    defaults: dict[str, Any] = {"weights": [1.0], "sequence_length": LENGTH, "packing": True, "seed": 3}
    defaults |= {"global_batch": 24, "micro_batch": 1, "rank": 0, "world_size": 1, "pad_id": PAD}
    return Stream(dataset, **(defaults | options))


def epoch_of(dataset: Dataset, world_size: int, **options: Any) -> list[list[MicroBatch]]:
    """All ranks' micro-batches of each step of epoch 0."""
    ranks = [stream(dataset, rank=rank, world_size=world_size, **options).epoch(0) for rank in range(world_size)]
    return [[batch for part in step for batch in part] for step in zip(*ranks, strict=True)]


def bins(step: list[MicroBatch]) -> list[tuple[int, int]]:
    return sorted(place for batch in step for place in batch.bins)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_the_global_order_knows_no_ranks(dataset: Dataset, world_size: int, micro_batch: int) -> None:
    alone = epoch_of(dataset, 1)
    together = epoch_of(dataset, world_size, micro_batch=micro_batch)
    assert [bins(step) for step in together] == [bins(step) for step in alone]
    for left, right in zip(alone, together, strict=True):
        assert Counter(d for b in left for d in b.documents) == Counter(d for b in right for d in b.documents)
        assert sum(batch.targets for batch in left) == sum(batch.targets for batch in right)


def test_every_document_once_an_epoch_and_every_bin_in_turn(dataset: Dataset) -> None:
    steps = epoch_of(dataset, 2)
    assert Counter(d for step in steps for batch in step for d in batch.documents) == Counter(range(DOCUMENTS))
    places = [place for step in steps for place in bins(step)]
    assert places == [(0, k) for k in range(len(places))]
    assert len(steps) == stream(dataset).steps_in_epoch(0) == -(-len(places) // 24)


def test_the_last_step_has_empty_rows_and_every_rank_the_same_number_of_micro_batches(dataset: Dataset) -> None:
    steps = epoch_of(dataset, 8)
    assert all(len(step) == 24 for step in steps)
    assert 0 < len(bins(steps[-1])) < 24
    empty = next(batch for batch in steps[-1] if not batch.bins)
    assert (empty.targets, empty.documents, empty.max_seqlen) == (0, (), LENGTH)
    assert empty.input_ids.tolist() == [[PAD] * LENGTH]
    assert empty.labels.tolist() == [[IGNORED] * LENGTH]
    assert empty.cu_seqlens.tolist() == [0, LENGTH]


def test_a_global_batch_that_ranks_do_not_divide_is_padded_with_empty_rows(dataset: Dataset) -> None:
    step = epoch_of(dataset, 5, global_batch=12, micro_batch=2)[0]
    assert bins(step) == [(0, k) for k in range(12)]
    assert len(step) == 5 * stream(dataset, world_size=5, global_batch=12, micro_batch=2).accumulation == 10


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_row_is_laid_out_as_documented(dataset: Dataset, micro_batch: int) -> None:
    total = micro_batch * LENGTH
    for batch in (batch for step in epoch_of(dataset, 1, micro_batch=micro_batch) for batch in step):
        for tensor in (batch.input_ids, batch.labels, batch.position_ids):
            assert (tensor.shape, tensor.dtype) == ((1, total), torch.int64)
        borders = batch.cu_seqlens.tolist()
        assert (borders[0], borders[-1], batch.cu_seqlens.dtype) == (0, total, torch.int32)
        assert batch.max_seqlen == max(b - a for a, b in pairwise(borders))
        assert batch.targets == int((batch.labels != IGNORED).sum())
        # Bins begin at multiples of the sequence length, so no segment crosses one.
        assert set(range(0, total, LENGTH)) <= set(borders)
        numbers = iter(batch.documents)
        for start, end in pairwise(borders):
            ids, labels = batch.input_ids[0, start:end].tolist(), batch.labels[0, start:end].tolist()
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
            if ids[0] == PAD:
                assert ids == [PAD] * len(ids)
                assert labels == [IGNORED] * len(ids)
            else:
                number = next(numbers)
                assert ids == [number] * (len(ids) - 1) + [EOS]
                # The prompt's first token predicts its second, which is not trained; the last token predicts nothing.
                assert labels == [IGNORED, *ids[2:], IGNORED]
        assert next(numbers, None) is None


def test_a_position_resumes_where_it_was_taken_on_any_number_of_ranks(dataset: Dataset) -> None:
    source = stream(dataset)
    position = Position()
    for _ in range(3):
        position = source.advance(position)
    assert position == Position(0, 72)
    restored = Position.from_json(json.loads(json.dumps(position.to_json())))
    resumed = [stream(dataset, rank=rank, world_size=3).step(restored) for rank in range(3)]
    assert bins([batch for part in resumed for batch in part]) == bins(source.step(position))


def test_an_epoch_is_followed_by_the_next_in_another_order(dataset: Dataset) -> None:
    source = stream(dataset)
    position = Position()
    for _ in range(source.steps_in_epoch(0)):
        position = source.advance(position)
    assert position == Position(1, 0)
    first, second = ([d for b in source.step(Position(epoch, 0)) for d in b.documents] for epoch in (0, 1))
    assert first != second
    assert first != [d for b in stream(dataset, seed=4).step(Position()) for d in b.documents]


def test_without_packing_every_document_has_a_row(dataset: Dataset) -> None:
    batches = [batch for step in epoch_of(dataset, 1, packing=False) for batch in step if batch.bins]
    assert len(batches) == DOCUMENTS
    assert all(len(batch.documents) == 1 for batch in batches)


def test_weights_are_visits(dataset: Dataset) -> None:
    seen = Counter(d for step in epoch_of(dataset, 1, weights=[2.0]) for batch in step for d in batch.documents)
    assert seen == Counter(dict.fromkeys(range(DOCUMENTS), 2))


def test_an_epoch_that_visits_nothing_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(DataError, match=r"epoch 0 visits no document, as weights of 1e-06 .* Raise a weight"):
        stream(dataset, weights=[1e-6]).step(Position())


def test_evaluation_visits_every_document_once_with_equal_micro_batches_on_each_rank(dataset: Dataset) -> None:
    ranks = [[batch for (batch,) in eval_stream(dataset, LENGTH, True, 2, rank, 3, PAD).epoch(0)] for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    assert Counter(d for batches in ranks for b in batches for d in b.documents) == Counter(range(DOCUMENTS))
