"""torchtune's components and their arguments: model, optimizer, schedule, loss and data set by the names of their
functions.
"""

import re
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys
from launcher.init.importing.sources import sections, source_paths, sources_at, split_of

_BUILDER = re.compile(r"torchtune\.models\.(?P<family>\w+)\.(?:\w+\.)?(?P<kind>q?lora_)?(?P<size>\w+)")

# The keys of a data set that make settings for all of them.
_SAID_ONCE = ("packed", "train_on_input", "masking_strategy")


def join(keys: Keys) -> None:
    """All settings that several keys make."""
    _model(keys)
    _course(keys)
    joint_settings.batch(keys, "batch_size")
    joint_settings.divided(keys, "tensor_parallel_dim", "context_parallel_dim")
    if keys.settings.get("objective.name", "sft") == "sft":
        for setting in ("objective.beta", "objective.gamma"):
            keys.settings.pop(setting, None)
    _data(keys)


def _end(component: Any) -> str:
    """The last part of a component's path."""
    return str(component or "").rpartition(".")[2]


def _model(keys: Keys) -> None:
    """The base and the method, both of which torchtune says by the name of the function that builds the model."""
    component = str(keys.given.get("model._component_") or "")
    found = _BUILDER.fullmatch(component)
    if component and not found:
        keys.lose("model._component_", f"{component} is none of torchtune's builders. tuning.method is left at lora.")
    kind = str(found["kind"] or "") if found else "lora_"
    family = found["family"] if found else ""
    if "vision" in component:
        keys.lose("model._component_", "Images are not read; of such a base the language model is trained.")
    if "Meta" in str(keys.given.get("checkpointer._component_")):
        keys.to_do.append(
            "model.base: the checkpointer reads Meta's own format. Give the directory of the same model in Hugging"
            " Face's."
        )
    if joint_settings.method(keys, "model._component_", not kind, {"model.use_dora": "dora"}) == "full":
        keys.put("quant.type", "none", "model._component_")
        return
    quantized = kind == "qlora_" or keys.asked("model.quantize_base")
    keys.put("quant.type", "nf4" if quantized else "none", "model.quantize_base", "model._component_")
    if quantized:
        keys.put("quant.double", True, "model.quantize_base", "model._component_")
    layers = ["o_proj" if name == "output_proj" else name for name in keys.names("model.lora_attn_modules")]
    layers += ["gate_proj", "up_proj", "down_proj"] if keys.asked("model.apply_lora_to_mlp") else []
    layers += ["lm_head"] if keys.asked("model.apply_lora_to_output") else []
    named = [
        keys.peer.tables["fused"].get(name, name) if family.startswith(("phi3", "phi4")) else name for name in layers
    ]
    if named:
        switches = ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output")
        keys.put("tuning.targets", list(dict.fromkeys(named)), *switches)


def _course(keys: Keys) -> None:
    """The decay of weights, and the length of rows and of the run."""
    if "optimizer.weight_decay" not in keys.given and keys.settings.get("optim.name") in ("adamw", "adamw_8bit"):
        keys.assume("optim.weight_decay", 0.01, "the default of torch.optim.AdamW")
    if "data.sequence_length" not in keys.settings:
        keys.to_do.append(
            "data.sequence_length: the file limits no length (tokenizer.max_seq_len); longer rows are cut at 2048"
            " tokens."
        )
    if (limit := keys.whole("max_steps_per_epoch")) > 0:
        steps = limit * keys.whole("epochs", 1)
        keys.spare("train.epochs", "max_steps_per_epoch limits the run: train.steps.")
        keys.put("train.steps", steps, "max_steps_per_epoch", "epochs")


def _data(keys: Keys) -> None:
    """The sources. A data set there also says how its rows are packed, and what of them is trained, which we say once
    for all.
    """
    for name, setting in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        given = keys.tree.get(name)
        listed = sections(given)
        sources: list[dict[str, Any]] = []
        for index, one in enumerate(listed):
            place = f"{name}[{index}]" if isinstance(given, list) else name
            sources += _sources(keys, place, one)
        if sources:
            inside = [key for key in keys.given if key.startswith((f"{name}.", f"{name}["))]
            read = [key for key in inside if key.rpartition(".")[2] not in _SAID_ONCE]
            keys.put(setting, sources, *read)
            keys.origins[setting] = [f"{name}: {_end(one.get('_component_'))}" for one in listed]
    packed = [key for key in keys.given if re.fullmatch(r"dataset(\[\d+\])?\.packed", key)]
    if "dataset" in keys.tree and keys.settings.get("objective.name", "sft") == "sft":
        keys.put("data.packing", any(keys.asked(key) for key in packed), *packed)
        keys.origins["data.packing"] = keys.origins["data.packing"] or ["torchtune's default of packed"]
    whole = [
        key
        for key, value in keys.given.items()
        if key.startswith("dataset") and ((key.endswith("train_on_input") and value is True) or value == "train_on_all")
    ]
    if whole:
        keys.put("data.loss_on", "all", *whole)
    elif any(
        _end(one.get("_component_")) in ("alpaca_dataset", "alpaca_cleaned_dataset")
        and one.get("train_on_input") is not False
        and one.get("masking_strategy") in (None, "train_on_all")
        for one in sections(keys.tree.get("dataset"))
    ):
        keys.assume("data.loss_on", "all", "alpaca_dataset's default: train_on_input: True")


def _sources(keys: Keys, place: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of one data set, whose format and fields follow from the function that reads it."""
    component, known = _end(given.get("_component_")), keys.peer.tables["datasets"]
    if component not in known:
        keys.lose(
            f"{place}._component_",
            f"{component} is not a data set that is known here. Write its path and format into the configuration.",
        )
    read: dict[str, Any] = known.get(component, {})
    form, fields, ours = read.get("format"), dict(read.get("fields", {})), keys.peer.tables["columns"]
    columns = given.get("column_map")
    if isinstance(columns, dict) and component != "alpaca_dataset":
        fields |= {ours[theirs]: str(column) for theirs, column in columns.items() if theirs in ours}
    if component == "text_completion_dataset" and given.get("column") not in (None, "text"):
        fields = {"text": str(given["column"])}
    if component == "chat_dataset":
        form = "sharegpt" if given.get("conversation_style") == "sharegpt" else "chat"
        column, usual = given.get("conversation_column"), "conversations" if form == "sharegpt" else "messages"
        fields = {"messages": str(column)} if column not in (None, usual) else {}
    if form == "prompt_completion" or form == "preference":
        fields = {ours: column for ours, column in fields.items() if ours != column}
    split, take = split_of(keys, f"{place}.split", given.get("split"))
    paths = source_paths(str(given.get("source") or read.get("source") or "FILL-IN"), given.get("data_files"))
    subset = given.get("name") or given.get("subset")
    return sources_at(paths, {"format": form, "fields": fields, "take": take}, subset, split)
