"""Answers that take long: whoever waits is told what for, and they are kept for the same packages alone."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.base.describe import architecture_cache, torch_answers
from trainer.base.describe.torch_answers import Question
from trainer.errors import ConfigError, DataError
from trainer.processes import helper_thread
from trainer.processes.helper_thread import patiently


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_SECONDS", "_NEXT_SECONDS"):
        monkeypatch.setattr(helper_thread, name, 0.01)


def test_what_takes_long_is_said_and_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said, enough = list[str](), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            enough.set()

    with patiently("counting", say):
        assert enough.wait(10)
    assert re.fullmatch(r"counting: \d+ s so far", said[0])
    enough.clear()
    del said[:]
    for name in ("_FIRST_SECONDS", "_NEXT_SECONDS"):
        monkeypatch.setattr(helper_thread, name, 60)
    with patiently("counting", say, every=0.01):
        assert enough.wait(10)
    told = len(said)
    monkeypatch.setattr(helper_thread, "_FIRST_SECONDS", 5)
    with patiently("nothing", say):
        pass
    assert len(said) == told


def test_a_thread_that_is_ended_by_what_it_does_leaves_nobody_waiting() -> None:
    assert isinstance(helper_thread.in_thread(lambda: sys.exit(3), "it").exception(10), SystemExit)


def test_plan_says_what_it_takes_longest_for_and_how_long_so_far(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = lambda _: threading.Event().wait(0.1) or b'{"answer": 1}'  # noqa: E731
    monkeypatch.setattr(torch_answers, "_said_elsewhere", slow)
    question = Question("base.describe.meta", "architecture_of", {}, "base", "reading the architecture")
    assert torch_answers._answer_elsewhere(question) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "reading the architecture with transformers, once for this base: this takes longest"
    assert said[1] == "reading the architecture: 0 s so far"


def test_an_answer_is_given_again_for_the_same_packages_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = list[str]()
    monkeypatch.setattr(torch_answers, "_answer", lambda question: asked.append("again") or len(asked))
    monkeypatch.setattr(torch_answers, "_answer_elsewhere", torch_answers._answer)
    question = Question("base.describe.meta", "architecture_of", {}, "base", "reading the architecture")
    for number, package in enumerate((None, None, "torch", "bitsandbytes", "transformers")):
        monkeypatch.setattr(torch_answers, "version", lambda name, newer=package: f"{name} {name == newer}")
        assert torch_answers.kept_answer(question, ["facts"], int) == max(1, number)


@pytest.mark.parametrize("written", ["", "{", "[1", "null", "{}", '{"other": 1}', "5", '"text"', "\udcff"])
def test_an_entry_of_the_cache_that_is_no_answer_is_made_again(
    written: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch_answers, "_answer", lambda question: {"layers": 3})
    monkeypatch.setattr(torch_answers, "_answer_elsewhere", torch_answers._answer)
    question = Question("base.describe.meta", "architecture_of", {}, "base", "reading the architecture")

    def answer() -> Any:
        return torch_answers.kept_answer(question, ["facts"], lambda tree: tree.get("layers") + tree["layers"])

    assert answer() == 6
    (entry,) = (path for path in tmp_path.rglob("*.json"))
    whole = entry.read_bytes()
    entry.write_bytes(os.fsencode(written))
    assert answer() == 6
    assert entry.read_bytes() == whole


def test_an_answer_is_that_of_the_code_and_the_tables_that_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.as_posix()) or b"")
    of_base, of_others = set[str](), set[str]()
    for module, names in (("base.load.sight", of_base), ("tuning.method", of_others)):
        torch_answers._code.__wrapped__(module)
        assert read == sorted(read), "in one order, whatever the file system's"
        names.update(path.partition("/trainer/")[2] for path in read)
        read.clear()
    assert {"base/describe/trial/sizes.yaml", "base/load/sight.py", "model/parts.py"} <= of_base & of_others
    assert "tuning/method.py" in of_others - of_base


def test_one_process_answers_the_questions_of_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = list[list[str]]()

    def start(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        started.append(command)
        program = "import json, sys\nfor line in sys.stdin: print(json.dumps({'answer': len(line)}), flush=True)"
        return subprocess.Popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(torch_answers.children, "start", start)
    monkeypatch.setattr(torch_answers, "_answering", [])
    question = Question("base.describe.meta", "architecture_of", {}, "base", "reading the architecture")
    first = torch_answers._answer_elsewhere(question)
    assert torch_answers._answer_elsewhere(question) == first > 10
    assert len(started) == 1
    torch_answers._answering[0].process.kill()
    torch_answers._answering[0].process.wait()
    assert torch_answers._answer_elsewhere(question) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch_answers._answer_elsewhere(question) == first
    assert len(started) == 3
    monkeypatch.chdir(tmp_path)
    assert torch_answers._answer_elsewhere(question) == first
    assert len(started) == 4
    torch_answers._answering[0].process.kill()


class Process:
    """An answering process: what it prints, or that it prints nothing for ever."""

    def __init__(self, stdout: Any) -> None:
        self.stdin, self.stdout, self.returncode, self.killed = io.BytesIO(), stdout, 1, False

    def wait(self) -> None: ...

    def kill(self) -> None:
        self.killed = True


def test_an_answer_that_does_not_come_is_a_refusal_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal has its own kind, and with it its exit code."""
    question, ends = Question("base.describe.meta", "architecture_of", {}, "mine", "reading"), list[int]()
    monkeypatch.setattr(torch_answers, "_answering", [])
    monkeypatch.setattr(torch_answers, "_said_elsewhere", lambda _: b'{"refusal": "no rows", "error": "DataError"}')
    with pytest.raises(DataError, match="no rows"):
        torch_answers._answer_elsewhere(question)
    monkeypatch.undo()
    monkeypatch.setattr(torch_answers, "_answering", [])

    def start(command: list[str], stderr: Any, **options: Any) -> Any:
        stderr.write(b"a warning\nMemoryError: no room\n")
        return started

    def piped() -> Any:
        ends.extend(os.pipe())
        return os.fdopen(ends[-2], "rb")

    monkeypatch.setattr(torch_answers.children, "start", start)
    started = Process(piped())
    os.close(ends[-1])
    with pytest.raises(ConfigError, match=r"cannot build the model of mine \(MemoryError: no room\)\.$"):
        torch_answers._said_elsewhere(question)
    started.stdout.close()
    monkeypatch.setattr(torch_answers, "_SECONDS", 0)
    started = Process(piped())
    with pytest.raises(ConfigError, match="has not built the model of mine within 0 seconds"):
        torch_answers._said_elsewhere(question)
    assert started.killed
    started.stdout.close()
    os.close(ends[-1])


def test_the_names_in_an_adapter_are_asked_anew_for_another_base_or_other_layers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = list[str]()
    monkeypatch.setattr(architecture_cache, "kept_answer", lambda question, facts, parse: asked.append(str(facts)))
    for name, text in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name, layers, paths in (
        ("a", None, ["q"]),
        ("b", None, ["q"]),
        ("c", None, ["q"]),
        ("a", 1, ["q"]),
        ("a", None, ["k"]),
    ):
        architecture_cache.read_adapter_paths(tmp_path / name, layers, paths, "mine")
    assert asked[0] == asked[1], "a copy is the same base"
    assert len(set(asked)) == 4


def test_settings_that_decide_no_weight_of_the_base_ask_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine-tuned base, or a quantized one, has its architecture from before; one that is cut has it of the whole."""
    asked = list[Any]()
    found: Any = SimpleNamespace(first=lambda layers: f"first {layers}" if layers < 3 else None)

    def answer(question: Question, facts: Any, parse: Any) -> Any:
        asked.append(facts)
        return found

    monkeypatch.setattr(architecture_cache, "kept_answer", answer)
    architecture_cache._read.cache_clear()
    plain = {"model_type": "llama", "hidden_size": 64}
    others = {
        "dtype": "bfloat16",
        "torch_dtype": "float16",
        "transformers_version": "9",
        "use_cache": False,
        "_name_or_path": "x",
        "id2label": {"0": "a"},
        "label2id": {"a": 0},
        "problem_type": "regression",
        "classifier_dropout": 0.1,
        "quantization_config": {"quant_method": "fp8"},
    }
    try:
        for given in (plain, *({**plain, name: value} for name, value in others.items())):
            assert architecture_cache.read_architecture(given) is found
        assert len(asked) == 1
        assert architecture_cache.read_architecture(plain, 2) == "first 2"
        assert len(asked) == 1
        assert architecture_cache.read_architecture(plain, 3) is found, "its layers are of several kinds"
        assert architecture_cache.read_architecture({**plain, "hidden_size": 32}) is found
        assert len({str(facts) for facts in asked}) == len(asked) == 3
    finally:
        architecture_cache._read.cache_clear()
