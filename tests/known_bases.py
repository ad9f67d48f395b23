"""Adds a base to those that the package knows without the Hub: `python -m tests.known_bases BILLIONS[/ACTIVE]
CONFIG.JSON ID ...`.

BILLIONS are the parameters that its makers state, ACTIVE those that compute for one token, which
tests/unit/base/test_known_bases.py compares with the plan's. What says nothing of sizes is left out of the config.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from trainer.base.find.locate import FILE

# Parts of a config.json that decide neither sizes, nor kinds of layers, nor how the weights are stored.
_LEFT_OUT = (
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "dtype",
    "initializer_range",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def of_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of a parsed config.json that a plan is made of; a tower for sound is only named, as none of it is
    trained.
    """
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT and not key.endswith("_token_id")}
    for key, part in kept.items():
        if key in ("text_config", "vision_config"):
            kept[key] = of_sizes(part)
        elif key == "audio_config":
            kept[key] = {name: part[name] for name in ("model_type",) if name in part}
    return dict(sorted(kept.items()))


def add(billions: float, active: float | None, config: dict[str, Any], ids: list[str]) -> None:
    """Write one line of the file, in the order of the ids; these ids leave the lines that they had."""
    entries = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    for entry in entries:
        entry["ids"] = [base for base in entry["ids"] if base not in ids]
    stated = {"billions": billions, **({"active": active} if active else {})}
    entries.append({"ids": sorted(ids), **stated, "config": of_sizes(config)})
    lines = (json.dumps(entry, separators=(",", ":")) for entry in entries if entry["ids"])
    FILE.write_text("".join(f"{line}\n" for line in sorted(lines)))


if __name__ == "__main__":
    total, _, each = sys.argv[1].partition("/")
    add(float(total), float(each) if each else None, json.loads(Path(sys.argv[2]).read_bytes()), sys.argv[3:])
