"""A conversation with a checkpoint, as `capstan generate` has one: by ranks of this machine, or by a server."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from markupsafe import escape

from launcher.board.live import Event, Look
from launcher.evaluate.answering import conversation, generate_answers
from launcher.policy.foreign import check_own, generated
from launcher.view.terminal import visible
from trainer.config import Config
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate.program import Ask
from trainer.run.folder import run_config
from trainer.store.store import Store

MOST_TALKS = 2
"""So many conversations may go on: each has a base in memory."""
_IDLE_SECONDS, _ALONE_SECONDS = 900.0, 30.0
_LONGEST = 2**16  # characters of what is said
_YOU, _SIDES = "you", {"base": "the base", "adapter": "the checkpoint"}


class Talk:
    """One conversation. A thread has the ranks answer, and hears what they write.

    It ends when nothing has been said for long, or nobody has listened for some seconds. It is the `screen` of
    `generate_answers`, as the terminal is for the verb. `turns` are (who, text), and `whole` counts whole answers.
    """

    look_seconds, macro = 0.1, "said"

    def __init__(self, folder: Store, given: Mapping[str, Any]) -> None:
        step, server = str(given.get("step") or "").strip(), str(given.get("server") or "").strip()
        if step and not step.isdecimal():
            raise ConfigError(f"step: {step[:40]!r} is no step of a checkpoint. Example: 120.")
        sampling = {"max_tokens": 512, "temperature": _temperature(given), "top_p": 1.0, "seed": 0}
        config = run_config(folder)
        check_own(folder, config, generated, (), trust=False)
        base = bool(given.get("base")) and not server
        ask = Ask("generate", folder.uri, int(step) if step else None, (), base, sampling=sampling, server=server)
        self.folder, self.chats, self.last = folder, False, dict[str, Any]()
        self.turns: list[tuple[str, str]] = []
        self.whole = 0
        self.state, self.over, self.listened = "The model is being loaded.", False, time.monotonic()
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._talk, args=(ask, folder, config), daemon=True, name="talk").start()

    def say(self, text: str) -> None:
        """Say something. An empty text begins a new conversation."""
        self._said.put(text[:_LONGEST])

    def end(self) -> None:
        self._said.put(None)

    def piece(self, side: str, text: str) -> None:
        who, before = self.turns[-1]
        self.turns[-1:] = [(who, before + text)] if who == _SIDES[side] else [(who, before), (_SIDES[side], text)]

    def answers(self, rows: Sequence[dict[str, Any]]) -> None:
        self.last = rows[-1]
        asked = max(at for at, (who, _) in enumerate(self.turns) if who == _YOU)
        # A side may have nothing to say, and then has told no piece.
        self.turns[asked + 1 :] = [(name, self.last[side]) for side, name in _SIDES.items() if side in self.last]
        self.whole += 1
        self.state = "Your turn."

    def _lines(self) -> Iterator[str]:
        """Yield what is said, until nobody is there any more."""
        self.state = "Your turn."
        since = time.monotonic()
        while (now := time.monotonic()) - since < _IDLE_SECONDS and now - self.listened < _ALONE_SECONDS:
            try:
                text = self._said.get(timeout=1.0)
            except queue.Empty:
                continue
            if text is None:
                return
            if text.strip():
                self.turns.append((_YOU, text))
                self.state = "The answer is being written."
            else:
                self.turns.clear()
            yield text
            since = time.monotonic()

    def _talk(self, ask: Ask, folder: Store, config: Config) -> None:
        def log(text: str) -> None:
            self.state = text

        try:
            generate_answers(ask, folder, config, conversation(self._lines(), self), log, self)
            self.state = "The conversation has ended. Begin a new one."
        except CapstanError as error:
            self.state = str(error)
        except Exception as error:
            self.state = f"{type(error).__name__}: {error}"
        self.over = True

    def look(self, render: Callable[[Sequence[tuple[str, str]]], str]) -> Look:
        """Return looks at the turns, of which `render` draws all, and the last one is added to."""
        seen, length, state = (-1, 0), 0, ""

        def look() -> Iterator[Event]:
            nonlocal seen, length, state
            self.listened = time.monotonic()
            over, now, turns = self.over, (len(self.turns), self.whole), list(self.turns)
            if now != seen:
                yield "parts", {"said": render(turns)}
            elif turns and len(turns[-1][1]) > length:
                yield "text", {"newest": visible(turns[-1][1][length:])}
            seen, length = now, len(turns[-1][1]) if turns else 0
            if self.state != state:
                state = self.state
                yield "parts", {"how": escape(state)}
            if over:
                yield "end", None

        return look


def _temperature(given: Mapping[str, Any]) -> float:
    value = str(given.get("temperature") or 0)
    with suppress(ValueError):
        if 0 <= float(value) <= 10:
            return float(value)
    raise ConfigError(f"temperature: {value[:40]!r} is not allowed. Allowed are 0 to 10.")
