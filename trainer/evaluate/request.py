"""The request to the ranks of an evaluation, as it travels between processes, and the function by which they report progress."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ask:
    """The request to every rank: evaluate or question the run at the URI `run`, or sample for the run there, or have a teacher write for the run of `config`, or judge its answers, with the checkpoint of `step`. None is the newest whole one.

    `overrides` are settings as on the command line. `base`: of an evaluation the base alone, of answers the base's beside the
    adapter's. `config` is the YAML text of the settings of a run that need not be there yet. `server` is the URL of the one that answers in the place of the ranks. `chat`: tasks are asked under the chat template. `sampling` are the arguments of `trainer.evaluate.measure.generation.Sampling`.
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
