"""A teacher writes what it finds likely in the place of each target, block by block, whoever computes it."""

import math
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import commit
from tests.material import Workshop
from tests.unit.evaluate.test_making import One
from tests.unit.export.test_served import stub
from tests.unit.model.test_decoding import packed as packed_model
from trainer.base.find.check import content_of
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, override
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, Reads, open_dataset
from trainer.data.dataset.taught import (
    Likeliest,
    StoredTeacher,
    begin_teacher,
    read_teacher,
    read_whole,
    teacher_folder,
)
from trainer.errors import ConfigError, NonFiniteLoss
from trainer.evaluate import teach
from trainer.evaluate.program import Ask
from trainer.evaluate.teach import TeacherModel, TeacherPass
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.store.store import Store, open_store
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.teacher import Teacher, teacher_of

BIG = Teacher("/models/big", False, None, 3, 1.0)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("teach"))


def taught(workshop: Workshop, config: Config) -> tuple[Store, StoredTeacher, Any]:
    """The folder of the run's teacher, what is in it, and the run's data."""
    key, teacher = workshop.prepare(config).train, teacher_of(find_objective(config))
    assert teacher is not None
    folder = teacher_folder(workshop.store.sub(layout.dataset(key)), teacher.to_json())
    record, whole = read_teacher(folder), read_whole(folder)
    assert record is not None
    assert whole is not None
    return folder, StoredTeacher(folder, record, whole, Reads()), open_dataset(workshop.store, key)


@torch.no_grad()
def test_what_is_written_is_what_the_teacher_says_of_each_document_alone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workshop.config(
        "pupil",
        *("objective.name=distil", "objective.teacher=/models/big", "objective.top_k=5", "objective.temperature=2"),
    )
    model, base, told = packed_model("llama"), resolve_base(config.model), list[dict[str, Any]]()
    resolved: Any = SimpleNamespace(
        config=config, base=base, method=SimpleNamespace(virtual=SimpleNamespace(reserved=0))
    )
    inside = list[str]()

    @contextmanager
    def within(name: str) -> Any:
        inside.append(name)
        yield
        inside.remove(name)

    def look(of: Any, batch: Any) -> torch.Tensor:
        assert inside == ["base alone", "evaluating"]
        return of(model, batch.to(torch.device("cpu")))

    class Ranks(One):
        world = "all ranks"

        def together(self, action: Any) -> None:
            action()

    resolved.method.switched_off = lambda of: within("base alone")
    engine: Any = SimpleNamespace(model=None, look=look, evaluating=lambda: within("evaluating"))
    of_base = TeacherModel(resolved, Ranks(), engine)  # type: ignore[arg-type]
    monkeypatch.setattr(teach, "open_teacher", lambda *of: of_base)
    found = teach.teach(Ask("teach", "", config=dump_config(config)), told.append)
    folder, stored, data = taught(workshop, config)
    assert found.pop("bytes") > 0
    assert found == {
        "teacher": "/models/big",
        "folder": folder.uri,
        "data": data.manifest.fingerprint,
        "documents": len(data.lengths),
        "targets": data.manifest.targets,
        "top_k": 5,
        "written": 1,
    }
    assert told == [{"progress": "blocks of the data", "done": 1, "total": 1}]
    for number, row in enumerate(data.documents(0)):
        tokens = torch.from_numpy((row & ID_BITS).astype(np.int64))[None]
        places = np.flatnonzero(row[1:] & TARGET_BIT)
        log_p = (model.logits(tokens)[0, places].float() / 2).log_softmax(-1)
        likeliest = log_p.topk(5, -1)
        said = stored.read([number])
        assert said.ids.tolist() == likeliest.indices.tolist()
        np.testing.assert_allclose(said.log_p[:, :5], likeliest.values.numpy(), atol=6e-3)
        np.testing.assert_allclose(np.exp(said.log_p).sum(1), 1, atol=1e-5)
    assert teach.teach(Ask("teach", "", config=dump_config(config)), told.append)["written"] == 0
    learnt = commit(open_store(str(workshop.folder / "run")), 4)
    facts = of_base.facts()
    assert TeacherModel(resolved, Ranks(), engine, learnt).facts() == {**facts, **teach._learnt(learnt)}  # type: ignore[arg-type]
    assert (facts["base"], facts["dtype"], facts["weights"]) == (base.fingerprint, "bf16", content_of(base))
    with TeacherModel(resolved, Ranks(), engine, learnt).computing():  # type: ignore[arg-type]
        assert inside == ["evaluating"], "a run teaches with what it has learnt"


def test_a_teacher_with_other_sizes_teaches_the_tokens_that_both_have(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own virtual tokens stand before each document, and rows beyond its vocabulary or the run's are nobody's."""
    asked = list[Any]()

    class Noted(TeacherPass):
        def run(self) -> int:
            asked.append((self.order.reserved, self.record.vocabulary))
            return 0

    monkeypatch.setattr(teach, "TeacherPass", Noted)
    monkeypatch.setattr(teach, "finished", lambda *of: {})
    base = resolve_base(workshop.config("sizes").model)
    for top_k, theirs in ((4, 200), (6, 10**6)):
        config = workshop.config("sizes", "objective.name=distil", "objective.teacher=/m", f"objective.top_k={top_k}")
        method = SimpleNamespace(virtual=SimpleNamespace(reserved=5), switched_off=lambda of: nullcontext())
        named = SimpleNamespace(fingerprint="x", architecture=SimpleNamespace(vocabulary=theirs))
        engine: Any = SimpleNamespace(model=None, evaluating=nullcontext)
        model = TeacherModel(SimpleNamespace(config=config, base=named, method=method), One(), engine)  # type: ignore[arg-type]
        monkeypatch.setattr(TeacherModel, "facts", lambda self: {})
        monkeypatch.setattr(teach, "open_teacher", lambda *of, model=model: model)
        teach.teach(Ask("teach", "", config=dump_config(config)), lambda told: None)
    ours = base.architecture.vocabulary
    assert asked == [(5, 200), (5, ours)]


class Passing(TeacherPass):
    """A pass whose ranks note what they compute and write."""

    def _compute(self, block: int | None) -> Any:
        return f"documents of {block}"

    def _write(self, block: int | None, documents: Any) -> None:
        self.teacher.append((block, documents))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("rank", "blocks"), [(0, [0, 3]), (1, [2, None])])
def test_ranks_take_turns_over_the_blocks_that_lack(tmp_path: Path, rank: int, blocks: list[int | None]) -> None:
    folder, done, told = open_store(str(tmp_path)), list[Any](), list[Any]()
    record = begin_teacher(folder, BIG, {}, 300)
    for block in (1, 4):
        teach.write_block(folder, record, block, [])
    ranks: Any = SimpleNamespace(rank=rank, world_size=2, on_first=lambda of: of(), together=lambda of: of())
    model: Any = SimpleNamespace(ranks=ranks)
    data: Any = SimpleNamespace(blocks=range(6))
    given: Any = (model, data, folder, record, None, 1, done, told.append)
    assert Passing(*given).run() == 3
    assert done == [(block, f"documents of {block}") for block in blocks]
    assert [(one["done"], one["total"]) for one in told] == [(4, 5), (5, 5)]


def test_a_rank_without_a_block_passes_as_many_rows_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, opened = list[str](), list[Any]()
    stream = SimpleNamespace(
        epoch=lambda number: iter([[SimpleNamespace(name="a", documents=())]]),
        padding=lambda: SimpleNamespace(name="padding", documents=()),
    )
    monkeypatch.setattr(teach, "block_stream", lambda data, block, order, size: opened.append(block) or stream)
    monkeypatch.setattr(teach, "by_document", lambda batch, values: [])
    ranks = SimpleNamespace(gather=lambda rows: [(rows,), (3.0,)])
    engine = SimpleNamespace(look=lambda of, batch: looked.append(batch.name) or torch.zeros(0))
    given: Any = (SimpleNamespace(ranks=ranks, engine=engine), None, None, None, None, 1, BIG, None)
    assert TeacherPass(*given)._compute(None) == []
    assert looked == ["padding"] * 3
    looked.clear()
    assert TeacherPass(*given)._compute(2) == []
    assert looked == ["a", "padding", "padding"]
    assert opened == [0, 2]


def test_only_the_tail_may_be_nothing(tmp_path: Path) -> None:
    folder = open_store(str(tmp_path))
    record = begin_teacher(folder, BIG, {}, 300)
    given: Any = (None, None, folder, record, None, 1, BIG, None)
    log_p = np.log(np.array([[0.5, 0.25, 0.25, 1e-9]], np.float32))
    log_p[0, 3] = -np.inf
    ids = np.array([[1, 2, 3]])
    TeacherPass(*given)._write(0, [Likeliest(ids, log_p)])
    assert teach.written_blocks(folder) == {0}
    TeacherPass(*given)._write(None, [])
    log_p[0, 2] = np.nan
    whole = Likeliest(ids, np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32)))
    for documents in ([Likeliest(ids, log_p)], [whole, Likeliest(ids, log_p)]):
        with pytest.raises(NonFiniteLoss, match="gives a token of block 1 of the data no finite log-probability"):
            TeacherPass(*given)._write(1, documents)
    assert teach.written_blocks(folder) == {0}


def test_a_server_writes_what_the_store_lacks_and_has_the_bases_tokenizer(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach, "_AT_ONCE", 4)  # no more than the stub takes in
    told, tokens = list[dict[str, Any]](), list[Any]()

    def complete(body: dict[str, Any]) -> Any:
        if isinstance(body.get("prompt"), str):
            tokens.append(body["prompt"])
            return {"tokens": tokenizer.encode(body["prompt"], add_special_tokens=False)[len(tokens) > 2 :]}
        ids = body["prompt"]
        places = [{str((token + 1) % 200 + 3): {"logprob": -0.5}, "3": {"logprob": -1.5}} for token in ids[1:]]
        return {"choices": [{"prompt_logprobs": [None, *places]}]}

    with stub(complete, "big") as url:
        distil = ("objective.name=distil", f"objective.teacher={url}", "objective.top_k=2")
        config = workshop.config("server", *distil)
        tokenizer: Any = load_tokenizer(resolve_base(config.model))
        ask = Ask("teach", "", config=dump_config(config))
        found = teach.teach(ask, told.append)
        assert (found["written"], found["top_k"]) == (1, 2)
        assert told == [{"progress": "blocks of the data", "done": 1, "total": 1}]
        assert teach.teach(ask, told.append)["written"] == 0
        with pytest.raises(ConfigError, match="has another tokenizer than model.base"):
            teach.teach(ask, told.append)
    _, stored, data = taught(workshop, config)
    (row, *_) = data.documents(0)
    places = np.flatnonzero(row[1:] & TARGET_BIT)
    said = stored.read([0])
    assert said.ids.tolist() == [[(token + 1) % 200 + 3, 3] for token in (row & ID_BITS)[places + 1].tolist()]
    np.testing.assert_allclose(said.log_p[:, :2], [[-0.5, -1.5]] * len(places), atol=2e-3)
    assert len(tokenizer.encode(tokens[0], add_special_tokens=False)) <= 64


@pytest.mark.parametrize(("second", "refused"), [(0.405, False), (0.42, True)])
def test_probabilities_that_are_rounded_may_add_up_to_a_little_more_than_1(second: float, refused: bool) -> None:
    found = {3: math.log(0.6), 4: math.log(second)}
    server: Any = SimpleNamespace(setting="objective.teacher", url="http://t", likeliest=lambda tokens, k: [found])
    document = np.array([1, 2 | int(TARGET_BIT)], np.uint32)
    with pytest.raises(ConfigError, match="add up to more than 1") if refused else nullcontext():
        said = teach._said(server, 2, 9, document)
        assert said.log_p[0].tolist() == pytest.approx([*found.values(), math.log(1e-9)])


@pytest.mark.parametrize(
    ("second", "refused"),
    [
        ({8: -1.5, 3: -2.0}, None),
        ({0: -1.5, 8: -2.0}, None),
        ({9: -1.5, 3: -2.0}, "gives tokens that model.base lacks, which has 9"),
        ({3: -1.5, -1: -2.0}, "gives tokens that model.base lacks, which has 9"),
        ({3: -1.5}, "gives fewer than the 2 likeliest tokens that objective.top_k asks for. Start it with --max-logprobs 2"),
    ],
    ids=["a last token", "a first token", "a token more", "a token less", "one token"],
)  # fmt: skip
def test_what_a_server_says_is_taken_at_the_targets_alone(second: dict[int, float], refused: str | None) -> None:
    asked = list[Any]()

    def likeliest(tokens: list[int], k: int) -> list[dict[int, float]]:
        asked.append((tokens, k))
        return [{5: -0.5, 2: -1.0}, {99: 2.0}, second]

    server: Any = SimpleNamespace(setting="objective.teacher", url="http://t", likeliest=likeliest)
    target = int(TARGET_BIT)
    document = np.array([1, 2 | target, 3, 4 | target], np.uint32)
    if refused:
        with pytest.raises(ConfigError, match=f"objective.teacher: http://t {refused}"):
            teach._said(server, 2, 9, document)
        return
    said = teach._said(server, 2, 9, document)
    assert asked == [([1, 2, 3, 4], 2)]
    assert said.ids.tolist() == [[5, 2], [*second]]
    tails = [math.log(1 - math.exp(-0.5) - math.exp(-1.0)), math.log(1 - math.exp(-1.5) - math.exp(-2.0))]
    assert said.log_p.tolist() == [pytest.approx([-0.5, -1.0, tails[0]]), pytest.approx([-1.5, -2.0, tails[1]])]
    silent = teach._said(server, 2, 9, np.array([1 | target, 2, 3], np.uint32))
    assert (silent.ids.shape, silent.log_p.shape, len(asked)) == ((0, 2), (0, 3), 1), "no first token is predicted"


def test_a_base_teaches_under_the_runs_settings_and_a_run_under_its_own(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = workshop.config(
        "pupil", "objective.name=distil", "objective.teacher=/m", "quant.type=none", "model.layers=1"
    )
    config = override(config, "model.attention=sdpa", "model.dtype=fp32")
    config = override(config, "sharding.sequence_parallel=2")  # of which a teacher knows nothing
    ranks: Any = One()
    ranks.world, ranks.device = None, torch.device("cpu")
    joined, checked = list[Config](), list[Any]()
    monkeypatch.setattr(teach, "join_run", lambda config: joined.append(config) or ranks)
    monkeypatch.setattr(teach, "resolve_base_alike", lambda model, ranks: resolve_base(model))
    monkeypatch.setattr(teach, "check_same_base", lambda base, world: checked.append(base.name))
    monkeypatch.setattr(teach, "assemble", lambda resolved, *of: ("engine", of[-1]))
    monkeypatch.setattr(teach, "choose_sharding", lambda resolved, ranks, accumulation: accumulation)
    base = str(workshop.base)
    for quant in (None, "int8"):
        model = teach.open_teacher(config, resolve_base(config.model), Teacher(base, False, quant), lambda told: None)
        assert (model.engine, model.manifest, checked.pop()) == ("engine", None, base)
        theirs = joined.pop()
        assert (theirs.model.base, theirs.model.layers) == (base, None)
        assert (theirs.model.dtype, theirs.model.attention) == ("fp32", "sdpa")
        assert (theirs.quant.type, theirs.sharding.sequence_parallel) == (quant or "none", 1)
        assert (theirs.objective.name, theirs.tuning.rank, theirs.data) == ("sft", 1, config.data)
    opened = list[Any]()
    resolved = resolve(workshop.config("big"), resolve_base(config.model))

    def open_model(run: Store, step: int | None, given: list[str], *, base_alone: bool, log: Any) -> Any:
        log("loading")
        opened.append((run, step, given, base_alone))
        return SimpleNamespace(
            resolved=resolved, ranks=ranks, engine="e", manifest="m", load=lambda: opened.append("loaded")
        )

    monkeypatch.setattr(teach, "open_model", open_model)
    monkeypatch.setattr(teach, "beginning_place", lambda store, name, setting: (store.sub(name), 7))
    told = list[Any]()
    model = teach.open_teacher(config, resolve_base(config.model), Teacher("big", True, None), told.append)
    assert (model.manifest, model.engine, told) == ("m", "e", [{"log": "loading"}])
    (run, step, given, alone), loaded = opened
    assert (run.uri, step, alone, loaded) == (workshop.store.sub("big").uri, 7, False, "loaded")
    assert any(one.startswith("quant.cache") and "false" in one for one in given)
