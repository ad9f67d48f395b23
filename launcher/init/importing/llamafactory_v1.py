"""The keys of LLaMA-Factory's second trainer that make settings together."""

import re
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys, no_training, source_paths, sources_at
from trainer.config.reading import read_yaml
from trainer.errors import ConfigError


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    _objective(keys)
    _method(keys)
    if "train.global_batch" not in keys.settings:
        rows = keys.whole("micro_batch_size", 1) * joint_settings.world(keys)
        keys.put("train.global_batch", rows, "micro_batch_size")
        joint_settings.divided(keys, "cp_size")
    joint_settings.duration(keys)
    strategy = str(keys.given.get("batching_strategy") or "normal")
    # padding_free puts the documents of a batch into one row; rows of ours are filled.
    keys.put("data.packing", strategy not in ("normal", "padding_free"), "batching_strategy")
    if "optim_config" not in keys.tree:
        keys.assume("optim.weight_decay", 0.01, "torch's AdamW without optim_config")
    elif keys.settings.get("optim.name") == "muon":
        for setting, usual in (("optim.weight_decay", 0.1), ("optim.betas", [0.9, 0.95])):
            if setting not in keys.settings:
                keys.assume(setting, usual, "LLaMA-Factory's default for muon")
    for name, setting in (("train_dataset", "data.train"), ("eval_dataset", "data.eval")):
        if keys.given.get(name):
            keys.put(setting, _sources(keys, name, str(keys.given[name])), name)


def _objective(keys: Keys) -> None:
    """Refuse a file of another training than sft. The command says what is trained and no key does, so data and name
    decide."""
    if keys.asked("peft_config.export_dir"):
        raise no_training("peft_config.export_dir, so a file that merges")
    said = f"{keys.name} {keys.given.get('train_dataset') or ''}".lower()
    others = set(re.split(r"[^a-z0-9]+", said)) & set(keys.peer.tables["others"].split())
    sign = next((name for name in keys.peer.tables["signs_of_others"].split() if keys.asked(name)), None)
    if others or sign:
        raise ConfigError(
            f"{sign or min(others)}: `llamafactory-cli` is told by its command (sft, dpo, rm) what it trains, and the"
            " file seems to be of another training than sft. Import it as a file of the first trainer, with stage and"
            " pref_loss. Nothing was written."
        )
    keys.to_do.append(
        "objective.name: sft, as `llamafactory-cli sft` trains; the file does not say which command reads it."
    )


def _method(keys: Keys) -> None:
    kind = str(keys.given.get("peft_config.name") or "full")
    if kind not in ("lora", "full", "freeze"):
        raise no_training(f"peft_config.name: {kind}", "docs/methods.md lists the methods.")
    switches = {"peft_config.use_rslora": "rslora", "peft_config.use_dora": "dora"}
    method = joint_settings.method(keys, "peft_config.name", kind != "lora", switches)
    if kind == "freeze":
        joint_settings.layers_that_learn(keys, "peft_config.")
    bits = keys.whole("quant_config.quantization_bit")
    if method == "full" or not bits:
        keys.put("quant.type", "none", "quant_config.quantization_bit")
    else:
        joint_settings.in_bits(keys, "quant_config.", True, "quant_config.name")


def _sources(keys: Keys, key: str, given: str) -> list[dict[str, Any]]:
    """Return the data sets of a YAML file that names them, or the one that the key names."""
    if not given.endswith(".yaml"):
        return [{"path": path} for path in source_paths(given)]
    found = next((place for place in keys.places(given) if place.is_file()), None)
    if found is None:
        keys.lose(
            key,
            f"{given}, which names the data sets, is not here. Write the paths of their rows into the configuration.",
        )
        return [{"path": "FILL-IN"}]
    try:
        tree = read_yaml(found.read_text(), given)
    except (OSError, ValueError, ConfigError) as error:
        keys.lose(key, f"{error} Write the paths of its data sets into the configuration.")
        tree = {}
    named = tree.values() if isinstance(tree, dict) else ()
    infos = [info for info in named if isinstance(info, dict) and info.get("path")]
    if pairs := [info for info in infos if info.get("converter") == "pair"]:
        raise ConfigError(
            f"{key}: {pairs[0]['path']} is read by the converter pair, so its answers are compared, and the file does"
            " not say whether by dpo or by rm. Import it as a file of the first trainer, with stage. Nothing was"
            " written."
        )
    return [source for info in infos for source in _of_info(keys, key, info)] or [{"path": "FILL-IN"}]


def _of_info(keys: Keys, key: str, info: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {"format": keys.peer.tables["formats"].get(str(info.get("converter"))), "weight": info.get("weight")}
    if info.get("size"):  # LLaMA-Factory draws them at random too, but may draw a row several times
        rows |= {"take": int(info["size"]), "take_seed": keys.whole("seed", 42)}
    return sources_at(source_paths(str(info["path"])), rows, split=info.get("split"))
