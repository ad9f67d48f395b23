"""Run in a copy of the packages with tests/toys/added in it: prints what the product makes of each addition, as JSON.

It is a program of its own, as the configuration reads what is there when it is imported.
"""

import json
import struct
import sys
from pathlib import Path
from typing import Any

from launcher.cli.command import commands
from launcher.config_docs import render
from trainer.base.base import Base, Description
from trainer.base.describe.description import stored_format
from trainer.config import Config, parse_config
from trainer.data.format.formats import detect
from trainer.errors import ConfigError
from trainer.export.format import find_format
from trainer.store.store import open_store
from trainer.tuning.method import find_method
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.answers import Answers

RUN = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"


def refusal(*overrides: str) -> str:
    try:
        config = parse_config(RUN, overrides)
        find_method(config.tuning)
        find_objective(config)
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{overrides} were accepted")


def method() -> dict[str, Any]:
    config = parse_config(RUN, ("tuning.method=loha", "tuning.spread=0.2"))
    return {
        "identity": find_method(config.tuning).identity,
        "refused": refusal("tuning.spread=0.2"),
        "mistyped": refusal("tuning.method=loha", "tuning.spreads=0.2"),
    }


def objective() -> dict[str, Any]:
    config = parse_config(RUN, ("data.format=preference", "objective.name=gap", "objective.gap=3"))
    found: Any = find_objective(config)
    sides: Any = (Answers(-2.0, 2), Answers(-8.0, 2))  # type: ignore[arg-type]
    return {
        "identity": found.identity,
        "loss": found.pair_loss.formula(found.given, sides, None).losses,
        "refused": refusal("data.format=preference", "objective.name=orpo", "objective.gap=3"),
    }


def stored(folder: Path) -> dict[str, Any]:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    data = struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0)
    (folder / "model.safetensors").write_bytes(data)
    form = stored_format({"quant_method": "halves"}, "the base")
    nothing: Any = None
    base = Base("b", folder, open_store(str(folder)), {}, Description(nothing, form))
    try:
        stored_format({"quant_method": "thirds"}, "the base")
    except ConfigError as error:
        return {"values": struct.unpack("<2f", base.weights["w"].read(0, 2)), "refused": str(error)}  # type: ignore[union-attr]
    raise AssertionError("thirds can be read")


def held() -> dict[str, Any]:
    quant = parse_config(RUN, ("quant.type=rows8", "quant.cache=true")).quant
    return {
        "sizes": quant.held.sizes(3, 8),
        "refused": refusal("quant.type=rows8", "quant.double=true"),
        "mistyped": refusal("quant.type=row8"),
        "exported": find_format("rows8").what,
    }


def rows() -> dict[str, Any]:
    row = {"riddle": "What has hands?", "solution": "A clock."}
    form = detect([row], {}, ["chat"])
    assert form is not None
    given = parse_config(RUN, ("data.format=riddle", "data.fields.solution=answer")).data
    return {"form": str(form), "row": form.read(row), "fields": given.fields}


if __name__ == "__main__":
    schema, page = json.dumps(Config.model_json_schema()), render()
    print(
        json.dumps(
            {
                "method": method(),
                "objective": objective(),
                "stored": stored(Path(sys.argv[1])),
                "rows": rows(),
                "held": held(),
                "verbs": [name for name, _ in commands()],
                "listed": [
                    name
                    for name in ("spread", "loha", "diary", "gap", "riddle", "largest_every", "rows8")
                    if f'"{name}"' in schema and f"{name}`" in page
                ],
            }
        )
    )
