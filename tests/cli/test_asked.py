"""`capstan evaluate` and `capstan generate` as a person calls them: on two ranks of their own, on torchrun's, and as a
chat in a terminal.
"""

import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.conftest import ENVIRONMENT, Capstan
from tests.dist.evaluating import adapted, write_rows
from tests.material import Workshop, byte_tokenizer, commit

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}{% if add_generation_prompt %}assistant: {%"
    " endif %}"
)
TEXTS = ["a bee and a cat", "the jay saw an emu", "two hens, one fox: none left"]
TOKENS = 8
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """With a run on conversations that has committed a checkpoint, and a set of texts."""
    here = Workshop(tmp_path_factory.mktemp("asked"))
    (here.folder / "chat.jinja").write_text(TEMPLATE)
    settings = ("data.format=chat", f"data.template={here.folder}/chat.jinja", "model.dtype=fp32", "quant.type=none")
    commit(here.store.sub("talks"), here.config("talks", *settings, "cluster.workers=2"))
    write_rows(here.folder / "general.jsonl", [{"text": text} for text in TEXTS])
    return here


@pytest.fixture(scope="module")
def tuned(workshop: Workshop) -> Iterator[Any]:
    """The checkpoint by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=torch.float32)
    with adapted(model, workshop.store.sub("talks").uri, workshop.folder / "adapter") as model:
        yield model


@torch.no_grad()
def loss(model: Any) -> float:
    """Nats a token of the texts, of which the first token is not predicted."""
    tokenizer, nats = byte_tokenizer(), list[torch.Tensor]()
    for text in TEXTS:
        ids = torch.tensor([*tokenizer.encode(text), tokenizer.eos_token_id])
        scores = model(ids[None]).logits[0].log_softmax(-1)
        nats.append(-scores[:-1].gather(1, ids[1:, None])[:, 0])
    return float(torch.cat(nats).mean())


def reply(model: Any, *said: str) -> str:
    """The greedy answer to a conversation, whose turns alternate and begin with the user's."""
    roles = ("user", "assistant")
    turns = "".join(f"{roles[number % 2]}: {text}<s>" for number, text in enumerate(said))
    ids = torch.tensor([byte_tokenizer().encode(f"{turns}assistant: ", add_special_tokens=False)])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0, "eos_token_id": [1, 2]}
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    text: Any = byte_tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_an_evaluation_on_two_ranks_prints_one_result_which_is_that_of_transformers(
    capstan: Capstan, workshop: Workshop, tuned: Any
) -> None:
    """The control: what is measured before is another loss than what is measured after."""
    general = (f"--set=general={workshop.folder}/general.jsonl", "eval.sets.general.format=text")
    asked = ("evaluate", "talks", f"--store={workshop.folder}/store", *general)
    assert "on general, with 2 ranks" in capstan(*asked, "--dry-run").stdout
    done = capstan(*asked, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sets"]["general"]
    assert found["adapter"]["loss"] == pytest.approx(loss(tuned), rel=1e-5)
    with tuned.disable_adapter():
        assert found["base"]["loss"] == pytest.approx(loss(tuned), rel=1e-5)
    assert abs(found["difference"]) > 1e-3


def test_two_ranks_of_torchrun_answer_each_prompt_once(workshop: Workshop, tuned: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    asked = ("generate", "talks", f"--store={workshop.folder}/store", "--prompts=prompts.txt")
    command = [sys.executable, *TORCHRUN, "-m", "launcher.cli", *asked, f"--max-tokens={TOKENS}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (result,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [{"prompt": text, "adapter": reply(tuned, text)} for text in TEXTS]
    assert (result["step"], result["answers"]) == (4, rows)


@contextmanager
def terminal(command: list[str], errors: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A process in a terminal that neither echoes nor rewrites line ends, and this side of the terminal."""
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    try:
        with errors.open("wb") as stderr:
            process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=stderr, env=ENVIRONMENT)
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.terminate()
            process.wait(60)
    finally:
        os.close(ours)


def read_until(ours: int, whole: Callable[[str], bool], seconds: float) -> str:
    """The text on the terminal once it is `whole`."""
    seen, deadline = b"", time.monotonic() + seconds
    while not whole(text := seen.decode(errors="ignore")):
        ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"the terminal shows only {text!r}"
        seen += os.read(ours, 4096)
    return text


def shown(answer: str) -> str:
    """An answer as it is streamed: the begin of a character that never got whole is left out, and controls are
    spelt.
    """
    whole = answer.rstrip("\N{REPLACEMENT CHARACTER}")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda c: f"\\x{ord(c[0]):02x}", whole) + "\n> "


def test_a_chat_in_a_terminal_is_a_conversation_until_an_empty_line(
    workshop: Workshop, tuned: Any, tmp_path: Path
) -> None:
    """The control: the second answer would be another one if the first turn were forgotten."""
    command = [sys.executable, "-m", "launcher.cli", "generate", "talks", f"--store={workshop.folder}/store"]
    answers = [reply(tuned, "hi")]
    answers.append(reply(tuned, "hi", answers[0], "and a cat?"))
    fresh = reply(tuned, "and a cat?")
    assert shown(fresh) != shown(answers[1])
    with terminal([*command, f"--max-tokens={TOKENS}"], tmp_path / "errors") as (process, ours):
        try:
            read_until(ours, lambda text: text == "> ", 300)
            for line, answer in zip(("hi", "and a cat?"), answers, strict=True):
                os.write(ours, f"{line}\n".encode())
                assert read_until(ours, lambda text: text.endswith("\n> "), 120) == shown(answer)
            os.write(ours, b"\n")
            assert read_until(ours, lambda text: text.endswith("> "), 60) == "> "
            os.write(ours, b"and a cat?\n")
            assert read_until(ours, lambda text: text.endswith("\n> "), 120) == shown(fresh)
            os.write(ours, b"\x04")
            assert process.wait(120) == 0
        except AssertionError as error:
            error.add_note((tmp_path / "errors").read_text())
            raise
