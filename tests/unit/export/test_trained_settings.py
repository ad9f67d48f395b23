"""A manifest whose seal is right and whose settings are not those of its weights is damage: nothing is exported of
it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.material import Workshop, commit
from trainer.config import override
from trainer.errors import ConfigError, Damaged, StorageError
from trainer.export.destination import ExportProgress, Written
from trainer.export.format import find_format
from trainer.export.trained import check_overrides, trained_config
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.run import layout
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run with adapters of rank 8 on every linear layer."""
    workshop = Workshop(tmp_path_factory.mktemp("run"), "ragged")
    commit(workshop.store.sub("done"), workshop.config("done"))
    return workshop.store.sub("done")


def part(section: str, /, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body[section].update(values)


def without(section: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda body: body[section].pop(key)


def reversed_shapes(body: dict[str, Any]) -> None:
    body["shapes"] = {name: shape[::-1] for name, shape in body["shapes"].items()}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "nothing of the base": (lambda body: body.update(base={}), "has base.path: None"),
    "no fingerprint": (without("base", "fingerprint"), "has base.fingerprint: None"),
    "a name that is a number": (part("base", name=5), "has base.name: 5"),
    "a path that is a list": (part("base", path=[1]), r"has base.path: \[1\]"),
    "a revision that is a number": (part("base", revision=5), "has base.revision: 5"),
    "a method that is a list": (part("adapter", method=[]), r"has method: \[\]"),
    "no rank": (
        without("adapter", "rank"),
        r"shape \[8, \d+\], but its settings of tuning \(.*rank: 16.*\) give \[16, ",
    ),
    "another rank": (part("adapter", rank=4), r"of shape \[8, \d+\], but its settings"),
    "other targets": (part("adapter", targets=["q_proj"]), r"of shape \[8, \d+\], but its settings .* give None"),
    "targets that are not there": (part("adapter", targets=["z"]), "give None"),
    "transposed": (reversed_shapes, r"give \[8, \d+\]"),
    "a year that no calendar has": (lambda body: body.update(created=1e300), "created: Input should be less than"),
    "a time before 1970": (lambda body: body.update(created=-1e18), "created: Input should be greater than"),
}


def export_nf4(run: Store, destination: Store) -> Written:
    return find_format("nf4").write(run, destination, None, ExportProgress(lambda done, total: None, print))


@pytest.mark.parametrize("export", [export_adapter, export_merged, export_nf4])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_sealed_manifest_with_wrong_settings_is_damaged(run: Store, tmp_path: Path, wrong: str, export: Any) -> None:
    change, sentence = WRONG[wrong]
    content = run.get(layout.manifest(4))
    tree = json.loads(content)
    change(tree["body"])
    canonical = json.dumps(tree["body"], sort_keys=True, separators=(",", ":"))
    tree["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    run.put(layout.manifest(4), json.dumps(tree).encode())
    try:
        with pytest.raises(StorageError, match=sentence) as caught:
            export(run, open_store(str(tmp_path / "out")))
    finally:
        run.put(layout.manifest(4), content)
    assert isinstance(caught.value, Damaged) or "is damaged" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_same_manifest_as_it_was_written_is_exported(run: Store, tmp_path: Path) -> None:
    assert export_adapter(run, open_store(str(tmp_path / "out"))).step == 4


def test_settings_of_the_checkpoint_itself_cannot_be_overridden(run: Store) -> None:
    manifest = read_manifest(run, 4)
    trained = trained_config(run, manifest)
    free = (
        "model.attention=eager",
        "quant.cache=true",
        "data.sequence_length=32",
        f"tuning.alpha={trained.tuning.alpha}",
    )
    check_overrides(trained, override(trained, *free), manifest)
    for given in ("tuning.alpha=64", "quant.block_size=128", "model.dtype=fp32"):
        setting, _, value = given.partition("=")
        with pytest.raises(
            ConfigError, match=f"^{setting}: '?{value}(.0)?'? would be another model than the checkpoint of step 4"
        ):
            check_overrides(trained, override(trained, given), manifest)
