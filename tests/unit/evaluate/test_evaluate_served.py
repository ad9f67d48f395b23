"""A server may answer in the place of ranks, and whoever reads the figures is told."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.evaluate.evaluating import Evaluated, evaluate_run
from launcher.report.figures import read_figures
from launcher.report.page import run_page
from tests.material import Workshop, commit, make_data
from tests.unit.export.test_served import stub
from trainer.errors import ConfigError
from trainer.evaluate.evaluate import evaluate
from trainer.evaluate.generate import generate
from trainer.evaluate.program import Ask
from trainer.evaluate.prompts import Prompt
from trainer.export.proof.verify import prove_served
from trainer.run import layout

LOG_P = {"small": -2.0, "first": -1.5}


def answer(asked: dict[str, Any]) -> Any:
    """The same log p for each token; 1 is likelier."""
    log_p = LOG_P[asked["model"]]
    places = [{str(token): {"logprob": log_p}, "1": {"logprob": -0.5}} for token in asked["prompt"][1:]]
    return {"choices": [{"prompt_logprobs": [None, *places]}]}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    here = Workshop(tmp_path_factory.mktemp("served"))
    make_data(here.folder / "task.jsonl", documents=7, seed=8)
    commit(here.store.sub("first"), here.config("first", f"data.eval=[{{path: {here.folder}/task.jsonl}}]"))
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


def test_a_server_is_shown_no_pictures(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from tests.seeing import make_pictured, seeing_base

    here, rows = Workshop(tmp_path), make_pictured(tmp_path / "rows", 4)
    of_rows = (f"data.train=[{{path: {rows}}}]", f"data.eval=[{{path: {rows}}}]", "data.format=pictures")
    base = seeing_base(tmp_path / "base", "llava")
    commit(run := here.store.sub("seen"), here.config("seen", f"model.base={base}", "quant.type=none", *of_rows))
    said = "^--server: a server is asked with .*tokens.*, which (carry no|cannot carry a) picture"
    with stub(answer, "seen") as url:
        with pytest.raises(ConfigError, match=said):
            evaluate(Ask("evaluate", run.uri, server=url), lambda told: None)
        prompts: list[list[Prompt]] = [[{"prompt": "what?", "images": ["0.png"]}]]
        with pytest.raises(ConfigError, match=said):
            generate(Ask("generate", run.uri, server=url), prompts, lambda told: None)
        with pytest.raises(ConfigError, match=said):
            prove_served(run, 4, here.store.sub("none"), url, whole_model=False)
