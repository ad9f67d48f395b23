"""The passes over the data before the first step: a reference, and features of pictures. What decides their values is in
the name under which they are kept, and a pass that is stopped goes on where it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.errors import ConfigError, Damaged, NonFiniteLoss
from trainer.model.front import CannotSee
from trainer.model.micro_batch import Seen
from trainer.store.json_text import canonical
from trainer.train import features, reference
from trainer.train.features import FeaturePass
from trainer.train.reference import ReferencePass, References


def resolved(**changed: Any) -> Any:
    """A run over a base, where some values are changed."""
    facts: dict[str, Any] = {
        "fingerprint": "f",
        "versions": {"a": "1"},
        "samples": {"a": "s"},
        "layers": None,
        "dtype": "bf16",
        "type": "nf4",
        "block_size": 64,
        "double": True,
        "start": None,
        **changed,
    }

    def of(*names: str) -> Any:
        return SimpleNamespace(**{name: facts[name] for name in names})

    base = of("fingerprint", "versions", "samples")
    base.directory, base.architecture = Path("/models/b"), SimpleNamespace(hidden=8)
    config = SimpleNamespace(model=of("layers", "dtype"), quant=of("type", "block_size", "double"))
    start = facts["start"]
    return SimpleNamespace(
        base=base, config=config, beginning=start and SimpleNamespace(begun=True, facts={"start_weights": start})
    )


BASE = [{"fingerprint": "g"}, {"versions": {"a": "2"}}, {"samples": {"a": "t"}}, {"layers": 1}, {"dtype": "fp32"}]


@pytest.mark.parametrize(
    "changed",
    [
        *BASE,
        *({"type": "fp4"}, {"block_size": 128}, {"double": False}, {"start": "w"}),
        *({"kernels": "eager"}, {"unit": "answers"}, {"dataset": "e"}),
    ],
)
def test_a_reference_of_something_else_has_another_name(changed: dict[str, Any]) -> None:
    def name(**of: Any) -> str:
        given = {"kernels": "sdpa", "unit": "pairs", "dataset": "d"} | of
        run = resolved(**{key: value for key, value in of.items() if key not in ("kernels", "unit", "dataset")})
        start: Any = SimpleNamespace(config=run.config, resolved=run, objective=SimpleNamespace(unit=given["unit"]))
        engine: Any = None
        dataset: Any = SimpleNamespace(manifest=SimpleNamespace(fingerprint=given["dataset"]))
        return reference.references_key(ReferencePass(start, engine, given["kernels"])._facts(dataset))

    assert name() == name()
    assert name(**changed) != name()


@pytest.mark.parametrize("changed", [*BASE, {"attention": "eager"}, {"device": "cuda"}, {"processor": b"size: 448"}])
def test_features_of_something_else_have_another_name(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def name(attention: str = "sdpa", device: str = "cpu", processor: bytes = b"size: 224", **of: Any) -> str:
        monkeypatch.setattr(features, "processor_files", lambda _: {"preprocessor_config.json": processor})
        return canonical(features._facts(resolved(**of), attention, device))

    assert name() == name()
    assert name(**changed) != name()


class Rows:
    """Four rows of one document each."""

    pictures = None

    def __init__(self) -> None:
        self.read = list[int]()

    def step(self, position: Position) -> list[Any]:
        self.read.append(position.bin)
        return [SimpleNamespace(documents=(position.bin,))]

    def advance(self, position: Position) -> Position:
        return Position(bin=position.bin + 1) if position.bin < 3 else Position(epoch=1)

    def read_from(self, position: Position, steps: int) -> Iterator[list[Any]]:
        for place in range(steps):
            seen = [SimpleNamespace(key=f"key {place}", inputs={"pixels": 1})]
            yield [SimpleNamespace(input=SimpleNamespace(seen=seen))]


class Pass:
    """The only rank of a run that computes a reference of four pairs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stops_after: int = 99, wrong: int = 99) -> None:
        self.rows, self.logged, self.written, self.modes = Rows(), list[str](), list[References](), list[str]()
        self.order = "this order"
        self.found: Any = None
        monkeypatch.setattr(reference, "eval_order", lambda *_: SimpleNamespace(to_json=lambda: self.order))
        monkeypatch.setattr(reference, "eval_stream", lambda *_: self.rows)
        monkeypatch.setattr(reference, "sees_pictures", lambda *_: None)
        monkeypatch.setattr(reference, "write_references", lambda folder, facts, made: self.written.append(made))
        monkeypatch.setattr(reference, "open_dataset", lambda store, name: self.dataset)
        monkeypatch.setattr(reference, "read_references", self.known)
        monkeypatch.setattr(reference, "begin_from", lambda *_: self.modes.append("begun"))
        self.dataset: Any = SimpleNamespace(manifest=SimpleNamespace(fingerprint="d", documents=4))
        ranks = SimpleNamespace(
            rank=0, world_size=1, gather_objects=lambda mine: [mine], on_first=lambda action: action()
        )
        rows = self.rows

        class Asked:
            @property
            def requested(self) -> bool:
                return len(rows.read) >= stops_after

        self.run = resolved()
        self.run.method = SimpleNamespace(trains_base=False, switched_off=lambda _: self.mode("the base"))
        self.start: Any = SimpleNamespace(
            ranks=ranks,
            resolved=self.run,
            config=self.run.config,
            store=SimpleNamespace(sub=lambda name: SimpleNamespace(uri=name)),
            objective=SimpleNamespace(unit="pairs", reference=None),
            log=self.logged.append,
            pulse=lambda *_: None,
            stop=Asked(),
            metrics=SimpleNamespace(write_now=lambda *_, **__: None, write=lambda *_, **__: None),
        )

        def look(_: Any, row: Any) -> torch.Tensor:
            number = row.documents[0]
            return torch.tensor([[torch.inf if number == wrong else float(number), -1.0], [99.0, 99.0]])  # and padding

        self.engine: Any = SimpleNamespace(look=look, evaluating=lambda: self.mode("without dropout"), model=None)

    @contextmanager
    def mode(self, name: str) -> Iterator[None]:
        self.modes.append(name)
        yield
        self.modes.append(f"no more {name}")

    def known(self, *_: Any) -> References:
        if self.found is None:
            raise reference.NotFound("there is none.")
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def log_p(self) -> Any:
        return ReferencePass(self.start, self.engine, "sdpa").log_probabilities("d")


ALL = [[float(number), -1.0] for number in range(4)]


def test_a_reference_is_computed_over_the_base_without_dropout_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pass(monkeypatch)
    assert one.log_p().tolist() == ALL
    assert [(made.log_p.tolist(), made.progress) for made in one.written] == [(ALL, None)]
    assert one.modes == ["the base", "without dropout", "no more without dropout", "no more the base"]
    known = Pass(monkeypatch)
    known.found = one.written[0]
    assert known.log_p().tolist() == ALL
    assert (known.rows.read, known.written) == ([], [])
    damaged = Pass(monkeypatch)
    damaged.found = Damaged("it is damaged.")
    assert damaged.log_p().tolist() == ALL
    assert damaged.logged[0] == "it is damaged. The reference is computed again."


def test_a_run_that_begins_from_an_adapter_or_tunes_its_base_is_its_own_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = Pass(monkeypatch)
    begun.run.beginning = SimpleNamespace(begun=True, facts={"start_weights": "w"})
    begun.log_p()
    assert begun.modes == ["begun", "without dropout", "no more without dropout"]
    resumed = Pass(monkeypatch)
    resumed.run.beginning = SimpleNamespace(begun=False, facts={"start_weights": "w"})
    resumed.log_p()
    assert resumed.modes == ["without dropout", "no more without dropout"]
    tuned = Pass(monkeypatch)
    tuned.run.method.trains_base = True
    tuned.log_p()
    assert tuned.modes == ["without dropout", "no more without dropout"]


def test_a_reference_that_was_stopped_goes_on_where_it_was_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Pass(monkeypatch, stops_after=2)
    assert stopped.log_p() is None
    (left,) = stopped.written
    assert left.progress == {"order": "this order", "position": Position(bin=2).to_json()}
    assert np.isnan(left.log_p[:, 0]).tolist() == [False, False, True, True]
    for order, read in (("this order", [2, 3]), ("another order", [0, 1, 2, 3])):
        again = Pass(monkeypatch)
        again.found, again.order = left, order
        assert again.log_p().tolist() == ALL
        assert again.rows.read == read


def test_a_stop_that_comes_with_the_last_row_leaves_the_whole_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Pass(monkeypatch, stops_after=4)
    assert stopped.log_p().tolist() == ALL
    assert [made.progress for made in stopped.written] == [None]


def test_a_long_pass_says_how_far_it_is_and_keeps_its_results_every_five_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long, clock = Pass(monkeypatch), count(0, 200)
    monkeypatch.setattr(reference.time, "monotonic", lambda: next(clock))
    assert long.log_p().tolist() == ALL
    assert long.logged == [f"the reference of {done} of 4 pairs is computed" for done in (1, 2, 3, 4)]
    kept = {"order": "this order", "position": Position(bin=2).to_json()}
    assert [made.progress for made in long.written] == [kept, None]


def test_each_document_has_the_values_of_its_own_row_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two documents, in the order in which they were packed."""
    one = Pass(monkeypatch)
    places = {0: (3, 1), 1: (2, 0)}
    monkeypatch.setattr(one.rows, "step", lambda position: [SimpleNamespace(documents=places[position.bin])])
    monkeypatch.setattr(
        one.rows, "advance", lambda position: Position(epoch=1) if position.bin else Position(bin=position.bin + 1)
    )
    one.engine.look = lambda _, row: torch.tensor([[float(number), -1.0] for number in row.documents])
    assert one.log_p().tolist() == ALL


@pytest.mark.parametrize(("chapters", "waits"), [(None, []), (1, []), (2, [1]), (3, [2])])
def test_passes_over_all_data_wait_until_its_last_chapter_is_compiled(
    monkeypatch: pytest.MonkeyPatch, chapters: int | None, waits: list[int]
) -> None:
    asked = list[int]()
    known: Any = None if chapters is None else SimpleNamespace(count=chapters, get=asked.append)
    one = Pass(monkeypatch)
    assert ReferencePass(one.start, one.engine, "sdpa")._whole("d", known) is one.dataset
    assert asked == waits
    assert seeing(monkeypatch)._dataset("d", known) is not None
    assert asked == 2 * waits


def test_an_answer_that_the_base_gives_no_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Pass(monkeypatch, wrong=2)
    with pytest.raises(NonFiniteLoss, match="the base gives 1 of 4 pairs .* document 2 first"):
        wrong.log_p()
    assert wrong.written == []


class Features:
    """The features that are kept."""

    folder = SimpleNamespace(uri="s3://bucket/features")

    def __init__(self, of: str | None = None) -> None:
        self.of, self.kept, self.finished, self.known = of, list[str](), list[Any](), list[frozenset[str]]()

    def weights(self, fingerprint: str) -> frozenset[str] | None:
        return frozenset() if fingerprint == self.of else None

    def weights_so_far(self) -> frozenset[str]:
        return frozenset({"known"})

    def keep_weights(self, names: frozenset[str]) -> None:
        self.known.append(names)

    def write(self, key: str, values: Any) -> None:
        self.kept.append(key)

    def finish(self, fingerprint: str, documents: int) -> None:
        self.finished.append((fingerprint, documents))

    def has(self, key: str) -> bool:
        return key in self.kept


def seeing(
    monkeypatch: pytest.MonkeyPatch, columns: tuple[str, ...] = (features.PICTURES,), problem: str | None = None
) -> FeaturePass:
    files: Any = Features("done")
    dataset = SimpleNamespace(columns=columns)
    stop = SimpleNamespace(requested=False)
    ranks = SimpleNamespace(gather_objects=lambda mine: [mine], on_first=lambda action: action(), agreeing=nullcontext)
    start: Any = SimpleNamespace(
        ranks=ranks,
        stop=stop,
        log=lambda _: None,
        pulse=lambda *_: None,
        metrics=SimpleNamespace(write_now=lambda *_, **__: None),
        store=None,
    )
    front: Any = "there"
    made = FeaturePass(start, "sdpa", files, front)

    def taken_out(batches: Any) -> Any:
        keys = [one.key for batch in batches for one in batch.input.seen]
        return {key: SimpleNamespace(weights={key}, kept=b"") for key in keys}, problem

    monkeypatch.setattr(features, "open_dataset", lambda store, name: dataset)
    monkeypatch.setattr(FeaturePass, "_stream", lambda self, dataset: Rows())
    monkeypatch.setattr(FeaturePass, "_taken_out", lambda self, batches: taken_out(batches))
    return made


def test_features_are_computed_once_and_not_of_data_without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    one = seeing(monkeypatch)
    kept: Any = one.files
    assert one.is_whole("done", None)
    assert kept.kept == []
    assert one.is_whole("new", None)
    assert kept.kept == [f"key {place}" for place in range(4)]
    assert kept.finished == [("new", 4)]
    assert kept.known == [frozenset({"known", *(f"key {place}" for place in range(n))}) for n in range(1, 5)]
    again = seeing(monkeypatch)
    monkeypatch.setattr(
        FeaturePass, "_taken_out", lambda self, batches: ({"key": SimpleNamespace(weights={"known"}, kept=b"")}, None)
    )
    there: Any = again.files
    assert again.is_whole("new", None)
    assert there.known == [frozenset({"known"})], "once, also where they are known already"
    assert there.finished == [("new", 4)]
    some = seeing(monkeypatch)
    monkeypatch.setattr(FeaturePass, "_taken_out", lambda self, batches: ({}, None))
    found: Any = some.files
    assert some.is_whole("new", None)
    assert found.finished == [("new", 4)], "those that were there already are counted"
    blind = seeing(monkeypatch, columns=())
    assert blind.is_whole("new", None)
    others: Any = blind.files
    assert (others.kept, others.finished) == ([], [])


def test_a_pass_over_pictures_ends_after_a_stop_request_and_for_a_class_that_cannot_do_without_its_tower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = seeing(monkeypatch)
    asked: Any = stopped.start.stop
    asked.requested = True
    assert not stopped.is_whole("new", None)
    kept: Any = stopped.files
    assert (kept.kept, kept.finished) == (["key 0"], [])
    other = seeing(monkeypatch)
    ranks: Any = other.start.ranks
    ranks.gather_objects = lambda mine: [mine, mine._replace(stop=True)]
    assert not other.is_whole("new", None), "another rank was asked"
    unable = seeing(monkeypatch, problem="it looks at pixels")
    with pytest.raises(ConfigError, match="it looks at pixels"):
        unable.is_whole("new", None)


def test_each_rank_computes_documents_of_its_own_that_have_no_features_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    one, left_out = seeing(monkeypatch), list[Any]()
    monkeypatch.undo()
    config = parse_config("""
run: {name: a}
model: {base: b}
data: {train: [{path: c}], sequence_length: 64}
train: {steps: 1}
sharding: {sequence_parallel: 2}
""")
    pictures = SimpleNamespace(leave_out=left_out.append)
    given = list[Any]()

    def streamed(config: Any, dataset: Any, rank: int, world_size: int) -> Any:
        given.append((config.sharding.sequence_parallel, rank, world_size))
        return SimpleNamespace(pictures=pictures)

    monkeypatch.setattr(features, "eval_stream", streamed)
    monkeypatch.setattr(features, "sees_pictures", lambda *_: None)
    start: Any = one.start
    start.config, start.resolved = config, SimpleNamespace(base=None)
    start.ranks.rank, start.ranks.world_size = 3, 4
    dataset: Any = SimpleNamespace(store=None)
    one._stream(dataset)
    assert given == [(1, 3, 4)], "no ranks share a row"
    assert left_out == [one.files.has]


def test_a_run_without_kept_features_makes_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolved()
    monkeypatch.setattr(features, "keeps_features", lambda config, architecture: config is not run.config)
    start: Any = SimpleNamespace(resolved=run)
    attention: Any = None
    assert features.kept_features(start, attention, ["d"], None) is None


def test_pictures_that_several_documents_show_are_taken_out_once_and_those_without_pixels_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, asked = seeing(monkeypatch), list[Any]()
    monkeypatch.undo()
    start: Any = one.start
    start.config, start.resolved = resolved().config, resolved()
    start.ranks.device = torch.device("cpu")

    def taken_out(ids: torch.Tensor, pixels: Any, types: Any, states: torch.Tensor) -> Any:
        asked.append((ids.tolist(), list(pixels), list(types), tuple(states.shape)))
        if 9 in ids:
            raise CannotSee("it looks at pixels")
        return f"of {ids.shape[1]} tokens"

    front: Any = SimpleNamespace(taken_out=taken_out)
    one.front = front
    inputs = {"pixel_values": torch.ones(1), "mm_token_type_ids": torch.ones(1, 2)}

    def row(*seen: tuple[int, str, Any], last: int = 5) -> Any:
        ids = torch.tensor([[1, 2, 3, 4, last]], dtype=torch.int32)
        every = [Seen(segment, inputs, key) for segment, key, inputs in seen]
        return SimpleNamespace(lengths=(2, 3), input=SimpleNamespace(input_ids=ids, seen=every))

    found = one._taken_out([row((0, "a", inputs), (1, "b", inputs)), row((1, "a", inputs), (0, "", inputs))])
    assert found == ({"a": "of 2 tokens", "b": "of 3 tokens"}, None)
    assert asked == [
        ([[1, 2]], ["pixel_values"], ["mm_token_type_ids"], (1, 2, 8)),
        ([[3, 4, 5]], ["pixel_values"], ["mm_token_type_ids"], (1, 3, 8)),
    ]
    assert one._taken_out([row((0, "c", {}))]) == ({}, None), "features that are kept already"
    assert one._taken_out([row((0, "a", inputs), (1, "b", inputs), last=9)]) == ({}, "it looks at pixels")
