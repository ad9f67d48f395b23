"""Reads a training script of TRL as a tree of its command line's keys.

It reads the syntax tree and never runs the script.

Most people call `SFTConfig(...)`, `LoraConfig(...)` and `load_dataset(...)` with plain values. A computed value is not
known without running the script, so it is left out with a sentence.
"""

import ast
import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.init.importing.command_line import computed
from launcher.init.importing.mapped_rows import NotRead, Rows
from launcher.init.importing.mixed_rows import mixture
from launcher.init.importing.names import Names, keywords
from launcher.init.importing.trained_rows import Trained, trained_rows
from trainer.config.peers.table import read_peer
from trainer.errors import NOT_JSON, ConfigError

_TABLES, _MIXTURES = (read_peer("trl").tables[name] for name in ("script", "mixtures"))
# These belong to other kinds of training, or are classes of models that see, hear or translate.
_NOT_OURS = re.compile(
    r"\b(GRPO|RLOO|PPO|OnlineDPO|NashMD|XPO|GKD|MiniLLM|PRM|BCO)(Config|Trainer)|\bSeq2SeqTrain(ingArguments|er)|"
    r"\bFastVisionModel|\bFastSentenceTransformer|\bUnslothVisionDataCollator|"
    r"\b(Auto)?ModelFor(?!CausalLM\b|SequenceClassification\b|TokenClassification\b)\w+|\bAutoModel\.|"
    r"\b\w+ForConditionalGeneration\b|\b\w+\.from_config$|\b\w+(ForCausalLM|LMHeadModel)$"
)
_A_BASE = re.compile(r"Model|For(CausalLM|SequenceClassification|TokenClassification)$")
_REFUSED = (
    "this is no training that can be carried over. docs/preference.md and docs/heads.md list those, and"
    " docs/rollouts.md says how answers are sampled and rewarded here. Nothing was written."
)
_OTHER_CELL = re.compile(r"\s*%%(?!capture|time)")
_SHELL_LINE = re.compile(r"^([ \t]*)(?:!(?!=)|%%?(?=[A-Za-z]))(?:\\\n|.)*", re.MULTILINE)
_MEDIA = ("audio", "image", "images", "video", "videos")
_OF_ROWS = ("map", "get_chat_template")
"""Calls that count only before the trainer. Later ones try the model out."""
_REGRESSION = "a head of one number"
_PATIENCE = "early_stopping_patience"
_WHOLE = ("embed_tokens", "lm_head")
_PARTS = (*_WHOLE, "layers", "h", "score", "classifier")
_FILES_OF = {"from_json": "json", "from_csv": "csv", "from_parquet": "parquet"}
"""The methods of `Dataset` that read files, by the reader that `load_dataset` has for them."""


def notebook_code(text: str, path: str) -> str:
    """Return the code cells of a notebook as one script, without the lines and cells that are for the shell.

    Raises:
        ConfigError: it is no notebook.
    """
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (*NOT_JSON, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no notebook that can be read: it has no list of cells.") from error
    python = [source for source in sources if not _OTHER_CELL.match(source)]
    return "\n".join(_SHELL_LINE.sub(r"\1pass", source) for source in python)


def read_script(text: str, path: str) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Return the keys that the script's calls make, and sentences on those whose values are computed.

    The third value has the parts of a source that the rows of each data set become. It is empty if no function is
    mapped over them, or one that is not followed.

    Raises:
        ConfigError: it is no Python, calls no configuration class of TRL's or transformers', or one of another
            training.
    """
    try:
        tree = ast.parse(text)
        reader, calls = _Reader(tree), _calls(tree)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no Python that can be read: {error}.") from error
    for call in calls:
        if found := _NOT_OURS.search(ast.unparse(call.func)):
            raise ConfigError(f"{path} calls {found[0]}: {_REFUSED}")
    every = calls
    assigned = _assigned(tree)
    made = [call for call in calls if _name(call).endswith("Trainer") and (call.args or call.keywords)]
    trainers = {ast.unparse(call): call for call in reversed(made)}  # unsloth's PatchDPOTrainer() is none
    trainer, *later = sorted(trainers.values(), key=lambda call: call.lineno) or [None]
    end = trainer.lineno if trainer is not None else None
    if trainer is not None and later:  # the first training is read, and what is configured for it
        last = trainer.end_lineno or trainer.lineno
        calls = [call for call in calls if call.lineno <= last]
        reader.again = f"The script trains {len(trainers)} times. This is the first one, of line {trainer.lineno}."
    if media := _media(tree, end):
        raise ConfigError(f"{path} makes rows of {media}, so of images, video or sound: {_REFUSED}")
    mixed = reader.mixed(_given(calls, "train_dataset"))
    if mixed:
        calls = [call for call in calls if not _loads_rows(call) and _name(call) != "map"]
    loaded = [call for call in calls if _loads_rows(call) and (end is None or call.lineno < end)]
    for argument, chosen in (("model", _loads_a_base), ("train_dataset", _loads_rows)):
        kept = _trained_on([call for call in calls if chosen(call)], assigned, _given_names(calls, argument), end)
        calls = [call for call in calls if call is kept or not chosen(call)]
    for call in calls:
        if end is None or call.lineno < end or _name(call) not in _OF_ROWS:
            reader.read(call)
    kept = next((call for call in calls if _loads_rows(call)), None)
    others = [call for call in loaded if kept and ast.unparse(call) != ast.unparse(kept)]
    if kept and others and not assigned.get(kept, set()) & _given_names(calls, "train_dataset"):
        reader.computed.append(f"data.train: what becomes of {ast.unparse(others[0])}")
    if reader.script is None:
        raise ConfigError(
            f"{path} calls none of {', '.join(_TABLES['trainings'])}, so it is no training script of TRL's."
        )
    if found := _trains_otherwise(tree, every):
        raise ConfigError(f"{path} {found}: {_REFUSED}")
    script = reader.script or reader.trainer or reader.head
    if script == _REGRESSION:
        raise ConfigError(f"{path} trains {script}: {_REFUSED}")
    if mixed or kept is not None:
        reader.choose(trainer, kept)
    # A value of a configuration's own class overrides one that a trainer or a model is given, wherever it stands.
    keys = {**reader.beside, **reader.keys, **reader.arguments}
    rows = mixed if mixed else [found] if (found := reader.source(keys)) is not None else []
    open_values = list(map(computed, reader.computed))
    if reader.again:
        open_values.append(reader.again)
    if reader.defaults:
        name, value = next(iter(reader.defaults.items()))
        open_values.append(
            f"The script's own options have their defaults, such as {name} {value}. If it was started with other"
            " values, give these."
        )
    return ({**keys, "script": script} if script else keys), open_values, rows


def _calls(tree: ast.Module) -> list[ast.Call]:
    """Return all calls by their lines, except those behind `if False`.

    Notebooks have such lines for what comes after a training.
    """

    def inside(node: ast.AST) -> Iterator[ast.Call]:
        if isinstance(node, ast.Call):
            yield node
        never = isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value
        for child in node.orelse if isinstance(node, ast.If) and never else ast.iter_child_nodes(node):
            yield from inside(child)

    return sorted(inside(tree), key=lambda call: call.lineno)


def _trains_otherwise(tree: ast.Module, calls: Sequence[ast.Call]) -> str | None:
    """Return what the script does by which it trains something else than its calls of known classes say, or None."""
    of_peft = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "peft"
        for name in node.names
    }
    known = _TABLES["of_lora"].split()
    for call in calls:
        named, of = _name(call), ast.unparse(call.func).rpartition(".")[0]
        if named.endswith("Config") and named not in known and (named in of_peft or of == "peft"):
            return f"calls PEFT's {named}"
        for word in call.keywords:
            if word.arg == "compute_loss_func" and not isinstance(word.value, ast.Constant):
                return "has a loss of its own"
            if word.arg == "is_trainable" and not (isinstance(word.value, ast.Constant) and not word.value.value):
                return "goes on with an adapter that is there, whose rank its own files say (tuning.start)"
        if named == "DataCollatorForLanguageModeling" and _masks_words(tree, call):
            return "has words in the middle of texts guessed (mlm)"
    adapts = any(_name(call) == "LoraConfig" or ast.unparse(call.func).startswith("Fast") for call in calls)
    given = [word for call in calls if _name(call).endswith("Trainer") for word in call.keywords]
    asked = any(word.arg == "peft_config" and not isinstance(word.value, ast.Constant) for word in given)
    if not adapts and (asked or any(_name(call) == "get_peft_model" for call in calls)):
        return "computes the kind of its adapter"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Trainer") for base in node.bases):
            own = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            if changed := own & set(_TABLES["of_losses"].split()):
                return f"has a trainer of its own, with {min(changed)}"
        if changed := _changes_what_learns(node, adapts):
            return changed
    return None


def _masks_words(tree: ast.Module, call: ast.Call) -> bool:
    """Return whether a collator of transformers' masks words, which it does unless it is told not to."""
    asked = next((word.value for word in call.keywords if word.arg == "mlm"), None)
    if asked is not None:
        return not (isinstance(asked, ast.Constant) and not asked.value)
    return len(call.args) < 2 and any(
        isinstance(node, ast.ImportFrom)
        and str(node.module).startswith("transformers")
        and any(name.name == "DataCollatorForLanguageModeling" for name in node.names)
        for node in ast.walk(tree)
    )


def _changes_what_learns(node: ast.AST, adapts: bool) -> str | None:
    """Return how a statement changes which parameters learn, or None.

    Beside an adapter the base is frozen in any case, and hooks let the first layer's inputs have gradients.
    """
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr == "requires_grad":
                off = isinstance(node.value, ast.Constant) and not node.value.value
                if not (adapts and off):
                    return f"sets {ast.unparse(target)}, so a part of the model learns (tuning.train)"
            if isinstance(target, ast.Attribute) and target.attr in _PARTS and "model" in ast.unparse(target.value):
                return f"replaces {ast.unparse(target)}"
    if isinstance(node, ast.Call) and _name(node) == "requires_grad_" and isinstance(node.func, ast.Attribute):
        of = ast.unparse(node.func.value)
        off = any(isinstance(given, ast.Constant) and not given.value for given in node.args)
        if not (adapts and off) and re.search("param|model|layer|head|embed", of):
            return f"calls {of}.requires_grad_, so a part of the model learns (tuning.train)"
    return None


def _media(tree: ast.Module, end: int | None) -> str | None:
    """Return the field of images, video or sound that the script's rows are made of before its trainer, or None."""

    def named(node: ast.AST) -> str | None:
        return node.value if isinstance(node, ast.Constant) and node.value in _MEDIA else None

    for node in ast.walk(tree):
        if end is not None and getattr(node, "lineno", 0) >= end:
            continue
        found = [named(argument) for argument in node.args] if isinstance(node, ast.Call) and _casts(node) else []
        if isinstance(node, ast.FunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Subscript):
                    found.append(named(inner.slice))
                elif isinstance(inner, ast.Call) and _name(inner) == "get" and inner.args:
                    found.append(named(inner.args[0]))
        if known := next(filter(None, found), None):
            return known
    return None


def _casts(call: ast.Call) -> bool:
    return _name(call) == "cast_column"


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _loads_a_base(call: ast.Call) -> bool:
    of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    return _name(call) == "from_pretrained" and (of.startswith("Fast") or bool(_A_BASE.search(of)))


def _first(call: ast.Call, name: str) -> list[ast.expr]:
    """Return the argument of this name, or else those that stand without one."""
    return [word.value for word in call.keywords if word.arg == name] or call.args


def _loads_rows(call: ast.Call) -> bool:
    return _name(call) == "load_dataset" or (_name(call) in _FILES_OF and ast.unparse(call.func).startswith("Dataset."))


def _assigned(tree: ast.Module) -> dict[ast.Call, set[str]]:
    """Return the names that a call's result is assigned to, even if it is one of several, or an attribute of it."""
    found: dict[ast.Call, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            names = {part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            found |= {part: names for part in ast.walk(node.value) if isinstance(part, ast.Call)}
    return found


def _given(calls: Sequence[ast.Call], argument: str) -> ast.expr | None:
    """Return what the first trainer is given as `argument`."""
    trainers = [call for call in calls if _name(call).endswith("Trainer")]
    return next((word.value for call in trainers[:1] for word in call.keywords if word.arg == argument), None)


def _given_names(calls: Sequence[ast.Call], argument: str) -> set[str]:
    """Return the names in what the first trainer is given as `argument`."""
    given = _given(calls, argument)
    return {part.id for part in ast.walk(given) if isinstance(part, ast.Name)} if given is not None else set()


def _trained_on(
    calls: Sequence[ast.Call], assigned: Mapping[ast.Call, set[str]], names: set[str], end: int | None
) -> ast.Call | None:
    """Return the loading call whose data the trainer is given.

    It is the last one before the trainer whose result has the name that the trainer gets. Otherwise it is the first of
    all, because data that is loaded later is tried or compared.
    """
    of_trainer = [call for call in calls if assigned.get(call, set()) & names and (end is None or call.lineno < end)]
    return of_trainer[-1] if of_trainer else calls[0] if calls else None


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Return names that are given a plain value once, anywhere."""
    return _plain_values(list(ast.walk(tree)))


def _plain_values(nodes: Sequence[ast.AST]) -> dict[str, Any]:
    """Return names by the plain value that the last of these nodes gives them."""
    found: dict[str, Any] = {}
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, TypeError):
                continue
    return found


class _Reader:
    """Reads the calls of a script.

    `arguments` are those of the training's own class. `beside` are those that trainers and unsloth's models are given
    instead.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._tree, self._constants, self._names = tree, _constants(tree), Names(tree)
        self._place: ast.AST = tree
        self._followed = 0  # names, from one to the next
        self.defaults: dict[str, Any] = {}
        self._rows: Rows | None = Rows()
        self.keys: dict[str, Any] = {}
        self.arguments: dict[str, Any] = {}
        self.beside: dict[str, Any] = {}
        self.computed: list[str] = []
        self.again = ""
        self.script: str | None = None
        self.head: str | None = None
        self.trainer: str | None = None

    def read(self, call: ast.Call) -> None:
        """Record what a call of the script says. Only its name is known, because nothing of the script is run.

        If several calls give one setting the last one counts, as in the script.
        """
        self._place = call
        name = _name(call)
        of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if name in _TABLES["trainings"]:
            trainer = _TABLES["trainings"][name]
            self.script = self.script or trainer
            self.arguments |= {**({} if trainer else _TABLES["transformers"]), **self._given(call)}
            if call.args and isinstance(folder := self._value(call.args[0]), str):
                self.arguments["output_dir"] = folder
        elif name == "LoraConfig":
            self._adapter(call, _TABLES["peft"])
        elif name == "get_peft_model" and of.startswith("Fast"):
            self._adapter(call, _TABLES["unsloth_lora"])
            self.beside |= self._given(call, {"random_state": "seed"})
            self._whole_modules()
            self._parts(call)
        elif name == "BitsAndBytesConfig":
            self.keys |= {"bnb_4bit_quant_type": "fp4", **self._given(call, _TABLES["quantization"])}
        elif name == "load_dataset":
            self._data(call)
        elif _loads_rows(call):
            given = [*call.args, *(word.value for word in call.keywords if word.arg == "path_or_paths")]
            files = self._value(given[0]) if given else _COMPUTED
            if files is _COMPUTED:
                self.computed.append(f"data.train: what {ast.unparse(call)} reads")
            else:
                self.keys["datasets"] = [{"path": _FILES_OF[name], "data_files": files}]
        elif name == "DataCollatorForCompletionOnlyLM":
            self.computed.append(f"data.train_on: what {ast.unparse(call)[:80]} leaves of a row")
        elif name == "EarlyStoppingCallback":
            self.beside |= {_PATIENCE: 1, **self._given(call, {_PATIENCE: _PATIENCE})}
        elif name == "train_on_responses_only":
            self._answers_alone(call)
        elif name == "map" and re.search(r"data|train|\bds\b", of) and not re.search(r"eval|test|valid", of):
            self._mapped(call, of)
        elif name == "get_chat_template":
            self.beside |= self._given(call, {"chat_template": "chat_template"})
        elif name == "from_pretrained" and of.startswith("Fast"):
            self._unsloth(call)
        elif _loads_a_base(call):
            quantized = self._given(call, _TABLES["quantization"])
            if quantized.get("load_in_4bit"):
                quantized = {"bnb_4bit_quant_type": "fp4", **quantized}
            self._base(
                _first(call, "pretrained_model_name_or_path"), {**self._given(call, _TABLES["base"]), **quantized}
            )
            self._head(of, self._given(call, {name: name for name in ("num_labels", "problem_type")}))
        elif name.endswith("Trainer"):
            self._base(_first(call, "model"), {})
            self.beside |= self._given(call, _TABLES["trainer"])
            self.trainer = self.trainer or _TABLES["trainings"].get(f"{name.removesuffix('Trainer')}Config")
            made = [word for word in call.keywords if word.arg == "formatting_func"]
            self.computed += [f"data.train: its rows, by formatting_func {ast.unparse(word.value)}," for word in made]
            self._of_its_own(call)

    def _of_its_own(self, call: ast.Call) -> None:
        """Record an optimizer that a trainer is handed."""
        for word in call.keywords:
            unset = ast.unparse(word.value) in ("None", "(None, None)")
            if word.arg in ("optimizers", "optimizer_cls_and_kwargs") and not unset:
                self.computed.append(f"optim.name: {word.arg}={ast.unparse(word.value)[:60]}")
        compares = self.trainer in ("dpo", "kto")
        reference = next((word.value for word in call.keywords if word.arg == "ref_model"), None)
        reference = call.args[1] if compares and len(call.args) > 1 else reference
        if reference is not None and ast.unparse(reference) != "None" and not self._is_the_base(reference):
            self.computed.append(f"objective.reference: ref_model={ast.unparse(reference)[:60]}")

    def _is_the_base(self, node: ast.expr) -> bool:
        """Return whether an expression is the base that is trained, loaded again or copied."""
        made = self._names.at(node.id, node) if isinstance(node, ast.Name) else node
        if not isinstance(made, ast.Call):
            return made is None or (isinstance(made, ast.Constant) and made.value is None)
        if not _loads_a_base(made):
            return "ref" in _name(made) or "copy" in _name(made)
        self._place = made
        first = _first(made, "pretrained_model_name_or_path")[:1]
        return [self._value(place) for place in first] == [self.keys.get("model_name_or_path")]

    def _mapped(self, call: ast.Call, of: str) -> None:
        """Follow the function that is mapped over the rows, as far as it can be followed."""
        given = [*call.args, *(word.value for word in call.keywords if word.arg == "function")]
        # A notebook may give several functions, and texts, one name in succession.
        before = [node for node in ast.walk(self._tree) if getattr(node, "lineno", call.lineno) < call.lineno]
        named = [node for node in before if isinstance(node, ast.FunctionDef)]
        asked = given[0].id if given and isinstance(given[0], ast.Name) else None
        function = max((node for node in named if node.name == asked), key=lambda node: node.lineno, default=None)
        batched = bool(self._given(call, {"batched": "batched"}).get("batched"))
        try:
            if self._rows is None or not isinstance(
                found := function or (given or [None])[0], ast.FunctionDef | ast.Lambda
            ):
                raise NotRead
            self._rows.map(found, batched, _plain_values(before))
        except NotRead:
            self._rows = None
            self.computed.append(f"data.train: its rows, by {of}.map,")

    def mixed(self, given: ast.expr | None) -> list[dict[str, Any]]:
        """Return the parts of each source that the trainer's rows are mixed of, and keep their data sets as keys."""
        drawn = mixture(self._tree, given, self._constants, self._rows_in)
        try:
            found = [one.source() for one in drawn]
        except NotRead:
            return []
        named = [self._named_data(one.call) for one in drawn]
        if not found or not all(isinstance(source["path"], str) for source in named):
            return []
        self.keys["datasets"] = named
        return found

    def choose(self, trainer: ast.Call | None, kept: ast.Call | None) -> None:
        """Record which of the rows that `kept` loads the trainer gets, and on which rows it evaluates.

        Of a mixture it is known which rows it has, and there is no such call.
        """
        given = dict(keywords(trainer, self._names)) if trainer is not None else {}
        named = self.keys.get("datasets")
        trained = self._rows_of(given.get("train_dataset"))
        if trained is not None and trained.call is kept and named:
            self.computed += trained.open
            named[0] |= {name: value for name, value in trained.chosen.items() if name not in named[0]}
            if trained.held_out:
                self.keys["test_split_size"] = trained.held_out
        tests = given.get("eval_dataset")
        tested = self._rows_of(tests)
        asked = self.arguments.get("eval_strategy", self.arguments.get("evaluation_strategy", "no")) != "no"
        if tested is not None and not tested.tested:
            self.keys["eval_dataset"] = [{**self._named_data(tested.call), **tested.chosen}]
        elif tested is None and asked and tests is not None and ast.unparse(tests) != "None":
            self.computed.append(f"data.eval: eval_dataset={ast.unparse(tests)[:60]}")

    def _rows_of(self, given: ast.expr | None) -> Trained | None:
        if given is None:
            return None
        try:
            return trained_rows(given, self._names, self._value, _loads_rows)
        except NotRead:
            return None

    def _rows_in(self, call: ast.Call) -> int | None:
        """Return how many rows a public data set has, if a table says so."""
        source = self._named_data(call)
        return _TABLES["rows_in"].get(f"{source.get('path')}:{source.get('split')}")

    def source(self, keys: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the parts of a source that the mapped rows become, or None if they are not known."""
        if self._rows is None or not self._rows.written:
            return None
        try:
            found = self._rows.source(str(keys.get("dataset_text_field") or "text"))
            if found and found.get("format") == "text" and keys.get("assistant_only_loss"):
                raise NotRead  # a mask over a text, by the words before an answer
        except NotRead:
            self.computed.append("data.train: its rows, by a function that is mapped over them,")
            return None
        return found

    def _answers_alone(self, call: ast.Call) -> None:
        """Read unsloth's mask over everything but the assistant's turns, or over all but the last of them."""
        last = self._given(call, {"last_response_only": "last"}).get("last")
        self.arguments |= {"assistant_only_loss": True, "train_on_responses_only": True}
        if last:
            self.computed.append("data.train_on.turns: last, as last_response_only")

    def _adapter(self, call: ast.Call, defaults: Mapping[str, Any]) -> None:
        self.keys |= {"use_peft": True, **defaults, **self._given(call, _TABLES["lora"])}
        others = {name or "" for name, _ in keywords(call, self._names)} - {
            *_TABLES["lora"],
            *_TABLES["needless_of_lora"].split(),
        }
        given = self._given(call, {name: f"LoraConfig.{name}" for name in others})
        self.keys |= {name: value for name, value in given.items() if value not in (None, False, "none", {}, [])}

    def _whole_modules(self) -> None:
        """Let embedding and head learn whole if they are among the targets, as unsloth does."""
        targets, saved = self.keys.get("lora_target_modules"), self.keys.get("lora_modules_to_save") or []
        if isinstance(targets, list) and isinstance(saved, list):
            whole = [name for name in targets if name in _WHOLE]
            self.keys["lora_target_modules"] = [name for name in targets if name not in _WHOLE]
            if whole:
                self.keys["lora_modules_to_save"] = list(dict.fromkeys([*saved, *whole]))

    def _parts(self, call: ast.Call) -> None:
        """Read unsloth's switches for the kinds of layers that get adapters."""
        for switch, layers in _TABLES["unsloth_parts"].items():
            targets = self.keys.get("lora_target_modules")
            if self._given(call, {switch: switch}).get(switch) is False and isinstance(targets, list):
                self.keys["lora_target_modules"] = [name for name in targets if name not in layers.split()]

    def _base(self, given: Sequence[ast.expr], settings: Mapping[str, Any]) -> None:
        place = self._value(given[0]) if given else None
        if isinstance(place, str):
            self.keys |= {"model_name_or_path": place, **settings}

    def _head(self, of: str, given: Mapping[str, Any]) -> None:
        """Read a head that replaces the language model's. A trainer's own class says that it is a reward's."""
        kind = _TABLES["heads"].get(re.sub(r"^(?:\w+\.)*\w+(?=For[A-Z])", "AutoModel", of))
        if kind == "classification" and given.get("num_labels") == 1:
            kind = _REGRESSION
        elif kind == "classification" and given.get("problem_type") == "multi_label_classification":
            kind = "multilabel_classification"
        self.head = self.head or kind

    def _unsloth(self, call: ast.Call) -> None:
        names = {**_TABLES["quantization"], **_TABLES["base"], **_TABLES["unsloth_base"]}
        given = {**_TABLES["unsloth"], **self._given(call, names)}
        classes = [ast.unparse(word.value) for word in call.keywords if word.arg == "auto_model"]
        for named in classes:
            self._head(named, self._given(call, {name: name for name in ("num_labels", "problem_type")}))
        if given.get("load_in_8bit") or self._given(call, {"full_finetuning": "full"}).get("full"):
            given["load_in_4bit"] = False
        self._base(call.args, {})
        self.beside["max_length"] = given.pop("max_length")
        self.keys |= given
        if re.search(_MIXTURES, str(self.keys.get("model_name_or_path"))):
            self.beside["router_aux_loss_coef"] = 0.0  # unsloth's versions of the trainers add no balancing loss

    def _data(self, call: ast.Call) -> None:
        """Read `load_dataset(path, name, split=..., data_files=...)`."""
        source = self._named_data(call)
        if isinstance(source["path"], str):
            self.keys["datasets"] = [source]

    def _named_data(self, call: ast.Call) -> dict[str, Any]:
        self._place = call
        values = [self._value(argument) for argument in call.args] + [None, None]
        given = self._given(call, {name: name for name in ("path", "name", "split", "data_files")})
        source = {"path": given.pop("path", values[0]), "name": given.pop("name", values[1]), **given}
        return {key: value for key, value in source.items() if value is not None or key == "path"}

    def _given(self, call: ast.Call, names: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the values of these arguments of a call by their names as keys, or of all by their own names."""
        found: dict[str, Any] = {}
        self._place = call
        for name, given in keywords(call, self._names):
            key = name if names is None else names.get(name or "")
            if name is None and names is None:
                self.computed.append(f"what **{ast.unparse(given)} says")
            if not key:
                continue
            value = self._value(given)
            if value is _COMPUTED:
                self.computed.append(f"{key}: {ast.unparse(given)}")
            else:
                found[key] = value
        return found

    def _value(self, node: ast.expr) -> Any:
        """Return the value of a plain expression, or of a name that has one; for `torch.bfloat16` its last part."""
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Attribute):
            return node.attr if ast.unparse(node.value) == "torch" else self._option(node)
        if isinstance(node, ast.Subscript):
            return self._inside(self._value(node.value), self._value(node.slice))
        if isinstance(node, ast.JoinedStr):
            parts = [self._value(part) for part in node.values]
            return _COMPUTED if any(part is _COMPUTED for part in parts) else "".join(map(str, parts))
        if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
            return self._value(node.value)
        if isinstance(node, ast.IfExp) and (chosen := self._value(node.test)) is not _COMPUTED:
            return self._value(node.body if chosen else node.orelse)
        if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
            found = {
                ast.literal_eval(key): self._value(item)
                for key, item in zip(node.keys, node.values, strict=True)
                if key
            }
            return _COMPUTED if any(item is _COMPUTED for item in found.values()) else found
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            of = self._value(node.operand)
            return of if of is _COMPUTED else not of
        if isinstance(node, ast.Call) and _name(node) in ("is_bfloat16_supported", "is_bf16_supported"):
            return True  # as on every GPU of the last years
        if isinstance(node, ast.BinOp) and (made := _OPERATIONS.get(type(node.op))):
            left, right = self._value(node.left), self._value(node.right)
            both = isinstance(left, int | float) and isinstance(right, int | float) and right != 0
            return made(left, right) if both else _COMPUTED
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            return _COMPUTED

    def _named(self, name: str) -> Any:
        """Return the value of a name at the call that is read."""
        found, before = self._names.at(name, self._place), self._place
        if found is None or self._followed > _MOST_NAMES:
            return _COMPUTED
        self._followed += 1
        self._place = found
        value = self._value(found)
        self._place = before
        self._followed -= 1
        return value

    def _option(self, node: ast.Attribute) -> Any:
        """Return the default of an option of the script's own, and record that it is one."""
        if not isinstance(node.value, ast.Name):
            return _COMPUTED
        if (constant := self._names.attribute(node.value.id, node.attr, self._place)) is not None:
            return self._value(constant)
        given = self._names.options.get(node.attr)
        if given is None or not _OPTIONS.search(ast.unparse(node.value)):
            return _COMPUTED
        value = self._value(given)
        if value is None or value is _COMPUTED:
            return _COMPUTED
        self.defaults[node.attr] = value
        return value

    @staticmethod
    def _inside(of: Any, key: Any) -> Any:
        try:
            return _COMPUTED if of is _COMPUTED or key is _COMPUTED else of[key]
        except (TypeError, LookupError):
            return _COMPUTED


_COMPUTED = object()
_MOST_NAMES = 20
_OPTIONS = re.compile(r"arg|opt|conf|cfg|hparams|param", re.IGNORECASE)
_OPERATIONS: Mapping[type, Any] = {ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Add: operator.add}
