"""Code of the user's that never ends is ended, in whatever thread it runs, and says so."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.material import byte_tokenizer
from trainer.data.render import chat_template
from trainer.errors import ConfigError
from trainer.processes import time_limit as limits
from trainer.processes.time_limit import OutOfTime, time_limit

LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{%"
    " endfor %}"
)


def test_a_loop_without_an_end_is_ended_in_the_main_thread_and_in_others() -> None:
    def endless() -> None:
        while True:
            with suppress(Exception):  # what such code may do with any error
                sum(range(100))

    def loop() -> float:
        began = time.monotonic()
        with pytest.raises(OutOfTime), time_limit(0.1):
            endless()
        return time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(loop) for _ in range(2)]
        assert all(seconds < 100 for seconds in (loop(), *(other.result() for other in others)))


def test_code_that_is_over_its_limit_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LOOK_SECONDS", 0.01)
    # The thread of the process that this one was forked from is not here. Another one looks sooner.
    monkeypatch.setattr(limits, "_watch", threading.Thread())
    told = 0
    with time_limit(0.01):
        for _ in range(10):
            try:
                time.sleep(0.02)
            except OutOfTime:
                told += 1
    assert told == 1
    assert limits._watch is not None
    assert limits._watch.is_alive()


def test_code_that_ends_in_time_is_left_alone() -> None:
    for _ in range(100):
        with time_limit(0.6):
            pass
    with time_limit(0.6), time_limit(60):
        pass
    assert limits._running == set(), "nobody looks at what is over"
    time.sleep(1.2)  # a limit that is over has no effect on what comes later


def test_a_template_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.1)
    endless = chat_template.ChatTemplate(byte_tokenizer(), LOOPS)
    with pytest.raises(ConfigError, match=r"^data\.template: .* has not rendered a conversation of 2 messages"):
        endless.render([{"role": "user", "content": "a"}])
