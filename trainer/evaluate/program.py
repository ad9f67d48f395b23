"""The request to the ranks of an evaluation, and the program of one rank that does as asked.

    python -m trainer.evaluate.program ASK

`capstan`, torchrun or srun start it. It evaluates a run, answers prompts, teaches, judges or samples. ASK is JSON with
the fields of `Ask`. Rank 0 writes one object a line to its output: messages on the way, and last the result, or an
error with its exit code.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainer.errors import CapstanError
from trainer.evaluate.prompts import Prompt
from trainer.processes.children import end_with_agent
from trainer.processes.devices import stay_on_cpu

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ask:
    """The request to every rank.

    Attributes:
        what: evaluate the run at the URI `run`, generate its answers, sample for it (rollout), or have a teacher write
            for it or judge its answers.
        step: the step of the checkpoint; None is the newest whole one.
        overrides: settings as on the command line.
        base: evaluate the base alone, or generate its answers beside the adapter's.
        chat: the tasks are asked under the chat template.
        sampling: the arguments of `trainer.evaluate.generation.Sampling`.
        config: the settings as YAML, for a teacher, whose run may not exist yet.
        server: the URL of a server that answers instead of the ranks.
    """

    what: Literal["evaluate", "generate", "teach", "judge", "rollout"]
    run: str
    step: int | None = None
    overrides: tuple[str, ...] = ()
    base: bool = False
    chat: bool = False
    on_cpu: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    server: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def answer(ask: Ask, prompts: Iterable[list[Prompt]], tell: Tell) -> dict[str, Any]:
    """Do as asked, as one rank. The result is the same on every rank.

    `prompts` come to rank 0 in the order in which they are to be answered, those of one list at once.

    Raises:
        CapstanError: on every rank alike.
    """
    if ask.on_cpu:
        stay_on_cpu()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # These modules import torch, which sees only the devices that are left to it.
    from trainer.evaluate.evaluate import evaluate
    from trainer.evaluate.generate import generate
    from trainer.evaluate.rollout.serving import judge_answers, roll_out
    from trainer.evaluate.teach import teach

    work: dict[str, Callable[[Ask, Tell], dict[str, Any]]] = {
        "evaluate": evaluate,
        "generate": lambda ask, say: generate(ask, prompts, say),
        "teach": teach,
        "judge": judge_answers,
        "rollout": roll_out,
    }
    speaks = os.environ.get("RANK", "0") == "0"  # rank 0 speaks for all
    try:
        result = work[ask.what](ask, tell if speaks else lambda _told: None)
    except CapstanError:
        _leave()
        raise
    _leave()
    return result


def _leave() -> None:
    """Leave the group. A rank that fails alone must not do this: it might wait for others that wait for it."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> None:
    end_with_agent()
    # Libraries also print to the output. From here on their output goes to stderr.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    ask = Ask(**{**given, "overrides": tuple(given["overrides"])})
    first = os.environ.get("RANK", "0") == "0"

    def tell(told: dict[str, Any]) -> None:
        if first:
            print(json.dumps(told), file=lines, flush=True)

    try:
        result = answer(ask, (json.loads(line) for line in sys.stdin), tell)
    except CapstanError as error:
        tell({"error": str(error), "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    tell({"result": result})


if __name__ == "__main__":
    main()
