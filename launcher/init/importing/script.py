"""A training script of TRL as a tree of its command line's keys: its calls are read in the syntax tree, and never run.

Most people call `SFTConfig(...)`, `LoraConfig(...)` and `load_dataset(...)` with plain values. A value that is computed is not known
without running the script, and is left out with a sentence.
"""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError

# The configuration class of each trainer, by the beginning of its script's name.
_TRAINERS = {
    **{f"{name.upper()}Config": name for name in ("sft", "dpo", "kto", "orpo", "cpo")},
    "RewardConfig": "reward",
}
_ARGUMENTS = {**_TRAINERS, "TrainingArguments": ""}
_LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "layers_to_transform": "lora_layers_to_transform",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
_QUANTIZATION = {
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
}
_BASE = {
    "attn_implementation": "attn_implementation",
    "dtype": "dtype",
    "torch_dtype": "torch_dtype",
    "revision": "model_revision",
}


def read_script(text: str, path: str) -> tuple[dict[str, Any], list[str]]:
    """The keys that the script's calls make, and the names of those whose values are computed.

    Raises:
        ConfigError: it is no Python, or calls no configuration class of TRL's or transformers'.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no Python that can be read: {error}.") from error
    reader = _Reader(_constants(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        reader.read(call)
    if reader.script is None:
        raise ConfigError(f"{path} calls none of {', '.join(_ARGUMENTS)}, so it is no training script of TRL's.")
    keys = {**reader.keys, "script": reader.script} if reader.script else reader.keys
    return keys, reader.computed


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names that are given a plain value once, anywhere."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                continue
    return found


class _Reader:
    def __init__(self, constants: Mapping[str, Any]) -> None:
        self._constants = constants
        self.keys: dict[str, Any] = {}
        self.computed: list[str] = []
        self.script: str | None = None

    def read(self, call: ast.Call) -> None:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in _ARGUMENTS:
            self.script = _ARGUMENTS[name] or self.script or ""
            self.keys |= dict(self._given(call))
        elif name == "LoraConfig":
            self.keys |= {"use_peft": True, **dict(self._given(call, _LORA))}
        elif name == "BitsAndBytesConfig":
            self.keys |= dict(self._given(call, _QUANTIZATION))
        elif name == "load_dataset" and "dataset_name" not in self.keys:
            self._data(call)
        elif name == "from_pretrained" and "Model" in ast.unparse(call.func):
            self._base(call, dict(self._given(call, _BASE)))
        elif name.endswith("Trainer"):
            self._base(ast.Call(call.func, [word.value for word in call.keywords if word.arg == "model"], []), {})

    def _base(self, call: ast.Call, settings: Mapping[str, Any]) -> None:
        place = self._value(call.args[0]) if call.args else None
        if isinstance(place, str):
            self.keys |= {"model_name_or_path": place, **settings}

    def _data(self, call: ast.Call) -> None:
        """`load_dataset(path, name, split=..., data_files=...)`."""
        values = [self._value(argument) for argument in call.args] + [None, None]
        given = dict(self._given(call, {name: name for name in ("path", "name", "split", "data_files")}))
        source = {"path": given.pop("path", values[0]), "name": given.pop("name", values[1]), **given}
        if isinstance(source["path"], str):
            self.keys["datasets"] = [{key: value for key, value in source.items() if value is not None}]

    def _given(self, call: ast.Call, names: Mapping[str, str] | None = None) -> Iterator[tuple[str, Any]]:
        for word in call.keywords:
            key = word.arg if names is None else names.get(word.arg or "")
            if not key:
                continue
            value = self._value(word.value)
            if value is _COMPUTED:
                self.computed.append(f"{key}: {ast.unparse(word.value)}")
            else:
                yield key, value

    def _value(self, node: ast.expr) -> Any:
        """The value of a plain expression, or of a name that has one; of `torch.bfloat16` its last part."""
        if isinstance(node, ast.Name):
            return self._constants.get(node.id, _COMPUTED)
        if isinstance(node, ast.Attribute):
            return node.attr if ast.unparse(node.value) == "torch" else _COMPUTED
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            return _COMPUTED


_COMPUTED = object()
