"""ms-swift's keys that make settings together: method and objective, and data sets by their names on ModelScope."""

import math
import re
from collections.abc import Mapping
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import MEDIA, Keys, is_hub_dataset, no_training, source_paths, sources_at
from trainer.config.peers import conversions as to

_SYNTAX = re.compile(r"(?:(?P<hub>hf|ms)::)?(?P<path>[^#:]+)(?::(?P<subset>[^#]+))?(?:#(?P<rows>\d+))?", re.IGNORECASE)


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    joint_settings.devices(keys)
    begin(keys)
    joint_settings.training_arguments(keys)
    if keys.given.get("gradient_accumulation_steps") is None:
        rows = keys.whole("per_device_train_batch_size", 1) * joint_settings.world(keys)
        keys.assume("train.global_batch", rows * max(1, math.ceil(16 / rows)), "ms-swift accumulates to 16 rows itself")
        joint_settings.divided(keys, "sequence_parallel_size")
    finish(keys)


def begin(keys: Keys) -> None:
    """Make the settings of both of ms-swift's trainers that do not depend on the batch."""
    _refuse_media(keys)
    _base(keys)
    _objective(keys)
    _routers(keys)
    _method(keys)


def finish(keys: Keys) -> None:
    """Make the settings of both of ms-swift's trainers that need the batch and the objective."""
    _trained(keys)
    _data(keys)
    _pictures(keys)
    _untemplated(keys)
    joint_settings.template(keys, "template", keys.given.get("template"))
    if keys.settings.get("data.template") is None and re.search(
        keys.peer.tables["hybrid"], str(keys.given.get("model"))
    ):
        _thinking(keys)
    joint_settings.streamed(keys, "streaming")
    joint_settings.without_evaluation(keys)
    if keys.given.get("max_length") is None:
        keys.assume("data.on_too_long", "fail", "without max_length no row is too long there: raise sequence_length")


def _thinking(keys: Keys) -> None:
    """Set what a hybrid base's answers without a thought begin with."""
    if keys.settings.get("data.format") == "text":
        return
    scale = str(keys.given.get("loss_scale") or "default")
    as_usual = not keys.asked("disable_ignore_empty_think") and keys.given.get("add_non_thinking_prefix") is None
    own = str(keys.given.get("model")).rpartition("/")[2].lower().startswith("qwen3")
    if own and as_usual and keys.settings.get("objective.name") == "sft" and "last_round" not in scale:
        keys.assume("data.thinking", "always", "ms-swift writes an empty block into answers without thinking")
    else:
        keys.to_do.append(
            "data.thinking: ms-swift writes an empty block of thinking into every answer that has none, and does not"
            " train it; here the chat template decides. Look at rows with `capstan data show`."
        )


def _refuse_media(keys: Keys) -> None:
    """Refuse a training that there is none of here, which the file says by an argument, a name, or a true variable."""
    if found := _said(keys, "media", "media_variables", "media_names", only_true=True):
        raise no_training(f"{found}, so rows of {MEDIA}")


def _said(keys: Keys, arguments: str, variables: str, parts: str, *, only_true: bool = False) -> str | None:
    """Return the first argument, variable, or part of the base's or a data set's name that the file has, of those in
    these tables. With `only_true` variables count that are not false."""
    tables = keys.peer.tables
    names = [str(keys.given.get("model") or ""), *keys.names("dataset"), *keys.names("val_dataset")]
    words = {word for name in names for word in re.split(r"[^a-z0-9.]+", name.lower())}
    joined, given = " ".join(names).lower(), joint_settings.variables(keys)
    if only_true:
        given = {name: value for name, value in given.items() if str(value).lower() not in ("false", "0", "none", "")}
    found = (
        *(key for key in tables[arguments].split() if keys.asked(key)),
        *(name for name in tables[variables].split() if name in given),
        *(name for name in tables[parts].split() if name in words or ("-" in name and name in joined)),
    )
    return next(iter(found), None)


def _pictures(keys: Keys) -> None:
    """Set what rows with pictures, videos or sounds ask for. Any base that sees or hears may be trained on them, so a
    name of such a base says enough: data.format: pictures reads rows of text, too."""
    found = _said(keys, "pictures", "picture_variables", "picture_names")
    forms = [source.get("format") for source in keys.settings.get("data.train") or []]
    if found is None or (forms and not set(forms) & set(joint_settings.CONVERSATIONS)):  # rows known to be of text
        return
    rows = "rows of pictures, videos or sounds"
    if keys.tree.get("script") == "pt":
        raise no_training(f"swift pt, and {found}, so {rows}", "docs/pictures.md says what is trained.")
    joint_settings.with_pictures(keys)
    keys.origins["data.format"] = [f"{found}, so {rows}"]
    variables = joint_settings.variables(keys)
    _limits(keys, variables)
    keys.carry("max_pixels", "data.images.max_pixels", to.whole)
    if root := variables.get("ROOT_IMAGE_DIR"):
        keys.assume("data.images.root", str(root), f"ROOT_IMAGE_DIR={root}")
    elif any("://" not in str(source.get("path")) for source in keys.settings.get("data.train") or []):
        keys.to_do.append(
            "data.images.root: ms-swift finds pictures from the folder that it is started in, Capstan from that of the"
            " rows. Set the folder that all pictures, videos and sounds are in."
        )
    _towers(keys)


def _limits(keys: Keys, variables: Mapping[str, Any]) -> None:
    """Set the limits of pictures and videos that variables of the environment say."""
    limits: Mapping[str, tuple[str, int]] = keys.peer.tables["limits"]
    for name in (name for name in limits if str(variables.get(name) or "")):
        (setting, factor), given = limits[name], str(variables[name])
        if given.isdecimal():
            keys.assume(setting, int(given) * factor, f"{name}={given}")
        else:
            keys.to_do.append(f"{setting}: {name} is {given}, and no whole number.")
    if named := [f"{name}={variables[name]}" for name in keys.peer.tables["sampling"].split() if variables.get(name)]:
        keys.to_do.append(
            f"data.videos: {', '.join(named)}: here the base's own processor chooses the frames of a video, and their"
            " least size (docs/pictures.md)."
        )


def _towers(keys: Keys) -> None:
    """Set whether the tower learns. ms-swift freezes the tower's encoder and its projector separately."""
    frozen = [str(keys.given.get(name, True)).lower() not in ("false", "0", "no") for name in _PARTS]
    if all(frozen):
        return
    if not any(frozen) and keys.settings.get("tuning.method") in ("lora", "rslora"):
        keys.put("tuning.towers", "lora", *_PARTS)
        return
    why = "gives adapters to both encoder and projector, never to one alone"
    if not any(frozen):
        why = "works only with tuning.method lora or rslora, so the tower stays frozen"
    for name in (name for name, is_frozen in zip(_PARTS, frozen, strict=True) if not is_frozen):
        keys.lose(name, f"tuning.towers: lora {why}.")


_PARTS = ("freeze_vit", "freeze_aligner")


def _base(keys: Keys) -> None:
    """Name the base as it is on the Hub. ms-swift takes the names of ModelScope."""
    named = str(keys.given.get("model") or "")
    owner, _, name = named.partition("/")
    if ours := keys.peer.tables["owners"].get(owner):
        keys.put("model.base", f"{ours}/{name}", "model")
    elif owner in keys.peer.tables["mirrors"].split() and is_hub_dataset(named):
        keys.to_do.append(f"model.base: {named} is its name on ModelScope. Give the one that it has on the Hub.")


def _objective(keys: Keys) -> None:
    """Set the objective, by the command, rlhf_type and task_type."""
    tables, script = keys.peer.tables, str(keys.tree.get("script") or "")
    asked = str(keys.given.get("rlhf_type") or ("dpo" if script == "rlhf" else ""))
    if script and script not in tables["verbs"].split():
        raise no_training(f"{keys.program} {script}")
    if asked:
        if asked not in tables["objectives"]:
            raise no_training(f"rlhf_type: {asked}")
        keys.put("objective.name", tables["objectives"][asked], "rlhf_type")
        _preferences(keys, asked)
        return
    keys.put("objective.name", "sft", "task_type")
    task = str(keys.given.get("task_type") or "causal_lm")
    if task == "seq_cls":
        _classes(keys)
    elif task != "causal_lm":
        raise no_training(f"task_type: {task}")
    elif keys.given.get("loss_type"):
        keys.lose("loss_type", "It names a loss of a plugin or of an embedding; sft has the next-token loss.")
    for name in ("beta", "gamma", "label_smoothing", "desirable_weight", "undesirable_weight"):
        keys.spare(f"objective.{name}", "It has no effect without rlhf_type.")


def _routers(keys: Keys) -> None:
    """Set the routers' balancing loss, which transformers and Megatron count in their own ways."""
    by_sigmoids = any(name in keys.settings.get("model.base", "").lower() for name in _sigmoids(keys))
    if by_sigmoids:
        keys.need_not("router_aux_loss_coef", "transformers has no balancing loss for this base, so there is none.")
    else:
        keys.carry("router_aux_loss_coef", "objective.router_loss", to.number)
    of_layers = "moe_aux_loss_coeff"
    if keys.given.get(of_layers) in (None, 0, "0", "0.0"):
        return
    kind = str(keys.given.get("moe_router_load_balancing_type") or "aux_loss")
    if kind == "none":
        keys.need_not(of_layers, "moe_router_load_balancing_type: none turns it off.")
    elif kind != "aux_loss":
        keys.lose("moe_router_load_balancing_type", f"{kind} is counted over other tokens than those of a row.")
    elif by_sigmoids:
        keys.lose(of_layers, "The router of this base scores by sigmoids, and objective.router_loss reads softmax.")
    else:
        keys.carry(of_layers, "objective.router_loss", to.number)
        if "objective.router_loss" in keys.settings:
            keys.assume("objective.router_loss_of", "layers", "Megatron adds a loss for each layer")


def _sigmoids(keys: Keys) -> list[str]:
    return keys.peer.tables["sigmoid_routers"].split()


def _preferences(keys: Keys, asked: str) -> None:
    losses = keys.names("loss_type")
    if asked == "dpo" and losses and losses != ["sigmoid"]:
        joint_settings.dpo_loss(keys, "loss_type", losses)
    elif losses and losses[0] not in ("sigmoid", "kto", "simpo", "orpo"):
        keys.lose("loss_type", f"{losses[0]} is not a loss of rlhf_type: {asked}.")
    if asked in keys.peer.tables["betas"] and keys.given.get("beta") is None:
        keys.assume("objective.beta", keys.peer.tables["betas"][asked], f"ms-swift's default of beta for {asked}")
    if asked == "simpo":
        if keys.given.get("simpo_gamma") is None:
            keys.assume("objective.gamma", 1.0, "ms-swift's default of simpo_gamma")
        joint_settings.without_next_tokens(keys)


def _untemplated(keys: Keys) -> None:
    """Say what rows without a chat template become: texts for pt and classes, conversations for sft."""
    texts = keys.tree.get("script") == "pt" or str(keys.given.get("task_type")) == "seq_cls"
    if str(keys.given.get("use_chat_template")).lower() == "false":
        if texts:
            keys.need_not("use_chat_template", "Such rows are texts here, which no template is for.")
        else:
            keys.lose("use_chat_template", "The chat template writes the rows of sft; those of pt have none.")
    elif str(keys.given.get("task_type")) == "seq_cls":
        keys.to_do.append(
            "data.train: ms-swift writes the chat template around a text that has a class. Here it stays a text: give"
            " rows of messages, or data.format: classified_messages."
        )


def _classes(keys: Keys) -> None:
    labels, problem = keys.whole("num_labels"), str(keys.given.get("problem_type") or "")
    if problem == "regression" or (labels == 1 and not problem):
        raise no_training("task_type: seq_cls with a number as its answer")
    kind = "multilabel_classification" if problem.startswith("multi") else "classification"
    keys.put("objective.name", kind, "task_type", "problem_type", "num_labels")


def _method(keys: Keys) -> None:
    kind = str(keys.given.get("tuner_type") or keys.given.get("train_type") or keys.get("tuner_type") or "lora")
    full = kind == "full"
    if kind not in ("lora", "full", "lora_llm"):
        raise no_training(f"tuner_type: {kind}", "docs/methods.md lists the methods.")
    joint_settings.method(keys, "tuner_type", full, {"use_rslora": "rslora", "use_dora": "dora"})
    if keys.given.get(keys.peer.tables["joint"]["rate"]) is None:
        keys.assume("optim.lr", 1e-5 if full else 1e-4, f"ms-swift's default for tuner_type: {kind}")
    if keys.given.get("target_regex"):
        keys.put("tuning.targets", [f"re:{keys.given['target_regex']}"], "target_regex")
    if full:
        _trained_part(keys)
    _quantization(keys, full)
    optimizer = str(keys.given.get("optimizer") or "")
    if optimizer and optimizer not in ("adam", "lorap", "muon", "default"):
        keys.lose("optimizer", f"{optimizer}: optim.name is adam, adamw, adamw_8bit, adafactor, lion or muon.")
    elif optimizer:
        keys.put("optim.name", "muon" if optimizer == "muon" else "adamw", "optimizer")


def _trained_part(keys: Keys) -> None:
    """Set which parameters learn. Those that are named to learn do so even if another key freezes them."""
    share = str(keys.given.get("freeze_parameters_ratio") or 0)
    if share not in ("0", "0.0", "1", "1.0"):
        raise no_training(
            f"freeze_parameters_ratio: {share}", "tuning.train names the parameters that learn, and takes no share."
        )
    names = ("freeze_parameters", "freeze_parameters_regex", "trainable_parameters", "trainable_parameters_regex")
    frozen, learning = (_begins_or_has(keys, *pair) for pair in (names[:2], names[2:]))
    if share in ("1", "1.0"):
        keys.put("tuning.train", learning, *names, "freeze_parameters_ratio")
    elif frozen:
        excepted = "|".join(one.removeprefix("re:") for one in frozen)
        keys.put("tuning.train", [f"re:(?!{excepted}).*", *learning], *names)
    else:
        for name in names[2:]:
            keys.need_not(name, "Nothing is frozen, so all parameters learn.")


def _begins_or_has(keys: Keys, beginnings: str, expression: str) -> list[str]:
    """Return patterns of the names that begin with one of the first key's, or have what the second key looks for."""
    found = [f"re:{re.escape(name)}.*" for name in keys.names(beginnings)]
    given = keys.given.get(expression)
    return [*found, f"re:.*(?:{given}).*"] if given else found


def _quantization(keys: Keys, full: bool) -> None:
    bits, method = keys.given.get("quant_bits"), str(keys.given.get("quant_method") or "bnb")
    if not bits or full:
        keys.put("quant.type", "none", "quant_bits")
        if bits:
            keys.lose("quant_bits", "tuning.method: full learns in 16 bits.")
    elif str(bits) == "8" and method == "bnb":
        joint_settings.in_8_bits(keys, "quant_bits")
    else:
        if str(bits) != "4" or method != "bnb":
            keys.lose(
                "quant_method", f"{method} in {bits} bits: the base is stored as bitsandbytes does it. Here in 4."
            )
        keys.put("quant.type", str(keys.given.get("bnb_4bit_quant_type") or "nf4"), "quant_bits", "quant_method")
        keys.put("quant.double", True, "quant_bits")
        keys.carry("bnb_4bit_use_double_quant", "quant.double", to.flag)


def _trained(keys: Keys) -> None:
    """Set which tokens are trained. `loss_scale` is a strategy; after a + it may name what weighs differently."""
    pretrains = keys.tree.get("script") == "pt"
    if keys.settings.get("objective.name") != "sft":
        return
    asked = str(keys.given.get("loss_scale") or ("all" if pretrains else "default"))
    base, *others = asked.split("+")
    if base not in ("default", "last_round", "all"):
        base, others = "default", [base, *others]
    if pretrains:
        keys.assume("data.format", "text", "swift pt trains on texts, without a chat template")
        if keys.settings.get("data.on_too_long") == "split":
            return
    elif base == "all":
        keys.put("data.train_on.roles", "all", "loss_scale")
    else:
        keys.put("data.train_on.end", "last", "loss_scale")
        keys.origins["data.train_on.end"] = ["ms-swift trains the end of the last turn alone"]
        keys.assume("data.train_on.frame", "tail", "ms-swift's templates end an answer with its line break")
        if base == "last_round":
            keys.put("data.train_on.turns", "last", "loss_scale")
    if weighted := [name for name in others if name != "ignore_empty_think"]:
        keys.lose("loss_scale", f"{weighted[0]}: every trained token weighs the same.")
    elif others:
        keys.need_not("loss_scale", "An empty block of thinking is the chat template's, which decides where it is.")


def _data(keys: Keys) -> None:
    for name, setting in (("dataset", "data.train"), ("val_dataset", "data.eval")):
        if asked := keys.names(name):
            sources = [source for one in asked for source in _sources(keys, name, one)]
            used = ("model_name", "model_author") if any("replace" in source for source in sources) else ()
            keys.put(setting, sources, name, *(key for key in used if key in keys.given))
            keys.origins[setting] = [f"{name}: {' '.join(asked)}"[:200]]
    for name in ("model_name", "model_author"):
        if "swift/self-cognition" not in " ".join(keys.names("dataset")):
            keys.need_not(name, "It is for rows of swift/self-cognition alone.")
    if keys.given.get("columns"):
        keys.lose("columns", "Name the fields of the rows by data.fields.")
    if "data.held_out" in keys.settings and ("data.eval" in keys.settings or not keys.settings["data.held_out"]):
        keys.spare("data.held_out", "val_dataset is there, or nothing is held out.")
    if keys.settings.get("data.held_out") and keys.off("eval_strategy"):
        keys.spare("data.held_out", "ms-swift holds nothing out with eval_strategy: no.")
    if {"data.eval", "data.held_out"} & set(keys.settings) and not keys.given.get("eval_strategy"):
        steps = "eval_steps" if keys.given.get("eval_steps") else "save_steps"
        if keys.given.get("save_strategy") in ("epoch",):
            keys.put("eval.per_epoch", 1, "save_strategy")
        elif steps == "save_steps":
            keys.put("eval.every", keys.settings.get("checkpoint.every_steps", 500), "save_steps")


def _sources(keys: Keys, key: str, given: str) -> list[dict[str, Any]]:
    """Return the sources of `owner/name:subset#rows`, or of a file or folder with `#rows`."""
    found = _SYNTAX.fullmatch(given.strip())
    if found is None or given.startswith("<"):
        keys.lose(key, f"{given} is no name of a data set, and no path.")
        return [{"path": "FILL-IN"}]
    path, subset, rows = found["path"].strip(), found["subset"], int(found["rows"] or 0)
    known: Mapping[str, Any] = keys.peer.tables["public_sets"].get(path, {})
    on_hub = keys.asked("use_hf") or (found["hub"] or "").lower() == "hf"
    if known.get("made"):
        keys.lose(key, f"{path}: ms-swift changes its rows by code: {known['made']}. Write such rows into a file.")
    if is_hub_dataset(path) and not known and not on_hub:
        keys.to_do.append(
            f"data.train: {path} is its name on ModelScope, whose data sets Capstan does not read. Give the path of its"
            " rows, or its name on the Hub."
        )
    parts: dict[str, Any] = {name: known.get(name) for name in ("format", "fields")}
    about_itself = path == "swift/self-cognition"
    if about_itself and (around := keys.peer.tables["self_cognition"].get(subset)):
        parts = {"format": parts["format"], "write": around}
    subset = None if known else subset
    taken = {"take": rows, "take_seed": keys.whole("data_seed", 42)} if rows else {}
    if pretrained := keys.settings.get("data.format"):
        parts = {name: None for name in parts} if pretrained == "text" else parts
    changed = _of_itself(keys) if about_itself else [{name: known.get(name) for name in ("replace", "without")}]
    paths = source_paths(str(known.get("hub", path)))
    return [source for change in changed for source in sources_at(paths, {**parts, **change, **taken}, subset)]


def _of_itself(keys: Keys) -> list[dict[str, Any]]:
    """Return the parts of the sources of rows about who the model is: {{NAME}} and {{AUTHOR}} are replaced in them.

    A first name is for rows in Chinese, and a second one for the others. If they differ there is a source for each.
    """
    named = {
        mark: _two(keys.given.get(key)) for key, mark in (("model_name", "{{NAME}}"), ("model_author", "{{AUTHOR}}"))
    }
    chinese, other = ({mark: two[index] for mark, two in named.items() if two} for index in (0, 1))
    if chinese == other:
        return [{"replace": other}]
    return [{"replace": chinese, "without": {"tag": "en"}}, {"replace": other, "without": {"tag": "zh"}}]


def _two(given: Any) -> tuple[str, str] | None:
    names = [] if given in (None, "") else [str(one) for one in given] if isinstance(given, list) else [str(given)]
    return (names[0], names[-1]) if names else None
