"""What a server serves is compared with the export, and whatever it does instead of answering is one sentence."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from launcher.cli.__main__ import app
from tests.http_server import serving
from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import as_tensor
from trainer.config import Model
from trainer.errors import CapstanError, ConfigError
from trainer.export.destination import ExportProgress
from trainer.export.figures import ServedProof
from trainer.export.format import find_format
from trainer.export.proof import models, verify
from trainer.export.proof.verify import prove_served
from trainer.export.write.adapter import export_adapter
from trainer.servers import TOWERS_IGNORED, Answer, CompletionsServer, Pictured, is_healthy
from trainer.store.safetensors_index import PackedTensor, numel
from trainer.store.store import open_store
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS

Complete = Callable[[dict[str, Any]], Any]


@contextmanager
def stub(complete: Complete, *models: str, parent: str | None = None, status: int = 200) -> Iterator[str]:
    """A server of these models, of which the others are adapters on `parent`, that answers a request with what
    `complete` makes of it: JSON or bytes under this `status`, or the number of an error.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": model, "parent": None if model == parent else parent} for model in models]})

        def do_POST(self) -> None:
            self._send(complete(json.loads(self.rfile.read(int(self.headers["Content-Length"])))), status)

        def _send(self, answer: Any, status: int = 200) -> None:
            number, data = (answer, b"out of slots") if isinstance(answer, int) else (status, answer)
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(number)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    with serving(Handler) as url:
        yield url


def test_the_model_is_the_one_that_is_named_or_the_runs_or_the_only_one() -> None:
    with stub(lambda _: 500, "base", "first") as url:
        assert CompletionsServer.find("--server", f"{url}/v1/", "first").model == "first"
        assert CompletionsServer.find("--server", f"{url}#base", "first").model == "base"
        for place in (url, f"{url}#second"):
            with pytest.raises(
                ConfigError, match=r"no model called '?second'?; it has base, first\. Name one behind a #"
            ):
                CompletionsServer.find("--server", place, "second" if place == url else "first")
    with stub(lambda _: 500, "merged") as url:
        assert CompletionsServer.find("--server", url, "first").model == "merged"
    with pytest.raises(ConfigError, match=r"does not answer \(.*refused.*\)\. Start the server"):
        CompletionsServer.find("--server", url, "first")
    with pytest.raises(ConfigError, match="is no URL of a server"):
        CompletionsServer.find("--server", "localhost:8000", "first")


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (204, False), (404, False), (503, False)])
def test_a_server_that_answers_is_healthy_and_one_that_is_gone_is_not(status: int, healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    with serving(Handler) as url:
        assert is_healthy(url) == healthy
    assert not is_healthy(url)


def _chosen(prompt: float = -1.0, drawn: Sequence[tuple[int, float]] = ((7, -1.0),)) -> Any:
    """An answer to the tokens 3 and 4."""
    choice = {"prompt_logprobs": [None, {"4": {"logprob": prompt}}], "token_ids": [token for token, _ in drawn]}
    return {"choices": [{**choice, "logprobs": {"token_logprobs": [value for _, value in drawn]}}]}


def test_a_whole_answer_is_read_and_half_of_one_is_none() -> None:
    with stub(lambda _: _chosen(), "first") as url:
        assert CompletionsServer.find("--server", url, "first").ask([3, 4], 1) == ([-1.0], [7], [-1.0])

    class Half(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"{")

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    with serving(Half) as url, pytest.raises(CapstanError, match="without what vLLM gives"):
        CompletionsServer.find("--server", url, "first")


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@127.0.0.1:1", "ftp://me:hunter2@a", "http://127.0.0.1:1/?key=hunter2"]
)
def test_a_password_in_a_url_is_not_printed(url: str) -> None:
    with pytest.raises(ConfigError, match="holds a password or a query") as caught:
        CompletionsServer.find("--server", url, "first")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (500, "answered 500 to /v1/completions: out of slots. Its log says more"),
        (b"", "without what vLLM gives"),
        (b"[" * 100_000, "without what vLLM gives"),
        ({"choices": [{"text": "a", "prompt_logprobs": None}]}, "without what vLLM gives"),
        (
            {"choices": [{"prompt_logprobs": [None, {"9": {"logprob": -1.0}}], "token_ids": []}]},
            "without what vLLM gives",
        ),
        (_chosen(prompt=2.5), "without what vLLM gives"),
        (_chosen(drawn=[(7, float("nan"))]), "without what vLLM gives"),
        (_chosen(drawn=[]), "without what vLLM gives"),
        (_chosen(drawn=[(-1, -1.0)]), "without what vLLM gives"),
    ],
    ids=[
        "500",
        "nothing",
        "deep",
        "no-log-probabilities",
        "other-tokens",
        "logits",
        "not-a-number",
        "nothing-drawn",
        "no-token",
    ],
)
def test_what_is_no_answer_is_one_sentence(answer: Any, said: str) -> None:
    with stub(lambda _: answer, "first") as url, pytest.raises(CapstanError, match=said):
        CompletionsServer.find("--server", url, "first").ask([3, 4], 1)


def test_a_server_without_verify_has_no_effect() -> None:
    result = CliRunner().invoke(app, ["export", "first", "there", "--server", "http://127.0.0.1:1"])
    assert "Add --verify" in str(result.exception)


@pytest.mark.parametrize(
    ("prompt", "from_base", "effect", "holds", "verdict"),
    [
        (0.001, 0.5, 0.5, True, "It serves what was exported."),
        (0.5, 0.001, 0.5, False, "It answers as the base alone."),
        (0.3, 0.4, 0.5, False, "It serves another model, or this one over another base."),
        (0.001, 0.002, 0.003, False, "That proves nothing"),
        (float("nan"), 0.4, 0.5, False, "It serves another model"),
    ],
)
def test_a_difference_says_what_is_served(
    prompt: float, from_base: float, effect: float, holds: bool, verdict: str
) -> None:
    proof = ServedProof("http://a", "first", prompt, 0.001, 1.0, 0.01, effect, from_base, 9, 9, "8 rows")
    assert proof.holds == holds
    assert proof.verdict.startswith(verdict)
    assert replace(proof, prompt=proof.drawn, drawn=proof.prompt).holds == holds
    blind = replace(proof, from_blind=0.002).verdict
    assert blind.startswith("It ignores what the tower has") == verdict.startswith("It serves another")


def test_an_answer_is_compared_up_to_a_drawn_token_of_a_picture_or_video() -> None:
    """No picture belongs to it, so the class that sees fails over it. A row of text may get one, too."""
    processor: Any = SimpleNamespace(reserved=frozenset({259, 263}))
    answer, asked = Answer([-1.0, -4.0], [5, 263, 6], [-1.0, -2.0, -3.0]), [3, 4, 5]
    pictured = Pictured(asked, [range(1, 2)], [], {}, {})
    cut = verify._beside_pictures  # pyright: ignore[reportPrivateUsage]
    assert cut(answer, asked, processor) == ([-1.0, -4.0], [5], [-1.0])
    assert cut(answer, pictured, processor) == ([-4.0], [5], [-1.0])
    assert cut(answer, asked, None) == answer


def test_an_export_of_a_tower_says_which_server_would_ignore_it(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from tests.seeing import make_pictured, seeing_base, trained_over

    here, base = Workshop(tmp_path), seeing_base(tmp_path / "sees", "llava")
    over = (*trained_over(base, make_pictured(tmp_path / "rows", 2)), "data.format=pictures")
    for name, more in (("eyes", ["tuning.towers=lora"]), ("words", [])):
        commit(run := here.store.sub(name), here.config(name, *over, *more))
        written = find_format("peft", ()).write(
            run, open_store(str(tmp_path / name)), 4, ExportProgress(lambda *_: None, lambda *_: None)
        )
        texts = " ".join(written.remarks), (tmp_path / name / "README.md").read_text()
        assert [TOWERS_IGNORED in " ".join(text.split()) for text in texts] == [bool(more)] * 2


@pytest.mark.parametrize(("rank", "ignored"), [(8, True), (640, False)])
def test_a_server_that_would_refuse_an_adapter_ignores_nothing_of_it(
    rank: int, ignored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination, nothing = open_store("memory://"), cast(Any, None)
    destination.put(PEFT_SETTINGS, json.dumps({"peft_type": "LORA", "r": rank}).encode())
    destination.put(PEFT_WEIGHTS, save({"a.lora_A.weight": torch.zeros(1, 1)}))
    written: Any = SimpleNamespace(adapter={"towers": "lora"})
    monkeypatch.setattr("trainer.export.write.adapter.export_adapter", lambda *_: written)
    remarks = find_format("peft").write(nothing, destination, 4, ExportProgress(nothing, nothing)).remarks
    assert (TOWERS_IGNORED in remarks) is ignored
    assert any("vLLM would refuse it" in remark for remark in remarks) is not ignored


def completing(model: Any) -> Complete:
    """What a vLLM with this model answers; it draws the likeliest tokens."""

    @torch.no_grad()
    def complete(asked: dict[str, Any]) -> Any:
        prompt, drawn = asked["prompt"], list[int]()
        while len(drawn) < asked["max_tokens"] and not (drawn and drawn[-1] in asked.get("stop_token_ids", ())):
            drawn.append(int(model(torch.tensor([[*prompt, *drawn]])).logits[0, -1].argmax()))
        tokens = [*prompt, *drawn]
        log_p = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[:-1]
        values = log_p.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
        likeliest = [(str(int(row.argmax())), {"logprob": float(row.max())}) for row in log_p]
        places = [
            {first: best, str(token): {"logprob": value}}
            for (first, best), token, value in zip(likeliest, prompt[1:], values, strict=False)
        ]
        choice = {"prompt_logprobs": [None, *places], "token_ids": drawn}
        return {"choices": [{**choice, "logprobs": {"token_logprobs": values[len(prompt) - 1 :]}}]}

    return complete


@pytest.mark.long
def test_a_served_adapter_is_proven_and_another_base_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "aside", lambda device, work, *arguments: work(*arguments))
    workshop = Workshop(tmp_path)
    config = workshop.config("done")
    run = workshop.store.sub("done")
    commit(run, config, dataset=workshop.prepare(config).train)
    export_adapter(run, adapter := open_store(str(tmp_path / "adapter")), 4)

    def served(model: Any) -> ServedProof:
        with stub(completing(model), "done") as url:
            return prove_served(run, 4, adapter, url, whole_model=False)

    def base(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(workshop.base, dtype=dtype).eval()

    def adapted(model: Any) -> Any:
        return PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()

    exact, rounded = served(adapted(base(torch.float32))), served(adapted(base(torch.bfloat16)))
    assert exact.holds
    assert exact.largest < 1e-4
    assert rounded.holds
    alone = served(base(torch.float32))
    assert not alone.holds
    assert alone.verdict.startswith("It answers as the base alone")
    other = base(torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    found = served(adapted(other))
    assert not found.holds
    assert found.verdict.startswith("It serves another model, or this one over another base")


def test_a_served_merge_in_codes_is_read_without_the_package_of_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "aside", lambda device, work, *arguments: work(*arguments))
    workshop = Workshop(tmp_path, hidden_size=128)
    config = workshop.config("done", "quant.type=none")
    run = workshop.store.sub("done")
    commit(run, config, dataset=workshop.prepare(config).train)
    merged = open_store(str(tmp_path / "int4"))
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    find_format("merged", ["as=int4"]).write(run, merged, None, quiet)

    def served(base: Path) -> ServedProof:
        model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32).eval()
        weights = resolve_base(Model(base=str(base))).weights
        for name, source in weights.items():
            assert not isinstance(source, PackedTensor)
            model.get_parameter(name).data = as_tensor(source.read(0, numel(source)), source).view(source.shape).float()
        with stub(completing(model), "done") as url:
            return prove_served(run, 4, merged, url, whole_model=True)

    right, wrong = served(tmp_path / "int4"), served(workshop.base)
    assert right.holds
    assert right.largest < 1e-4
    assert not wrong.holds
