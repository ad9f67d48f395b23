"""The program of a rank on its driver's machine, in a process of its own.

    python -m launcher.start.local_rank TASK OUTCOME

The file TASK is JSON: the configuration, the compiled data, whether there must be a checkpoint, and when the start
began. The rank writes how it ended to the file OUTCOME, as `outcome_of` does. A killed process writes none.
"""

import json
import sys
from pathlib import Path
from typing import Any

from launcher.start.group import imported_rank
from trainer.config import parse_config
from trainer.data.compile.prepare import Datasets
from trainer.errors import CapstanError, NonFiniteLoss


def outcome_of(error: BaseException) -> dict[str, Any]:
    """Return the error that ended a rank, as JSON."""
    window = error.window if isinstance(error, NonFiniteLoss) else None
    return {"kind": type(error).__name__, "ours": isinstance(error, CapstanError), "text": str(error), "window": window}


def main() -> None:
    given, outcome = map(Path, sys.argv[1:])
    task = json.loads(given.read_text(encoding="utf-8"))
    config, datasets = parse_config(task["config"]), Datasets(**task["datasets"])
    try:
        run_rank = imported_rank(config)
        from trainer.train.start import Starter

        run_rank(config, datasets, resume=task["resume"], starter=Starter(began=task["began"]))
    except Exception as error:
        outcome.write_text(json.dumps(outcome_of(error)), encoding="utf-8")
        raise SystemExit(1) from error
    outcome.write_text("{}", encoding="utf-8")


if __name__ == "__main__":
    main()
