"""A server may answer in the place of ranks, and whoever reads the figures is told."""

import json
from base64 import b64decode
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

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
from trainer.errors import CapstanError, ConfigError
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


def chatting(model: Any, processor: Any) -> Complete:
    """What a vLLM with this class answers to a message with pictures, whose template comes with the request."""
    from PIL import Image

    @torch.no_grad()
    def complete(asked: dict[str, Any]) -> Any:
        if "prompt" in asked:
            return completing(lambda ids: model(input_ids=ids, use_cache=False))(asked)
        parts = [part for message in asked["messages"] for part in message["content"]]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        seen = [Image.open(BytesIO(b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]
        text = Template(asked["chat_template"]).render(messages=asked["messages"])
        made = processor(text=[text], images=[seen], return_tensors="pt", return_mm_token_type_ids=True)
        inputs = {name: value for name, value in made.items() if name != "attention_mask"}
        ids = inputs["input_ids"][0].tolist()
        if asked.get("stream"):
            ends = {"max_new_tokens": asked["max_tokens"], "eos_token_id": asked["stop_token_ids"]}
            given = processor(text=[text], images=[seen], return_tensors="pt")
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


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            b"Chat template is passed with request, but --trust-request-chat-template is not set.",
            "takes no template with a request, and requests with pictures need one. Start vLLM with"
            " --trust-request-chat-template.",
        ),
        ({"prompt_token_ids": [3, 4, 5]}, "makes other tokens of a text with pictures (3) than the run (2)."),
        (
            b'{"error": {"message": "small is not a multimodal model", "type": "BadRequestError"}}',
            "takes no pictures, or fewer than a text has (small is not a multimodal model). Start vLLM with the run's"
            " base and its processor, and with a --limit-mm-per-prompt of at least the pictures of a text.",
        ),
        (
            b'{"error": {"message": "At most 0 image(s) may be provided in one prompt.", "code": 400}}',
            "(At most 0 image(s) may be provided in one prompt).",
        ),
        ({"choices": [{"token_ids": [3]}]}, "without what vLLM gives"),
    ],
    ids=["no template", "other tokens", "text alone", "no pictures", "tokens that nobody knows"],
)
def test_a_server_that_cannot_be_shown_a_picture_is_said(said: Any, sentence: str) -> None:
    def refuse(asked: dict[str, Any]) -> Any:
        assert asked["messages"][0]["content"] == [{"type": "text", "text": "a"}]
        return said

    with stub(refuse, "seen", status=400 if isinstance(said, bytes) else 200) as url:
        server = CompletionsServer.find("--server", url, "seen")
        with pytest.raises(CapstanError) as refused:
            server.ranked(asked := Pictured([3, 4], [], [{"type": "text", "text": "a"}], "<image>"))
        assert sentence in str(refused.value)
        with pytest.raises(CapstanError) as refused:
            list(server.written("seen", asked))
    assert sentence in str(refused.value)
