"""An adapter for llama.cpp has its rows where the converter puts those of the base."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig

from tests.families import SIZES
from trainer.errors import ConfigError
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX

gguf = pytest.importorskip("gguf")
pytest.importorskip("conversion")


@pytest.mark.parametrize(("stabilized", "alpha"), [(False, 16), (True, 32)])
def test_an_adapter_changes_each_matrix_where_llama_cpp_has_it_and_as_much(
    stabilized: bool, alpha: int, tmp_path: Path
) -> None:
    """llama.cpp divides by the rank, 4; PEFT divides by its root, 2, if the adapter is rank-stabilized."""
    from trainer.export.gguf.lora import write_gguf_lora

    sizes = {**SIZES, "model_type": "llama"}
    AutoConfig.for_model(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    heads, size = sizes["num_attention_heads"], sizes["hidden_size"]
    draw = torch.Generator().manual_seed(0)
    given = {
        f"{PREFIX}model.layers.1.self_attn.{name}.lora_{part}.weight": torch.randn(*shape, generator=draw)
        for name in ("q_proj", "v_proj")
        for part, shape in (("A", (4, size)), ("B", (size if name == "q_proj" else size // 2, 4)))
    }
    files = {
        PEFT_SETTINGS: json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": stabilized}).encode(),
        PEFT_WEIGHTS: save(given),
    }
    (tmp_path / "scratch").mkdir()
    write_gguf_lora(files, tmp_path, tmp_path / "scratch", tmp_path / "adapter.gguf")

    read = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert read.get_field("adapter.lora.alpha").contents() == alpha
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in read.tensors}
    query, value = (f"{PREFIX}model.layers.1.self_attn.{name}.lora_B.weight" for name in ("q_proj", "v_proj"))
    # Rotary positions turn neighbours there, and the halves of a head in transformers.
    neighbours = given[query].view(heads, 2, -1, 4).transpose(1, 2).reshape(size, 4)
    assert torch.equal(found["blk.1.attn_q.weight.lora_b"], neighbours)
    assert not torch.equal(neighbours, given[query])
    assert torch.equal(found["blk.1.attn_v.weight.lora_b"], given[value])
    assert torch.equal(found["blk.1.attn_q.weight.lora_a"], given[query.replace("_B", "_A")])


@pytest.mark.parametrize(
    "moved",
    [lambda matrix: matrix.flip(1), lambda matrix: matrix.T, lambda matrix: matrix[:, :2]],
    ids=["columns", "transposed", "cut"],
)
def test_a_matrix_whose_rows_alone_do_not_move_has_no_adapter(moved: Callable[[Tensor], Tensor]) -> None:
    from trainer.export.gguf.lora import _parts

    def converter(change: Callable[[Tensor], Tensor]) -> Any:
        return SimpleNamespace(
            filter_tensors=lambda given: given,
            modify_tensors=lambda values, name, layer: [(f"{name} of {layer}", change(values))],
        )

    for name, layer in (("layers.1.q", 1), ("layers.12.q.8", 12), ("head", None)):
        (part,) = _parts(converter(lambda matrix: matrix.flip(0)), name, 3, 3)
        assert (part.name, part.rows.tolist()) == (f"{name} of {layer}", [2, 1, 0])
    for error in (ValueError("no"), RuntimeError("no"), KeyError("no")):
        failing: Any = converter(lambda matrix, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ConfigError, match="llama.cpp's converter cannot place layers.1.q: '?no"):
            list(_parts(failing, "layers.1.q", 3, 3))
    lacking: Any = SimpleNamespace(filter_tensors=lambda given: None)
    with pytest.raises(ConfigError, match="llama.cpp's model of this base has no layers.1.q"):
        list(_parts(lacking, "layers.1.q", 3, 3))
    with pytest.raises(ConfigError, match="has layers.1.q in another layout, which no adapter can follow"):
        list(_parts(converter(moved), "layers.1.q", 3, 3))
