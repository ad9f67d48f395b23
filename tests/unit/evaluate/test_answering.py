"""`capstan generate` before and beside its ranks: where prompts come from, what a chat sends, and ranks that are
gone.
"""

import io
import subprocess
import sys
import wave
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.evaluate import answering, ranks
from launcher.evaluate.answering import (
    Screen,
    answer_prompts,
    generate_answers,
    given_prompts,
    in_turns,
    read_files,
    with_files,
)
from trainer.config import Config, override, parse_config
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate.program import Ask
from trainer.evaluate.prompts import Prompt
from trainer.store.store import open_store


class _Terminal(io.StringIO):
    """A person's, who is not asked for anything."""

    def isatty(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> str:
        raise AssertionError("it would wait for a person to end the input")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "kept.txt").write_text("kept\n")
    (tmp_path / "named.txt").write_text("named\n")
    text = f"""
model: {{base: {tmp_path}}}
data: {{train: [{{path: rows.jsonl}}]}}
train: {{steps: 1}}
eval: {{prompts: {tmp_path}/kept.txt}}
run: {{name: one}}
"""
    return parse_config(text, [], "config.yaml")


@pytest.mark.parametrize(
    ("path", "piped", "expected"),
    [
        (None, "one\u2028line\nanother\n", ["one\u2028line", "another"]),
        (None, "\n", ["kept"]),
        (None, None, ["kept"]),
        ("-", "one\n \ntwo \n", ["one", "two "]),
        ("named.txt", "one\n", ["named"]),
    ],
)
def test_a_pipe_goes_before_the_prompts_that_the_settings_name(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, piped: Any, expected: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal() if piped is None else io.StringIO(piped))
    found = given_prompts(config, str(tmp_path / path) if path == "named.txt" else path)
    assert [prompt["prompt"] for prompt in found] == expected


def test_a_pipe_is_text_in_utf_8(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match=r"^standard input is not text in UTF-8 \(byte 3\)"):
        given_prompts(config, "-")


@pytest.mark.parametrize("chats", [True, False])
def test_a_chat_sends_conversations_where_the_ranks_say_so(monkeypatch: pytest.MonkeyPatch, chats: bool) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand?\n"))
    screen, sent = Screen(io.StringIO(), both=False, streams=True), list[Any]()
    screen.chats = chats
    for prompts in screen.conversation({}):
        sent += prompts
        screen.answers([{"prompt": "", "adapter": "hi"}])
    said = [("user", "hello"), ("assistant", "hi"), ("user", "and?")]
    talk = [{"role": role, "content": text} for role, text in said]
    assert sent == (
        [{"messages": talk[:1]}, {"messages": talk}] if chats else [{"prompt": "hello"}, {"prompt": "and?"}]
    )


def test_each_conversation_begins_with_the_files_of_the_command(
    monkeypatch: pytest.MonkeyPatch, config: Config, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    picture, sound = tmp_path / "one.png", tmp_path / "one.wav"
    Image.new("RGB", (4, 3), "red").save(picture)
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16_000, 400, "NONE", ""))
        file.writeframes(bytes(800))
    seeing = config.model_copy(update={"data": config.data.model_copy(update={"format": "pictures"})})
    image, audio = (
        f"data:application/octet-stream;base64,{b64encode(one.read_bytes()).decode()}" for one in (picture, sound)
    )
    given = {"image": [str(picture)], "video": [], "audio": [str(sound)]}
    files = read_files(given, seeing, "first")
    assert files == {"images": [image], "audios": [audio]}
    with pytest.raises(ConfigError, match=r"^--audio: first was trained on text .*, so its prompts have no files"):
        read_files({"audio": [str(sound)]}, config, "first")
    (tmp_path / "words").write_text("words")
    for kind, name, said in (
        ("image", "two.png", "cannot be read: No such file or directory"),
        ("image", "words", "is no picture that can be read"),
        ("image", "one.wav", "is a sound. Give it with --audio"),
        ("video", "one.png", "is a picture. Give it with --image"),
    ):
        with pytest.raises(ConfigError, match=rf"^--{kind}: '[^']*{name}' {said}\.$"):
            read_files({kind: [str(tmp_path / name)]}, seeing, "first")
    with monkeypatch.context() as bare:
        bare.setattr("trainer.base.find.processor.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"pip install 'capstan-llm\[images\]'"):
            read_files(given, seeing, "first")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand?\n\nnew\n"))
    screen, sent = Screen(io.StringIO(), both=False, streams=True), list[Any]()
    screen.chats = True
    for prompts in screen.conversation(files):
        sent += prompts
        screen.answers([{"prompt": "", "adapter": "hi"}])
    assert [(len(prompt["messages"]), prompt["images"], prompt["audios"]) for prompt in sent] == [
        (1, [image], [audio]),
        (3, [image], [audio]),
        (1, [image], [audio]),
    ]
    with pytest.raises(ConfigError, match=r"^--image, --audio: a prompt has files of its own"):
        with_files([{"prompt": "plain"}, *sent], files)


@pytest.mark.parametrize(("group", "sizes"), [(None, [3, 3, 1]), ("2", [2, 2, 2, 1])])
def test_each_rank_answers_a_prompt_of_a_turn(
    monkeypatch: pytest.MonkeyPatch, config: Config, group: str | None, sizes: list[int]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", group)) if group else ():
        monkeypatch.setenv(name, str(value))
    prompts: list[Any] = [{"prompt": str(number)} for number in range(7)]
    turns = in_turns(prompts, override(config, "cluster.workers=3", "cluster.gpus_per_worker=0"))
    assert [len(turn) for turn in turns] == sizes
    assert [prompt for turn in turns for prompt in turn] == prompts


def test_answers_that_come_whole_have_their_prompt_and_side_before_them() -> None:
    screen = Screen(out := io.StringIO(), both=True, streams=False)
    screen.piece("adapter", "not shown")
    screen.answers([{"prompt": "why?", "base": "no", "adapter": "yes"}, {"prompt": "and?", "adapter": "so"}])
    assert out.getvalue() == "> why?\nbase: no\nnow: yes\n> and?\nnow: so\n"


def test_each_answer_that_comes_in_pieces_has_its_side_before_it() -> None:
    screen = Screen(out := io.StringIO(), both=True, streams=True)
    for _ in range(2):
        for side, text in (("base", "n"), ("base", "o"), ("adapter", "yes")):
            screen.piece(side, text)
        screen.answers([{"prompt": "why?", "base": "no", "adapter": "yes"}])
    assert out.getvalue() == "base: no\nnow: yes\n" * 2


def test_what_the_ranks_tell_reaches_the_screen_and_the_log(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    told: list[dict[str, Any]] = [
        {"log": "loading"},
        {"ready": True, "chats": True},
        {"side": "adapter", "piece": "yo"},
        {"side": "adapter", "piece": "u"},
        {"answers": [{"prompt": "hi", "adapter": "you"}]},
    ]

    def run_ranks(ask: Ask, config: Config, prompts: Any, hear: Any) -> dict[str, Any]:
        for one in told:
            hear(one)
        return {"step": 4}

    monkeypatch.setattr(answering, "run_ranks", run_ranks)
    screen, logged = Screen(out := io.StringIO(), both=False, streams=True), list[str]()
    ask = Ask("generate", "memory://run", server="http://127.0.0.1:1")
    folder = open_store("memory://run")
    assert generate_answers(ask, folder, config, [], logged.append, screen) == {"step": 4}
    assert (logged, screen.chats, screen.last) == (["loading"], True, {"prompt": "hi", "adapter": "you"})
    assert "you" in out.getvalue()


def test_ranks_that_have_ended_while_a_person_typed_are_no_broken_pipe() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, text=True) as process:
        process.wait(60)
        assert process.stdin
        for prompts in ([{"prompt": "a"}], [{"prompt": "b"}], None):
            ranks._hand_over(process.stdin, prompts)  # pyright: ignore[reportArgumentType, reportPrivateUsage]


def test_ranks_hear_from_a_person_who_thinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_AWAKE_SECONDS", 0.05)
    program = "import sys; print(sys.stdin.readline(), flush=True)"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin
        assert process.stdout
        with ranks._kept_awake(process.stdin):  # pyright: ignore[reportPrivateUsage]
            assert process.stdout.readline() == "[]\n"


@pytest.fixture
def of_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_MODULE", "tests.toys.answering")


@pytest.mark.usefixtures("of_toys")
@pytest.mark.parametrize("workers", [1, 2])
def test_ranks_get_prompts_each_time_that_they_have_answered_and_are_heard_until_the_result(
    config: Config, workers: int
) -> None:
    heard, taken = list[dict[str, Any]](), list[int]()

    def prompts() -> Iterator[list[Prompt]]:
        for number, words in enumerate((["one", "three"], ["eleven"])):
            taken.append(len(heard))
            assert heard[-1].keys() == ({"answers"} if number else {"ready"}), "the next ones are asked for when needed"
            yield [{"prompt": word} for word in words]

    config = override(config, f"cluster.workers={workers}", "cluster.gpus_per_worker=0")
    result = ranks.run_ranks(Ask("generate", "memory://run"), config, prompts(), heard.append)
    assert result == {"answered": 3, "ranks": workers, "on_cpu": True}
    pieces = [{"piece": "one"}, {"piece": "three"}, {"answers": [3, 5]}, {"piece": "eleven"}, {"answers": [6]}]
    assert heard == [{"ready": True}, *pieces]
    assert taken == [1, 4]


@pytest.mark.usefixtures("of_toys")
@pytest.mark.parametrize(
    ("word", "code", "sentence"),
    [("refuse", 3, "no answer to this"), ("leave", 1, "the ranks ended with exit code 9; their output is above.")],
)
def test_ranks_that_fail_say_why_or_their_output_does(
    config: Config, capsys: pytest.CaptureFixture[str], word: str, code: int, sentence: str
) -> None:
    config = override(config, "cluster.workers=1", "cluster.gpus_per_worker=0")
    prompts: list[list[Prompt]] = [[{"prompt": word}]]
    with pytest.raises(CapstanError) as caught:
        ranks.run_ranks(Ask("generate", "memory://run"), config, prompts, lambda _: None)
    assert (str(caught.value), caught.value.exit_code) == (sentence, code)
    assert capsys.readouterr().err.rstrip("\n") == ("rank 0 of 1" if word == "leave" else "")


class _Process:
    """A rank's process that goes on until it is killed."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.stdin, self.stdout = io.StringIO(), io.StringIO()

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9

    wait = poll


def test_ctrl_c_leaves_no_rank_and_closes_what_leads_to_them(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    every = list[_Process]()
    monkeypatch.setattr(ranks.children, "start", lambda *_, **__: every.append(_Process()) or every[-1])

    def interrupted() -> Iterator[list[Prompt]]:
        raise KeyboardInterrupt
        yield

    config = override(config, "cluster.workers=2", "cluster.gpus_per_worker=0")
    monkeypatch.setattr(ranks, "_conversed", lambda process, prompts, hear: next(prompts))
    with pytest.raises(KeyboardInterrupt):
        ranks.run_ranks(Ask("generate", "memory://run"), config, interrupted(), print)
    assert [process.returncode for process in every] == [-9, -9]
    assert every[0].stdin.closed


def test_a_rank_of_torchruns_answers_itself(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "is_rank", lambda: True)
    monkeypatch.setattr(ranks, "answer", lambda ask, prompts, hear: {"on_cpu": ask.on_cpu, "prompts": list(prompts)})
    config = override(config, "cluster.gpus_per_worker=0")
    asked = ranks.run_ranks(Ask("generate", "memory://run"), config, [[{"prompt": "a"}]], print)
    assert asked == {"on_cpu": True, "prompts": [[{"prompt": "a"}]]}


def test_a_server_answers_for_no_step_and_no_base_and_ranks_for_a_step_that_is_there(config: Config) -> None:
    def answered(**asked: Any) -> None:
        generate_answers(Ask("generate", "memory://run", **asked), open_store("memory://run"), config, [], print, None)

    for given in ({"step": 4}, {"base": True}):
        with pytest.raises(ConfigError, match="--server: the server answers with the model that it serves"):
            answered(server="http://127.0.0.1:1", **given)
    with pytest.raises(CapstanError, match="no committed checkpoint"):
        answered(step=4)


def test_no_person_chats_where_a_program_reads_the_answers(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr(answering, "run_ranks", lambda ask, config, prompts, hear: asked.extend(prompts) or {})
    config = override(config, "cluster.workers=1", "cluster.gpus_per_worker=0")
    ask, folder = Ask("generate", "memory://run", server="http://127.0.0.1:1"), open_store("memory://run")
    answer_prompts(ask, folder, config, None, {}, print, shows=False)
    assert [[prompt["prompt"] for prompt in turn] for turn in asked] == [["kept"]]


def test_a_line_of_spaces_begins_a_new_conversation_as_an_empty_one_does() -> None:
    screen = Screen(io.StringIO(), both=False, streams=True)
    screen.chats, screen.last = True, {"adapter": "hi"}
    turns = [turn[0]["messages"] for turn in answering.conversation(["one", "two", "  ", "three"], screen)]
    assert [[message["content"] for message in said] for said in turns] == [["one"], ["one", "hi", "two"], ["three"]]


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_are_shown_as_they_are_written_where_each_turn_has_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    (tmp_path / "kept.txt").write_text("kept\ntwo\n")
    shown = list[str]()

    def run_ranks(ask: Ask, config: Config, prompts: Any, hear: Any) -> dict[str, Any]:
        for turn in prompts:
            hear({"side": "adapter", "piece": "wh"})
            shown.append(capsys.readouterr().out)
            hear({"side": "adapter", "piece": "ole"})
            hear({"answers": [{"prompt": prompt["prompt"], "adapter": "whole"} for prompt in turn]})
        return {}

    monkeypatch.setattr(answering, "run_ranks", run_ranks)
    config = override(config, f"cluster.workers={workers}", "cluster.gpus_per_worker=0")
    ask, folder = Ask("generate", "memory://run", server="http://127.0.0.1:1"), open_store("memory://run")
    answer_prompts(ask, folder, config, str(tmp_path / "kept.txt"), {}, print, shows=True)
    assert shown[0] == ("> kept\nwh" if workers == 1 else "")
    assert "".join(shown) + capsys.readouterr().out == "> kept\nwhole\n> two\nwhole\n"
