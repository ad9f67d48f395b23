"""A merged export is an ordinary model: PEFT's own merge, in the base's own files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.smoke.local_s3 import S3Server
from tests.dist import memory, proofs
from tests.dist.launch import launch
from tests.material import Workshop, commit, make_base, quantize_base
from tests.stored import read_index
from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT
from trainer.errors import ConfigError
from trainer.export.figures import Proof
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.store.safetensors_index import INDEX_FILE
from trainer.store.store import PART_BYTES, Store, open_store


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Store:
    return committed(workshop, "done")


def committed(workshop: Workshop, name: str, *overrides: str) -> Store:
    run = workshop.store.sub(name)
    commit(run, workshop.config(name, *overrides))
    return run


def merged_by_peft(run: Store, base: Path, folder: Path) -> Any:
    """In fp32, of the adapter as it is exported."""
    export_adapter(run, open_store(str(folder)))
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60)[None]).logits


@pytest.mark.parametrize(
    ("kind", "dtype", "shard_size", "overrides"),
    [
        ("llama", torch.bfloat16, "40KB", ()),
        ("llama", torch.float16, "1GB", ("tuning.method=rslora",)),
        ("llama-tied", torch.float32, "40KB", ("tuning.alpha=7.3",)),
        ("qwen2", torch.bfloat16, "40KB", ("quant.type=none", "model.dtype=fp32")),
        ("phi3", torch.bfloat16, "1GB", ()),
        ("mixtral", torch.bfloat16, "40KB", ()),
        ("gpt-oss", torch.bfloat16, "40KB", ()),
    ],
)
def test_it_is_what_peft_merges_bit_by_bit_in_the_bases_own_layout(
    workshop: Workshop, tmp_path: Path, kind: str, dtype: torch.dtype, shard_size: str, overrides: tuple[str, ...]
) -> None:
    base = make_base(tmp_path / "base", kind, dtype, shard_size)
    run = committed(workshop, f"{kind}-{dtype}", f"model.base={base}", *overrides)
    export_merged(run, open_store(str(tmp_path / "merged")))

    expected = merged_by_peft(run, base, tmp_path / "adapter").to(dtype).state_dict()
    eager: Any = {"experts_implementation": "eager"}  # grouped products want widths that divide by 8
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", **eager)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **eager)
    assert model.dtype == dtype
    assert expected.keys() == model.state_dict().keys() == plain.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(value, plain.state_dict()[name]) == (not name.endswith("_proj.weight")), name
    plain.load_state_dict(expected)
    assert torch.equal(logits(model), logits(plain))

    before, after = (read_index(open_store(str(folder))) for folder in (base, tmp_path / "merged"))
    assert {name: (t.key, t.dtype, t.shape, t.offset) for name, t in before.items()} == {
        name: (t.key, t.dtype, t.shape, t.offset) for name, t in after.items()
    }
    assert (tmp_path / "merged" / INDEX_FILE).exists() == (len(list(base.glob("*.safetensors"))) > 1)


def test_a_matrix_of_several_pieces_is_merged_row_by_row(workshop: Workshop, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 448, "intermediate_size": 6001, "num_hidden_layers": 1}
    base = make_base(tmp_path / "base", "llama", torch.float32, "30MB", **sizes)
    run = committed(workshop, "large", f"model.base={base}")
    progress: list[tuple[int, int]] = []
    export_merged(run, open_store(str(tmp_path / "merged")), report=lambda done, total: progress.append((done, total)))

    expected = merged_by_peft(run, base, tmp_path / "adapter").state_dict()
    found = {
        name: value for file in (tmp_path / "merged").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=1e-6
        )  # products of fewer rows may add in another order
    assert progress == sorted(progress)
    assert set(progress[-1]) == {sum(path.stat().st_size for path in base.glob("*.safetensors"))}
    assert len(progress) > 3 * 6001 * 448 * 4 / 2**22


def test_it_has_what_serving_needs_and_the_runs_facts(workshop: Workshop, run: Store, tmp_path: Path) -> None:
    assert export_merged(run, open_store(str(tmp_path / "merged"))).step == 4
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (workshop.base / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 259
    card = (tmp_path / "merged/README.md").read_text()
    assert "library_name: transformers" in card
    assert "trained over the base in nf4" in card
    assert "| step | 4 |" in card


def test_from_a_bucket_to_a_bucket_are_the_files_of_a_folder(
    workshop: Workshop, run: Store, tmp_path: Path, s3: S3Server
) -> None:
    base = open_store(f"{s3.uri('merges')}/base")
    for path in workshop.base.iterdir():
        base.put(path.name, path.read_bytes())
    far = committed(workshop, "far", f"model.base={base.uri}")
    folder, bucket = open_store(str(tmp_path / "merged")), open_store(f"{s3.uri('merges')}/merged")
    export_merged(run, folder)
    export_merged(far, bucket)
    names = [entry.key for entry in folder.list()]
    assert [entry.key for entry in bucket.list()] == names
    assert [bucket.get(name) for name in names if name != "README.md"] == [
        folder.get(name) for name in names if name != "README.md"
    ]


def test_a_destination_that_holds_something_else_is_refused(run: Store, tmp_path: Path) -> None:
    for name in ("whole", "mine", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine/README.md").write_text("My own weights.")
    (tmp_path / "mine/model.safetensors").write_text("keep me")
    export_adapter(run, open_store(str(tmp_path / "adapter")))
    export_merged(run, open_store(str(tmp_path / "whole")))
    for name in ("whole", "mine", "adapter"):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ConfigError, match="is not empty. Name a new folder"):
            export_merged(run, open_store(str(tmp_path / name)))
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


def test_what_cannot_be_merged_is_refused_before_anything_is_written(workshop: Workshop, tmp_path: Path) -> None:
    def refusal(run: Store) -> str:
        with pytest.raises(ConfigError) as error:
            export_merged(run, open_store(str(tmp_path / "merged")))
        return str(error.value)

    cut = committed(workshop, "cut", "model.layers=1")
    assert "the first 1 layers of its base only (model.layers)" in refusal(cut)
    packed = quantize_base(workshop.base, tmp_path / "4bit", bnb_4bit_quant_type="nf4")
    assert "is stored in 4 bits, where no merged weight fits" in refusal(
        committed(workshop, "packed", f"model.base={packed}")
    )
    base = Path(shutil.copytree(workshop.base, tmp_path / "base"))
    other = committed(workshop, "other", f"model.base={base}")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    assert "is not the model that the checkpoint of step 4 was trained on" in refusal(other)
    shutil.rmtree(base)
    assert "does not exist" in refusal(other)
    with pytest.raises(ConfigError, match="no committed checkpoint of step 3. Its steps are: 4"):
        export_merged(workshop.store.sub("done"), open_store(str(tmp_path / "merged")), step=3)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("cheat", ["", "lora_A", "config.json"])
def test_the_proof_holds_for_what_was_merged_and_for_nothing_else(tmp_path: Path, cheat: str) -> None:
    # bitsandbytes' fused CPU kernel, which plain transformers uses where it can, wants widths that divide by 32.
    workshop = Workshop(tmp_path, intermediate_size=192)
    run, other = committed(workshop, "done", "tuning.rank=5", "quant.type=none"), workshop.store.sub("other")
    merged = tmp_path / "merged"
    if cheat == "lora_A":  # of another step
        commit(other, workshop.config("other", "tuning.rank=5"), step=5)
    export_merged(other if cheat == "lora_A" else run, open_store(str(merged)))
    if cheat == "config.json":
        settings = json.loads((merged / "config.json").read_text())
        (merged / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    (proof,) = launch(1, proofs.merge_proof, run.uri, 4, str(merged))
    assert Proof(**proof).holds == (not cheat)
    assert proof["kl_allowed"] < 1e-4 * proof["kl_effect"]
    assert proof["rows"].endswith("as the run's compiled data is gone")
    # Nothing was quantized: the trained model differs by the rounding of the sums alone.
    assert cheat or proof["trained_kl"] < 1e-2 * proof["kl_effect"]


@pytest.mark.long
def test_the_peak_of_a_merge_is_a_few_pieces_and_parts(workshop: Workshop, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 70_000,
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
    }
    base = make_base(tmp_path / "base", shard_size="1GB", **sizes)
    run = committed(workshop, "heavy", f"model.base={base}")
    (grown,) = launch(1, memory.merge_memory, run.uri, str(tmp_path / "merged"))
    # Parts on their way out, and pieces: as read and, twice that size, in fp32.
    allowed = 6 * PART_BYTES + (PIECES_IN_FLIGHT + 1) * 3 * PIECE_BYTES
    assert grown <= allowed < 0.8 * (tmp_path / "merged/model.safetensors").stat().st_size
