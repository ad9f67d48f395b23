"""TRL's keys that make settings together: the trainer, PEFT, quantization and data sets."""

from pathlib import Path
from typing import Any

from launcher.importing import joined
from launcher.importing.mapping import Keys
from launcher.importing.sources import sections, source_paths, sources_at, split_of
from trainer.config.peers import conversions as to
from trainer.config.peers.table import Inconvertible

_DPO_LOSSES = ("sigmoid", "hinge", "ipo")
_SCRIPTS = {"sft": "sft", "dpo": "dpo", "kto": "kto", "orpo": "orpo", "cpo": "simpo"}
# Keys that one trainer alone has, where no script is named.
_SIGNS = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "simpo": ("simpo_gamma", "cpo_alpha"),
    "dpo": (
        "beta",
        "precompute_ref_log_probs",
        "loss_weights",
        "f_divergence_type",
        "label_smoothing",
        "ref_model_sync_steps",
    ),
}
_ADAPTER = {
    "lora_r": ("tuning.rank", to.whole, 16),
    "lora_alpha": ("tuning.alpha", to.number, 32),
    "lora_dropout": ("tuning.dropout", to.number, 0.05),
    "lora_target_modules": ("tuning.targets", to.targets, None),
    "lora_modules_to_save": ("tuning.modules_to_save", to.names, None),
    "lora_target_parameters": ("tuning.experts", bool, None),
}
_SOURCES = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_mixer", "dataset_splits")
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "simpo": 1e-6}


def join(keys: Keys, folder: Path) -> None:
    """All settings that several keys make."""
    for name in ("num_processes", "nproc_per_node"):
        joined.workers(keys, name)
    _objective(keys)
    _method(keys)
    joined.batch(keys, "per_device_train_batch_size")
    joined.training_arguments(keys, folder)
    joined.tracking(keys, {}, ("run_name",), ("project",))
    if keys.given.get("max_length", 0) is None:
        keys.to_do.append(
            "data.sequence_length: max_length: null limits no length. Here longer rows are cut at 2048 tokens; give the length of the longest."
        )
    _data(keys)


def _objective(keys: Keys) -> None:
    script = str(keys.tree.get("script", ""))
    named = next((ours for theirs, ours in _SCRIPTS.items() if script.startswith(theirs)), None)
    loss = keys.given.get("loss_type")
    losses = [str(name) for name in loss] if isinstance(loss, list) else [str(loss)] if loss else []
    by_loss = (
        {"kto": "kto", "simpo": "simpo", "sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo"}.get(losses[0])
        if losses
        else None
    )
    by_keys = next(
        (name for name, signs in _SIGNS.items() if any(keys.given.get(sign) is not None for sign in signs)), "sft"
    )
    name = named or by_loss or by_keys
    keys.put("objective.name", name, "script" if named else "loss_type")
    keys.origins["objective.name"] = keys.origins["objective.name"] or ["by the keys that are there"]
    if name == "dpo" and losses:
        if len(losses) > 1 or losses[0] not in _DPO_LOSSES:
            keys.lose("loss_type", f"objective.loss_type is one of {', '.join(_DPO_LOSSES)}. Left at sigmoid.")
        else:
            keys.put("objective.loss_type", losses[0], "loss_type")
    elif losses and losses[0] not in ("nll", "chunked_nll", "kto", "simpo", "sigmoid"):
        keys.lose("loss_type", f"{losses[0]} is not a loss of objective.name: {name}.")
    if "learning_rate" not in keys.given:
        keys.settings["optim.lr"] = _RATES[name]
    if name == "simpo":
        joined.simpo(keys)
        if losses != ["simpo"]:
            keys.to_do.append("objective.name: CPO is not a method of ours. simpo is the nearest: --loss_type simpo.")
    if name == "sft" and "assistant_only_loss" not in keys.given:
        keys.to_do.append(
            "data.loss_on: TRL trains on all of a conversation without assistant_only_loss, here the assistant's turns are trained. "
            "Set data.loss_on: all for TRL's."
        )
    # TRL masks by the assistant's turns wherever it is asked to, whatever completion_only_loss says.
    asked = keys.given.get("assistant_only_loss")
    if name == "sft" and (asked is False or (not asked and keys.given.get("completion_only_loss") is False)):
        keys.put("data.loss_on", "all", "completion_only_loss", "assistant_only_loss")


def _method(keys: Keys) -> None:
    in_4_bits = joined.in_4_bits(keys, keys.asked("load_in_4bit"))
    low_rank = keys.asked("use_peft")
    method = "dora" if keys.asked("use_dora") else "rslora" if keys.asked("use_rslora") else "lora"
    keys.put(
        "tuning.method", method if low_rank else "full", "use_peft", *([f"use_{method}"] if method != "lora" else [])
    )
    keys.origins["tuning.method"] = keys.origins["tuning.method"] or ["without use_peft the base itself learns"]
    if not low_rank:
        keys.put("quant.type", "none", "use_peft")
        for name in ("load_in_4bit", "load_in_8bit", *_ADAPTER):
            keys.lose(name, "Without use_peft the base itself learns, in 16 bits: tuning.method is full.")
        return
    keys.put("quant.type", str(keys.given.get("bnb_4bit_quant_type") or "nf4") if in_4_bits else "none", "load_in_4bit")
    if in_4_bits and keys.asked("use_bnb_nested_quant"):
        keys.put("quant.double", True, "use_bnb_nested_quant")
    for key, (setting, convert, otherwise) in _ADAPTER.items():
        value = keys.given.get(key)
        if value is None and otherwise is not None:
            keys.assume(setting, otherwise, f"TRL's default of {key}")
        elif value in (None, []) and key == "lora_target_modules":
            keys.assume(setting, ["q_proj", "v_proj"], "PEFT's default for most bases")
        elif value not in (None, []):
            value = _single(key, value)
            keys.attempt(key, lambda setting=setting, convert=convert, value=value: {setting: convert(value)})


def _single(key: str, value: Any) -> Any:
    """The text all-linear, where a command line makes a list of it."""
    return value[0] if key == "lora_target_modules" and value in (["all-linear"],) else value


def _data(keys: Keys) -> None:
    listed = sections(keys.tree.get("datasets"))
    single = keys.given.get("dataset_name")
    if not listed and single:
        listed = [
            {"path": single, "name": keys.given.get("dataset_config"), "split": keys.given.get("dataset_train_split")}
        ]
    mixed = keys.given.get("dataset_mixer")
    splits = keys.names("dataset_splits")
    if not listed and isinstance(mixed, dict):
        chosen = next((name for name in splits if name.startswith("train")), None)
        listed = [{"path": str(path), "split": chosen} for path in mixed]
    shares = [given.get("fraction") for given in listed]
    sources: list[dict[str, Any]] = []
    for index, given in enumerate(listed):
        place = f"datasets[{index}]" if not single or keys.tree.get("datasets") else "dataset_train_split"
        sources += _sources(keys, given, f"{place}.split" if place.startswith("datasets") else place)
        last = index == len(listed) - 1
        if sources and shares[index] is not None and not last:
            try:
                sources[-1]["fraction"] = to.number(shares[index])
            except Inconvertible as error:
                keys.lose(f"{place}.fraction", str(error))
        elif shares[index] is not None:
            keys.note(f"{place}.fraction", "The rest of the tokens.")
    used = [name for name in keys.given if name.startswith("datasets[") or name in _SOURCES]
    if sources:
        keys.put("data.train", sources, *used)
        keys.origins["data.train"] = [
            f"dataset_name: {single}" if single and not keys.tree.get("datasets") else "datasets"
        ]
    evaluated = keys.given.get("eval_strategy") not in (None, "no")
    if evaluated and single and "data.held_out" not in keys.settings:
        split = keys.given.get("dataset_test_split") or "test"
        if sources[0]["path"].startswith("hf://"):
            keys.put("data.eval", [{**sources[0], "split": split}], "dataset_test_split", "eval_strategy")
    tests = [name for name in splits if name.startswith("test")]
    if isinstance(mixed, dict) and tests:
        keys.put("data.eval", [{**source, "split": tests[0]} for source in sources], "dataset_splits")
    field = keys.given.get("dataset_text_field")
    if isinstance(field, str) and field not in ("", "text"):
        keys.put("data.fields", {"text": field}, "dataset_text_field")


def _sources(keys: Keys, given: dict[str, Any], key: str) -> list[dict[str, Any]]:
    split, sliced = split_of(given.get("split"))
    if sliced:
        keys.lose(key, sliced)
    return sources_at(source_paths(str(given.get("path", "")), given.get("data_files")), {}, given.get("name"), split)
