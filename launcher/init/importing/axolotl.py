"""axolotl's keys that make settings together: the method, the objective, the data sets with their types."""

import re
from collections.abc import Mapping
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import Keys, no_training, read_split, sections, source_paths, sources_at
from trainer.config.peers import conversions as to
from trainer.data.format.messages import THOUGHTS

_USERS = (("format", "{instruction} {input} "), ("no_input_format", "{instruction} "), ("system_format", "{system}"))
"""The parts of a text of one's own in a data set's type, and axolotl's defaults of them."""
_THINKING = ("field_thinking", "template_thinking_key")
_TEMPLATED = ("system", "user", "assistant", "tool")
_TEMPLATE_TEXT = "The row becomes a conversation in the chat template, without a prompt text of its own."


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    for name in ("ray_num_workers", "num_processes", "nproc_per_node", "num_gpus"):
        joint_settings.workers(keys, name)
    _method(keys)
    _objective(keys)
    if keys.given.get("warmup_steps") is not None and "optim.warmup_steps" in keys.settings:
        keys.spare("optim.warmup_ratio", "Steps of warm-up are given, and be they 0, which go before a ratio.")
    joint_settings.training_arguments(keys)
    if keys.asked("lr_quadratic_warmup") and keys.settings.get("optim.schedule") == "cosine":
        keys.put("optim.warmup_power", 2, "lr_quadratic_warmup")
    else:
        keys.need_not("lr_quadratic_warmup", "axolotl reads it beside lr_scheduler: cosine alone.")
    if keys.settings["tuning.method"] == "full":
        keys.need_not("dp_replicate_size", "A base that learns itself is divided over all ranks; no result changes.")
    elif keys.whole("dp_replicate_size", 1) > 1:
        keys.put("sharding.scope", "node", "dp_replicate_size")
    constant = str(keys.get("lr_scheduler")) == "constant"
    _warmup(keys, constant)
    if keys.asked("lora_target_linear") and keys.settings["tuning.method"] == "full":
        keys.need_not("lora_target_linear", "Without adapter the base itself learns.")
    elif keys.asked("lora_target_linear"):
        keys.put("tuning.targets", "all-linear", "lora_target_linear", "lora_target_modules")
    if keys.whole("batch_size") > 0 and keys.given.get("gradient_accumulation_steps") is None:
        micro = max(1, keys.whole("micro_batch_size", 1))
        rows = max(1, keys.whole("batch_size") // micro) * micro
        keys.put("train.global_batch", rows * joint_settings.world(keys), "batch_size", "micro_batch_size")
    _data(keys)
    if keys.asked("processor_type") and keys.asked("skip_prepare_dataset"):
        joint_settings.with_pictures(keys, "processor_type")
        keys.carry("image_size", "data.images.max_pixels", _pixels)
        keys.note("image_size", "There each picture gets this very size; here larger ones keep their proportions.")
        keys.lose("image_resize_algorithm", "Pictures are made smaller by bicubic interpolation.")
        if keys.given.get("freeze_mm_modules") is False:
            keys.lose("freeze_mm_modules", "The base's tower stays as it is (docs/pictures.md).")
    joint_settings.streamed(keys, "streaming", "pretraining_dataset")
    joint_settings.without_evaluation(keys)


def _pixels(size: Any) -> int:
    """The pixels of a picture of the size that `image_size` names: a side, or width and height."""
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    return to.whole(sides[0]) * to.whole(sides[1])


def _warmup(keys: Keys, constant: bool) -> None:
    """Set warm-up. axolotl counts its steps itself where it knows all of them, and takes at least two if any."""
    total, ratio = int(keys.settings.get("train.steps") or 0), keys.settings.get("optim.warmup_ratio")
    if constant or keys.given.get("warmup_steps") is not None:
        return
    if not total:
        if keys.given.get("warmup_ratio") is None:
            keys.assume("optim.warmup_ratio", 0.03, "axolotl's default, which ends at 100 steps")
        return
    steps = min(int(0.03 * total), 100) if ratio is None else int(float(ratio) * total)
    keys.settings.pop("optim.warmup_ratio", None)
    if ratio is not None:
        keys.put("optim.warmup_steps", 2 if steps == 1 else steps, "warmup_ratio")
    elif steps:
        keys.assume("optim.warmup_steps", max(2, steps), "axolotl's default: 3 %, and 100 at most")


def _method(keys: Keys) -> None:
    adapter = str(keys.get("adapter") or "full").lower()
    in_4_bits = keys.asked("load_in_4bit") or adapter == "qlora"
    low_rank = adapter in ("lora", "qlora")
    if not low_rank and adapter != "full":
        raise no_training(f"adapter: {adapter}", "docs/methods.md lists the methods.")
    switches = {"peft_use_rslora": "rslora", "peft_use_dora": "dora"} if low_rank else {}
    if joint_settings.method(keys, "adapter", adapter == "full", switches) == "full":
        keys.put("quant.type", "none", "adapter")
        keys.origins["quant.type"].append("without an adapter the base itself learns")
        _trained_part(keys)
    elif in_4_bits:
        keys.put("quant.type", "nf4", "load_in_4bit", "adapter")
        given = keys.given.get("bnb_config_kwargs")
        double = given.get("bnb_4bit_use_double_quant", True) if isinstance(given, dict) else True
        keys.put("quant.double", bool(double), "load_in_4bit", "adapter", "bnb_config_kwargs")
    elif keys.asked("load_in_8bit"):
        joint_settings.in_8_bits(keys, "load_in_8bit")
    else:
        keys.put("quant.type", "none", "adapter", "load_in_4bit")
    if adapter == "full" and (bits := next(filter(keys.asked, ("load_in_4bit", "load_in_8bit")), None)):
        raise no_training(
            f"{bits} without adapter", "A base in so few bits cannot learn. Give the adapter, or remove the key."
        )
    _published(keys)


def _published(keys: Keys) -> None:
    """Read a base whose files are in FP8 or MXFP4, which `model_quantization_config` names.

    They are read as 16-bit values.
    """
    names = ("model_quantization_config", "model_quantization_config_kwargs")
    arguments = keys.given.get(names[1])
    for name in (name for name in names if keys.given.get(name)):
        if isinstance(arguments, dict) and arguments.get("dequantize"):
            keys.need_not(name, "The base's own files say how they are stored, and are read as 16-bit values.")
        elif keys.settings["tuning.method"] == "full":
            keys.lose(name, "tuning.method: full learns in 16 bits, which the base's values become as they are read.")
        else:
            keys.put("quant.type", "stored", name)


def _trained_part(keys: Keys) -> None:
    """Read `unfrozen_parameters`: regular expressions for the beginnings of names, in which every dot means a dot."""
    patterns = keys.names("unfrozen_parameters")
    if ranges := [given for given in patterns if re.search(r"\[[0-9]*(:[0-9]*)?\]$", given)]:
        raise no_training(
            f"unfrozen_parameters: {ranges[0]}", "Only some rows of a parameter learn there, and here it learns whole."
        )
    if patterns:
        whole = [re.sub(r"(?<!\\)\.(?![+*])", r"\.", given.lstrip("^")) for given in patterns]
        expressions = [f"re:{given.removesuffix('$')}{'' if given.endswith(('$', '.*')) else '.*'}" for given in whole]
        keys.put("tuning.train", expressions, "unfrozen_parameters")


def _objective(keys: Keys) -> None:
    """Set the objective.

    axolotl says it by several keys. Some of them ask for what we do not train, which is refused.
    """
    asked = str(keys.given.get("rl") or "").lower()
    known = keys.peer.tables["objectives"]
    if asked and asked not in known:
        raise no_training(f"rl: {asked}")
    others = [name for name in keys.names("plugins") if name.startswith(tuple(keys.peer.tables["trainings"]))]
    if others:
        raise no_training(f"plugins: {others[0]}")
    if "Classification" in str(keys.given.get("model_type")) and not keys.asked("reward_model"):
        raise no_training(f"model_type: {keys.given['model_type']} without reward_model")
    if any(str(given.get("type")).startswith("stepwise") for given in sections(keys.tree.get("datasets"))):
        raise no_training("datasets: type: stepwise_supervised, so answers that are judged step by step")
    if keys.asked("kd_trainer"):
        _distillation(keys)
    if keys.asked("reward_model"):
        asked = "reward"
        keys.put("objective.name", "reward", "reward_model")
    elif asked:
        keys.put("objective.name", known[asked], "rl")
    if asked == "simpo":
        joint_settings.simpo(keys)
        joint_settings.without_next_tokens(keys)
    losses = keys.names("dpo_loss_type")
    if asked == "ipo":
        keys.put("objective.loss_type", "ipo", "rl")
    elif losses and losses != ["sigmoid"]:
        joint_settings.dpo_loss(keys, "dpo_loss_type", losses)
    joint_settings.uncertainty(keys, "use_eaft", scale=1.0)
    if not asked and keys.asked("train_on_inputs"):
        keys.put("data.train_on.roles", "all", "train_on_inputs")
    if asked:
        keys.put("data.packing", False, "sample_packing")


def _distillation(keys: Keys) -> None:
    """Set the distillation. Here `capstan teach` has the teacher's values written once, before the training.

    axolotl's rows bring these values, or a server gives them during the training.
    """
    keys.put("objective.name", "distil", "kd_trainer")
    server = keys.given.get("kd_online_server_base_url")
    if server:
        keys.put("objective.teacher", str(server), "kd_online_server_base_url")
    else:
        keys.put("objective.teacher", "FILL-IN", "kd_trainer")
        keys.to_do.append(
            "objective.teacher: the rows there bring its log-probabilities. Name the teacher, and have it write them by"
            " `capstan teach`."
        )
    if keys.given.get("kd_temperature") and not server:
        keys.attempt("kd_temperature", lambda: {"objective.temperature": to.number(keys.given["kd_temperature"])})
    keys.carry("kd_online_topk", "objective.top_k", to.whole)
    if keys.given.get("kd_beta") == 1:
        keys.put("objective.divergence", "reverse", "kd_beta")
    elif keys.given.get("kd_beta"):
        keys.lose("kd_beta", "objective.divergence is forward or reverse, and nothing between. Left at forward.")
    for name in ("kd_normalize_topk", "kd_online_server", "kd_online_timeout"):
        keys.need_not(name, "All but the teacher's likeliest tokens are one outcome here, whoever is asked.")
    for name in keys.given:
        if name.endswith("].logprobs_field"):
            keys.note(name, "What a teacher says of each token is written by `capstan teach`, beside the data.")
    keys.attempt("kd_ce_alpha", lambda: _shares(keys))


def _shares(keys: Keys) -> dict[str, Any]:
    names = {"kd_ce_alpha": 0.0, "kd_alpha": 1.0}
    plain, taught = (
        otherwise if keys.given.get(name) is None else to.number(keys.given[name]) for name, otherwise in names.items()
    )
    if (whole := plain + taught) != 1:
        for name in names:
            keys.note(name, f"The two losses add up to shares of 1 here; there the loss is {whole:g} times as large.")
    keys.put("objective.next_tokens", plain / (whole or 1.0), *names)
    return {}


def _data(keys: Keys) -> None:
    """Set the sources of the three lists of data sets. We have two lists."""
    for name, setting in (
        ("datasets", "data.train"),
        ("pretraining_dataset", "data.train"),
        ("test_datasets", "data.eval"),
    ):
        listed = keys.tree.get(name)
        if isinstance(listed, str) and listed:
            keys.put(setting, [{"path": path, "format": "text"} for path in source_paths(listed)], name)
            continue
        listed = sections(listed)
        found = [source for index, given in enumerate(listed) for source in _sources(keys, f"{name}[{index}]", given)]
        if found:
            used = (f"{name}[{index}].{key}" for index, given in enumerate(listed) for key in _flat(given))
            keys.put(setting, found, *used)
            keys.origins[setting] = [name]
    dropping = [bool(given.get("drop_system_message")) for given in sections(keys.tree.get("datasets"))]
    if any(dropping) and all(dropping):
        listed = (f"datasets[{index}].drop_system_message" for index in range(len(dropping)))
        keys.put("data.drop_system", True, *listed)
    elif any(dropping):
        keys.lose(
            f"datasets[{dropping.index(True)}].drop_system_message",
            "One answer for all data sets here: data.drop_system.",
        )
    templates = [name for name in keys.given if name.rpartition(".")[2] == "chat_template_jinja" and keys.given[name]]
    if _untemplated(keys):
        for name in keys.given:
            if name.rpartition(".")[2] in ("chat_template", "chat_template_jinja"):
                keys.need_not(name, "All rows have a text of their own there, and no chat template.")
    elif templates:
        keys.put("data.template", str(keys.given[templates[0]]), *templates)
    else:
        _template(keys)
    sources = keys.settings.get("data.train") or []
    if sources and all(source.get("format") == "text" for source in sources):
        keys.settings["data.on_too_long"] = "split"
        keys.origins["data.on_too_long"] = ["axolotl cuts texts into pieces, and drops none"]


def _template(keys: Keys) -> None:
    """Set the one template for all data sets here.

    It is the file's, or a data set's, or the one that a type of preferences brings.
    """
    named = [name for name in keys.given if name.rpartition(".")[2] == "chat_template" and keys.given[name]]
    if named:
        joint_settings.template(keys, named[0], keys.given[named[0]])
        return
    for name, kind in keys.given.items():
        family, _, rest = str(kind).partition(".")
        if name.endswith("].type") and rest and family in ("llama3", "chatml", "zephyr"):
            joint_settings.template(keys, name, family)


def _flat(given: dict[str, Any]) -> list[str]:
    inner = given.get("type")
    return [*given, *(f"type.{name}" for name in inner)] if isinstance(inner, dict) else [*given]


def _sources(keys: Keys, place: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sources of one data set: one for each of its files."""
    of_pairs = keys.settings.get("objective.name") in joint_settings.OF_ANSWERS
    parts = None if of_pairs else _written(keys, place, given)
    if parts is None:
        form, fields = _format(keys, place, given)
        parts = {"format": form, "fields": fields}
    split, taken = read_split(keys, f"{place}.split", given.get("split"))
    if (shards := keys.whole(f"{place}.shards")) > 1:
        taken = {"take": 1 / shards, "take_seed": keys.whole("seed", 42)}
    paths = source_paths(str(given.get("path", "")), given.get("data_files"), given.get("revision"))
    _turns(keys, place, given)
    return sources_at(paths, {**parts, **taken}, given.get("name"), split)


def _format(keys: Keys, place: str, given: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Return the format of a data set's rows (None if it has to be detected), and the names of its fields."""
    kind = given.get("type")
    if keys.settings.get("objective.name") in joint_settings.OF_ANSWERS:
        return _answers(keys, place, given, kind)
    if isinstance(kind, dict):
        for name in ("format", "no_input_format", "system_prompt", "system_format"):
            if kind.get(name):
                _lose_text(keys, f"{place}.type.{name}")
        return "alpaca", _named(kind, "instruction", "input", "output", "system")
    name = str(kind or "chat_template")
    first = name.split(":")[0]
    known = keys.peer.tables["formats"]
    found = known.get(first, known.get(first.split(".")[0]))
    if found is None:
        keys.lose(
            f"{place}.type",
            f"{name} is not a format of ours: data.format is left at auto. docs/data-format.md lists formats.",
        )
        return None, {}
    form, fields = found.get("format"), found.get("fields", {})
    if first.startswith(("alpaca", "gpteacher", "oasst", "context_qa", "jeopardy")):
        _lose_text(keys, f"{place}.type")
    if form == "segments":
        if all(one.get("type") == "input_output" for one in sections(keys.tree.get("datasets"))):
            keys.put("data.tokenize_apart", True, f"{place}.type")
        else:
            keys.note(f"{place}.type", "Tokenized as one text; there segment by segment.")
        if keys.asked("train_on_inputs"):
            keys.lose("train_on_inputs", "Segments say themselves what is trained of them: data.format: segments.")
    if form == "text":
        column = given.get("field") or given.get("text_column")
        return form, {"text": str(column)} if column not in (None, "text") else {}
    return _conversation(keys, place, given) if form in (None, "sharegpt") else (form, dict(fields))


def _types(keys: Keys) -> list[Any]:
    """Return the types of all data sets."""
    listed = [given for name in ("datasets", "test_datasets") for given in sections(keys.tree.get(name))]
    return [given.get("type") or "chat_template" for given in listed]


def _untemplated(keys: Keys) -> bool:
    """Return whether no row goes through a chat template."""
    kinds, others = _types(keys), keys.peer.tables["untemplated"].split()
    return bool(kinds) and all(isinstance(kind, dict) or kind in others or _own_text(keys, kind) for kind in kinds)


def _own_text(keys: Keys, kind: Any) -> dict[str, Any] | None:
    name = str(kind)
    return keys.peer.tables["texts"].get(f"{name}.load" if name in ("alpaca_chat", "alpaca_instruct") else name)


def _written(keys: Keys, place: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the parts of a source whose rows have a text of their own around them, or None for other rows.

    A template is for all data sets here. Beside rows that need a named one such texts are not carried over.
    """
    kind = given.get("type")
    known = {} if isinstance(kind, dict) else _own_text(keys, kind)
    templated = any(keys.given[name] for name in keys.given if "chat_template" in name.rpartition(".")[2])
    if known is None or (templated and not _untemplated(keys)):
        return None
    if isinstance(kind, dict):
        fields = {name: str(kind.get(f"field_{name}") or name) for name in ("instruction", "input", "output")}
        style = [str(kind.get(name) or otherwise) for name, otherwise in _USERS]
        systems = [str(kind.get("system_prompt") or "")] * 2
        column = kind.get("field_system")
    else:
        fields = {name: name for name in ("instruction", "input", "output")} | known.get("fields", {})
        style, systems = (keys.peer.tables["styles"][known["style"]], keys.peer.tables["systems"][known["system"]])
        column = None
    prompts = list[str]()
    for system in ([f"{{{column}}}"] if column else []) + [None]:
        for turn, words in zip(style[:2], systems, strict=True):
            said = system or words.replace("{", "{{").replace("}", "}}")
            prompts.append((style[2].replace("{system}", said) if said else "") + _named_fields(turn, fields))
    keys.put("data.tokenize_apart", True, f"{place}.type") if _untemplated(keys) and _parted(keys) else None
    answer = f"{known.get('after', '')}{{{fields['output']}}}"
    return {"format": "prompt_completion", "write": {"prompt": prompts, "completion": answer}}


def _named_fields(turn: str, fields: Mapping[str, str]) -> str:
    for name in ("instruction", "input"):
        turn = turn.replace(f"{{{name}}}", f"{{{fields[name]}}}")
    return turn


def _parted(keys: Keys) -> bool:
    """Return whether all rows have parts that are tokenized by themselves."""
    return not {"completion", "pretrain"} & {str(kind) for kind in _types(keys)}


def _lose_text(keys: Keys, key: str) -> None:
    """The text that axolotl writes around a row, such as `### Instruction:`, is not the chat template's."""
    keys.lose(key, _TEMPLATE_TEXT)
    said = (
        "data.template: axolotl writes a text of its own around such rows (Below is an instruction ..., ###"
        " Instruction:, ### Response:), and here they are conversations in the base's chat template. Name a Jinja file"
        " that writes that text where it is to stay; `capstan data show` shows what is trained."
    )
    if said not in keys.to_do:
        keys.to_do.append(said)


def _conversation(keys: Keys, place: str, given: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Return the format of messages with role and content, or with from and value."""
    mapped = given.get("message_property_mappings")
    properties = mapped if isinstance(mapped, dict) else {}
    role = given.get("message_field_role") or properties.get("role") or "role"
    content = given.get("message_field_content") or properties.get("content") or "content"
    renamed = {"messages": given.get("field_messages"), "tools": given.get("field_tools")}
    if (role, content) not in (("role", "content"), ("from", "value")):
        keys.lose(f"{place}.message_property_mappings", "A message has role and content, or from and value.")
    thought, written = (given.get(name) or "reasoning_content" for name in _THINKING)
    for name in _THINKING:
        if thought == written and thought in THOUGHTS:
            keys.note(f"{place}.{name}", "What was thought is under this name in the rows, and the template reads it.")
        else:
            keys.lose(
                f"{place}.{name}",
                f"A message's thinking is under the name that the template reads: rename it to {written}.",
            )
    if given.get("message_field_training") not in (None, "train", "training"):
        keys.lose(f"{place}.message_field_training", "A message's key is train, or weight with 0 or 1.")
    said_by_name = given.get("type") == "sharegpt" and not properties
    form = "sharegpt" if (role, content) == ("from", "value") or said_by_name else None
    defaults = {"messages": "conversations" if form else "messages", "tools": "tools"}
    fields = {key: str(value) for key, value in renamed.items() if value and value != defaults[key]}
    return form or ("chat" if fields else None), fields


def _answers(keys: Keys, place: str, given: dict[str, Any], kind: Any) -> tuple[str | None, dict[str, str]]:
    """Return the format of pairs, or of answers with a label."""
    labelled = keys.settings.get("objective.name") == "kto"
    if str(kind).startswith("bradley_terry."):  # a question in `input`, and nothing beside it
        return "preference_alpaca", {"instruction": "input", "input": "nothing"}
    if isinstance(kind, dict):
        for name in ("field_system", "prompt_format", "chosen_format", "rejected_format", "completion_format"):
            if kind.get(name):
                keys.lose(f"{place}.type.{name}", _TEMPLATE_TEXT)
        if labelled:
            return "labelled", _named(kind, "prompt", "completion", "label")
        return "preference", _named(kind, "prompt", "chosen", "rejected")
    if str(kind) == "chat_template.default" and not labelled:
        renamed = ("messages", "chosen", "rejected")
        named = {name: str(given[f"field_{name}"]) for name in renamed if given.get(f"field_{name}")}
        return "preference_sharegpt", {"messages": "messages"} | named
    template = str(kind).rpartition(".")[2]
    fields = dict(keys.peer.tables["answers"].get(template, {}))
    if str(kind).startswith("chat_template."):  # ORPO's read prompt, chosen and rejected as messages
        fields = {}
    if labelled:
        fields = {ours: theirs for ours, theirs in fields.items() if ours == "prompt"}
    fields |= _named({**given, "field_prompt": given.get("field_messages")}, "prompt", "chosen", "rejected")
    form = "labelled" if labelled else "preference"
    if fields and template in ("intel", "argilla"):  # rows that may have a system message beside the prompt
        alpaca = {"prompt": "instruction", "completion": "output"}
        completion = {"completion": "completion"} if labelled else {}
        return f"{form}_alpaca", {alpaca.get(ours, ours): theirs for ours, theirs in {**completion, **fields}.items()}
    return form if fields else None, fields


def _named(given: Mapping[str, Any], *fields: str) -> dict[str, str]:
    """Return the names of these fields in the rows, given as `field_NAME`, if they differ from ours."""
    return {name: str(given[f"field_{name}"]) for name in fields if given.get(f"field_{name}") not in (None, name)}


def _turns(keys: Keys, place: str, given: dict[str, Any]) -> None:
    """Set which turns of the conversations are trained; one answer holds for all data sets here."""
    known = keys.peer.tables["roles"]
    allowed = ("system", "developer", "user", "assistant", "tool")
    named = (known.get(str(role), str(role)) for role in to.names(given.get("roles_to_train") or []))
    roles = list(dict.fromkeys(named))
    if roles and set(roles) - set(allowed):
        keys.lose(f"{place}.roles_to_train", f"Roles are {', '.join(allowed)}.")
    elif keys.settings.get("data.train_on.roles", roles) != roles:
        keys.lose(f"{place}.roles_to_train", "One answer for all data sets here: data.train_on.roles.")
    elif roles and roles != ["assistant"]:
        keys.put("data.train_on.roles", roles, f"{place}.roles_to_train")
    ends = given.get("train_on_eot") or given.get("train_on_eos")
    for name in ("train_on_eos", "train_on_eot"):
        if given.get(name) == "all":
            keys.lose(
                f"{place}.{name}", "The ends of those turns are trained that are trained, or none: data.train_on.end."
            )
    if ends in ("none", "last"):
        end = False if ends == "none" else "last"
        keys.put("data.train_on.end", end, f"{place}.train_on_eos", f"{place}.train_on_eot")
    mapped = given["roles"] if isinstance(given.get("roles"), dict) else {}
    asked = [(role, name) for role, names in mapped.items() for name in to.names(names)]
    if any(role not in _TEMPLATED or known.get(name, name) != role for role, name in asked):
        keys.lose(
            f"{place}.roles",
            "Roles are named system, user (human), assistant (gpt) and tool (observation) in the rows.",
        )
