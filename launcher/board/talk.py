"""A conversation with a checkpoint, as `capstan generate` has one: by ranks of this machine, or by a server."""

import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import anyio

from launcher.board.live import sent
from launcher.evaluate.answering import generate_answers
from launcher.policy.foreign import check_own, generated
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate.program import Ask
from trainer.evaluate.prompts import Prompt
from trainer.run.folder import run_config
from trainer.store.store import Store

_MOST_TALKS = 2
_IDLE_SECONDS = 900.0
_LOOK_SECONDS = 0.1
_LONGEST = 2**16  # characters of what is said


class Talk:
    """One conversation. A thread has the ranks answer, and hears what they write.

    It is the `screen` of `generate_answers`, as the terminal is for the verb.
    """

    def __init__(self, folder: Store, given: Mapping[str, Any]) -> None:
        step, server = str(given.get("step") or "").strip(), str(given.get("server") or "").strip()
        if step and not step.isdecimal():
            raise ConfigError(f"step: {step[:40]!r} is no step of a checkpoint. Example: 120.")
        sampling = {"max_tokens": 512, "temperature": _temperature(given), "top_p": 1.0, "seed": 0}
        config = run_config(folder)
        check_own(folder, config, generated, (), trust=False)
        base = bool(given.get("base")) and not server
        ask = Ask("generate", folder.uri, int(step) if step else None, (), base, sampling=sampling, server=server)
        self.chats = False
        self.told: list[tuple[str, Any]] = []
        self.heard = time.monotonic()
        self._said: queue.Queue[str | None] = queue.Queue()
        self._last: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._talk, args=(ask, folder, config), daemon=True, name="talk")
        self._thread.start()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def say(self, text: str) -> None:
        """Say something. An empty text begins a new conversation."""
        self.heard = time.monotonic()
        self._said.put(text[:_LONGEST])

    def end(self) -> None:
        self._said.put(None)

    def piece(self, side: str, text: str) -> None:
        self.told.append(("piece", {"side": side, "text": text}))

    def answers(self, rows: Sequence[dict[str, Any]]) -> None:
        self._last = rows[-1]
        # A side may have nothing to say, and then tells no piece.
        self.told.append(("answered", {"sides": [side for side in ("base", "adapter") if side in self._last]}))

    def _prompts(self) -> Iterator[list[Prompt]]:
        messages = list[dict[str, str]]()
        self.told.append(("ready", {}))
        while True:
            try:
                text = self._said.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                return
            if text is None:
                return
            if not text.strip():
                messages.clear()
                continue
            messages.append({"role": "user", "content": text})
            yield [{"messages": list(messages)} if self.chats else {"prompt": text}]
            messages.append({"role": "assistant", "content": str(self._last.get("adapter", ""))})

    def _talk(self, ask: Ask, folder: Store, config: Any) -> None:
        def log(text: str) -> None:
            self.told.append(("log", text))

        try:
            generate_answers(ask, folder, config, self._prompts(), log, self)
            self.told.append(("end", "The conversation has ended."))
        except CapstanError as error:
            self.told.append(("end", str(error)))
        except Exception as error:
            self.told.append(("end", f"{type(error).__name__}: {error}"))

    async def events(self) -> AsyncIterator[str]:
        """Yield what is told, and end the conversation when nobody listens any more."""
        at = 0
        try:
            while True:
                told = self.told[at:]
                at += len(told)
                for kind, value in told:
                    yield sent(kind, value)
                    if kind == "end":
                        return
                await anyio.sleep(_LOOK_SECONDS)
        finally:
            self.end()


def _temperature(given: Mapping[str, Any]) -> float:
    try:
        value = float(given.get("temperature") or 0.0)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= 10:
        raise ConfigError(f"temperature: {str(given.get('temperature'))[:40]!r} is not allowed. Allowed are 0 to 10.")
    return value


class Talks:
    """The conversations that go on: at most a few, because each has the base in memory."""

    def __init__(self) -> None:
        self._talks: dict[str, Talk] = {}

    def begin(self, folder: Store, given: Mapping[str, Any]) -> str:
        self._talks = {name: talk for name, talk in self._talks.items() if not talk.over}
        if len(self._talks) >= _MOST_TALKS:
            raise ConfigError(f"{_MOST_TALKS} conversations go on already, and each has a base in memory. End one.")
        name = secrets.token_hex(8)
        self._talks[name] = Talk(folder, given)
        return name

    def find(self, name: str) -> Talk | None:
        return self._talks.get(name)

    def end(self) -> None:
        for talk in self._talks.values():
            talk.end()
