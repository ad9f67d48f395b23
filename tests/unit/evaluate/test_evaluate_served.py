"""A server may answer in the place of ranks, and whoever reads the figures is told."""

import json
from base64 import b64decode
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import Template
from peft import PeftModel
from rich.console import Console

from launcher.evaluate.evaluating import Evaluated, evaluate_run
from launcher.report.figures import read_figures
from launcher.report.page import run_page
from tests.dist import evaluating
from tests.dist.launch import launch
from tests.material import Workshop, commit, make_data
from tests.unit.export.test_served import Complete, completing, stub
from trainer.errors import CapstanError, ConfigError, DataError
from trainer.evaluate import evaluate as rank
from trainer.evaluate.evaluate import evaluate
from trainer.evaluate.generate import generate
from trainer.evaluate.program import Ask
from trainer.evaluate.prompts import Prompt
from trainer.export.proof import models
from trainer.export.proof.verify import prove_served
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.servers import CompletionsServer, Pictured
from trainer.store.store import open_store

LOG_P = {"small": -2.0, "first": -1.5}


def answer(asked: dict[str, Any]) -> Any:
    """The same log p for each token; 1 is likelier."""
    log_p = LOG_P[asked["model"]]
    places = [{str(token): {"logprob": log_p}, "1": {"logprob": -0.5}} for token in asked["prompt"][1:]]
    return {"choices": [{"prompt_logprobs": [None, *places]}]}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    here = Workshop(tmp_path_factory.mktemp("served"))
    task = make_data(here.folder / "task.jsonl", documents=6, seed=8)
    task.write_text(task.read_text() + here.data.read_text().splitlines(keepends=True)[3])
    config = here.config("first", f"data.eval=[{{path: {task}}}]")
    commit(here.store.sub("first"), config, dataset=here.prepare(config).train)
    return here


def shown(found: dict[str, Any]) -> str:
    out = StringIO()
    Console(file=out, width=200).print(Evaluated(found, "first", "where").tables())
    return out.getvalue()


def test_what_a_server_says_of_base_and_adapter_is_kept_for_the_step_that_is_named(workshop: Workshop) -> None:
    run, told = workshop.store.sub("first"), list[dict[str, Any]]()
    with stub(answer, "small", "first", parent="small") as url:
        found = evaluate(Ask("evaluate", run.uri, 4, server=url), told.append)
    name, of = f"{url}#first", found["sets"]["eval"]
    assert {"log": f"the answers are those of small and first at {url}"} in told
    assert [of[side]["loss"] for side in ("base", "adapter")] == [2.0, 1.5]
    assert (of["difference"], of["documents"], of["server"], found["server"]) == (-0.5, 7, name, name)
    assert of["trained_on"] == 1
    assert json.loads(run.get(layout.evaluation(4)))["sets"]["eval"]["server"] == name
    assert f"by the server {name}" in shown(found)
    assert "(by the server " in run_page(read_figures(run))


def test_a_server_knows_no_step_and_perhaps_no_base(workshop: Workshop) -> None:
    run = workshop.store.sub("first")
    before = list(run.list(layout.EVALUATIONS))
    with stub(answer, "first") as url:
        found = evaluate(Ask("evaluate", run.uri, server=url), lambda told: None)
    assert found["step"] is None
    assert found["sets"]["eval"].keys().isdisjoint({"base", "difference"})
    assert list(run.list(layout.EVALUATIONS)) == before
    assert "not kept" in shown(found)
    assert "1.5000" in shown(found)


def test_a_server_is_asked_for_no_base(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"step": None, "best": False, "chat": False, "dry_run": False, "log": print}
    with pytest.raises(ConfigError, match="--base has no effect"):
        evaluate_run(workshop.store.sub("first"), (), base=True, trust=True, server="http://gpu-1:8000", **given)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process asks a server"):
        evaluate_run(workshop.store.sub("first"), (), base=False, trust=True, server="http://gpu-1:8000", **given)


def test_a_base_that_reads_answers_as_it_reads_prompts_is_asked_by_no_server(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_it_read(run: Any, config: Any, base: Any, manifest: Any) -> Any:
        return config, SimpleNamespace(architecture=SimpleNamespace(reads_prompts=True))

    monkeypatch.setattr(rank, "as_it_read", as_it_read)
    with pytest.raises(ConfigError, match="--server: this base reads everything before an answer in both directions"):
        evaluate(Ask("evaluate", workshop.store.sub("first").uri, 4, server="http://gpu-1:8000"), lambda told: None)


def _files(parts: list[dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any]:
    """The files of a message as a processor gets them. vLLM reads a video from a list of frames, whose times come with
    the request."""
    from PIL import Image

    def addresses(kind: str, head: str) -> list[str]:
        return [part[kind]["url"].removeprefix(head) for part in parts if part["type"] == kind]

    def opened(encoded: str) -> Any:
        return Image.open(BytesIO(b64decode(encoded)))

    found: dict[str, Any] = {}
    if pictures := addresses("image_url", "data:image/png;base64,"):
        found["images"] = [list(map(opened, pictures))]
    if videos := addresses("video_url", "data:video/jpeg;base64,"):
        said = asked["media_io_kwargs"]["video"]
        assert (said.pop("num_frames"), said.pop("do_sample_frames")) == (-1, False)
        frames = [np.stack([np.asarray(opened(one)) for one in video.split(",")]) for video in videos]
        found |= {"videos": frames, "video_metadata": [said] * len(videos), "do_sample_frames": False}
    if sounds := [part["input_audio"]["data"] for part in parts if part["type"] == "input_audio"]:
        from trainer.base.find.media.sound import decoded

        found |= {"audio": [decoded(b64decode(one), 16_000) for one in sounds], "sampling_rate": 16_000}
    return found


def chatting(model: Any, processor: Any) -> Complete:
    """What a vLLM with this class answers to a message with files, whose template comes with the request."""

    @torch.no_grad()
    def complete(asked: dict[str, Any]) -> Any:
        if "prompt" in asked:
            return completing(lambda ids: model(input_ids=ids, use_cache=False))(asked)
        parts = [part for message in asked["messages"] for part in message["content"]]
        text = Template(asked["chat_template"]).render(messages=asked["messages"])
        files = _files(parts, asked)
        types = {"return_mm_token_type_ids": True} if "audio" not in files else {}
        made = processor(text=[text], **files, return_tensors="pt", **types)
        inputs = {name: value for name, value in made.items() if name != "attention_mask"}
        ids = inputs["input_ids"][0].tolist()
        if asked.get("stream"):
            ends = {"max_new_tokens": asked["max_tokens"], "eos_token_id": asked["stop_token_ids"]}
            given = processor(text=[text], **files, return_tensors="pt")
            answer = model.generate(**given, **ends, do_sample=False)[0, len(ids) :].tolist()
            return {"prompt_token_ids": ids, "choices": [{"token_ids": answer}]}
        logits = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
        places = [
            {str(int(row.argmax())): {"logprob": float(row.max())}, str(token): {"logprob": float(row[token])}}
            for row, token in zip(logits, ids[1:], strict=False)
        ]
        drawn = int(logits[-1].argmax())
        choice = {"token_ids": [drawn], "logprobs": {"content": [{"logprob": float(logits[-1, drawn])}]}}
        return {"prompt_token_ids": ids, "prompt_logprobs": [None, *places], "choices": [choice]}

    return complete


@pytest.mark.parametrize(
    "kind", ["llava", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("gemma3", "qwen3_vl"))]
)
def test_a_server_is_shown_the_pictures_of_rows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures what the class measures of each row, and what it serves is found to be the export."""
    pytest.importorskip("torchvision")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tests.seeing import make_pictured, seeing_base, trained_over

    monkeypatch.setattr(models, "aside", lambda device, work, *arguments: work(*arguments))
    here, rows = Workshop(tmp_path), make_pictured(tmp_path / "rows", 3)
    base, asked = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "asked", 5, seed=9)
    of_rows = (f"data.eval=[{{path: {asked}}}]", "data.format=pictures", "data.images.max_pixels=900")
    config = here.config("seen", *trained_over(base, rows), *of_rows)
    commit(run := here.store.sub("seen"), config, dataset=here.prepare(config).train)
    export_adapter(run, adapter := open_store(str(tmp_path / "adapter")), 4)
    plain: Any = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(base)
    with stub(chatting(plain, processor), "seen") as url:
        alone = evaluate(Ask("evaluate", run.uri, server=url), lambda told: None)["sets"]["eval"]["adapter"]["loss"]
        assert not prove_served(run, 4, adapter, url, whole_model=False).holds
    prompts: list[Prompt] = [
        {"prompt": "what?", "images": [name, "2-1.png"], "file": str(asked)} for name in ("1-0.png", "2-0.png")
    ]
    prompts[1] = {**prompts[1], "messages": [{"role": "user", "content": "<image>and<image>?"}]}
    ask = {"what": "generate", "run": run.uri, "sampling": {"max_tokens": 8}}
    adapted: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with stub(chatting(adapted, processor), "seen") as url:
        found = evaluate(Ask("evaluate", run.uri, server=url), lambda told: None)["sets"]["eval"]["adapter"]["loss"]
        proof = prove_served(run, 4, adapter, url, whole_model=False)
        said = generate(Ask(**ask, server=url), [prompts], lambda told: None)["answers"]
    assert proof.holds
    assert proof.largest < 1e-4
    assert proof.rows == "5 rows of the evaluation data, 3 of them with pictures"
    measured, answered = launch(
        1, evaluating.answers, [{"what": "evaluate", "run": run.uri}, {**ask, "prompts": [prompts]}]
    )[0]
    assert said == answered["answers"]
    if kind != "gemma3":  # with these weights it says the same of any picture
        assert len({one["adapter"] for one in said}) == len(said)
    assert found == pytest.approx(measured["sets"]["eval"]["adapter"]["loss"], abs=1e-5)
    assert alone == pytest.approx(measured["sets"]["eval"]["base"]["loss"], abs=1e-5)
    assert abs(found - alone) > 1e-3


@pytest.mark.parametrize("noun", ["sound", "video"])
def test_a_server_is_sent_the_sounds_and_videos_of_rows(
    noun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    pytest.importorskip("torchvision")
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from tests.hearing import hearing_base, make_sounding
    from tests.seeing import make_watched, seeing_base, trained_over

    monkeypatch.setattr(models, "aside", lambda device, work, *arguments: work(*arguments))
    here = Workshop(tmp_path)
    base = hearing_base(tmp_path / "base") if noun == "sound" else seeing_base(tmp_path / "base", "qwen3_vl")
    make = make_sounding if noun == "sound" else make_watched
    rows, asked = make(tmp_path / "rows", 4), make(tmp_path / "asked", 6, seed=9)
    of_rows = (f"data.eval=[{{path: {asked}}}]", "data.format=pictures", "data.sequence_length=256")
    config = here.config("sent", *trained_over(base, rows), *of_rows)
    commit(run := here.store.sub("sent"), config, dataset=here.prepare(config).train)
    export_adapter(run, adapter := open_store(str(tmp_path / "adapter")), 4)
    plain: Any = AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32).eval()
    adapted: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    with stub(chatting(adapted, AutoProcessor.from_pretrained(base)), "sent") as url:
        found = evaluate(Ask("evaluate", run.uri, server=url), lambda told: None)["sets"]["eval"]["adapter"]["loss"]
        proof = prove_served(run, 4, adapter, url, whole_model=False)
    assert proof.holds
    assert proof.largest < 1e-4
    assert f"of them with {noun}s" in proof.rows
    (measured,) = launch(1, evaluating.answers, [{"what": "evaluate", "run": run.uri}])[0]
    assert found == pytest.approx(measured["sets"]["eval"]["adapter"]["loss"], abs=1e-5)


def test_several_videos_of_other_times_are_no_request() -> None:
    from trainer.base.find.media import Shown
    from trainer.base.find.media.video import VIDEO, Clip

    one, same, other = (
        Shown(clip, (np.zeros((2, 4, 4, 3), np.uint8), clip.metadata()))
        for clip in (Clip(4, 4, 2), Clip(4, 4, 2), Clip(4, 4, 2, fps=12.0))
    )
    assert VIDEO.beside_parts([one, same])["media_io_kwargs"]["video"]["fps"] == 24.0
    with pytest.raises(DataError, match="several videos, whose frames have different times"):
        VIDEO.beside_parts([one, other])


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            b"Chat template is passed with request, but --trust-request-chat-template is not set.",
            "does not take a template with a request, and this text needs it. Start vLLM with"
            " --trust-request-chat-template.",
        ),
        (
            b"Per-request media_io_kwargs are disabled by default because they can change multimodal media loading"
            b" resource usage. Start the server with --trust-request-mm-kwargs only when clients are trusted.",
            "does not take the rate of a video's frames with a request, and this text needs it. Start vLLM with"
            " --trust-request-mm-kwargs.",
        ),
        ({"prompt_token_ids": [3, 4, 5]}, "makes other tokens of a text with files (3) than the run (2)."),
        (
            b'{"error": {"message": "small is not a multimodal model", "type": "BadRequestError"}}',
            "takes no such files as a text has, or fewer (small is not a multimodal model). Start vLLM with the run's"
            " base and its processor, and with a --limit-mm-per-prompt of at least the files of a text.",
        ),
        (
            b'{"error": {"message": "At most 0 image(s) may be provided in one prompt.", "code": 400}}',
            "(At most 0 image(s) may be provided in one prompt).",
        ),
        ({"choices": [{"token_ids": [3]}]}, "without what vLLM gives"),
    ],
    ids=["no template", "no rate", "other tokens", "text alone", "no pictures", "tokens that nobody knows"],
)
def test_a_server_that_cannot_be_shown_a_picture_is_said(said: Any, sentence: str) -> None:
    def refuse(asked: dict[str, Any]) -> Any:
        assert asked["messages"][0]["content"] == [{"type": "text", "text": "a"}]
        return said

    with stub(refuse, "seen", status=400 if isinstance(said, bytes) else 200) as url:
        server = CompletionsServer.find("--server", url, "seen")
        with pytest.raises(CapstanError) as refused:
            server.ranked(asked := Pictured([3, 4], [], [{"type": "text", "text": "a"}], {}, {}))
        assert sentence in str(refused.value)
        with pytest.raises(CapstanError) as refused:
            list(server.written("seen", asked))
    assert sentence in str(refused.value)


def test_an_evaluation_by_ranks_tells_its_progress_and_where_its_findings_are_kept(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked, logged = workshop.store.sub("first"), list[Ask](), list[str]()
    parts = (
        {"progress": what, "done": done, "total": 2_000} for what in ("eval", "tasks") for done in (1, 2_000, 2_000)
    )

    def ranks(ask: Ask, config: Any, prompts: Any, hear: Any) -> dict[str, Any]:
        asked.append(ask)
        for told in ({"log": "reading"}, *parts):
            hear(told)
        return {"step": None if ask.server else 4, "sets": {}, "tasks": {}, "bias": {}}

    monkeypatch.setattr("launcher.evaluate.evaluating.run_ranks", ranks)

    def evaluated(**given: Any) -> Any:
        usual: dict[str, Any] = {"step": None, "best": False, "base": False, "chat": False, "server": None}
        about = {**usual, "trust": True, "dry_run": False, "log": logged.append, **given}
        return evaluate_run(run, ["cluster.workers=1"], **about)

    found = evaluated(step=4)
    assert logged == ["reading", "eval: 2,000 done", "tasks: 2,000 done"]
    assert asked == [Ask("evaluate", run.uri, 4, ("cluster.workers=1",))]
    assert (found.where, found.to_json()["run"]) == (f"{run.uri}/{layout.evaluation(4)}", run.uri)
    assert evaluated(base=True).where is None
    assert evaluated(server="http://gpu-1:8000").where is None, "the server has told no step"
    on = f"of {run.uri} on eval"
    assert evaluated(dry_run=True) == f"would evaluate step 4 beside its base {on}, with 1 rank"
    assert evaluated(dry_run=True, base=True) == f"would evaluate the base {on}, with 1 rank"
    assert evaluated(dry_run=True, server="http://a") == f"would have http://a measure what it has {on}"
    assert len(asked) == 3
    with pytest.raises(CapstanError, match="5"):
        evaluated(step=5, dry_run=True)
    for given in ({"step": 4}, {"best": True}):
        with pytest.raises(ConfigError, match="--step and --best have no effect"):
            evaluated(base=True, **given)
    changed = {"step": 4, "sets": {}, "tasks": {}, "bias": {}, "under": ["data.eval"]}
    assert "step 4, not kept in the run's folder: data.eval is not what the run has" in shown(changed)


def test_tasks_alone_are_asked_under_a_chat_template_and_there_must_be_one(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task.yaml").write_text("task: mine")
    asked = list[Ask]()

    def ranks(ask: Ask, *_: Any) -> dict[str, Any]:
        asked.append(ask)
        return {"step": 4, "sets": {}, "tasks": {}, "bias": {}}

    def evaluated(*overrides: str) -> None:
        given: dict[str, Any] = {"step": 4, "best": False, "base": False, "server": None, "log": print}
        evaluate_run(workshop.store.sub("first"), overrides, chat=True, trust=True, dry_run=False, **given)

    monkeypatch.setattr("launcher.evaluate.evaluating.run_ranks", ranks)
    task = f"eval.tasks=[{tmp_path}/task.yaml]"
    for overrides, refusal in (
        ((), "--chat: has no effect without a task"),
        ((task,), "--chat: the run has no chat template"),
    ):
        with pytest.raises(ConfigError, match=refusal):
            evaluated(*overrides)
    assert asked == []
    evaluated(task, "data.format=chat", "data.template=chatml")
    assert [ask.chat for ask in asked] == [True]


def test_a_run_of_somebody_else_is_not_evaluated_until_it_is_trusted(workshop: Workshop) -> None:
    given: dict[str, Any] = {"step": None, "best": False, "base": True, "chat": False, "server": None, "log": print}
    theirs = workshop.store.sub("theirs")
    theirs.put(layout.CONFIG, workshop.store.sub("first").get(layout.CONFIG) + b"# as somebody else has left it\n")
    with pytest.raises(ConfigError, match="so it counts as somebody"):
        evaluate_run(theirs, (), trust=False, dry_run=True, **given)
    assert str(evaluate_run(theirs, (), trust=True, dry_run=True, **given)).startswith("would evaluate the base of ")
