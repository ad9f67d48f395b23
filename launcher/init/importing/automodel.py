"""NeMo Automodel's keys that make settings together: recipe, PEFT, schedule, and data sets with their functions."""

import re
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys, no_training, read_split, source_paths, sources_at
from trainer.config.peers import conversions as to

_OF_ALL_ROWS = (
    "seq_length",
    "truncation",
    "chat_template",
    "mask_history",
    "answer_only_loss_mask",
    "mask_reasoning_content",
)
"""Keys of a data set that become settings of all rows here."""
_SIZES = ("dp_size", "tp_size", "cp_size", "pp_size")


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    _recipe(keys)
    _method(keys)
    _routers(keys)
    _optimizer(keys)
    _schedule(keys)
    _duration(keys)
    _devices(keys)
    _data(keys)
    joint_settings.tracking(keys)
    joint_settings.without_evaluation(keys)


def _recipe(keys: Keys) -> None:
    """Refuse everything but the training of a language model that has weights."""
    asked = str(keys.given.get("recipe._target_") or keys.given.get("recipe") or "")
    target = str(keys.given.get("model._target_") or "")
    if asked and asked.rpartition(".")[2] not in keys.peer.tables["recipes"].split():
        raise no_training(f"recipe: {asked.rpartition('.')[2]}")
    if "CausalLM" not in target:
        raise no_training(f"model._target_: {target or 'none'}")
    if not target.endswith("from_pretrained"):
        raise no_training(f"model._target_: {target}, so a base without weights")
    loss = str(keys.given.get("loss_fn._target_") or "").rpartition(".")[2]
    if loss and not loss.endswith("CrossEntropy"):
        raise no_training(f"loss_fn._target_: {loss}", "The loss of sft is the cross entropy of the next token.")
    keys.put("objective.name", "sft", "recipe", "model._target_")


def _method(keys: Keys) -> None:
    full = not keys.tree.get("peft")
    kind = str(keys.given.get("peft._target_") or "").rpartition(".")[2]
    if kind not in ("", "PeftConfig"):
        raise no_training(f"peft._target_: {kind}", "docs/methods.md lists the methods.")
    joint_settings.method(keys, "peft._target_", full, {"peft.use_dora": "dora"})
    if full:
        keys.put("quant.type", "none", "peft._target_")
        if keys.asked("quantization.load_in_4bit"):
            keys.lose("quantization.load_in_4bit", "Without peft the base itself learns, in 16 bits.")
        return
    _targets(keys)
    if keys.given.get("peft.dropout_position") == "pre":
        keys.need_not("peft.dropout_position", "Dropout is of what an adapter is given.")
    else:
        keys.note("peft.dropout", "There of what an adapter adds, and here of what it is given.")
    if keys.asked("quantization.load_in_4bit"):
        kind = str(keys.given.get("quantization.bnb_4bit_quant_type") or "fp4")
        keys.put("quant.type", kind, "quantization.load_in_4bit", "quantization.bnb_4bit_quant_type")
        keys.put("quant.double", False, "quantization.load_in_4bit")
        keys.carry("quantization.bnb_4bit_use_double_quant", "quant.double", to.flag)
    elif keys.asked("quantization.load_in_8bit"):
        joint_settings.in_8_bits(keys, "quantization.load_in_8bit")
    else:
        keys.put("quant.type", "none", "peft._target_")


def _targets(keys: Keys) -> None:
    """Set the modules with adapters. If the file names none, Automodel gives the language model's head one too."""
    named = keys.given.get("peft.target_modules")
    excluded = keys.names("peft.exclude_modules")
    if named and not keys.asked("peft.match_all_linear"):
        keys.put("tuning.targets", [named] if isinstance(named, str) else to.names(named), "peft.target_modules")
        return
    if excluded and not keys.asked("peft.match_all_linear"):
        others = "|".join(re.escape(name).replace(r"\*", ".*") for name in excluded)
        keys.put("tuning.targets", [f"re:(?!(?:{others})$).*"], "peft.exclude_modules")
    else:
        keys.put("tuning.targets", "all-linear", "peft.match_all_linear")
    if not any("lm_head" in name for name in excluded):
        for name in ("peft.match_all_linear", "peft.exclude_modules"):
            keys.lose(
                name, "The language model's head has an adapter there too. Here all other linear layers have one."
            )


def _routers(keys: Keys) -> None:
    """Set the routers' balancing loss. Automodel takes it of the base's own config.json if the file says nothing."""
    base = str(keys.settings.get("model.base")).lower()
    known = keys.peer.tables["router_losses"].items()
    usual = next((loss for loss, names in known if any(name in base for name in names.split())), 0.0)
    given = keys.given.get("model.router_aux_loss_coef")
    if keys.asked("model.force_hf") or (given is None and not usual):
        if given is not None:
            keys.need_not("model.router_aux_loss_coef", "With force_hf transformers' class is asked for no such loss.")
        return
    if given is None:
        keys.assume("objective.router_loss", usual, "router_aux_loss_coef of the base's config.json")
    else:
        keys.carry("model.router_aux_loss_coef", "objective.router_loss", to.number)
    if keys.settings.get("objective.router_loss"):
        keys.assume("objective.router_loss_of", "layers", "Automodel adds a loss for each layer")


def _optimizer(keys: Keys) -> None:
    kind = str(keys.given.get("optimizer._target_") or "").rpartition(".")[2]
    ours = keys.peer.tables["optimizers"].get(kind)
    if ours is None:
        keys.lose(
            "optimizer._target_", "optim.name is adam, adamw, adamw_8bit, adafactor, lion or muon. Left at adamw."
        )
    else:
        keys.put("optim.name", ours, "optimizer._target_")
    if keys.given.get("optimizer.weight_decay") is None:
        decay = keys.peer.tables["decays"].get(kind, 0.0)
        keys.assume("optim.weight_decay", decay, f"the default of {kind}")
    elif kind == "Adam" and keys.settings.get("optim.weight_decay"):
        keys.put("optim.name", "adam", "optimizer._target_")  # without a decay it is adamw
    if keys.given.get("optimizer.betas") is None:
        keys.assume("optim.betas", [0.9, 0.999], "torch's default")


def _schedule(keys: Keys) -> None:
    """Set the schedule. Without the section the rate is constant; with it warm-up begins at a tenth of the rate."""
    if "lr_scheduler" not in keys.tree:
        keys.assume("optim.schedule", "constant", "Automodel has a schedule only where lr_scheduler is given")
        return
    if "optim.schedule" not in keys.settings:
        keys.assume("optim.schedule", "cosine", "Automodel's default of lr_decay_style")
    rate = keys.settings.get("optim.lr")
    warmup = keys.given.get("lr_scheduler.lr_warmup_steps")
    if warmup is None and (steps := keys.whole("step_scheduler.max_steps")):
        keys.assume("optim.warmup_steps", min(1000, steps // 10), "Automodel's default: a tenth, and 1000 at most")
    elif warmup is None:
        keys.assume("optim.warmup_ratio", 0.1, "Automodel's default, which ends at 1000 steps")
    else:
        keys.carry("lr_scheduler.lr_warmup_steps", "optim.warmup_steps", to.whole)
    if keys.settings.get("optim.warmup_steps") or keys.settings.get("optim.warmup_ratio"):
        keys.assume("optim.warmup_from", 0.1, "Automodel's default of init_lr")
        if rate and keys.given.get("lr_scheduler.init_lr") is not None:
            keys.attempt("lr_scheduler.init_lr", lambda: _share(keys, "lr_scheduler.init_lr", "optim.warmup_from"))
    if keys.settings["optim.schedule"] != "constant":
        keys.assume("optim.min_lr_ratio", 0.01, "Automodel's default of min_lr")
        if rate and keys.given.get("lr_scheduler.min_lr") is not None:
            keys.attempt("lr_scheduler.min_lr", lambda: _share(keys, "lr_scheduler.min_lr", "optim.min_lr_ratio"))
    else:
        keys.need_not("lr_scheduler.min_lr", "A constant rate has no last one.")


def _share(keys: Keys, key: str, setting: str) -> dict[str, Any]:
    return {setting: round(to.number(keys.given[key]) / float(keys.settings["optim.lr"]), 12)}


def _duration(keys: Keys) -> None:
    if keys.whole("step_scheduler.max_steps") > 0:
        keys.put("train.steps", keys.whole("step_scheduler.max_steps"), "step_scheduler.max_steps")
        if keys.given.get("step_scheduler.num_epochs"):
            keys.need_not("step_scheduler.num_epochs", "max_steps limits the run, unless its epochs end before.")
    elif keys.given.get("step_scheduler.num_epochs"):
        keys.carry("step_scheduler.num_epochs", "train.epochs", to.passes)
    else:
        keys.assume("train.epochs", 10, "Automodel's default without num_epochs and max_steps")
    if keys.given.get("checkpoint.enabled") is False:
        keys.put("checkpoint.every_steps", 0, "checkpoint.enabled")
        keys.need_not("step_scheduler.ckpt_every_steps", "checkpoint.enabled: false, so only the end is kept.")
    else:
        keys.carry("step_scheduler.ckpt_every_steps", "checkpoint.every_steps", to.steps)
        keys.carry("checkpoint.checkpoint_dir", "run.store", lambda value: to.text(value).rstrip("/"))
    keys.assume("run.name", to.run_folder(keys.name)["run.name"], "the file's name")


def _devices(keys: Keys) -> None:
    if keys.whole("distributed.dp_size") > 0 and "cluster.workers" not in keys.settings:
        count = 1
        for name in _SIZES:
            count *= max(1, keys.whole(f"distributed.{name}", 1))
        keys.put("cluster.workers", count, "distributed.dp_size")
    if keys.whole("distributed.dp_replicate_size") > 1:
        keys.put("sharding.scope", "node", "distributed.dp_replicate_size")


def _data(keys: Keys) -> None:
    trained = keys.tree.get("dataset")
    if not isinstance(trained, dict):
        raise no_training("a file without a section dataset")
    _lengths(keys, trained)
    keys.put("data.train", [_source(keys, "dataset", trained)], *(key for key in keys.given if _names_rows(key)))
    keys.origins["data.train"] = [f"dataset._target_: {trained.get('_target_')}"]
    evaluated = keys.tree.get("validation_dataset")
    if isinstance(evaluated, dict) and evaluated:
        used = [key for key in keys.given if key.startswith("validation_dataset")]
        keys.put("data.eval", [_source(keys, "validation_dataset", evaluated)], *used)
        keys.origins["data.eval"] = [f"validation_dataset._target_: {evaluated.get('_target_')}"]


def _names_rows(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "dataset" and name not in _OF_ALL_ROWS


def _lengths(keys: Keys, trained: dict[str, Any]) -> None:
    """Set the length of rows, and what happens to longer ones."""
    packed = keys.whole("packed_sequence.packed_sequence_size")
    keys.put("data.packing", packed > 0, "packed_sequence.packed_sequence_size")
    length = packed or keys.whole("dataset.seq_length")
    if length:
        key = "packed_sequence.packed_sequence_size" if packed else "dataset.seq_length"
        keys.put("data.sequence_length", length, key)
    elif _kind(keys, trained) not in ("squad", "hellaswag"):
        keys.assume("data.on_too_long", "fail", "without seq_length no row is too long there: raise sequence_length")
    truncation = keys.given.get("dataset.truncation")
    if packed and keys.asked("packed_sequence.drop_long_samples"):
        keys.put("data.on_too_long", "drop", "packed_sequence.drop_long_samples")
    elif truncation not in (None, False, "do_not_truncate"):
        keys.put("data.on_too_long", "truncate", "dataset.truncation")


def _kind(keys: Keys, given: dict[str, Any]) -> str:
    """Return which of the known functions makes the rows. Raises `ConfigError` for made-up rows, or if there are
    none."""
    target = str(given.get("_target_") or "")
    name = target.rpartition(".")[2]
    for kind in ("squad", "hellaswag", "chat", "columns"):
        if name in keys.peer.tables[kind].split():
            return kind
    if word := next((word for word in keys.peer.tables["no_rows"].split() if word in target.lower()), None):
        raise no_training(f"dataset._target_: {target}, so rows that are {word}'s")
    return ""


def _source(keys: Keys, section: str, given: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(keys, given)
    named = next((n for n in ("path_or_dataset_id", "path_or_dataset", "dataset_name") if given.get(n)), "")
    path = given.get(named, "squad")
    split, rows = read_split(keys, f"{section}.split", given.get("split"))
    limit = given.get("limit_dataset_samples") or given.get("num_samples_limit")
    if "take" not in rows and isinstance(limit, int):
        rows["take"] = to.whole(limit)
    if kind == "chat" and rows and given.get("shuffle_seed") is not None:
        rows["take_seed"] = to.whole(given["shuffle_seed"])  # rows are shuffled before the split is cut
    makers = {"squad": _squad, "hellaswag": _hellaswag, "chat": _chat, "columns": _columns}
    if kind:
        rows |= makers[kind](keys, section, given)
    else:
        keys.lose(
            f"{section}._target_",
            f"{given.get('_target_')} is code that makes the rows. Write them into a file, and name it in data.train.",
        )
    listed = path if isinstance(path, list) else [path]
    (source, *more) = sources_at(
        [one for name in listed for one in source_paths(str(name), revision=given.get("revision"))],
        rows,
        given.get("name"),
        split,
    )
    if more:
        keys.lose(f"{section}.{named}", "Several files: name each as a source of data.train.")
    return source


def _templated(keys: Keys, section: str, given: dict[str, Any]) -> bool:
    """Return whether rows go through a chat template. In Automodel they do if the tokenizer has one."""
    base = str(keys.settings.get("model.base") or "")
    found = bool(given.get("chat_template") or re.search(keys.peer.tables["templated"], base.rpartition("/")[2]))
    if section == "dataset" and not given.get("chat_template"):
        keys.to_do.append(
            "data.train: Automodel takes the tokenizer's chat template where it has one. By its name"
            f" {base} {'has one' if found else 'has none'}; if that is wrong, format is"
            f" {'prompt_completion' if found else 'question_answer'}, with"
            f" {'prompt and completion' if found else 'question and answer'}."
        )
    return found


def _talk(keys: Keys, section: str, given: dict[str, Any]) -> None:
    """Set what is trained of conversations. The header before an answer is trained too, unless a template marks
    answers."""
    template = given.get("chat_template")
    if section == "dataset" and template:
        keys.put("data.template", str(template), "dataset.chat_template")
    if section == "dataset":
        keys.assume("data.train_on.frame", True, "Automodel also trains what the template writes around an answer")


def _squad(keys: Keys, section: str, given: dict[str, Any]) -> dict[str, Any]:
    asked = keys.peer.tables["squad_prompt"]
    if _templated(keys, section, given):
        _talk(keys, section, given)
        return {"format": "question_answer", "write": {"question": asked, "answer": "{answers.text.0}"}}
    _without_end(keys, section)
    return {"format": "prompt_completion", "write": {"prompt": asked, "completion": "{answers.text.0}"}}


def _hellaswag(keys: Keys, section: str, given: dict[str, Any]) -> dict[str, Any]:
    _without_end(keys, section)
    keys.assume("data.tokenize_apart", True, "HellaSwag's contexts and endings are tokenized apart there")
    return {"format": "prompt_completion", "write": {"prompt": "{ctx}", "completion": "{endings[label]}"}}


def _chat(keys: Keys, section: str, given: dict[str, Any]) -> dict[str, Any]:
    _talk(keys, section, given)
    if section == "dataset" and keys.asked("dataset.mask_history"):
        keys.put("data.train_on.turns", "last", "dataset.mask_history")
    if section == "dataset" and keys.asked("dataset.mask_reasoning_content"):
        keys.put("data.train_on.thinking", False, "dataset.mask_reasoning_content")
    return {}


def _columns(keys: Keys, section: str, given: dict[str, Any]) -> dict[str, Any]:
    mapping = given.get("column_mapping")
    named: dict[str, Any] = mapping if isinstance(mapping, dict) else {}
    whole = section == "dataset" and given.get("answer_only_loss_mask") is False
    asked = [f"{{{named[name]}}}" for name in ("context", "question") if named.get(name)]
    answer = f"{{{named.get('answer', 'answer')}}}"
    if given.get("use_hf_chat_template") and _templated(keys, section, given):
        _talk(keys, section, given)
        if named.get("context") or not named.get("question"):
            part = "context" if named.get("context") else "answer"
            keys.lose(
                f"{section}.column_mapping.{part}", "The context is a system message there. Write rows of messages."
            )
        if whole:
            keys.put("data.train_on.roles", "all", "dataset.answer_only_loss_mask")
        return {"format": "question_answer", "write": {"question": asked[-1] if asked else "", "answer": answer}}
    if whole:
        keys.put("data.train_on.roles", "all", "dataset.answer_only_loss_mask")
    _without_end(keys, section)
    return {"format": "prompt_completion", "write": {"prompt": " ".join([*asked, ""]), "completion": answer}}


def _without_end(keys: Keys, section: str) -> None:
    """Set that the end of a text is not trained. In Automodel the tokenizer adds none, unless the file asks for it."""
    if section == "dataset":
        keys.assume("data.train_on.end", False, "Automodel adds no token that ends a text")
