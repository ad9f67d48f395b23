"""Each import contract of pyproject.toml and layers.toml is broken in a copy of the graph of imports, wherever it says
something, and seen to fail.
"""

import re
import tomllib
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from grimp import ImportGraph, build_graph
from importlinter.application import output, rendering, use_cases
from importlinter.application.app_config import settings
from importlinter.configuration import configure
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.independence import IndependenceContract
from importlinter.contracts.layers import LayersContract
from importlinter.domain.contract import registry

ROOT = Path(__file__).parents[3]


FILES = {
    file: tomllib.loads((ROOT / file).read_text(encoding="utf-8"))["tool"]["importlinter"]
    for file in ("pyproject.toml", "layers.toml")
}
CONTRACTS: dict[str, dict[str, Any]] = {
    contract["name"]: {**contract, "file": file} for file in FILES for contract in FILES[file]["contracts"]
}
NEW = "newly_added"


@cache
def imports_for(file: str) -> ImportGraph:
    """The imports as the contracts of `file` count them."""
    options = {key: value for key, value in FILES[file].items() if key not in ("root_packages", "contracts")}
    return build_graph(*FILES[file]["root_packages"], cache_dir=None, **options)


class Copy:
    """The imports that the contracts of `file` are about, to which others can be added."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.graph = deepcopy(imports_for(file))

    def add(self, module: str, *imports: str, inside: str = NEW) -> None:
        """Let `module`, or the module `inside` it where it is a package, import these. `inside` may be new."""
        assert module in self.graph.modules or module.endswith(NEW)
        if inside != "__init__" and module in self.graph.modules and self.graph.find_children(module):
            module = f"{module}.{inside}"
        for name in imports:
            self.graph.add_import(importer=module, imported=name, line_number=1, line_contents=f"import {name}")

    def modules(self, pattern: str) -> list[str]:
        """The modules and packages that `pattern`, such as trainer.tuning.*, stands for."""
        package = pattern.removesuffix(".*")
        return sorted(name for name in self.graph.find_children(package) if "__" not in name)

    def lint(self, name: str, capsys: pytest.CaptureFixture[str]) -> str:
        """The linter's report on the contract."""
        configure()
        for kind in (ForbiddenContract, LayersContract, IndependenceContract):
            registry.register(kind, kind.type_name)
        settings.configure(GRAPH_BUILDER=self)
        options = use_cases.read_user_options(str(ROOT / self._file))
        options.contracts_options = [one for one in options.contracts_options if one["name"] == name]
        report = use_cases.create_report(options)
        assert report.contains_failures
        capsys.readouterr()
        output.console.width = 500
        rendering.render_report(report)
        return " ".join(capsys.readouterr().out.split())

    def build(self, **_: Any) -> ImportGraph:
        """The linter asks this in the place of what reads the files."""
        return self.graph


def break_forbidden(contract: dict[str, Any], copy: Copy) -> list[str]:
    inside = NEW if contract.get("as_packages", True) else "__init__"
    sources = [module.replace("*", NEW) for module in contract["source_modules"]]
    for module in sources:
        copy.add(module, *contract["forbidden_modules"], inside=inside)
    return [
        f"{module} is not allowed to import {other}"
        for module in sources
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
            copy.graph.add_module(f"{container}.{NEW}")
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
def test_a_broken_contract_is_seen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    contract = CONTRACTS[name]
    copy = Copy(contract["file"])
    expected = BREAK[contract["type"]](contract, copy)
    said = copy.lint(name, capsys)
    assert f"{name} BROKEN" in said
    assert expected
    assert [text for text in expected if text not in said] == []
