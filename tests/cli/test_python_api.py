"""The snippets of docs/python-api.md, one after the other, as a program that a user has written: a rank of its own,
without Ray.
"""

import json
import re
from pathlib import Path

import yaml

from tests.cli.test_resume import alone
from tests.forked import run_program
from tests.material import SEQUENCE, Workshop
from tests.pages import ROOT, blocks_of
from trainer.run import layout

PAGE = ROOT / "docs/python-api.md"
TOLD = """
import json
print("TOLD", json.dumps({
    "state": status.state, "loss": status.loss, "losses": losses, "step": manifest.step,
    "shapes": {name: list(weight.shape) for name, weight in weights.items()},
    "adapted": sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name),
}))
"""


def documented_fields() -> dict[str, set[str]]:
    """The fields of each kind of record, by the table of docs/tracking.md."""
    rows = (ROOT / "docs/tracking.md").read_text(encoding="utf-8").partition("| record | field |")[2].splitlines()
    fields: dict[str, set[str]] = {}
    kinds: list[str] = []
    for _, kind, names, *_ in (row.split("|") for row in rows if row.startswith("| ")):
        kinds = re.findall(r"`(\w+)`", kind) or kinds
        for name in kinds:
            fields.setdefault(name, set()).update(re.findall(r"`(\w+)`", names))
    return fields


def test_the_snippets_train_read_and_export_a_run(workshop: Workshop, tmp_path: Path) -> None:
    tree = workshop.config("mine", "run.store=runs").model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "my-run.yaml").write_text(yaml.safe_dump(tree))
    snippets = [block.text for block in blocks_of(PAGE) if block.language == "python"]
    (tmp_path / "program.py").write_text("\n".join([*snippets, TOLD]))
    done = run_program(tmp_path / "program.py", tmp_path, alone(), timeout=300)
    assert done.returncode == 0, done.stderr
    (told,) = (json.loads(line.removeprefix("TOLD ")) for line in done.stdout.splitlines() if line.startswith("TOLD "))
    assert (told["state"], told["step"]) == ("finished", 4)
    assert list(told["losses"]) == ["1", "2", "3", "4"]
    assert told["losses"]["4"] == told["loss"]
    learnt = sum(rows * columns for rows, columns in told["shapes"].values())
    assert told["adapted"] == learnt > SEQUENCE
    documented, undocumented = documented_fields(), set[tuple[str, str]]()
    for line in (tmp_path / "runs/from-python" / layout.metrics(1)).read_text().splitlines():
        record = json.loads(line)
        kind = record.pop("kind")
        undocumented |= {(kind, field) for field in record.keys() - {"time", "clock"} - documented.get(kind, set())}
    assert undocumented == set()
    assert len(documented["step"]) > 10
