"""A training script of TRL as a tree of its command line's keys: its calls are read in the syntax tree, and never run.

Most people call `SFTConfig(...)`, `LoraConfig(...)` and `load_dataset(...)` with plain values. A value that is computed
is not known without running the script, and is left out with a sentence.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config.peers.table import read_peer
from trainer.errors import ConfigError

_TABLES = read_peer("trl").tables["script"]
# Those of other trainings, and classes of models that see, hear or translate.
_NOT_OURS = re.compile(
    r"\b(GRPO|RLOO|PPO|OnlineDPO|NashMD|XPO|GKD|MiniLLM|PRM|BCO)Config|\bSeq2SeqTrainingArguments|\bFastVisionModel|"
    r"\bAutoModelFor(Seq2SeqLM|ImageTextToText|Vision2Seq|MaskedLM|CTC|SpeechSeq2Seq|QuestionAnswering|MultipleChoice)"
)
_REFUSED = (
    "this is no training that can be carried over. docs/preference.md and docs/heads.md list those, and"
    " docs/rollouts.md says how answers are sampled and rewarded here. Nothing was written."
)
_REGRESSION = "a head of one number"


def read_script(text: str, path: str) -> tuple[dict[str, Any], list[str]]:
    """The keys that the script's calls make, and the names of those whose values are computed.

    Raises:
        ConfigError: it is no Python, calls no configuration class of TRL's or transformers', or one of another
            training.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no Python that can be read: {error}.") from error
    reader = _Reader(_constants(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: call.lineno):
        if found := _NOT_OURS.search(ast.unparse(call.func)):
            raise ConfigError(f"{path} calls {found[0]}: {_REFUSED}")
        reader.read(call)
    if reader.script is None:
        raise ConfigError(
            f"{path} calls none of {', '.join(_TABLES['trainings'])}, so it is no training script of TRL's."
        )
    script = reader.script or reader.head
    if script == _REGRESSION:
        raise ConfigError(f"{path} trains {script}: {_REFUSED}")
    # A value of a configuration's own class goes before one that a trainer or a model is given, wherever it stands.
    keys = {**reader.beside, **reader.keys, **reader.arguments}
    return ({**keys, "script": script} if script else keys), reader.computed


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
    """`arguments` are those of the training's own class, and `beside` what trainers and unsloth's models are given in
    their place.
    """

    def __init__(self, constants: Mapping[str, Any]) -> None:
        self._constants = constants
        self.keys: dict[str, Any] = {}
        self.arguments: dict[str, Any] = {}
        self.beside: dict[str, Any] = {}
        self.computed: list[str] = []
        self.script: str | None = None
        self.head: str | None = None

    def read(self, call: ast.Call) -> None:
        """Keep what a call of the script says. Only its name is known, as nothing of the script is run; where several
        calls give one setting the last one counts, as it would there."""
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if name in _TABLES["trainings"]:
            trainer = _TABLES["trainings"][name]
            self.script = self.script or trainer
            self.arguments |= {**({} if trainer else _TABLES["transformers"]), **self._given(call)}
        elif name == "LoraConfig":
            self._adapter(call, _TABLES["peft"])
        elif name == "get_peft_model" and of.startswith("Fast"):
            self._adapter(call, _TABLES["unsloth_lora"])
            self.beside |= self._given(call, {"random_state": "seed"})
        elif name == "BitsAndBytesConfig":
            self.keys |= {"bnb_4bit_quant_type": "fp4", **self._given(call, _TABLES["quantization"])}
        elif name == "load_dataset" and "dataset_name" not in self.keys:
            self._data(call)
        elif name == "map" and re.search(r"data|train|\bds\b", of):
            self.computed.append(f"data.train: its rows, by {of}.map,")
        elif name == "from_pretrained" and of.startswith("Fast"):
            self._unsloth(call)
        elif name == "from_pretrained" and "Model" in of:
            self._base(call.args, self._given(call, _TABLES["base"]))
            self._head(of, self._given(call, {name: name for name in ("num_labels", "problem_type")}))
        elif name.endswith("Trainer"):
            given = [word.value for word in call.keywords if word.arg == "model"] or call.args
            self._base(given, {})
            self.beside |= self._given(call, _TABLES["trainer"])
            made = [word for word in call.keywords if word.arg == "formatting_func"]
            self.computed += [f"data.train: its rows, by formatting_func {ast.unparse(word.value)}," for word in made]

    def _adapter(self, call: ast.Call, defaults: Mapping[str, Any]) -> None:
        self.keys |= {"use_peft": True, **defaults, **self._given(call, _TABLES["lora"])}
        others = {word.arg or "" for word in call.keywords} - {*_TABLES["lora"], *_TABLES["needless_of_lora"].split()}
        given = self._given(call, {name: f"LoraConfig.{name}" for name in others})
        self.keys |= {name: value for name, value in given.items() if value not in (None, False, "none", {}, [])}

    def _base(self, given: Sequence[ast.expr], settings: Mapping[str, Any]) -> None:
        place = self._value(given[0]) if given else None
        if isinstance(place, str):
            self.keys |= {"model_name_or_path": place, **settings}

    def _head(self, of: str, given: Mapping[str, Any]) -> None:
        """A head in the place of the language model's; that of a reward is said by its trainer's own class."""
        kind = _TABLES["heads"].get(of)
        if kind == "classification" and given.get("num_labels") == 1:
            kind = _REGRESSION
        elif kind == "classification" and given.get("problem_type") == "multi_label_classification":
            kind = "multilabel_classification"
        self.head = self.head or kind

    def _unsloth(self, call: ast.Call) -> None:
        names = {**_TABLES["quantization"], **_TABLES["base"], **_TABLES["unsloth_base"]}
        given = {**_TABLES["unsloth"], **self._given(call, names)}
        if given.get("load_in_8bit") or self._given(call, {"full_finetuning": "full"}).get("full"):
            given["load_in_4bit"] = False
        self._base(call.args, {})
        self.beside["max_length"] = given.pop("max_length")
        self.keys |= given

    def _data(self, call: ast.Call) -> None:
        """`load_dataset(path, name, split=..., data_files=...)`."""
        values = [self._value(argument) for argument in call.args] + [None, None]
        given = self._given(call, {name: name for name in ("path", "name", "split", "data_files")})
        source = {"path": given.pop("path", values[0]), "name": given.pop("name", values[1]), **given}
        if isinstance(source["path"], str):
            self.keys["datasets"] = [{key: value for key, value in source.items() if value is not None}]

    def _given(self, call: ast.Call, names: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The values of these arguments of a call by the names that they have as keys, or of all by their own."""
        found: dict[str, Any] = {}
        for word in call.keywords:
            key = word.arg if names is None else names.get(word.arg or "")
            if not key:
                continue
            value = self._value(word.value)
            if value is _COMPUTED:
                self.computed.append(f"{key}: {ast.unparse(word.value)}")
            else:
                found[key] = value
        return found

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
