"""A manifest whose seal is right and whose settings are not those of its weights is damage: nothing is exported of
it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.material import Workshop, commit
from trainer.base.find.locate import describe_base
from trainer.config import Quant, Tuning, dump_config, override
from trainer.errors import ConfigError, Damaged, StorageError
from trainer.export import trained
from trainer.export.destination import ExportProgress, Written
from trainer.export.format import find_format
from trainer.export.trained import (
    check_base_at_hand,
    check_mergeable_run,
    check_overrides,
    check_written_as_stored,
    refuse_towers,
    resolve_trained_base,
    trained_config,
    trained_directory,
    with_trained_template,
)
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.run import layout
from trainer.run.folder import run_config
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
    "nothing of the base": (lambda body: body.update(base={}), "has base.path: null"),
    "no fingerprint": (without("base", "fingerprint"), "has base.fingerprint: null"),
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
    ours = trained_config(run, manifest)
    free = (
        "model.attention=eager",
        "quant.cache=true",
        "data.sequence_length=32",
        f"tuning.alpha={ours.tuning.alpha}",
    )
    check_overrides(ours, override(ours, *free), manifest)
    for given in ("tuning.alpha=64", "quant.block_size=128", "model.dtype=fp32"):
        setting, _, value = given.partition("=")
        with pytest.raises(
            ConfigError, match=f"^{setting}: '?{value}(.0)?'? would be another model than the checkpoint of step 4"
        ):
            check_overrides(ours, override(ours, given), manifest)


def test_what_the_checkpoint_was_trained_with_counts_and_not_what_the_settings_say_by_now(run: Store) -> None:
    manifest, given = read_manifest(run, 4), run_config(run)
    base = {
        **manifest.base,
        "name": "me/b",
        "revision": "main",
        "commit": "c" * 40,
        "dtype": "fp32",
        "layers": 1,
        "add_tokens": ["<a>"],
        "special_tokens": {"pad": "<b>"},
        "quant.type": "nf4",
        "quant.block_size": 256,
        "quant.double": False,
        "quant.cache": True,
    }
    tuned = {**manifest.adapter, "dropout": 0.5}
    classes = {"name": "classification", "labels": ["no", "yes"]}
    then = trained_config(run, replace(manifest, base=base, adapter=tuned, objective=classes))
    assert (then.model.base, then.model.revision) == ("me/b", "c" * 40)
    assert (then.model.dtype, then.model.layers) == ("fp32", 1)
    assert (then.model.add_tokens, then.model.special_tokens.pad) == (["<a>"], "<b>")
    assert (then.quant.block_size, then.quant.double, then.quant.cache) == (256, False, given.quant.cache)
    assert (then.tuning.dropout, then.data.labels) == (0.5, ["no", "yes"])
    now = dump_config(override(given, "tuning.dropout=0.25", "quant.block_size=1024", "model.add_tokens=[<now>]"))
    content = run.get(layout.CONFIG)
    run.put(layout.CONFIG, now.encode())
    try:
        assert trained_config(run, manifest).tuning.dropout == given.tuning.dropout
        assert trained_config(run, manifest).quant.block_size == given.quant.block_size
        assert trained_config(run, manifest).model.add_tokens == []
        assert trained_config(run, replace(manifest, adapter={})).tuning.dropout == 0.25  # of before it was recorded
    finally:
        run.put(layout.CONFIG, content)


def test_the_template_is_that_of_the_training_whatever_the_settings_name_by_now(run: Store, tmp_path: Path) -> None:
    manifest, given = read_manifest(run, 4), run_config(run).data
    assert manifest.text is not None
    assert with_trained_template(run, given, manifest) is given
    for other in ("{{ messages }}", str(tmp_path / "gone.jinja")):
        changed = given.model_copy(update={"template": other})
        assert with_trained_template(run, changed, manifest).template is None
        text = b"{{ messages[0] }}"
        of_it = replace(manifest, text=replace(manifest.text, template=hashlib.sha256(text).hexdigest()))
        with pytest.raises(
            ConfigError, match=r"^data.template: .* is not the template that the checkpoint of step 4 was"
        ):
            with_trained_template(run, changed, of_it)
        run.put(layout.kept_text(hashlib.sha256(text).hexdigest()), text)
        found = with_trained_template(run, changed, of_it).template
        assert trained_config(run, of_it).data.template == found
        assert Path(found or "").read_bytes() == text
        run.delete(layout.kept_text(hashlib.sha256(text).hexdigest()))
    ours = trained_config(run, manifest)
    asked = ours.model_copy(update={"data": ours.data.model_copy(update={"template": "{{ messages }}"})})
    with pytest.raises(ConfigError, match=r"data.template: .* would be other texts than the checkpoint of step 4 was"):
        check_overrides(ours, asked, manifest)


def test_the_base_is_that_of_the_training_wherever_it_lies_now(run: Store) -> None:
    manifest, given = read_manifest(run, 4), run_config(run)
    assert resolve_trained_base(run, given.model, manifest).fingerprint == manifest.base["fingerprint"]
    moved = replace(manifest, base={**manifest.base, "name": "/gone", "path": "/gone"})
    assert trained_config(run, moved).model.base == given.model.base
    for other in (moved, manifest):
        wrong = replace(other, base={**other.base, "fingerprint": "0" * 20})
        with pytest.raises(ConfigError, match="is not the model that the checkpoint of step 4 was trained on"):
            resolve_trained_base(run, trained_config(run, wrong).model, wrong)


def test_a_base_whose_weights_were_replaced_is_another_although_its_facts_are_the_same(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, given = read_manifest(run, 4), run_config(run)
    check_base_at_hand(given.model, manifest)
    weights = {file: "0" * 8 for file in manifest.base["weights"]}
    other = replace(manifest, base={**manifest.base, "weights": weights})
    with pytest.raises(ConfigError, match=r"\.safetensors is another\. Put that one back"):
        resolve_trained_base(run, given.model, other)
    with pytest.raises(ConfigError, match=r"\.safetensors is another\. Put that one back"):
        check_base_at_hand(given.model, other)
    cache = Path("/cache/models--me--b/snapshots", "c" * 40)
    monkeypatch.setattr(trained, "base_files", lambda model: cache)
    on_hub = given.model.model_copy(update={"base": "me/b"})
    of_commit = replace(manifest, base={**manifest.base, "commit": "d" * 40})
    with pytest.raises(ConfigError, match=f"me/b is at commit {'c' * 40} of the Hub, and the checkpoint of step 4"):
        check_base_at_hand(on_hub, of_commit)
    check_base_at_hand(on_hub, replace(manifest, base={**manifest.base, "commit": "c" * 40}))
    base = trained.resolve_base(given.model)
    monkeypatch.setattr(trained, "resolve_base", lambda model: base)
    bucket = given.model.model_copy(update={"base": "s3://models/b"})
    check_base_at_hand(bucket, manifest)
    with pytest.raises(ConfigError, match=r"\.safetensors is another\. Put that one back"):
        check_base_at_hand(bucket, other)


def test_files_of_llama_cpp_have_no_place_for_what_the_part_that_sees_has_learnt(run: Store) -> None:
    config = run_config(run)
    refuse_towers(config, "gguf", "merged")
    for towers in ("lora", "projector"):
        seeing = config.model_copy(update={"tuning": config.tuning.model_copy(update={"towers": towers})})
        with pytest.raises(ConfigError, match=rf"--format gguf: .*\(tuning.towers: {towers}\)\. Take --format merged"):
            refuse_towers(seeing, "gguf", "merged")


def test_what_was_trained_through_codes_is_rounded_as_it_was_trained(run: Store) -> None:
    config = override(run_config(run), "quant.type=stored", "tuning.through=stored")
    base: Any = SimpleNamespace(stored=SimpleNamespace(unmergeable=None, decoded=True))
    check_written_as_stored(config, base, "dither")
    for other in ("nearest", "gptq"):
        with pytest.raises(
            ConfigError, match=f"rounding: {other} gives other codes than those that the run was trained"
        ):
            check_written_as_stored(config, base, other)
    plain: Any = SimpleNamespace(stored=SimpleNamespace(unmergeable=None, decoded=False))
    with pytest.raises(ConfigError, match="as: stored keeps the codes of a base in 4 or 8 bits"):
        check_written_as_stored(config, plain, "dither")


def test_the_tokenizer_is_that_of_the_training_or_the_export_is_refused(run: Store) -> None:
    manifest, given = read_manifest(run, 4), run_config(run)
    assert manifest.text is not None
    base = resolve_trained_base(run, given.model, manifest)
    assert trained_directory(run, base.directory, manifest) == base.directory
    other = replace(manifest, text=replace(manifest.text, tokenizer={"tokenizer.json": "0" * 64}))
    with pytest.raises(
        ConfigError, match="^model.base: the tokenizer in .* is not the one that the checkpoint of step 4"
    ):
        trained_directory(run, base.directory, other)
    with pytest.raises(ConfigError, match="tokenizer") as found:
        trained_directory(run, base.directory, replace(other, base={**other.base, "add_tokens": ["<a>"]}))
    assert "own copy" not in str(found.value)  # its rows are counted by the tokenizer beside the base


def test_a_part_of_a_base_that_was_tuned_is_no_model(run: Store) -> None:
    tuned: dict[str, Any] = {"tuning": Tuning(method="full"), "quant": Quant(type="none")}
    config = run_config(run).model_copy(update=tuned)
    base = describe_base(config.model)
    check_mergeable_run(config, base)
    part = config.model_copy(update={"model": config.model.model_copy(update={"layers": 1})})
    with pytest.raises(ConfigError, match="^model.layers: the run has the first 1 layers of its base only"):
        check_mergeable_run(part, base)
    # An adapter has a part of the model to stand beside, and files into which nothing can be merged.
    adapter = part.model_copy(update={"tuning": Tuning()})
    with pytest.raises(ConfigError, match=r"the first 1 layers of its base only \(model.layers\).* Take --format peft"):
        check_mergeable_run(adapter, base)
    packed: Any = SimpleNamespace(stored=SimpleNamespace(unmergeable="in INT2"))
    with pytest.raises(ConfigError, match="there is no merged model: .* is in INT2. Take --format peft"):
        check_mergeable_run(config.model_copy(update={"tuning": Tuning()}), packed)
    check_mergeable_run(config, packed)
