"""A base that cannot be trained is refused before any rank starts, with the setting, the numbers and the way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.material import KINDS, SIZES, Workshop
from trainer.base.architecture import mismatches
from trainer.base.locate import resolve_base, tokenizer_size
from trainer.base.parameters import check_base, check_no_other
from trainer.config import override, parse_config
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(workshop: Workshop, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(workshop.base, tmp_path / "base"))


def check(workshop: Workshop, base: Path | str, *overrides: str) -> None:
    config = workshop.config("check", f"model.base={base}", *overrides)
    check_base(resolve_base(config.model), config)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sound_base_passes(workshop: Workshop, base: Path) -> None:
    check(workshop, base)
    assert tokenizer_size(base, str(base)) == 259


def test_rows_longer_than_the_positions_are_refused(workshop: Workshop, base: Path) -> None:
    check(workshop, base, "data.sequence_length=256")
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 257 exceeds the base's 256 positions"):
        check(workshop, base, "data.sequence_length=257")


def test_gpt_oss_is_refused_packed_rows() -> None:
    config = parse_config(
        "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}\n", ["data.sequence_length=64"]
    )
    (sentence,) = mismatches(config, {**SIZES, **KINDS["gpt-oss"]})
    assert "data.packing" in sentence
    assert not mismatches(override(config, "data.packing=false"), {**SIZES, **KINDS["gpt-oss"]})


def test_more_layers_than_the_base_has_are_refused(workshop: Workshop, base: Path) -> None:
    check(workshop, base, "model.layers=2")
    with pytest.raises(ConfigError, match=r"model\.layers: 3 exceeds the base's 2 layers"):
        check(workshop, base, "model.layers=3")


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(workshop: Workshop, base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 259, "content": "<more>"})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="has 260 tokens, the embedding 259 rows.*resize_token_embeddings"):
        check(workshop, base)


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        for path in list(base.glob(pattern)):
            path.unlink()

    return damage


def drop_embedding(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    embedding = names["model.embed_tokens.weight"]
    edit(index, weight_map={name: file for name, file in names.items() if file != embedding})


def no_json(base: Path) -> None:
    (base / "config.json").write_text("{")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "has no config.json. Give a Hugging Face model directory"),
    "config is no JSON": (no_json, "config.json is not JSON"),
    "other architecture": (
        lambda base: edit(base / "config.json", model_type="mamba"),
        "is a 'mamba' model. Supported are gemma2, .*llama, mistral",
    ),
    "quantized already": (
        lambda base: edit(base / "config.json", quantization_config={"quant_method": "gptq"}),
        "is quantized already, and not to 4 bits by bitsandbytes. Give the 16-bit model",
    ),
    "no safetensors": (remove("*.safetensors"), r"holds no \*.safetensors file. Convert the model"),
    "one file missing": (remove("model-00002-*"), "names model-00002-.*, which is not there"),
    "no embedding": (drop_embedding, r"has no tensor model\.embed_tokens\.weight"),
    "no tokenizer": (remove("tokenizer.json"), "has neither tokenizer.json nor tokenizer.model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_base_that_lacks_something_is_refused_by_name(workshop: Workshop, base: Path, damage: str) -> None:
    do, reason = DAMAGES[damage]
    do(base)
    with pytest.raises(ConfigError, match=reason) as error:
        check(workshop, base)
    assert error.value.exit_code == 2
    assert str(base) in str(error.value)


def test_a_tensor_that_the_architecture_has_not_is_refused_by_name(workshop: Workshop, base: Path) -> None:
    found = resolve_base(workshop.config("extra", f"model.base={base}").model)
    names = [name for name in found.tensors if not name.endswith("q_proj.weight")]
    check_no_other(found, found.tensors, ignored=[], layers=None)
    with pytest.raises(
        ConfigError, match=r"has the tensor model\.layers\.0\.self_attn\.q_proj\.weight.*\(2 such"
    ) as error:
        check_no_other(found, names, ignored=[], layers=None)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "one", "a/b/c"])
def test_a_missing_directory_is_refused_without_asking_the_hub(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigError, match=f"the directory '{name}' does not exist"):
        check(workshop, name)


def test_a_hub_id_that_the_hub_does_not_give_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_arguments: object, **_options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"'some/model' is no directory here.*\(no route to host\).*HF_TOKEN"):
        check(workshop, "some/model")


def test_the_fingerprint_changes_with_the_architecture_and_the_tensors(workshop: Workshop, base: Path) -> None:
    def fingerprint() -> str:
        return resolve_base(workshop.config("f", f"model.base={base}").model).fingerprint

    before = fingerprint()
    assert before == resolve_base(workshop.config("f").model).fingerprint
    edit(base / "config.json", rms_norm_eps=1e-3)
    assert fingerprint() != before
