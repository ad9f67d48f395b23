"""A run over pictures: the curve of plain transformers, on any number of ranks, also where some have no pictures."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.dist import curves, evaluating, judged, proofs, runs, seeing
from tests.dist.assembled import chapters_of
from tests.dist.gradients import first_step
from tests.dist.launch import launch, running
from tests.dist.test_heads import by_its_card
from tests.dist.test_preference import distance
from tests.dist.test_resume import losses
from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config, override
from trainer.config.evaluation import UNNAMED
from trainer.data.order.settings import Position
from trainer.data.order.stream import sees_pictures, train_stream
from trainer.evaluate.prompts import read_prompts
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.model.micro_batch import MicroBatch
from trainer.run import layout
from trainer.store.store import open_store

pytest.importorskip("torchvision")
from tests import every_seeing
from tests.every_model import PROVEN
from tests.seeing import BASES, make_pictured, picture, seeing_base, trained_over
from trainer.data.dataset.pictures import PICTURE

pytestmark = pytest.mark.timeout(300)
QUICK = "gemma3"


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("kind", "quant"), [(QUICK, "none"), *(long(kind, "none") for kind in BASES if kind != QUICK), long("llava", "nf4")]
)
def test_the_curve_is_that_of_plain_transformers_on_one_and_more_ranks(
    kind: str, quant: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Rows are of one or two documents: some have pictures, some have none, and so have the ranks of a step."""
    base = seeing_base(tmp_path / "base", kind)
    rows = make_pictured(tmp_path / "rows")
    config = workshop.config(
        f"{kind}-{quant}",
        *(f"model.base={base}", f"quant.type={quant}", f"model.dtype={'bf16' if quant == 'nf4' else 'fp32'}"),
        *(f"data.train=[{{path: {rows}}}]", "data.format=pictures", "data.sequence_length=128"),
        *("train.steps=4", "train.global_batch=6", "train.micro_batch=1", "optim.lr=0.01"),
        "checkpoint.every_steps=0",
    )
    fingerprint = workshop.prepare(config).train
    text = dump_config(config)
    (stock,) = launch(1, seeing.stock_losses, text, fingerprint)
    within = 2e-2 if quant == "nf4" else 1e-5
    for ranks in (1, 3) if quant == "none" and kind != QUICK else (2,):
        named = dump_config(override(config, f"run.name={kind}-{quant}-{ranks}"))
        ours = launch(ranks, curves.losses, named, fingerprint)[0]
        assert ours == pytest.approx(stock, rel=within), ranks
    assert stock[-1] < 0.9 * stock[0]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "length"), [(QUICK, 96), ("gemma4", 640)])
def test_ranks_with_text_with_pictures_and_with_both_have_one_curve(
    kind: str, length: int, workshop: Workshop, tmp_path: Path
) -> None:
    """The class of the second base has its decoder look tokens up for the inputs of each layer, which all ranks gather
    together."""
    base = tmp_path / "base"
    if kind in BASES:
        seeing_base(base, kind)
    else:
        every_seeing.write_base(kind, base, every_seeing.CASES.get(kind, {}))
    rows = make_pictured(tmp_path / "rows", 24, seen=(0, 1, 1, 0, 2, 0))
    config = workshop.config(
        f"{kind}-ranks",
        *trained_over(base, rows),
        *("data.format=pictures", f"data.sequence_length={length}", "train.steps=3", "train.global_batch=3"),
        *("train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=0", "data.on_too_long=drop"),
    )
    fingerprint = workshop.prepare(config).train
    text = dump_config(config)
    kinds = seeing.kinds_of_rows(text, fingerprint, 3)
    assert {kind for step in kinds for kind in step} == {"text", "pictures", "both"}
    assert any("text" in step and len(set(step)) > 1 for step in kinds), kinds
    found = {
        ranks: launch(
            ranks,
            seeing.losses_and_decoded,
            dump_config(override(config, f"run.name={kind}-ranks-{ranks}")),
            fingerprint,
            timeout=200,
        )
        for ranks in (1, 2, 3)
    }
    (alone, decoded) = found[1][0]
    assert decoded > 0
    for ranks in (2, 3):
        assert found[ranks][0][0] == pytest.approx(alone, rel=1e-5), ranks
        assert sum(count for _, count in found[ranks]) == decoded  # nobody decodes a picture for the sake of others


@pytest.mark.parametrize("kind", [kind if kind == "qwen3_vl" else long(kind) for kind in BASES])
def test_two_ranks_share_a_row_and_its_pictures(kind: str, workshop: Workshop, tmp_path: Path) -> None:
    """The second slice of some rows begins inside of a picture: texts of many lengths stand before it, and no two of
    these documents fit into a row. Short documents fill the rows."""
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows", 6)
    first = 53 if kind == "paligemma" else 44  # its template writes no word before the question
    long_rows = [
        {
            "messages": [
                {"role": "user", "content": f"{'x' * length}<image>?"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": ["1-0.png"],
        }
        for length in range(first, first + 14)
    ]
    with rows.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in long_rows)
    config = override(
        _run(kind, workshop, base, rows, f"seeing-{kind}-alone"),
        *("train.steps=2", "train.global_batch=14", "checkpoint.every_steps=0"),
    )
    fingerprint = workshop.prepare(config).train
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    sees_pictures(stream, config, resolve_base(config.model), workshop.store.sub(layout.dataset(fingerprint)))
    assert any(cut_inside(row, 64) for row in stream.step(Position()))
    (alone,) = launch(1, curves.losses, dump_config(config), fingerprint)
    shared = override(config, f"run.name=seeing-{kind}-shared", "sharding.sequence_parallel=2", "cluster.workers=2")
    assert launch(2, curves.losses, dump_config(shared), fingerprint)[0] == pytest.approx(alone, rel=1e-5)


def cut_inside(row: MicroBatch, place: int) -> bool:
    """Whether a picture of the row has tokens on both sides of a place."""
    counts, borders = row.column("pictures").tolist(), row.input.segments.borders
    begins = [border for border, count in zip(borders, counts, strict=False) for _ in range(count)]
    places = np.ascontiguousarray(row.column("picture").numpy()).view(PICTURE)[:, 0]
    return any(
        begin + int(one["begin"]) < place < begin + int(one["begin"]) + int(one["tokens"])
        for begin, one in zip(begins, places, strict=True)
    )


def _run(kind: str, workshop: Workshop, base: Path, rows: Path, name: str) -> Any:
    return workshop.config(
        name,
        *trained_over(base, rows),
        *("data.format=pictures", "data.sequence_length=128", "train.steps=6", "train.global_batch=6"),
        *("train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=3"),
    )


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_on_other_ranks_and_decodes_no_picture_again(
    workshop: Workshop, tmp_path: Path
) -> None:
    base, rows = seeing_base(tmp_path / "base", "qwen3_vl"), make_pictured(tmp_path / "rows")
    whole, killed = (_run("qwen3_vl", workshop, base, rows, name) for name in ("seeing-whole", "seeing-killed"))
    fingerprint = workshop.prepare(whole).train
    (every,) = launch(1, seeing.decoded, dump_config(whole), fingerprint, "start")
    expected = losses(workshop.store.sub("seeing-whole"))
    folder = workshop.store.sub("seeing-killed")
    with running(1, runs.run, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: folder.exists(layout.manifest(3)))
        ranks.kill()
    again = launch(2, seeing.decoded, dump_config(killed), fingerprint, "resume")
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    begun = override(whole, "run.name=seeing-begun", "train.steps=3")
    (before,) = launch(1, seeing.decoded, dump_config(begun), fingerprint, "start")
    assert sum(again) == every - before > 0


_TOKENS = 10


@torch.no_grad()
def answered(model: Any, processor: Any, messages: Any, folder: Path, ends: set[int]) -> str:
    """The greedy answer of transformers."""
    made = seeing.inputs(processor, messages, folder, asks=True)
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    if "mm_token_type_ids" not in inspect.signature(type(whole).forward).parameters:
        made.pop("mm_token_type_ids", None)  # `generate` would refuse it
    options = {"do_sample": False, "max_new_tokens": _TOKENS, "pad_token_id": 0, "eos_token_id": list(ends)}
    written = model.generate(**made, **options)[0, made["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(written, skip_special_tokens=True))


@pytest.mark.parametrize("kind", [kind if kind == "qwen3_vl" else long(kind) for kind in BASES])
def test_answers_about_pictures_and_losses_over_them_are_those_of_transformers(
    kind: str, workshop: Workshop, tmp_path: Path
) -> None:
    """One rank has a text with pictures, the other one has one without; the third text has the first rank alone."""
    base, rows = seeing_base(tmp_path / "base", kind, seed=8), make_pictured(tmp_path / "rows", 5)
    name = f"seeing-{kind}-asked"
    config = override(_run(kind, workshop, base, rows, name), f"data.eval=[{{path: {rows}}}]")
    commit(workshop.store.sub(name), config)
    prompts, talks = tmp_path / "rows" / "prompts.jsonl", list[Any]()
    for line in rows.read_text().splitlines()[2::-1]:
        talk = json.loads(line)["messages"][:1]
        talks.append(talk)
    beside = {"prompt": "the <image> and <image>?", "images": ["2-1.png", "2-0.png"]}
    parts = [{"type": "text", "text": "the "}, {"type": "image", "path": "2-1.png"}, {"type": "text", "text": " and "}]
    parts += [{"type": "image", "path": "2-0.png"}, {"type": "text", "text": "?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in [*({"messages": talk} for talk in talks), beside]))
    talks.append([{"role": "user", "content": parts}])
    given = read_prompts(str(prompts), {})
    uri = workshop.store.sub(name).uri
    asks = [
        {"what": "generate", "run": uri, "base": True, "sampling": {"max_tokens": _TOKENS}, "prompts": [given]},
        {"what": "evaluate", "run": uri},
    ]
    answers, measured = launch(2, evaluating.answers, asks, timeout=200)[0]
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    ends = {processor.tokenizer.eos_token_id}
    expected = [answered(model, processor, talk, rows.parent, ends) for talk in talks]
    assert [row["base"] for row in answers["answers"]] == expected
    before = _loss(model, processor, rows)
    with evaluating.adapted(model, uri, tmp_path / "adapter") as tuned:
        expected = [answered(tuned, processor, talk, rows.parent, ends) for talk in talks]
        assert [row["adapter"] for row in answers["answers"]] == expected
        after = _loss(tuned, processor, rows)
    assert measured["sets"][UNNAMED]["base"]["loss"] == pytest.approx(before, rel=1e-5)
    assert measured["sets"][UNNAMED]["adapter"]["loss"] == pytest.approx(after, rel=1e-5)
    assert len({*expected, *(row["base"] for row in answers["answers"])}) > 2
    assert expected != [row["base"] for row in answers["answers"]]


@torch.no_grad()
def _loss(model: Any, processor: Any, rows: Path) -> float:
    nats, targets = 0.0, 0
    for line in rows.read_text().splitlines():
        made = seeing.inputs(processor, json.loads(line)["messages"], rows.parent)
        labels = seeing.answer(processor, made)[0, 1:]
        logits = model(**made, use_cache=False).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        targets += int((labels != -100).sum())
    return nats / targets


@pytest.mark.long
def test_samples_about_pictures_are_taken_while_a_run_trains(workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", "gemma3"), make_pictured(tmp_path / "rows")
    prompts = tmp_path / "rows" / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "what?", "images": ["1-0.png"]}) + "\n" + json.dumps({"prompt": "dog"}))
    config = override(
        _run("gemma3", workshop, base, rows, "seeing-samples"),
        *(f"eval.prompts={prompts}", f"eval.max_tokens={_TOKENS}", "train.sample_every=3", "optim.lr=0.05"),
    )
    assert launch(2, runs.run, dump_config(config), workshop.prepare(config).train)[0]["outcome"] == "finished"
    folder = workshop.store.sub("seeing-samples")
    taken = [[json.loads(one) for one in folder.get(layout.samples(step)).splitlines()] for step in (0, 6)]
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    parts = [{"type": "image", "path": "1-0.png"}, {"type": "text", "text": "what?"}]
    expected = answered(model, processor, [{"role": "user", "content": parts}], rows.parent, {2})
    assert taken[0][0] == {"prompt": "<image>what?", "adapter": expected}
    assert taken[1][0] != taken[0][0]
    assert taken[0][1]["prompt"] == "dog"


def judged_rows(folder: Path, objective: str, made: Callable[..., Path] = make_pictured) -> Path:
    """Rows of answers or classes over the conversations that are `made`, some with files and some without."""
    talks = [json.loads(line)["messages"] for line in made(folder, rows=8).read_text().splitlines()]
    labels: list[Any] = [["odd"], ["odd", "even"], []] if "multi" in objective else ["odd", "even", "odd"]
    lines = list[dict[str, Any]]()
    for number, (asked, answer) in enumerate(talks):
        other = {**answer, "content": f"no {answer['content']}"}
        lines.append(
            {"prompt": [asked], "chosen": [answer], "rejected": [other]}
            | {"completion": [answer], "label": labels[number % 3] if "class" in objective else number % 3 > 0}
            | ({"messages": [asked]} if "class" in objective else {})
        )
    (folder / f"{objective}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / f"{objective}.jsonl"


JUDGED = {
    "dpo": "preference_pictures",
    "reward": "preference_pictures",
    "kto": "labelled_pictures",
    "classification": "classified_pictures",
    "multilabel_classification": "multilabel_pictures",
}


def _packed_and_alone(
    workshop: Workshop, folder: Path, name: str, base: Path, objective: str, *settings: str
) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """The first step and its gradients: in packed rows on one rank, and with each document alone on two."""
    rows, found = judged_rows(folder / "rows", objective), list[tuple[dict[str, Any], dict[str, torch.Tensor]]]()
    for way, ranks, packing in (("packed", 1, True), ("alone", 2, False)):
        config = workshop.config(
            f"{name}-{way}",
            *trained_over(base, rows),
            *(f"data.format={JUDGED[objective]}", f"objective.name={objective}", "data.sequence_length=256"),
            *("train.steps=1", "train.global_batch=8", "train.micro_batch=1", f"data.packing={packing}", *settings),
        )
        file = folder / f"{way}.safetensors"
        step = launch(ranks, first_step, dump_config(config), workshop.prepare(config).train, str(file), timeout=200)
        found.append((step[0], load_file(file)))
    return found


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        (QUICK, "dpo"),
        *(long(QUICK, objective) for objective in JUDGED if objective != "dpo"),
        *(long(kind, objective) for kind in BASES if kind != QUICK for objective in JUDGED),
    ],
)
def test_answers_and_classes_with_pictures_are_learnt_packed_as_alone(
    kind: str, objective: str, workshop: Workshop, tmp_path: Path
) -> None:
    base = seeing_base(tmp_path / "base", kind)
    labels = ("data.labels=[odd, even]",) if "class" in objective else ()
    (packed, gradients), (alone, others) = _packed_and_alone(
        workshop, tmp_path, f"{kind}-{objective}", base, objective, *labels
    )
    assert packed["targets"] == alone["targets"]
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert packed["accumulation"] == 8  # the step has fewer rows, so that some are empty
    assert distance(gradients, others) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
def test_pairs_with_pictures_have_the_loss_and_gradient_of_plain_transformers(
    kind: str, workshop: Workshop, tmp_path: Path
) -> None:
    base, rows = seeing_base(tmp_path / "base", kind), judged_rows(tmp_path / "rows", "dpo")
    config = workshop.config(
        f"{kind}-dpo-plain",
        *trained_over(base, rows),
        *("data.format=preference_pictures", "objective.name=dpo", "objective.beta=0.4", "data.sequence_length=256"),
        *("train.steps=1", "train.global_batch=8", "train.micro_batch=1"),
    )
    text, gradients = dump_config(config), tmp_path / "gradients.safetensors"
    (step,) = launch(1, first_step, text, workshop.prepare(config).train, str(gradients), timeout=200)
    (plain,) = launch(1, judged.plain_first_step, text, str(rows), timeout=200)
    assert (step["loss"], step["grad_norm"]) == pytest.approx(plain, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
def test_an_export_sees_as_its_card_says(kind: str, workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    name = f"seeing-{kind}-export"
    config = _run(kind, workshop, base, rows, name)
    assert launch(1, runs.run, dump_config(config), workshop.prepare(config).train)[0]["outcome"] == "finished"
    workshop.store.sub(name).put(layout.CONFIG, dump_config(config).encode())
    adapter = tmp_path / "adapter"
    export_adapter(workshop.store.sub(name), open_store(str(adapter)))
    proof = proofs.proof_of(workshop.store.sub(name), adapter, 6)
    assert proof.holds
    assert proof.rows == "8 rows of the training data, 8 of them with pictures"
    assert proof.kl_allowed < 1e-3 * proof.kl_effect
    changed = load_file(weights := adapter / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in changed.items()}, weights)
    assert not proofs.proof_of(workshop.store.sub(name), adapter, 6).holds
    save_file(changed, weights)
    here = _as_the_card_says(adapter, tmp_path)
    with torch.no_grad():
        one = here["model"](**here["inputs"]).logits
        inputs = {name: v.flip(-1) if v.is_floating_point() else v for name, v in here["inputs"].items()}
        other = here["model"](**inputs).logits
        with here["model"].disable_adapter():
            before = here["model"](**here["inputs"]).logits
    assert (one - other)[:, -1].abs().max() > 1e-4
    assert (one - before)[:, -1].abs().max() > 1e-4
    merged = tmp_path / "merged"
    export_merged(workshop.store.sub(name), open_store(str(merged)))
    (proof,) = launch(1, proofs.merge_proof, workshop.store.sub(name).uri, 6, str(merged))
    assert Proof(**proof).holds
    here = _as_the_card_says(merged, tmp_path)
    with torch.no_grad():
        assert (here["model"](**here["inputs"]).logits - one).abs().max() < 1e-4
    written, given = _tensors(merged), _tensors(base)
    assert written.keys() == given.keys()
    changed = {key for key in given if written[key] != given[key]}
    assert changed
    assert all("language_model" in key for key in changed)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["classification", "reward"])
def test_a_head_over_pictures_is_measured_asked_and_exported_as_transformers_has_it(
    objective: str, workshop: Workshop, tmp_path: Path
) -> None:
    base, rows = seeing_base(tmp_path / "base", "gemma3"), judged_rows(tmp_path / "rows", objective)
    named = f"gemma3-{objective}-head"
    config = workshop.config(
        named,
        *trained_over(base, rows),
        *(f"data.format={JUDGED[objective]}", f"objective.name={objective}", "data.sequence_length=256"),
        *("train.steps=1", "train.global_batch=8", "train.micro_batch=1"),
        *(["data.labels=[odd, even]"] if "class" in objective else []),
    )
    run, fingerprint = workshop.store.sub(named), workshop.prepare(config).train
    commit(run, config, dataset=fingerprint)
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    talks = [row["messages"] if "class" in objective else [*row["prompt"], *row["chosen"]] for row in given]
    prompts = [[{"messages": talk, "file": str(rows)} for talk in talks]]
    evaluated = (f"data.eval=[{{path: {rows}}}]",) if "class" in objective else ()
    asks = [
        {"what": "generate", "run": run.uri, "sampling": {"max_tokens": 1}, "prompts": prompts},
        {"what": "evaluate", "run": run.uri, "overrides": evaluated},
    ]
    said, *measures = launch(1, evaluating.answers, asks if evaluated else asks[:1])[0]
    export_adapter(run, open_store(str(adapter := tmp_path / "out")))
    proof = proofs.proof_of(run, adapter)
    assert proof.holds
    assert "of them with pictures" in proof.rows
    loaded = by_its_card(adapter)
    with torch.no_grad():
        values = torch.cat(
            [
                loaded["model"].eval()(**seeing.inputs(loaded["processor"], talk, rows.parent)).logits.float()
                for talk in talks
            ]
        )
    found = [row["adapter"] for row in said["answers"]]
    assert len(set(found)) > 1
    if objective == "reward":
        assert list(map(float, found)) == pytest.approx(values[:, 0].tolist(), abs=2e-4)
        return
    labels = torch.tensor([row["label"] == "even" for row in given]).long()
    expected = float(torch.nn.functional.cross_entropy(values, labels))
    assert measures[0]["tasks"][UNNAMED]["loss"]["adapter"] == pytest.approx(expected, rel=1e-4)
    shares, best = values.softmax(-1).max(-1)
    assert [one.partition(" ")[0] for one in found] == [("odd", "even")[number] for number in best.tolist()]
    assert [float(one.partition("(")[2][:-1]) for one in found] == pytest.approx(shares.tolist(), abs=1e-3)


def _tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a model."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {key: value.view(torch.uint8).numpy().tobytes() for file in files for key, value in file.items()}


def _as_the_card_says(folder: Path, scratch: Path) -> dict[str, Any]:
    """What the lines of the card leave. They load the class that the base's config.json names."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    shown = picture(40, 30, 1)
    shown.save(scratch / "picture.png")
    code = code.replace("FOLDER", str(folder)).replace("picture.jpg", str(scratch / "picture.png"))
    with patch("builtins.print") as said:
        exec(code, here := dict[str, Any]())
    assert any(asked in said.call_args[0][0] for asked in ("assistant: ", "<s>What is in the picture?\n"))
    (named,) = json.loads((scratch / "base" / "config.json").read_text())["architectures"]
    model = here["model"]
    assert type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__ == named
    return here


# Their decoder is inside of the module with the head; transformers picks the tower's states itself; the types of tokens
# follow from more than the ids.
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["llama4", "mistral3", "idefics3"])
def test_a_class_with_ways_of_its_own_is_that_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    (found,) = launch(1, every_seeing.tried, kind, str(tmp_path), timeout=800)
    assert found["status"] == PROVEN, found
