"""Which weights of a merged model are quantized, and by which scale."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.export.format import find_format
from trainer.export.write.in_codes import _seconds
from trainer.export.write.recoded import choose
from trainer.store.safetensors_index import read_header
from trainer.store.store import open_store

RUN = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 1}\n"
LAYER = "model.layers.0"
LINEAR = [f"{LAYER}.self_attn.{leaf}_proj.weight" for leaf in "qkvo"] + [f"{LAYER}.mlp.down_proj.weight"]
EVERY: Any = SimpleNamespace(name="fp8", takes=lambda shape: True)


def chosen(tmp_path: Path, code: Any = EVERY, experts: int = 0, config: Any = None, **others: torch.dtype) -> Any:
    """The choice over five linear layers and a head in bf16, but for the types of `others`."""
    names = {name.split(".")[-2].removesuffix("_proj"): name for name in LINEAR} | {"head": "lm_head.weight"}
    tensors = {
        f"stored.{name}": torch.ones(4, 4, dtype=others.get(short, torch.bfloat16)) for short, name in names.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    store, key = open_store(str(tmp_path)), "model.safetensors"
    found = read_header(store, key, store.head(key).size)
    parameters = [
        SimpleNamespace(name=name, kind="head" if short == "head" else "linear", shape=(4, 4))
        for short, name in names.items()
    ]
    architecture = SimpleNamespace(parameters=parameters, weights=lambda *kinds: experts)
    base: Any = SimpleNamespace(
        description=SimpleNamespace(architecture=architecture),
        architecture=architecture,
        config=config or {},
        tensors=found,
    )
    weights: Any = SimpleNamespace(sources={name: found[f"stored.{name}"] for name in names.values()})
    return choose(base, code, weights)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ([], (128, True)),
        (["block_size=256"], (256, True)),
        (["double=false"], (128, False)),
        (["block_size=64", "double=true"], (64, True)),
    ],
    ids=str,
)
def test_an_export_in_4_bits_has_the_scales_of_the_run_where_its_options_do_not_say_otherwise(
    options: list[str], sizes: tuple[int, bool]
) -> None:
    config = parse_config(RUN, ["quant.block_size=128", "quant.double=true", "model.dtype=fp32"])
    encoder: Any = find_format("nf4", options)._encoder(config)  # type: ignore[attr-defined]
    assert (encoder.form.quant_type, encoder.form.block_size, encoder.form.double) == ("nf4", *sizes)
    assert encoder.dtype == torch.float32


def test_a_form_whose_scales_have_one_layout_takes_no_options_for_them() -> None:
    for option in ("block_size=64", "double=true"):
        with pytest.raises(ConfigError, match="unknown setting"):
            find_format("fp8", [option])


def test_layers_that_servers_compute_as_one_matrix_are_quantized_together_or_not_at_all(tmp_path: Path) -> None:
    everything = chosen(tmp_path)
    assert everything.stored == {name: f"stored.{name}" for name in LINEAR}
    assert everything.chosen == {f"stored.{name}": (4, 4) for name in LINEAR}
    assert everything.untouched == ["lm_head"]
    without_k = chosen(tmp_path, k=torch.float64)
    assert list(without_k.stored) == LINEAR[3:]
    assert without_k.untouched == [*(name.removesuffix(".weight") for name in LINEAR[:3]), "lm_head"]
    assert list(chosen(tmp_path, o=torch.float32, down=torch.float16).stored) == LINEAR


def test_what_nobody_could_load_is_refused(tmp_path: Path) -> None:
    nothing: Any = SimpleNamespace(name="fp8", takes=lambda shape: False)
    with pytest.raises(ConfigError, match="--format fp8: no linear layer of this base can be stored in this form"):
        chosen(tmp_path, nothing)
    with pytest.raises(ConfigError, match="transformers cannot load the experts of this base in this form"):
        chosen(tmp_path, experts=9)
    with pytest.raises(ConfigError, match="transformers cannot load a model that also sees or hears in this form"):
        chosen(tmp_path, config={"text_config": {}})


def test_the_layers_of_a_module_share_the_second_scale_that_their_largest_weight_gives(tmp_path: Path) -> None:
    largest = {"self_attn.q_proj": -8.0, "self_attn.k_proj": 2.0, "mlp.up_proj": 4.0}
    tensors = {f"{LAYER}.{name}.weight": torch.tensor([[1.0, value]] * 3) for name, value in largest.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    store, key = open_store(str(tmp_path)), "model.safetensors"
    weights: Any = SimpleNamespace(sources=read_header(store, key, store.head(key).size))
    recoding: Any = SimpleNamespace(stored={name: name for name in tensors})
    found = {
        name.removeprefix(f"{LAYER}.").removesuffix(".weight"): of for name, of in _seconds(weights, recoding).items()
    }
    # A scale in FP8 is at most 448, and a code at most 6.
    assert found == {
        "self_attn.q_proj": pytest.approx(448 * 6 / 8),
        "self_attn.k_proj": pytest.approx(448 * 6 / 8),
        "mlp.up_proj": pytest.approx(448 * 6 / 4),
    }
