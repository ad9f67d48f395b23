"""Whole runs, through the one function that every launcher calls, and what goes wrong on their way."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trainer.config import parse_config
from trainer.data.compile.prepare import Datasets
from trainer.data.order.settings import Position
from trainer.errors import CapstanError
from trainer.plan.assemble import join_run
from trainer.processes.ranks import join
from trainer.rank import run_rank
from trainer.run import layout
from trainer.state.zero.engine import Engine
from trainer.store.store import Store, open_store


def run(
    config_text: str,
    fingerprint: str,
    how: str = "start",
    eval_fingerprint: str | None = None,
    sets: dict[str, str] | None = None,
    epochs: list[list[list[int]]] | None = None,
) -> dict[str, Any]:
    """`run_rank`, and how it ended. `how`: start, resume, or something that goes wrong on the way.

    hold: after the first commit showed up, no rank finishes another step; resume_hold: so after the second in a run
        that goes on.
    terminate: rank 1 alone gets SIGTERM in its third step.
    poison: the loss of bin 26 of the first epoch, which is in step 7, is not a number; poison_chapter: that of the
        fourth chapter of answers.
    stuck: rank 1 never comes out of its third step, and rank 0 takes two seconds to write its stacks.
    stuck_inside: rank 1 never comes out of a layer in its third step, whose weights come by collectives that DeepSpeed
        begins and awaits.
    freeze: rank 0 gets SIGSTOP in its third step.
    rests: rank 1 takes a tenth of a second longer in each layer.
    """
    config = parse_config(config_text)
    if how in ("hold", "resume_hold"):
        every = config.checkpoint.every_steps
        assert every
        _hold_after(open_store(config.run.store).sub(config.run.name), step=every if how == "hold" else 2 * every)
    if how == "terminate" and os.environ["RANK"] == "1":
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if how.startswith("poison"):
        _poison(Position(0, 0, 26) if how == "poison" else Position(0, 0, 0, chapter=3))
    if how == "stuck" and os.environ["RANK"] == "1":
        _in_step(3, lambda: threading.Event().wait())
    if how == "stuck" and os.environ["RANK"] == "0":
        _slow_stacks(2.0)
    if how == "stuck_inside" and os.environ["RANK"] == "1":
        _in_layer_of_step(3, lambda: threading.Event().wait())
    if how == "rests" and os.environ["RANK"] == "1":
        _rest(0.1)
    if how == "freeze" and os.environ["RANK"] == "0":
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    datasets = Datasets(fingerprint, eval_fingerprint, epochs or (), sets or {}) if os.environ["RANK"] == "0" else None
    return outcome_of(lambda: run_rank(config, datasets, resume=how.startswith("resume")))


def meet(seconds: float, absent: list[int]) -> str:
    """The words of a rank that joins the others within `seconds`, where the `absent` never come."""
    if int(os.environ["RANK"]) in absent:
        return "absent"
    # The time begins when all that come have begun: on a busy machine the last is seconds behind the first.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store.add("came", 1)
    while store.add("came", 0) < int(os.environ["WORLD_SIZE"]) - len(absent):
        time.sleep(0.01)
    try:
        together = join(meeting=timedelta(seconds=seconds))
    except CapstanError as error:
        return str(error)
    together.gather()  # a rank that leaves at once breaks the connections that others still make
    return f"{together.world_size} together"


def environment(config_text: str, *names: str) -> list[str | None]:
    """Variables of a rank that has joined the others as its settings say."""
    join_run(parse_config(config_text))
    return [os.environ.get(name) for name in names]


def outcome_of(action: Any) -> dict[str, Any]:
    try:
        action()
    except CapstanError as error:
        return {"outcome": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
    return {"outcome": "finished", "exit_code": 0, "message": ""}


def _hold_after(run: Store, step: int) -> None:
    plain = Engine.step

    def held(self: Engine, lr: float) -> float:
        if run.exists(layout.manifest(step)):
            threading.Event().wait()  # until SIGKILL
        return plain(self, lr)

    Engine.step = held


def _slow_stacks(seconds: float) -> None:
    """The other ranks have ended, and this rank's collectives have failed, before it says why."""
    plain = faulthandler.dump_traceback

    def slow(*arguments: Any, **given: Any) -> None:
        time.sleep(seconds)
        plain(*arguments, **given)

    faulthandler.dump_traceback = slow


def _rest(seconds: float) -> None:
    plain = LlamaDecoderLayer.forward

    def rested(*arguments: Any, **given: Any) -> Any:
        time.sleep(seconds)
        return plain(*arguments, **given)

    LlamaDecoderLayer.forward = rested


def _in_step(number: int, strike: Callable[[], object]) -> None:
    plain, steps = Engine.step, []

    def struck(self: Engine, lr: float) -> float:
        steps.append(lr)
        if len(steps) == number:
            strike()
        return plain(self, lr)

    Engine.step = struck


def _in_layer_of_step(number: int, strike: Callable[[], object]) -> None:
    def struck(*_arguments: Any, **_given: Any) -> Any:
        strike()

    def arm() -> None:
        LlamaDecoderLayer.forward = struck

    _in_step(number - 1, arm)


def _poison(place: Position) -> None:
    plain = Engine.loss

    def poisoned(self: Engine, row: Any) -> Tensor:
        return plain(self, row) * (float("nan") if place in row.bins else 1.0)

    Engine.loss = poisoned
