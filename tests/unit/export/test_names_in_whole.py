"""Names of an adapter's parts in the class of a whole model, whose tower has layers of the same names."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from trainer.config import Model
from trainer.export.write import adapter
from trainer.model.towers import SEEING
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS


def tree(*paths: str) -> Any:
    """A module with linear layers at these paths."""
    made = nn.Module()
    for path in paths:
        at = made
        *parents, leaf = path.split(".")
        for name in parents:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(leaf, nn.Linear(2, 2))
    return made


LANGUAGE = [f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "gate")] + ["model.out"]
IN_WHOLE = [path.replace("model.", "model.language_model.") for path in LANGUAGE]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Any:
    def renamed(_whole: Any, _language: Any) -> Any:
        return lambda name: name.replace("model.", "model.language_model.", 1)

    monkeypatch.setattr(adapter, "whole_names", renamed)
    return adapter._Names(tree(*IN_WHOLE, "model.vision.layers.0.q_proj"), tree(*LANGUAGE))


def found_by(pattern: Any) -> list[str]:
    """What PEFT finds by a value of `target_modules`."""
    every = [*IN_WHOLE, "model.vision.layers.0.q_proj"]
    if isinstance(pattern, str):
        return [path for path in every if re.fullmatch(pattern, path)]
    return [path for path in every if path.endswith(tuple(f".{end}" for end in pattern)) or path in pattern]


@pytest.mark.parametrize("ends", [["gate"], ["q_proj"], ["q_proj", "gate"]])
def test_the_same_layers_are_found_and_none_of_the_tower(names: Any, ends: Sequence[str]) -> None:
    expected = [path for path in IN_WHOLE if path.endswith(tuple(ends))]
    assert found_by(names.pattern(ends)) == expected
    if ends == ["gate"]:
        assert names.pattern(ends) == ends, "the ends alone tell them apart"


def test_ends_that_the_tower_has_too_become_whole_paths(names: Any) -> None:
    assert names.ends(["gate"]) == ["gate"]
    assert names.ends(["out"]) == ["out"]
    assert names.ends(["q_proj"]) == [path for path in IN_WHOLE if path.endswith("q_proj")]
    assert names.ends([f"{SEEING}.model.vision.merger"]) == ["model.vision.merger"]
    both = names.ends(["gate", f"{SEEING}.model.vision.merger"])
    assert both == ["gate", "model.vision.merger"]
    assert names.ends(["q_proj", f"{SEEING}.model.a"]) == ["model.a", *names.ends(["q_proj"])]


def test_a_weight_has_its_name_in_the_whole_class_unless_it_is_beside_the_language_model(names: Any) -> None:
    prefix = "base_model.model."
    assert names.of_weight(f"{prefix}model.out.lora_A.weight") == f"{prefix}model.language_model.out.lora_A.weight"
    assert names.of_weight("prompt_embeddings") == "prompt_embeddings"
    beside = f"{prefix}{SEEING}.model.vision.q.lora_A.weight"
    assert names.of_weight(beside) == beside


def test_every_setting_of_an_adapter_names_what_it_named_in_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, beside = "model.vision.layers.0.q_proj", f"{SEEING}.model.vision.merger"
    inner = tree(*LANGUAGE, "model.embed")
    whole = tree(*IN_WHOLE, "model.language_model.embed", "model.vision.embed", tower)
    given = {"base_files": None, "composite_model": whole, "model_config": None, "meta_model": inner}
    for name, value in given.items():
        monkeypatch.setattr(adapter, name, lambda *_, value=value: value)
    monkeypatch.setattr(
        adapter, "whole_names", lambda *_: lambda name: name.replace("model.", "model.language_model.", 1)
    )
    prefix = "base_model.model."
    names = ["model.out.lora_A.weight", f"{SEEING}.{tower}.lora_A.weight", f"{beside}.weight"]
    described = {
        "target_modules": ["gate"],
        "modules_to_save": ["out", beside],
        "target_parameters": None,
        "trainable_token_indices": {"embed": [5]},
    }
    settings = json.dumps(described).encode()
    files = {
        PEFT_WEIGHTS: save({f"{prefix}{name}": torch.ones(1) for name in names}),
        PEFT_SETTINGS: settings,
        "other": b"x",
    }
    found = adapter.for_whole_class(files, Model(base="b"))
    assert found["other"] == b"x"
    assert {name.removeprefix(prefix) for name in load(found[PEFT_WEIGHTS])} == {
        "model.language_model.out.lora_A.weight",
        f"{tower}.lora_A.weight",
        "model.vision.merger.weight",
    }
    assert json.loads(found[PEFT_SETTINGS]) == {
        "target_modules": ["gate", tower],
        "modules_to_save": ["out", "model.vision.merger"],
        "target_parameters": None,
        "trainable_token_indices": {"model.language_model.embed": [5]},
    }
    files[PEFT_SETTINGS] = json.dumps({**described, "target_modules": ["q_proj"]}).encode()
    pattern = json.loads(adapter.for_whole_class(files, Model(base="b"))[PEFT_SETTINGS])["target_modules"]
    assert found_by(pattern) == [path for path in IN_WHOLE if path.endswith("q_proj")] + [tower]
    assert adapter.for_whole_class({"own.safetensors": b"x"}, Model(base="b")) == {"own.safetensors": b"x"}
