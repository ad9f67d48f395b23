"""From a configuration to compiled data, its order and its length in steps."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.start.check import anchored
from tests.material import Workshop, byte_tokenizer, make_data
from trainer.base.find.locate import resolve_base
from trainer.config import parse_config
from trainer.data.compile.prepare import locate, prepare, prepare_start, wait_until_prepared
from trainer.data.dataset.chapters import open_chapters
from trainer.data.dataset.dataset import ID_BITS, open_chapter, open_dataset
from trainer.data.dataset.manifest import MANIFEST, DatasetManifest
from trainer.data.dataset.overlap import document_hashes
from trainer.data.format.formats import RowForm
from trainer.data.order.order import EpochPlan
from trainer.data.order.settings import Position, bins_in, steps_of_epochs, train_order
from trainer.data.order.stream import eval_stream, train_stream
from trainer.errors import ConfigError, Damaged, DataError, NotFound
from trainer.run import layout
from trainer.store.store import open_store
from trainer.train.horizon import horizon_of

EPOCHS = "run: {name: demo}\nmodel: {base: /models/tiny}\ndata: {train: [{path: a.jsonl}]}\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("prepare"))


def sources(shop: Workshop, *settings: str) -> str:
    """`data.train=...`: our 60 documents, and for each of `settings` a source of 500 others."""
    general = make_data(shop.folder / "general.jsonl", documents=500, seed=9)
    return f"data.train=[{{path: {shop.data}}}, {', '.join(f'{{path: {general}, {s}}}' for s in settings)}]"


def test_a_fraction_is_a_share_of_an_epochs_tokens(shop: Workshop) -> None:
    config = shop.config("replay", sources(shop, "fraction: 0.2", "fraction: 0.1"))
    manifest = open_dataset(shop.store, shop.prepare(config).train).manifest
    weights = train_order(config).weights_for([source.tokens for source in manifest.sources])
    visited = [weight * source.tokens for weight, source in zip(weights, manifest.sources, strict=True)]
    assert weights[0] == 1
    assert [tokens / sum(visited) for tokens in visited] == pytest.approx([0.7, 0.2, 0.1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.train=[{path: a.jsonl, fraction: 0.5}]"], ["data.train", "0.5", "below 1"]),
        (
            ["data.train=[{path: a.jsonl}, {path: b.jsonl, fraction: 0.5}, {path: c.jsonl, fraction: 0.5}]"],
            ["data.train", "0.5, 0.5", "below 1"],
        ),
        (["data.train=[{path: a.jsonl, fraction: 0.5, weight: 2}]"], ["weight", "fraction", "both given"]),
        (["data.train=[{path: a.jsonl, fraction: 0.5, weight: 0.5}]"], ["weight", "fraction", "both given"]),
        (["data.eval=[{path: a.jsonl, weight: 2}]"], ["data.eval[0]", "evaluated once"]),
        (["data.eval=[{path: a.jsonl}]", "data.held_out=0.1"], ["data.held_out", "data.eval", "both given"]),
        (["data.held_out_seed=3"], ["data.held_out_seed", "no effect"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    shop: Workshop, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        shop.config("wrong", *overrides)
    assert all(word in str(refused.value) for word in words)


def test_rows_held_out_become_the_evaluation_data(shop: Workshop) -> None:
    datasets = shop.prepare(shop.config("held", "data.held_out=0.2", "eval.every=5"))
    assert datasets.eval
    train, evaluation = (open_dataset(shop.store, key).manifest for key in (datasets.train, datasets.eval))
    assert train.documents + evaluation.documents == 60
    assert evaluation.documents > 0


def test_a_number_of_rows_held_out_is_that_many_documents_and_other_data(shop: Workshop) -> None:
    datasets = shop.prepare(shop.config("held", "data.held_out=7", "eval.every=5"))
    assert datasets.eval
    train, evaluation = (open_dataset(shop.store, key).manifest for key in (datasets.train, datasets.eval))
    assert (train.documents, evaluation.documents) == (53, 7)
    more = shop.prepare(shop.config("more", "data.held_out=8", "eval.every=5"))
    assert more.train != datasets.train


def test_another_seed_holds_out_other_rows_and_none_is_on_both_sides(shop: Workshop) -> None:
    found = list[set[int]]()
    for seed in (0, 3):
        config = shop.config("held", "data.held_out=0.2", f"data.held_out_seed={seed}", "eval.every=5")
        datasets = shop.prepare(config)
        sides = [document_hashes(shop.store, key) for key in (datasets.train, datasets.eval or "")]
        train, held = ({*side.tolist()} for side in sides if side is not None)
        assert not train & held
        assert len(train | held) == len({line for line in shop.data.read_text().splitlines()})
        found.append(held)
    assert found[0] != found[1]


def test_a_share_of_nothing_is_refused(shop: Workshop) -> None:
    lengthy = shop.folder / "lengthy.jsonl"
    lengthy.write_text(json.dumps({"prompt": "a" * 99, "completion": "b"}) + "\n")
    sources = f"data.train=[{{path: {shop.data}}}, {{path: {lengthy}, fraction: 0.2}}]"
    with pytest.raises(DataError, match=r"data.train\[1\]: has a fraction of 0.2, but no document. Remove it."):
        shop.prepare(shop.config("nothing", sources, "data.on_too_long=drop"))
    shop.prepare(shop.config("nothing", sources.replace("fraction: 0.2", "weight: 2"), "data.on_too_long=drop"))


def test_ranks_wait_for_who_compiles_their_data(shop: Workshop) -> None:
    config, waited = shop.config("waiting", "data.sequence_length=48", "data.held_out=0.2"), list[int]()

    def wait() -> None:
        waited.append(len(waited))
        if len(waited) == 2:
            shop.prepare(config)

    wait_until_prepared(config, resolve_base(config.model), shop.store, wait)
    assert waited == [0, 1]
    shop.store.sub(layout.dataset(shop.prepare(config).eval or "")).delete(MANIFEST)
    waited.clear()
    wait_until_prepared(config, resolve_base(config.model), shop.store, wait)
    assert waited == [0, 1], "also for the data of evaluations"


def test_an_evaluation_of_more_sources_than_are_trained_on_has_each_document_once(shop: Workshop) -> None:
    more = (make_data(shop.folder / f"more-{seed}.jsonl", documents=7, seed=seed) for seed in (1, 2))
    config = shop.config("more", f"data.eval=[{', '.join(f'{{path: {path}}}' for path in more)}]", "eval.every=5")
    stream = eval_stream(config, open_dataset(shop.store, shop.prepare(config).eval or ""), 0, 1)
    assert sorted(number for (row,) in stream.epoch(0) for number in row.documents) == list(range(14))


def test_epochs_are_planned_once_and_their_length_is_kept(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume, or a run of more epochs, plans none of them again."""
    planned: list[int] = []
    plain = EpochPlan.count_bins

    def observed(self: EpochPlan) -> list[int]:
        planned.append(self.epoch)
        return plain(self)

    monkeypatch.setattr(EpochPlan, "count_bins", observed)
    first = shop.prepare(shop.config("two", "train.epochs=2", "train.steps=null"))
    again = shop.prepare(shop.config("two", "train.epochs=2", "train.steps=null"))
    longer = shop.prepare(shop.config("three", "train.epochs=3", "train.steps=null"))
    assert planned == [0, 1, 2]
    assert len(first.epochs) == 2
    assert again == first
    assert list(longer.epochs[:2]) == list(first.epochs)
    shop.prepare(shop.config("seed", "train.epochs=1", "train.steps=null", "run.seed=99"))
    assert planned == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("bins", "epochs", "steps"),
    [
        ([240, 233], "2", 30 + 30),
        ([240], "0.5", 15),
        ([233], "0.5", 15),
        ([233], "0.01", 1),
        ([240, 233, 200], "2.1", 30 + 30 + 3),
        ([240] * 3, "2.1", 63),  # 64 by the nearest binary number
        ([8], "0.3", 1),
    ],
)
def test_a_part_of_an_epoch_is_its_first_steps_rounded_up(bins: list[int], epochs: str, steps: int) -> None:
    assert sum(steps_of_epochs(bins, Fraction(epochs), 8)) == steps
    given = parse_config(f"{EPOCHS}train: {{epochs: {epochs}, global_batch: 8}}")
    assert horizon_of(given.train, [[[count]] for count in bins], 0, Position()).steps == steps


def test_a_part_of_an_epoch_is_counted_and_begun_as_a_whole_one(shop: Workshop) -> None:
    """So what it trains, and in which order, is what whole epochs begin with."""
    whole, part = (shop.config("part", f"train.epochs={epochs}", "train.steps=null") for epochs in (2, 1.5))
    datasets = [shop.prepare(config) for config in (whole, part)]
    assert datasets[0] == datasets[1]
    every, some = (
        horizon_of(config.train, found.epochs, 0, Position()).steps
        for found, config in zip(datasets, (whole, part), strict=True)
    )
    assert (every, some) == (7 + 7, 7 + 4)
    given = open_chapters(shop.store, datasets[0].train, shop.store.sub("part"))
    streams = [train_stream(config, given, rank=0, world_size=1).read_from(Position()) for config in (whole, part)]
    for _ in range(some):
        first, second = (next(steps) for steps in streams)
        assert [batch.bins for batch in first] == [batch.bins for batch in second]


@pytest.mark.usefixtures("chapters")
def test_a_run_of_so_many_steps_starts_with_the_first_chapter_and_all_of_the_evaluation_data(shop: Workshop) -> None:
    other = make_data(shop.folder / "eval.jsonl", documents=40, seed=8)
    config = shop.config("start", f"data.eval=[{{path: {other}}}]", "data.on_too_long=drop", "eval.every=5")
    datasets, rest = prepare_start(config, resolve_base(config.model), shop.store)
    assert datasets.eval
    assert open_dataset(shop.store, datasets.eval).manifest.documents == 40
    first = open_chapter(shop.store, datasets.train, 0).manifest
    assert 0 < first.documents < 60
    with pytest.raises(NotFound):
        open_dataset(shop.store, datasets.train)
    assert list(rest) == list(range(1, first.chapters))
    assert open_dataset(shop.store, datasets.train).manifest.documents == 60
    again, rest = prepare_start(config, resolve_base(config.model), shop.store)
    assert again == datasets
    assert not list(rest)


@pytest.mark.usefixtures("chapters")
def test_a_run_of_epochs_starts_with_all_its_data_as_its_bins_are_counted(shop: Workshop) -> None:
    config = shop.config("counted", "data.on_too_long=split", "train.epochs=2", "train.steps=null")
    datasets, rest = prepare_start(config, resolve_base(config.model), shop.store)
    assert not list(rest)
    given = open_chapters(shop.store, datasets.train, shop.store.sub("counted"))
    assert given.count > 1
    stream = train_stream(config, given, rank=0, world_size=1)
    for epoch, bins in enumerate(datasets.epochs):
        assert bins_in(bins) == sum(len(batch.bins) for step in stream.epoch(epoch) for batch in step)


def test_a_relative_path_names_the_same_data_as_the_anchored_one_that_train_and_submit_see(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shop.folder)
    other = make_data(shop.folder / "others.jsonl", seed=8)
    (shop.folder / "t.jinja").write_text("{{ messages }}")
    settings = ["data.format=chat", "data.template=t.jinja", "model.base=base"]
    for path in ("train.jsonl", "./train.jsonl", "others*.jsonl"):
        given = shop.config(
            "relative", f"data.train=[{{path: {path}}}]", f"data.eval=[{{path: {other.name}}}]", *settings
        )
        anchor = anchored(given)
        assert anchor.data.train[0].path != given.data.train[0].path
        assert locate(given, resolve_base(given.model)) == locate(anchor, resolve_base(anchor.model))


def test_an_epoch_without_documents_is_refused_before_anything_starts(shop: Workshop) -> None:
    source = f"data.train=[{{path: {shop.data}, weight: 0.000001}}]"
    with pytest.raises(DataError, match="epoch 0 visits no document.* Raise a weight"):
        shop.prepare(shop.config("few", source, "train.epochs=1", "train.steps=null"))


@pytest.mark.parametrize("epochs", ["train.epochs=null", "train.epochs=2"])
def test_a_sealed_manifest_of_another_number_of_sources_is_damaged(shop: Workshop, tmp_path: Path, epochs: str) -> None:
    steps = f"train.steps={10 if epochs.endswith('null') else 'null'}"
    config = shop.config("sources", f"run.store={tmp_path}", epochs, steps)
    base, store = resolve_base(config.model), open_store(str(tmp_path))
    key = f"{layout.dataset(prepare(config, base, store).train)}{MANIFEST}"
    whole = json.loads(store.get(key))
    del whole["sha256"]
    nothing: dict[str, Any] = {"documents": 0, "tokens": 0, "targets": 0}
    for change in (
        {"sources": [], "shards": [], **nothing},
        {"sources": [*whole["sources"], {**nothing, "files": []}]},
    ):
        manifest = DatasetManifest.model_validate({**whole, **change})
        store.put(key, manifest.sealed())
        with pytest.raises(
            Damaged, match=rf"is damaged \(it has {len(manifest.sources)} sources, and the data 1\)\. Delete"
        ):
            prepare(config, base, store)


def test_an_added_token_is_one_id_wherever_its_text_stands_and_gives_the_data_another_name(tmp_path: Path) -> None:
    """The rows of conversations too, whose template holds one; a token of the base stays as it is."""
    shop = Workshop(tmp_path, "speck")
    path, template = tmp_path / "talk.jsonl", tmp_path / "t.jinja"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a<t>b"}, {"role": "assistant", "content": "x<t></s>"}]})
    )
    template.write_text(
        "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
    )
    settings = (f"data.train=[{{path: {path}}}]", "data.format=chat", f"data.template={template}")

    def compiled(*more: str) -> tuple[str, list[int]]:
        config = shop.config("tokens", *settings, *more)
        key = prepare(config, resolve_base(config.model), shop.store).train
        data = open_dataset(shop.store, key)
        return key, (data.read(np.array([0])).gather(np.array([0])) & ID_BITS).tolist()

    plain, pieces = compiled()
    added, tokens = compiled("model.add_tokens=[<u>, <t>, </s>]")
    turned, other = compiled("model.add_tokens=[<t>, <u>, </s>]")
    a, b, x = byte_tokenizer().encode("abx")
    assert tokens == [259, a, 260, b, 259, x, 260, 2]
    assert other == [260, a, 259, b, 260, x, 259, 2]
    assert pieces[-1] == 2
    assert len(pieces) == len("<u>a<t>b<u>x<t>") + 1
    assert len({plain, added, turned}) == 3
    assert compiled("model.add_tokens=[]")[0] == plain


def documents(
    shop: Workshop, rows: list[dict[str, Any]], *settings: str, name: str, left: int = 0
) -> list[tuple[str, str]]:
    """The text of each document of `rows`, and what is trained of it; bytes are tokens. `left` rows become none."""
    path = shop.folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.train=[{{path: {path}, {', '.join(one for one in settings if not one.startswith('data.'))}}}]"
    config = shop.config(name, source, *(one for one in settings if one.startswith("data.")))
    read = open_dataset(shop.store, shop.prepare(config).train).read(np.arange(1))
    found = list[tuple[str, str]]()
    tokenizer = byte_tokenizer()
    for number in range(len(rows) - left):
        stored = read.gather(np.array([number]))
        ids, targets = stored & ID_BITS, stored > ID_BITS
        found.append((str(tokenizer.decode(ids)), str(tokenizer.decode(ids[targets]))))
    return found


def test_texts_are_replaced_and_fields_are_written_before_a_row_is_read(shop: Workshop) -> None:
    rows = [
        {"ctx": "I am {NAME}", "endings": ["yes", "no"], "label": "1", "more": ""},
        {"ctx": "You", "endings": ["a", "b"], "label": 0, "more": "{NAME}!"},
        {"ctx": "It", "endings": ["c"], "label": 0, "more": None},
    ]
    write = "write: {prompt: ['{ctx} {more}: ', '{{{ctx}}}: '], completion: '{endings[label]}'}"
    found = documents(shop, rows, "format: prompt_completion", write, "replace: {'{NAME}': Bo}", name="written")
    end = byte_tokenizer().eos_token
    assert found[:2] == [(f"{{I am Bo}}: no{end}", f"no{end}"), (f"You Bo!: a{end}", f"a{end}")]
    assert found[2] == (f"{{It}}: c{end}", f"c{end}"), "null is no text"


def test_a_field_that_a_template_reads_has_a_use() -> None:
    written = ("prompt", ("{ctx}{{no}}", "{deep.inside}")), ("completion", ("{endings[label]}",))
    fields = ("no", "ctx", "deep", "inside", "endings", "label", "prompt", "more")
    assert RowForm("prompt_completion", written=written).unused(dict.fromkeys(fields, "")) == ["no", "inside", "more"]


def test_texts_are_replaced_in_the_order_in_which_they_are_given(shop: Workshop) -> None:
    rows = [{"text": "NAME_OF_TEAM and NAME"}]
    given = "replace: {NAME_OF_TEAM: us, NAME: Bo, us: all of us}"
    ((text, _),) = documents(shop, rows, "format: text", given, name="ordered")
    assert text.startswith("all of us and Bo")


def test_behind_re_an_expression_is_replaced(shop: Workshop) -> None:
    rows = [{"text": "Answer:  a long answer  "}, {"text": "No Answer: here"}]
    given = r"replace: {'re:(?s)\AAnswer: \s*(.*?)\s*\Z': '\1'}"
    found = documents(shop, rows, "format: text", given, name="expression")
    texts = [text.removesuffix(str(byte_tokenizer().eos_token)).removeprefix("<s>") for text, _ in found]
    assert texts == ["a long answer", "No Answer: here"]


def test_rows_with_a_given_text_in_a_field_are_left_out(shop: Workshop) -> None:
    rows = [{"text": "one", "of": "a"}, {"text": "two", "of": ["a"]}, {"text": "three", "of": "b"}, {"text": "four"}]
    found = documents(shop, rows, "format: text", "without: {of: [a, c]}", name="left-out", left=1)
    assert [text.removeprefix("<s>")[:3] for text, _ in found] == ["two", "thr", "fou"]
    found = documents(shop, rows, "format: text", "without: {of: a, text: [four, five]}", name="either-field", left=2)
    assert [text.removeprefix("<s>")[:3] for text, _ in found] == ["two", "thr"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("write: {prompt: '{a}'}", "write: needs a format"),
        ("format: prompt_completion, write: {prompt: '{a'}", "a brace is alone"),
        ("format: prompt_completion, write: {prompt: 'a}'}", "a brace is alone"),
        ("format: prompt_completion, write: {prompt: '{a b.}'}", "names no field"),
        ("format: prompt_completion, write: {prompt: 'a {}'}", r"\{\} names no field"),
        ("format: prompt_completion, write: {answer: '{a}'}", "'answer' is not a field"),
        ("format: prompt_completion, write: {prompt: []}", "has no template"),
        ("replace: {'': x}", "an empty text cannot be replaced"),
        ("replace: {'re:(': x}", "is no regular expression with this replacement"),
        (r"replace: {'re:a': '\1'}", "is no regular expression with this replacement"),
    ],
)
def test_a_row_cannot_be_written_in_this_way(given: str, words: str) -> None:
    text = EPOCHS.replace("path: a.jsonl", f"path: a.jsonl, {given}")
    with pytest.raises(ConfigError, match=words):
        parse_config(text)


@pytest.mark.parametrize("label", ["²", "9" * 5000, "-1"], ids=["superscript", "digits", "negative"])
def test_a_row_whose_field_numbers_no_item_is_a_bad_row(shop: Workshop, label: str) -> None:
    write = "write: {prompt: 'a', completion: '{endings[label]}'}"
    with pytest.raises(DataError, match=r"for \{endings\[label\]\} of write"):
        documents(
            shop,
            [{"endings": ["b", "c"], "label": label}],
            "format: prompt_completion",
            write,
            name=f"numbered-{len(label)}",
        )


def test_a_row_that_lacks_a_written_field_is_a_bad_row(shop: Workshop) -> None:
    write = "write: {prompt: '{question.0.text}', completion: '{answer}'}"
    with pytest.raises(DataError, match=r"no '0' for \{question.0.text\} of write \(the row has: question, answer\)"):
        documents(shop, [{"question": [], "answer": "a"}], "format: prompt_completion", write, name="lacking")
    with pytest.raises(DataError, match=r"\{question\} of write is a list, and not a text"):
        documents(
            shop,
            [{"question": [], "answer": "a"}],
            "format: prompt_completion",
            "write: {prompt: '{question}', completion: '{answer}'}",
            name="lists",
        )
