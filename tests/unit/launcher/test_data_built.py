"""What `capstan data build` compiles where, and says of what is compiled."""

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launcher.data.data import _histogram, build
from tests.material import Workshop
from trainer.config import override
from trainer.data.dataset.manifest import read_manifest
from trainer.errors import ConfigError


def shown(table: Any) -> list[str]:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return [" ".join(line.replace("│", " ").split()) for line in out.getvalue().splitlines()]


def test_each_figure_of_compiled_data_has_its_own_line(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, "speck")
    config = workshop.config("one", "data.on_too_long=drop", "data.sequence_length=24", "data.held_out=2")

    secret = override(config, "cluster.ray.runtime_env={env_vars: {HF_TOKEN: hf_abcdefghijklmnopqrstuvwxyzABCDEF}}")
    with pytest.raises(ConfigError, match="looks like a secret"):
        build(secret, dry_run=True, log=print)

    def built() -> Any:
        return build(config, dry_run=True, log=print)

    assert {split: found["compiled"] for split, found in built().to_json().items()} == {"train": False, "eval": False}
    assert any(line.startswith("state to be compiled to be compiled") for line in shown(built().table()))
    key = workshop.prepare(config).train
    manifest, found = read_manifest(workshop.store, key), built()
    told = found.to_json()["train"]
    assert (told["fingerprint"], told["compiled"]) == (key, True)
    assert manifest.counters.dropped > 0 == manifest.counters.truncated
    assert (told["dropped"], told["truncated"], told["split"]) == (manifest.counters.dropped, 0, 0)
    assert (told["documents"], told["tokens"], told["targets"]) == (
        manifest.documents,
        manifest.tokens,
        manifest.targets,
    )
    lines = shown(found.table())
    assert any(line.startswith(f"dropped {manifest.counters.dropped:,}") for line in lines)
    assert any(line.startswith("state compiled compiled") for line in lines)


@pytest.mark.parametrize(
    ("address", "mapped", "said"),
    [(None, False, ""), ("head:6379", True, ""), ("http://head:8265", False, "takes jobs, and no driver")],
)
def test_data_is_compiled_on_a_cluster_that_takes_drivers_and_else_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, mapped: bool, said: str
) -> None:
    workshop, asked, logged = Workshop(tmp_path, "speck"), list[Any](), list[str]()
    monkeypatch.setattr("launcher.data.data.address_of", lambda config: address)
    monkeypatch.setattr("launcher.data.data.prepare", lambda *given: asked.append(given[-1]))
    build(workshop.config("one"), dry_run=False, log=logged.append)
    assert [mapper is not None for mapper in asked] == [mapped]
    assert said in "".join(logged)
    assert bool(logged) == bool(said)


def test_lengths_are_shown_from_the_shortest_on() -> None:
    found: Any = SimpleNamespace(histogram={1024: 1, 64: 3, 256: 30})
    lines = [line for line in shown(_histogram("training", found)) if "up to" in line]
    assert [line.split("█")[0].strip() for line in lines] == ["up to 64 3", "up to 256 30", "up to 1,024 1"]
    assert [line.count("█") for line in lines] == [3, 30, 1]
