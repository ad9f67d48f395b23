"""Each import contract of pyproject.toml and layers.toml is broken in a copy of the code, wherever it says something,
and seen to fail.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FILES = ("pyproject.toml", "layers.toml")
CONTRACTS: dict[str, dict[str, Any]] = {
    contract["name"]: contract
    for file in FILES
    for contract in tomllib.loads((ROOT / file).read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
}
NEW = "newly_added"


class Copy:
    """The packages that the contracts are about, to which imports can be added."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for package in ("trainer", "launcher"):
            shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file in FILES:
            shutil.copy(ROOT / file, root)

    def add(self, module: str, *imports: str, inside: str = NEW) -> None:
        """Let `module`, or the module `inside` it where it is a package, import these. `inside` may be new."""
        path = self.root / module.replace(".", "/")
        file = path / f"{inside}.py" if path.is_dir() else path.with_suffix(".py")
        with file.open("a", encoding="utf-8") as text:
            text.writelines(f"\nimport {name}\n" for name in imports)

    def modules(self, pattern: str) -> list[str]:
        """The modules and packages that `pattern`, such as trainer.tuning.*, stands for."""
        found = self.root.glob(pattern.replace(".", "/"))
        return sorted(f"{pattern.rpartition('.')[0]}.{path.stem}" for path in found if not path.stem.startswith("__"))

    def lint(self) -> str:
        """The linter's report on the contracts that are broken."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "COLUMNS": "500"}
        command = [str(Path(sys.executable).with_name("lint-imports")), *FILES, "--no-cache"]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 1, done.stdout + done.stderr
        return " ".join(done.stdout.split())


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def break_forbidden(contract: dict[str, Any], copy: Copy) -> list[str]:
    inside = NEW if contract.get("as_packages", True) else "__init__"
    for module in contract["source_modules"]:
        copy.add(module, *contract["forbidden_modules"], inside=inside)
    return [
        f"{module} is not allowed to import {other}"
        for module in contract["source_modules"]
        for other in contract["forbidden_modules"]
        if f"{module} -> {other}" not in contract.get("ignore_imports", ())
    ]


def break_layers(contract: dict[str, Any], copy: Copy) -> list[str]:
    expected = []
    for container in contract["containers"]:
        layers = [re.split(r"\s*[:|]\s*", layer) for layer in contract["layers"]]
        for above, below in pairwise(layers):
            copy.add(f"{container}.{below[0]}", f"{container}.{above[0]}")
            expected.append(f"{container}.{below[0]} is not allowed to import {container}.{above[0]}")
        if contract.get("exhaustive"):
            (copy.root / container.replace(".", "/") / f"{NEW}.py").touch()
            expected.append(f"{container}.{NEW}")
    return expected


def break_independence(contract: dict[str, Any], copy: Copy) -> list[str]:
    excepted = {rule.partition(" -> ")[2] for rule in contract.get("ignore_imports", ())}
    expected = []
    for pattern in contract["modules"]:
        other = next(module for module in copy.modules(pattern) if module not in excepted)
        copy.add(pattern.rpartition(".")[0], other)
        expected.append(f"{pattern.replace('*', NEW)} is not allowed to import {other}")
    return expected


BREAK = {"forbidden": break_forbidden, "layers": break_layers, "independence": break_independence}


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_broken_contract_is_seen(name: str, copy: Copy) -> None:
    contract = CONTRACTS[name]
    expected = BREAK[contract["type"]](contract, copy)
    said = copy.lint()
    assert f"{name} BROKEN" in said
    assert expected
    assert [text for text in expected if text not in said] == []
