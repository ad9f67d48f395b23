"""Runs that are evaluated and asked, by the functions that every rank of `capstan evaluate` and `capstan generate`
calls.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from launcher.view.status import read_generation
from trainer.evaluate.evaluate import evaluate
from trainer.evaluate.generate import generate
from trainer.evaluate.program import Ask
from trainer.export.write.adapter import export_adapter
from trainer.store.store import Store, open_store


def answers(asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of several asks, one after the other; `prompts` of an ask are lists that come in turn."""
    results = list[dict[str, Any]]()
    for given in asks:
        prompts = given.pop("prompts", [])
        ask, told = Ask(**{**given, "overrides": tuple(given.get("overrides", ()))}), list[dict[str, Any]]()
        if ask.what == "evaluate":
            results.append(evaluate(ask, told.append))
        else:
            results.append({**generate(ask, prompts, told.append), "told": told})
    return results


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def adapted(model: Any, uri: str, folder: Path) -> Iterator[Any]:
    """`model`, a base in transformers, with the exported adapter of the run at `uri` on it."""
    export_adapter(open_store(uri), open_store(str(folder)))
    peft = PeftModel.from_pretrained(model, str(folder))
    yield peft.eval()
    if not peft.peft_config["default"].is_prompt_learning:  # else nothing was put into the base's own layers
        peft.unload()


def step_losses(run: Store) -> list[float]:
    return [record["loss"] for record in read_generation(run, 1)["step"]]
