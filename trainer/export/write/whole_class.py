"""An adapter's files for the class that people load, if the base is a model that also sees or hears.

Only its language model is trained, and that has other names by itself than inside the whole model. PEFT and vLLM load
the whole class, which config.json names: an adapter under the other names would change nothing there, and PEFT would
only warn.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from safetensors.torch import load, save
from transformers import PreTrainedModel

from trainer.base.describe.composite import composite_model, whole_names
from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_settings import model_config
from trainer.base.find.locate import base_files
from trainer.config import Model
from trainer.tuning.shared.linear_adapters import PREFIX, SETTINGS, WEIGHTS

# These settings of PEFT's name modules by the ends of their paths. PEFT takes a regular expression in place of the
# first two.
_BY_PATTERN, _BY_END = ("target_modules", "feedforward_modules"), ("modules_to_save", "target_parameters")


def for_whole_class(files: Mapping[str, bytes], model: Model) -> Mapping[str, bytes]:
    """Return the files of an adapter, name -> content, under the names of the whole class of the base `model`.

    They stay as they are if the class is a language model alone. Files of methods that PEFT does not know have names of
    their own.
    """
    whole = composite_model(base_files(model)) if SETTINGS in files else None
    if whole is None:
        return files
    names = _Names(whole, meta_model(model_config(base_files(model), model.layers)))
    weights = {names.of_weight(name): weight for name, weight in load(files[WEIGHTS]).items()}
    described: dict[str, Any] = json.loads(files[SETTINGS])
    for setting in _BY_PATTERN:
        if described.get(setting):
            described[setting] = names.pattern(described[setting])
    for setting in _BY_END:
        if described.get(setting):
            described[setting] = names.ends(described[setting])
    if isinstance(rows := described.get("trainable_token_indices"), dict):
        described["trainable_token_indices"] = {names.ends([end])[0]: found for end, found in rows.items()}
    return {
        **files,
        WEIGHTS: save(weights, metadata={"format": "pt"}),
        SETTINGS: json.dumps(described, indent=2, sort_keys=True).encode(),
    }


class _Names:
    """Names in the language model, and the names of the same parts in the whole model."""

    def __init__(self, whole: PreTrainedModel, language: PreTrainedModel) -> None:
        self._in_whole: Callable[[str], str] = whole_names(whole, language)
        self._language = _paths(language)
        self._whole = _paths(whole)

    def of_weight(self, name: str) -> str:
        """Return the name of a weight. Virtual tokens have no path: PEFT keeps them by themselves."""
        return f"{PREFIX}{self._in_whole(name.removeprefix(PREFIX))}" if name.startswith(PREFIX) else name

    def pattern(self, ends: Collection[str]) -> Collection[str] | str:
        """Return a value of PEFT's setting that finds the same layers in the whole model and none in its towers.

        It is `ends` itself, or a regular expression.
        """
        if self._find_the_same(ends):
            return ends
        paths = [
            self._in_whole(path)
            for path in self._language
            if path.endswith(tuple(f".{end}" for end in ends)) or path in ends
        ]
        shapes = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(path)) for path in paths}
        expression = "|".join(sorted(shapes))
        found = {path for path in map(self._in_whole, self._language) if re.fullmatch(expression, path)}
        return expression if found == set(paths) else sorted(paths)

    def ends(self, ends: Collection[str]) -> list[str]:
        """Return the same ends, or else whole paths."""
        if self._find_the_same(ends):
            return list(ends)
        return sorted(self._in_whole(path) for path in self._language if path.endswith(tuple(ends)))

    def _find_the_same(self, ends: Collection[str]) -> bool:
        ours = {self._in_whole(path) for path in self._language if path.endswith(tuple(ends))}
        # The whole model has all layers, while the language model may be cut to its first ones.
        parts = {re.sub(r"\.\d+\.", ".*.", path) for path in ours}
        found = {path for path in self._whole if path.endswith(tuple(ends))}
        return ours <= found and {re.sub(r"\.\d+\.", ".*.", path) for path in found} == parts


def _paths(model: PreTrainedModel) -> set[str]:
    """Return the paths of all modules, and of parameters, because PEFT names experts by these."""
    return {path for path, _ in model.named_modules() if path} | {path for path, _ in model.named_parameters()}
