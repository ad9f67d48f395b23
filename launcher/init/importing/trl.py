"""TRL's keys that make settings together: the trainer, PEFT, quantization and data sets."""

import re
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys, no_training, read_split, sections, source_paths, sources_at
from trainer.config.peers import conversions as to
from trainer.config.peers.conversions import Inconvertible

_LISTS = ("datasets[", "dataset_mixture.")
_SEES = "vlm"
_SOURCES = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_mixer", "dataset_splits")


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    for name in ("num_processes", "nproc_per_node", "num_gpus"):
        joint_settings.workers(keys, name)
    _objective(keys)
    _method(keys)
    _precision(keys)
    _routers(keys)
    joint_settings.training_arguments(keys)
    if keys.given.get("max_length", 0) is None:
        keys.to_do.append(
            "data.sequence_length: max_length: null limits no length. Here longer rows are cut at 2048 tokens; give the"
            " length of the longest."
        )
    _rate_of_modules(keys)
    if keys.settings["objective.name"] == "dpo":
        keys.carry("max_prompt_length", "data.prompt_length", to.whole)
    elif keys.given.get("max_prompt_length") is not None:
        keys.lose(
            "max_prompt_length",
            "data.prompt_length limits every prompt of a pair, and TRL's orpo and kto those of rows that are too long.",
        )
    _data(keys)
    if _sees(keys):
        joint_settings.with_pictures(keys, "script", answers=True)
    joint_settings.template(keys, "chat_template", keys.given.get("chat_template"))
    joint_settings.streamed(keys, "streaming", "dataset_streaming")
    joint_settings.without_evaluation(keys)


def _by_script(keys: Keys) -> str | None:
    """Return the objective of the named script or command. A file of another training is refused."""
    tables, script = keys.peer.tables, str(keys.tree.get("script", ""))
    place = script or keys.name
    others = f"{tables['others']} {tables['scripts_of_others'] if script else ''}".split()
    named = set(re.split(r"[^a-z0-9]+", place.lower()))
    if words := named & set(others) - ({_SEES} if _sees(keys) else set()):
        raise no_training(f"{'the script' if script else 'the file'} {place}, which says {min(words)}")
    if _folder(keys) in others:
        raise no_training(f"the file's folder, which is called {_folder(keys)}")
    asked = re.split(r"[^a-z0-9]+", script.lower())
    found = _beginning(keys, script) or next(filter(None, (_beginning(keys, word) for word in asked)), None)
    if script and not found and (keys.program or set(asked) - set(tables["words_of_scripts"].split())):
        raise no_training(
            f"the {'command' if keys.program else 'script'} {' '.join(filter(None, (keys.program, script)))}",
            "Its name does not say what it trains. Those of TRL's own are sft, dpo, kto, orpo, cpo and reward.",
        )
    return found


def _sees(keys: Keys) -> bool:
    """Whether the named script fine-tunes a base that sees on conversations with pictures, or on pairs of answers."""
    words = set(re.split(r"[^a-z0-9]+", str(keys.tree.get("script", "")).lower()))
    return _SEES in words and bool(words & {"sft", "dpo"})


def _folder(keys: Keys) -> str:
    """Return the name of the file's folder, which recipes are sorted into by their trainers; a script has none."""
    return keys.folder.absolute().name.lower() if keys.name and "script" not in keys.tree else ""


def _beginning(keys: Keys, name: str) -> str | None:
    """Return the objective whose trainer's name `name` begins with."""
    return next((ours for theirs, ours in keys.peer.tables["scripts"].items() if name.lower().startswith(theirs)), None)


def _beside_next_tokens(keys: Keys, losses: list[str]) -> list[str]:
    """Set the weight of the next-token loss, if it is the second of two, and return the other one."""
    if len(losses) != 2 or losses[1] != "sft":
        return losses
    weights = keys.given.get("loss_weights") or [1.0, 1.0]
    try:
        first, second = to.pair(weights)
    except Inconvertible as error:
        keys.lose("loss_weights", str(error))
        return losses
    if first != 1:
        return losses
    keys.put("objective.sft_weight", second, "loss_type", "loss_weights")
    return losses[:1]


def _objective(keys: Keys) -> None:
    tables = keys.peer.tables
    named = _by_script(keys)
    losses = keys.names("loss_type")
    by_loss = tables["losses"].get(losses[0]) if losses else None
    given = {key for key, value in keys.given.items() if value is not None}
    by_keys = next((name for name, signs in tables["signs"].items() if given & set(signs.split())), None)
    told = named or by_loss or by_keys or _beginning(keys, keys.name) or tables["scripts"].get(_folder(keys))
    name = told or "sft"
    keys.put("objective.name", name, "script" if named else "loss_type")
    if told is None and keys.name:
        keys.to_do.append(
            "objective.name: the file does not say which of TRL's trainers reads it. It is sft, as nothing in it is"
            " another's."
        )
    keys.origins["objective.name"] = keys.origins["objective.name"] or ["by the keys that are there"]
    if name == "dpo" and losses:
        joint_settings.dpo_loss(keys, "loss_type", _beside_next_tokens(keys, losses))
    elif losses and losses[0] not in ("nll", "chunked_nll", "kto", "simpo", "sigmoid"):
        keys.lose("loss_type", f"{losses[0]} is not a loss of objective.name: {name}.")
    if "objective.sft_weight" not in keys.settings:
        keys.lose("loss_weights", "Losses are not added up, but for dpo's and that of the next token.")
    if "learning_rate" not in keys.given:
        keys.settings["optim.lr"] = tables["rates"][name]
    if name == "simpo":
        joint_settings.simpo(keys)
        joint_settings.without_next_tokens(keys)
        if losses != ["simpo"]:
            raise no_training(
                f"loss_type: {' '.join(losses) or 'sigmoid, the default'}, so CPO",
                "docs/preference.md lists the objectives. CPO with loss_type: simpo is SimPO, objective.name: simpo.",
            )
    if name == "sft" and keys.asked("train_on_responses_only"):
        keys.put("data.train_on.frame", "tail", "train_on_responses_only")
    # TRL masks by the assistant's turns whenever it is asked to, whatever completion_only_loss says.
    asked = keys.given.get("assistant_only_loss")
    if name == "sft" and (asked is False or (not asked and keys.given.get("completion_only_loss") is False)):
        keys.put("data.train_on.roles", "all", "completion_only_loss", "assistant_only_loss")
    elif name == "sft" and not asked and keys.rows_of(0).get("format") != "text":
        keys.assume("data.train_on.roles", "whole", "TRL trains on all of a conversation without assistant_only_loss")


def _method(keys: Keys) -> None:
    full = not keys.asked("use_peft")
    joint_settings.method(keys, "use_peft", full, {"use_rslora": "rslora", "use_dora": "dora"})
    keys.origins["tuning.method"] = keys.origins["tuning.method"] or ["without use_peft the base itself learns"]
    if full:
        keys.put("quant.type", "none", "use_peft")
        if bits := next(filter(keys.asked, ("load_in_4bit", "load_in_8bit")), None):
            why = "A base in so few bits cannot learn. Give LoRA's keys, or remove this one."
            raise no_training(f"{bits} without use_peft", why)
        return
    if keys.asked("load_in_4bit"):
        keys.put("quant.type", str(keys.given.get("bnb_4bit_quant_type") or "nf4"), "load_in_4bit")
        if keys.asked("use_bnb_nested_quant"):
            keys.put("quant.double", True, "use_bnb_nested_quant")
    elif keys.asked("load_in_8bit"):
        joint_settings.in_8_bits(keys, "load_in_8bit")
    else:
        keys.put("quant.type", "none", "load_in_4bit")
    if not keys.settings.get("tuning.targets"):
        base = str(keys.settings.get("model.base")).rpartition("/")[2]
        named = (names for kind, names in keys.peer.tables["peft_targets"].items() if re.search(kind, base))
        keys.assume("tuning.targets", next(named, "q_proj v_proj").split(), "PEFT's default for such a base")


def _precision(keys: Keys) -> None:
    """Set bf16 where only the weights are stored in fp32. TRL computes in bf16 unless the file says otherwise."""
    mixed = keys.asked("bf16") or (keys.given.get("bf16") is None and not keys.asked("fp16"))
    if keys.settings.get("model.dtype") == "fp32" and mixed:
        keys.put("model.dtype", "bf16", *(name for name in ("dtype", "torch_dtype", "bf16") if name in keys.given))


def _routers(keys: Keys) -> None:
    """Set the routers' balancing loss of a mixture of experts, which TRL's own trainers have without being asked."""
    base, tables = str(keys.settings.get("model.base")), keys.peer.tables
    own = bool(keys.name) or "script" in keys.tree  # of a script, its trainer is one of TRL's
    if keys.given.get("router_aux_loss_coef") is not None or not own or not re.search(tables["mixtures"], base):
        return
    if keys.settings["objective.name"] in ("sft", "dpo", "kto") and not re.search(tables["without_balance"], base):
        keys.assume("objective.router_loss", 0.001, "TRL's default of router_aux_loss_coef for a mixture of experts")


def _rate_of_modules(keys: Keys) -> None:
    """Set unsloth's learning rate of the modules that learn whole beside an adapter."""
    if keys.given.get("embedding_learning_rate") is None:
        return
    if not keys.settings.get("tuning.modules_to_save"):
        keys.need_not("embedding_learning_rate", "It is for modules that learn whole, and there are none.")
        return

    def ratio() -> dict[str, float]:
        rate = to.number(keys.given["embedding_learning_rate"]) / float(keys.settings["optim.lr"])
        return {"optim.modules_ratio": float(f"{rate:.12g}")}

    keys.attempt("embedding_learning_rate", ratio)


def _of_mixture(keys: Keys, index: int, given: dict[str, Any], mixture: dict[str, Any]) -> dict[str, Any]:
    """Return a data set of alignment-handbook's mixture as one of TRL's. Its weight is a random share of the rows."""
    found = {"path": given.get("id"), "name": given.get("config"), "split": given.get("split")}
    try:
        weight, seed = to.number(given.get("weight") or 1), to.whole(mixture.get("seed") or 0)
    except Inconvertible as error:
        keys.lose(f"dataset_mixture.datasets[{index}].weight", str(error))
        return found
    return {**found, "take": weight, "take_seed": seed} if 0 < weight < 1 else found


def _sources(keys: Keys, key: str, given: dict[str, Any], rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sources of a data set. `key` names its split in the file, and `rows` has what its rows become."""
    split, taken = read_split(keys, key, given.get("split"))
    chosen = {name: given[name] for name in ("take", "take_seed", "skip") if name in given} or taken
    paths = source_paths(str(given.get("path", "")), given.get("data_files"))
    return sources_at(paths, {**chosen, **rows}, given.get("name"), split)


def _evaluated(keys: Keys) -> None:
    """Set the rows that a script gives its trainer to evaluate on."""
    sources: list[dict[str, Any]] = []
    for index, given in enumerate(sections(keys.tree.get("eval_dataset"))):
        sources += _sources(keys, f"eval_dataset[{index}].split", given, keys.rows_of(0))
    if sources:
        keys.put("data.eval", sources, *(name for name in keys.given if name.startswith("eval_dataset")))


def _data(keys: Keys) -> None:
    """Set the sources.

    TRL names data sets in three ways. It gives shares of a mixture to all of them, while we leave the rest to the last
    one.
    """
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
    mixture = keys.tree.get("dataset_mixture")
    if not listed and not single and isinstance(mixture, dict):
        listed = [
            _of_mixture(keys, index, given, mixture) for index, given in enumerate(sections(mixture.get("datasets")))
        ]
        keys.carry("dataset_mixture.test_split_size", "data.held_out", to.held_out)
    named_alone = single and not keys.tree.get("datasets")
    shares = [given.get("fraction") for given in listed]
    sources: list[dict[str, Any]] = []
    for index, given in enumerate(listed):
        place = f"datasets[{index}]"
        key = "dataset_train_split" if named_alone else f"{place}.split"
        sources += _sources(keys, key, given, keys.rows_of(index))
        last = index == len(listed) - 1
        if sources and shares[index] is not None and not last:
            try:
                sources[-1]["fraction"] = to.number(shares[index])
            except Inconvertible as error:
                keys.lose(f"{place}.fraction", str(error))
        elif shares[index] is not None:
            keys.note(f"{place}.fraction", "The rest of the tokens.")
    used = [name for name in keys.given if name.startswith(_LISTS) or name in _SOURCES]
    if sources:
        keys.put("data.train", sources, *used)
        keys.origins["data.train"] = [f"dataset_name: {single}" if named_alone else "datasets"]
    evaluated = keys.given.get("eval_strategy") is not None and not keys.off("eval_strategy")
    if evaluated and single and "data.held_out" not in keys.settings:
        split = keys.given.get("dataset_test_split") or "test"
        if sources[0]["path"].startswith("hf://"):
            keys.put("data.eval", [{**sources[0], "split": split}], "dataset_test_split", "eval_strategy")
    _evaluated(keys)
    tests = [name for name in splits if name.startswith("test")]
    if isinstance(mixed, dict) and tests:
        keys.put("data.eval", [{**source, "split": tests[0]} for source in sources], "dataset_splits")
    field = keys.given.get("dataset_text_field")
    if isinstance(field, str) and field not in ("", "text"):
        keys.put("data.fields", {"text": field}, "dataset_text_field")
