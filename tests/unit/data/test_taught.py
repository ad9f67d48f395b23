"""A stored teacher: what is written is read back by document, checked, and refused where it is not whole or of another
teacher.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.checkpoints import commit
from tests.unit.export.test_served import stub
from trainer.config import parse_config
from trainer.data.dataset.dataset import TARGET_BIT, Reads
from trainer.data.dataset.taught import (
    BlockRecord,
    Likeliest,
    StoredTeacher,
    TeacherRecord,
    begin_teacher,
    finish_teacher,
    read_teacher,
    read_whole,
    taught_identity,
    teacher_folder,
    write_block,
    written_blocks,
)
from trainer.errors import ConfigError, Damaged, Unreachable
from trainer.evaluate import teach
from trainer.run import layout
from trainer.servers import CompletionsServer
from trainer.store.store import Store, open_store
from trainer.train.supply import stored_teacher
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.teacher import Teacher, teacher_of

CONFIG = """
run: {name: a, store: memory://taught}
model: {base: /models/small}
data: {train: [{path: a.jsonl}]}
train: {steps: 1}
"""
BIG = Teacher("/models/big", False, None, 3, 1.0)


def said(targets: int, seed: int) -> Likeliest:
    draw = np.random.default_rng(seed)
    log_p = np.log(draw.dirichlet(np.ones(4), targets)).astype(np.float32)
    return Likeliest(draw.integers(0, 300, (targets, 3)), log_p)


@pytest.fixture
def folder(tmp_path: Any) -> Store:
    """A teacher of two blocks, of two documents and of one."""
    folder = open_store(str(tmp_path))
    record = begin_teacher(folder, BIG, {"base": "x"}, 300)
    write_block(folder, record, 1, [said(2, 3)])
    write_block(folder, record, 0, [said(5, 1), said(1, 2)])
    finish_teacher(folder, record, [0, 2, 3], 8)
    return folder


def reader(folder: Store) -> StoredTeacher:
    record, whole = TeacherRecord(settings={}, facts={}, k=3, vocabulary=300), read_whole(folder)
    assert whole is not None
    return StoredTeacher(folder, record, whole, Reads())


def test_documents_are_read_back_in_the_order_that_is_asked_for(folder: Store) -> None:
    assert written_blocks(folder) == {0, 1}
    found = reader(folder).read([2, 0, 1])
    expected = [said(2, 3), said(5, 1), said(1, 2)]
    assert np.array_equal(found.ids, np.concatenate([part.ids for part in expected]))
    np.testing.assert_allclose(found.log_p, np.concatenate([part.log_p for part in expected]), atol=4e-3)
    np.testing.assert_allclose(np.exp(found.log_p).sum(1), 1, atol=1e-6)
    assert len(folder.get("block-000000000.bin")) == 6 * BIG.bytes_a_target(300)


def test_a_vocabulary_of_65536_tokens_has_ids_of_two_bytes_and_none_is_lost(tmp_path: Path) -> None:
    assert [BIG.bytes_a_target(size) for size in (2, 2**16, 2**16 + 1)] == [2 * 2 + 2 * 3, 3 * 2 + 2 * 4, 3 * 4 + 2 * 4]
    for vocabulary in (2**16, 2**16 + 1):
        folder = open_store(str(tmp_path / f"{vocabulary}"))
        record = begin_teacher(folder, BIG, {}, vocabulary)
        last = said(1, 1)._replace(ids=np.array([[0, 1, vocabulary - 1]]))
        write_block(folder, record, 0, [last])
        finish_teacher(folder, record, [0, 1], 1)
        whole = read_whole(folder)
        assert whole is not None
        assert StoredTeacher(folder, record, whole, Reads()).read([0]).ids.tolist() == last.ids.tolist()
        assert len(folder.get("block-000000000.bin")) == BIG.bytes_a_target(vocabulary)


def test_a_record_that_is_damaged_is_not_trained_on(folder: Store) -> None:
    data = bytearray(folder.get("block-000000000.bin"))
    data[69] ^= 1  # of the document 0
    folder.put("block-000000000.bin", bytes(data))
    assert len(reader(folder).read([1, 2]).ids) == 3
    with pytest.raises(Damaged, match=r"block-000000000\.bin is damaged.*run capstan teach again"):
        reader(folder).read([0])


@pytest.mark.parametrize(("offsets", "documents"), [([0, 6, 5], 2), ([0, 5], 2), ([0, 5, 6, 6], 2)])
def test_a_record_whose_documents_do_not_follow_each_other_is_damaged(
    folder: Store, offsets: list[int], documents: int
) -> None:
    digests = [hashlib.sha256().hexdigest()] * documents
    folder.put("block-000000000.json", BlockRecord(offsets=offsets, digests=digests).sealed())
    with pytest.raises(Damaged, match=r"block-000000000\.json is damaged \(its documents do not follow each other\)"):
        reader(folder).read([0])


def test_a_block_counts_once_its_values_are_written(folder: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: Store, key: str, data: bytes) -> None:
        if key.endswith(".bin"):
            raise Unreachable("the store is away")
        put(store, key, data)

    put, record = Store.put, read_teacher(folder)
    assert record is not None
    monkeypatch.setattr(Store, "put", fail)
    with pytest.raises(Unreachable):
        write_block(folder, record, 2, [said(1, 4)])
    assert written_blocks(folder) == {0, 1}


def test_a_run_without_its_teacher_names_the_command(tmp_path: Any) -> None:
    config = parse_config(CONFIG, ["objective.name=distil", "objective.teacher=/models/big", "objective.top_k=3"])
    start: Any = SimpleNamespace(
        objective=find_objective(config), store=open_store(str(tmp_path)), log=lambda text: None
    )
    with pytest.raises(
        ConfigError, match=r"objective\.teacher: '?/models/big'? has not yet written its.*Run capstan teach CONFIG"
    ):
        stored_teacher(start, "abc", Reads())
    folder = teacher_folder(start.store.sub("data/abc/"), BIG.to_json())
    record = begin_teacher(folder, BIG, {}, 300)
    with pytest.raises(ConfigError, match="has not yet written all of its"):
        stored_teacher(start, "abc", Reads())
    finish_teacher(folder, record, [0], 0)
    assert stored_teacher(start, "abc", Reads()) is not None
    with pytest.raises(ConfigError, match="Run capstan teach"):
        stored_teacher(start, "changed", Reads())


def test_another_teacher_does_not_go_on_in_a_folder(folder: Store) -> None:
    with pytest.raises(ConfigError, match=r"is not the teacher that has written .*: its base is another"):
        begin_teacher(folder, BIG, {"base": "y"}, 300)


def test_a_teacher_has_no_more_likeliest_tokens_than_tokens(tmp_path: Path) -> None:
    assert begin_teacher(open_store(str(tmp_path)), BIG, {}, 2).k == 2


def test_a_checkpoint_does_not_go_on_where_a_base_has_written_nor_the_other_way(tmp_path: Path) -> None:
    base, run = {"base": "x"}, {"base": "x", "step": 4}
    for number, (first, second) in enumerate(((base, run), (run, base))):
        folder = open_store(str(tmp_path / f"{number}"))
        begin_teacher(folder, BIG, first, 300)
        with pytest.raises(ConfigError, match="its step is another"):
            begin_teacher(folder, BIG, second, 300)


def test_a_token_that_the_teacher_excludes_has_no_probability_and_no_infinity(tmp_path: Path) -> None:
    folder = open_store(str(tmp_path))
    record = begin_teacher(folder, BIG, {}, 300)
    log_p = np.array([[np.log(0.75), -1e5, -np.inf, np.log(0.25)]], np.float32)
    write_block(folder, record, 0, [Likeliest(np.array([[1, 2, 3]]), log_p)])
    finish_teacher(folder, record, [0, 1], 1)
    found = reader(folder).read([0]).log_p
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found), [[0.75, 0, 0, 0.25]], atol=1e-3)


def test_another_run_of_the_teachers_name_is_another_teacher(tmp_path: Path) -> None:
    """Of the same base, data and step, with another learning rate."""
    first = commit(open_store(str(tmp_path / "run")), 4)
    other = replace(first, shards=[replace(shard, sha256="0" * 64) for shard in first.shards])
    taught, facts = open_store(str(tmp_path / "taught")), {"base": "x", **teach._learnt(first)}
    assert begin_teacher(taught, BIG, facts, 300) == begin_teacher(taught, BIG, facts, 300)
    with pytest.raises(ConfigError, match="its shards is another"):
        begin_teacher(taught, BIG, {"base": "x", **teach._learnt(other)}, 300)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "'b' is token 2 there and token 3 here"),
        ({"a": 1}, {"a": 1, "b": 0}, "'b' is no token there and token 0 here"),
        ({"a": 1, "b": 0}, {"a": 1}, "'b' is token 0 there and no token here"),
    ],
)
def test_a_teacher_of_another_tokenizer_is_refused_by_a_token(
    theirs: dict[str, int], ours: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabularies = {"big": theirs, "small": ours}
    monkeypatch.setattr(
        teach, "load_tokenizer", lambda base: SimpleNamespace(get_vocab=lambda: vocabularies[base.name])
    )
    big, small = (SimpleNamespace(name=name) for name in vocabularies)
    with pytest.raises(ConfigError, match=f"another tokenizer than model.base: small: {said}"):
        teach._check_tokenizer(BIG, big, small)  # type: ignore[arg-type]


def test_a_teacher_that_makes_other_tokens_of_a_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = {token: number for number, token in enumerate(("a", "b", "c", "t", "ab", "bc"))}

    def made(merges: list[tuple[str, str]], **options: Any) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE(vocabulary, merges, **options))
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    tokenizers = {
        "same": made([("a", "b"), ("b", "c")]),
        "small": made([("a", "b"), ("b", "c")]),
        "other": made([("b", "c"), ("a", "b")]),
        "uncased": made([("a", "b"), ("b", "c")]),
    }
    tokenizers["uncased"].backend_tokenizer.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(teach, "load_tokenizer", lambda base: tokenizers[base.name])
    same, small, *others = (SimpleNamespace(name=name) for name in tokenizers)
    teach._check_tokenizer(BIG, same, small)  # type: ignore[arg-type]
    for other in others:
        said = "has the vocabulary of model.base: small, and makes other tokens of a text"
        with pytest.raises(ConfigError, match=said):
            teach._check_tokenizer(BIG, other, small)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ([], "none is set"),
        (["objective.teacher=a", "objective.teacher_run=b"], "both are set"),
        (["objective.teacher_run=b", "objective.teacher_quant=nf4"], "objective.teacher_quant: has no effect"),
        (
            ["objective.teacher=http://a", "objective.temperature=2"],
            "objective.temperature: a server as teacher has its own",
        ),
        (["objective.teacher=a", "objective.temperature=2", "objective.teacher_quant=nf4"], ""),
        (["objective.teacher_run=b", "objective.temperature=2"], ""),
        (["objective.teacher=http://a"], ""),
    ],
    ids=str,
)
def test_a_distillation_has_one_teacher(given: list[str], wrong: str) -> None:
    found = find_objective(parse_config(CONFIG, ["objective.name=distil", *given])).mismatches()
    assert [wrong in sentence for sentence in found] == ([True] if wrong else [])


def test_only_a_distillation_has_a_teacher() -> None:
    assert teacher_of(find_objective(parse_config(CONFIG))) is None
    with pytest.raises(ConfigError, match="objective.top_k: has no effect with objective.name: sft"):
        find_objective(parse_config(CONFIG, ["objective.top_k=3"]))


def test_a_server_teaches_what_it_says_of_each_target() -> None:
    """Token 7 is trained, and not among the two likeliest in its place."""
    places = [None, {"4": {"logprob": -0.1}}, {"9": {"logprob": -0.5}, "3": {"logprob": -1.5}, "7": {"logprob": -4.0}}]

    def complete(asked: dict[str, Any]) -> Any:
        assert (asked["prompt"], asked["prompt_logprobs"]) == ([5, 4, 7], 2)
        return {"choices": [{"prompt_logprobs": places}]}

    stored = np.array([5, 4, 7 | TARGET_BIT], np.uint32)
    with stub(complete, "big") as url:
        server = CompletionsServer.find("objective.teacher", url)
        ids, log_p = teach._said(server, 2, 10, stored)
        assert ids.tolist() == [[9, 3]]
        np.testing.assert_allclose(np.exp(log_p).sum(1), 1, atol=1e-6)
        places[2] = {"9": {"logprob": -0.5}}
        with pytest.raises(ConfigError, match="gives fewer than the 2 likeliest .* --max-logprobs 2"):
            teach._said(server, 2, 10, stored)
        places[2] = {"9": {"logprob": -0.5}, "70000": {"logprob": -1.5}}  # two bytes would hold another token
        with pytest.raises(ConfigError, match="gives tokens that model.base lacks, which has 10"):
            teach._said(server, 2, 10, stored)
        places[2] = {"9": {"logprob": -0.1}, "3": {"logprob": -0.2}}  # as logits are
        with pytest.raises(ConfigError, match="add up to more than 1. Start it with --logprobs-mode raw_logprobs"):
            teach._said(server, 2, 10, stored)


def test_each_teacher_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Else a run learns from probabilities at another temperature, or of a base in fewer bits."""
    data, run = open_store(str(tmp_path)), replace(BIG, is_run=True)
    others = [
        run,
        *(replace(BIG, **one) for one in ({"name": "b"}, {"quant": "nf4"}, {"top_k": 4}, {"temperature": 2.0})),
    ]
    assert len({teacher_folder(data, teacher.to_json()).uri for teacher in (BIG, *others)}) == 6


@pytest.mark.parametrize(("name", "is_server"), [("http://a:1", True), ("https://a.b", True), ("/models/http", False)])
def test_a_teacher_by_its_address_is_a_server(name: str, is_server: bool) -> None:
    teacher = teacher_of(find_objective(parse_config(CONFIG, ["objective.name=distil", f"objective.teacher={name}"])))
    assert teacher is not None
    assert (teacher.is_server, teacher.setting) == (is_server, "objective.teacher")


def test_a_checkpoint_belongs_to_what_its_teacher_has_said(tmp_path: Any) -> None:
    store = open_store(str(tmp_path))
    folder, found = teacher_folder(store.sub(layout.dataset("data")), BIG.to_json()), list[dict[str, Any]]()
    assert taught_identity(store, "data", BIG) == {}
    record = begin_teacher(folder, BIG, {}, 300)
    for seed in (1, 2, 1):
        write_block(folder, record, 0, [said(2, seed)])
        finish_teacher(folder, record, [0, 1], 2)
        found.append(taught_identity(store, "data", BIG))
    assert found[0] == found[2] != found[1]
