"""`capstan export` as a user calls it, on a run that was really trained: what comes out is what was trained, or
nothing.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Capstan
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop, commit, make_base
from trainer.config import dump_config, parse_config
from trainer.export.figures import Proof
from trainer.run import layout
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A finished run of one rank, committed after steps 1 and 6; rank 5, alpha 20."""
    # bitsandbytes' fused CPU kernel, which plain transformers uses where it can, wants widths that divide by 32.
    workshop = Workshop(tmp_path_factory.mktemp("trained"), intermediate_size=192)
    settings = ("train.steps=6", "tuning.rank=5", "tuning.alpha=20", "optim.lr=0.01", "quant.block_size=128")
    config = workshop.config("done", *settings)
    run = workshop.store.sub("done")
    run.put(layout.CONFIG, dump_config(config).encode())
    (outcome,) = launch(1, runs.run, dump_config(config), workshop.prepare(config).train, timeout=200)
    assert outcome["outcome"] == "finished"
    return run


@pytest.fixture
def run(trained: Store, tmp_path: Path) -> Iterator[Store]:
    """The same run, for a test to change; its data and its base stay where they are."""
    settings = trained.get(layout.CONFIG)
    shutil.copytree(trained.uri.removeprefix("file://"), tmp_path / "before")
    yield trained
    shutil.rmtree(trained.uri.removeprefix("file://"))
    shutil.copytree(tmp_path / "before", trained.uri.removeprefix("file://"))
    assert trained.get(layout.CONFIG) == settings


def configure(run: Store, *overrides: str) -> None:
    """Change config.yaml, as a user does by hand, and as a resume once did that was refused too late."""
    changed = parse_config(run.get(layout.CONFIG).decode(), overrides)
    run.put(layout.CONFIG, dump_config(changed).encode())


def exported(capstan: Capstan, run: Store, folder: Path, *options: str) -> dict[str, object]:
    done = capstan("export", run.uri, folder, "--json", *options, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same_but_for_the_proof(proven: Path, unproven: Path) -> None:
    """Two exports of one checkpoint. The card says of one that it was compared with the trained model."""
    assert {file.name for file in proven.iterdir()} == {file.name for file in unproven.iterdir()}
    for file in unproven.iterdir():
        one, other = (folder.joinpath(file.name).read_bytes() for folder in (proven, unproven))
        if file.name == "README.md":
            (one, found), (other, expected) = (text.split(b"## Proof\n", 1) for text in (one, other))
            assert found != expected
        assert one == other, file.name


@pytest.mark.long
@pytest.mark.parametrize(
    "change",
    [
        ("tuning.alpha=320",),
        ("tuning.rank=32",),
        ("tuning.method=rslora", "tuning.targets=[q_proj]"),
        ("quant.type=none", "model.dtype=fp32", "model.layers=1"),
    ],
    ids=str,
)
def test_an_adapter_is_what_was_trained_whatever_config_yaml_says_now(
    capstan: Capstan, run: Store, tmp_path: Path, change: tuple[str, ...]
) -> None:
    expected = tmp_path / "expected"
    exported(capstan, run, expected)
    configure(run, *change)
    exported(capstan, run, tmp_path / "adapter", "--verify")
    assert_same_but_for_the_proof(tmp_path / "adapter", expected)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (5, 20, False)


@pytest.mark.long
def test_an_adapter_names_the_base_it_was_trained_on(capstan: Capstan, run: Store, tmp_path: Path) -> None:
    configure(run, f"model.base={make_base(tmp_path / 'other', 'qwen2')}")
    exported(capstan, run, tmp_path / "adapter", "--verify")
    base = read_manifest(run, 6).base["path"]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert f"| base | {Path(base).name} |" in (tmp_path / "adapter/README.md").read_text()


@pytest.mark.long
def test_a_merge_is_of_what_was_trained_whatever_config_yaml_says_now(
    capstan: Capstan, run: Store, tmp_path: Path
) -> None:
    """And proven also where memory is so short that the model in transformers is there a decoder layer at a time."""
    exported(capstan, run, tmp_path / "expected", "--format", "merged")
    configure(run, "tuning.alpha=320", "model.layers=1", f"model.base={make_base(tmp_path / 'other', 'qwen2')}")
    assert exported(capstan, run, tmp_path / "planned", "--format", "merged", "--dry-run")["step"] == 6
    little = "import trainer.export.proof.models; trainer.export.proof.models.host_memory_left = lambda: 1000"
    done = capstan("export", run.uri, tmp_path / "merged", "--format", "merged", "--verify", timeout=300, before=little)
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stderr.split()).count("the exported side computes on the CPU, a layer at a time, as ") == 2
    assert_same_but_for_the_proof(tmp_path / "merged", tmp_path / "expected")


@pytest.mark.long
def test_a_base_that_moved_is_found_by_config_yaml_and_known_by_its_fingerprint(
    capstan: Capstan, run: Store, tmp_path: Path
) -> None:
    base = Path(read_manifest(run, 6).base["path"])
    moved, other = tmp_path / "moved", make_base(tmp_path / "other", "qwen2")
    base.rename(moved)
    try:
        configure(run, f"model.base={other}")
        refused = capstan("export", run.uri, tmp_path / "adapter")
        configure(run, f"model.base={moved}")
        exported(capstan, run, tmp_path / "adapter")
    finally:
        moved.rename(base)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert f"{other} is not the model that the checkpoint of step 6 was trained on" in refused.stderr
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(moved)


@pytest.mark.long
def test_a_manifest_of_before_names_its_base_and_the_rest_is_in_config_yaml(
    capstan: Capstan, run: Store, tmp_path: Path
) -> None:
    """Format 2 of the first release knew the base's path, layers and quantization, but no `name`, `revision` or
    `dtype`.
    """
    manifest = read_manifest(run, 6)
    known = {key: value for key, value in manifest.base.items() if key not in ("name", "revision", "dtype")}
    exported(capstan, run, tmp_path / "expected")
    run.put(layout.manifest(6), replace(manifest, base=known).to_json())
    configure(run, f"model.base={make_base(tmp_path / 'other', 'qwen2')}", "tuning.rank=32")
    exported(capstan, run, tmp_path / "adapter")
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes(), file.name


# A fault between the checkpoint and the files, as code.
FAULTS = {
    "alpha off by a tenth": """
        change_settings = lambda settings: settings | {"lora_alpha": 1.1 * settings["lora_alpha"]}
    """,
    "one matrix of one layer zeroed": """
        name = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
        change = lambda weights: weights | {name: torch.zeros_like(weights[name])}
    """,
    "two layers swapped": """
        swapped = {"layers.0.self_attn.q_proj": "layers.1.self_attn.q_proj"}
        swapped |= {value: key for key, value in swapped.items()}
        def other(name):
            return next((name.replace(old, new) for old, new in swapped.items() if old in name), name)
        change = lambda weights: {name: weights[other(name)] for name in weights}
    """,
}
_HARNESS = """
import sys
if sys.argv[0] == "trainer.export":
    import json
    import torch
    import safetensors.torch
    from trainer.store.store import Store
    change = change_settings = lambda given: given
    save, create = safetensors.torch.save, Store.create
    safetensors.torch.save = lambda weights, metadata: save(change(weights), metadata)
    Store.create = lambda store, key, data: create(store, key, json.dumps(change_settings(json.loads(data))).encode())
"""


# One of them is enough to see that a fault is found.
@pytest.mark.parametrize(
    "fault", [name if not at else pytest.param(name, marks=pytest.mark.long) for at, name in enumerate(FAULTS)]
)
def test_an_adapter_that_is_not_what_was_trained_is_refused(
    capstan: Capstan, trained: Store, tmp_path: Path, fault: str
) -> None:
    harness = _HARNESS + textwrap.indent(textwrap.dedent(FAULTS[fault]), "    ")
    done = capstan("export", trained.uri, tmp_path / "adapter", "--verify", timeout=300, before=harness)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("It is not what was trained; do not use it."), done.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def test_a_right_adapter_is_proven_and_the_figures_are_told(capstan: Capstan, trained: Store, tmp_path: Path) -> None:
    done = capstan("export", trained.uri, tmp_path / "adapter", "--verify", "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    proof = Proof(**json.loads(done.stdout)["proof"])
    assert proof.holds
    card = (tmp_path / "adapter/README.md").read_text()
    assert "It was compared with the trained model: its predictions in transformers (and PEFT) against" in card
    assert (proof.computed_in, proof.rows) == ("fp32", "8 rows of the training data")
    assert 100 * proof.kl_allowed < 0.01 * proof.kl_effect, "an alpha that is off by a tenth would not be seen"
    said = " ".join(done.stderr.split())
    for side in ("trained", "exported"):
        assert f"--verify: the {side} side computes on the CPU; it takes 0.0 GiB of " in said


@pytest.mark.long
def test_a_run_whose_base_was_tuned_is_written_as_the_whole_model_with_merge_or_without(
    capstan: Capstan, tmp_path: Path
) -> None:
    workshop = Workshop(tmp_path)
    run = workshop.store.sub("full")
    method = ("tuning.method=full", "tuning.rank=16", "tuning.alpha=32", "quant.type=none")
    commit(run, workshop.config("full", *method))
    assert exported(capstan, run, tmp_path / "planned", "--dry-run")["tuned_base"] is True
    found = exported(capstan, run, tmp_path / "model")
    assert (found["merged"], found["tuned_base"], found["step"]) == (True, True, 4)
    done = capstan("export", run.uri, tmp_path / "merged", "--format", "merged", timeout=300)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "the whole model (its base was tuned, so an export and a merge are the same) of step 4 in" in text
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes(), file.name
