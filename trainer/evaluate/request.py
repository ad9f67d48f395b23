"""The request to the ranks of an evaluation, as processes pass it on, and the function that reports progress."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
