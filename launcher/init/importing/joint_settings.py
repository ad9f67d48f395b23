"""Settings that follow from several keys at once, by the names that most peers give them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.init.importing.mapping import Keys, no_training
from trainer.config.objective import HEADS
from trainer.config.peers import conversions as to
from trainer.config.peers.conversions import Inconvertible
from trainer.config.reading import read_yaml
from trainer.config.section import EXPRESSION
from trainer.errors import ConfigError

OF_ANSWERS = ("dpo", "orpo", "simpo", "kto", "reward")
"""Objectives that compare answers, or judge whole ones."""
_DPO_LOSSES = ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down")
_OF_FULL = ("tuning.method", "tuning.train")
# These are LLaMA-Factory's templates of Qwen's. They are ChatML to the last character except for tools, over a base
# whose own template has thoughts.
_WITHOUT_THOUGHTS = ("qwen3_nothink", "qwen3_5_nothink")


def workers(keys: Keys, name: str) -> None:
    """Set `cluster.workers`, unless it is known already."""
    if keys.whole(name) > 0 and "cluster.workers" not in keys.settings:
        keys.put("cluster.workers", keys.whole(name), name)


def variables(keys: Keys) -> dict[str, Any]:
    """Return the variables of the environment that the file sets, by a section or on its command line."""
    section = keys.tree.get("ENV")
    return {**(section if isinstance(section, dict) else {}), **keys.variables}


def devices(keys: Keys) -> None:
    """Set `cluster.workers` to the processes that torchrun, accelerate or the environment's variables ask for."""
    counts = [str(variables(keys).get(name) or 1) for name in ("NPROC_PER_NODE", "NNODES")]
    asked = math.prod(int(count) if count.isdigit() else 1 for count in counts)
    for name in ("num_processes", "nproc_per_node", "num_gpus"):
        workers(keys, name)
    if asked > 1 and "cluster.workers" not in keys.settings:
        keys.assume("cluster.workers", asked, "NPROC_PER_NODE and NNODES")


def parallel(keys: Keys, *sizes: str) -> None:
    """Set `cluster.workers` to the product of all `sizes`, if the file names the first or the second of them.

    The other sizes alone leave open how many devices share the rest.
    """
    if any(keys.whole(name) > 1 for name in sizes[:2]) and "cluster.workers" not in keys.settings:
        named = [name for name in sizes if keys.whole(name, 1) > 1]
        keys.put("cluster.workers", math.prod(keys.whole(name) for name in named), *named)


def world(keys: Keys) -> int:
    """Return the number of devices that a batch covers, as far as it is known."""
    return max(1, int(keys.settings.get("cluster.workers") or 1))


def batch(keys: Keys, micro: str) -> None:
    """Set `train.global_batch`: rows a device, times accumulation, times devices."""
    devices, accumulation = world(keys), "gradient_accumulation_steps"
    keys.put("train.global_batch", keys.whole(micro, 1) * keys.whole(accumulation, 1) * devices, micro, accumulation)
    if devices > 1:
        keys.origins["train.global_batch"].append(f"on {devices} GPUs")


def in_8_bits(keys: Keys, key: str) -> None:
    """Set `quant.type: int8`, which `key` asks for."""
    keys.put("quant.type", "int8", key)
    keys.note(key, "A scale for 64 weights, where bitsandbytes has one for a row; and activations stay in 16 bits.")


def in_bits(keys: Keys, section: str, bnb: bool, *others: str) -> None:
    """Set `quant.type` and `quant.double` of a base in the bits that LLaMA-Factory's `section` asks for.

    With `bnb` they are in bitsandbytes' form. `others` are keys that say no more than that.
    """
    bits, kind = f"{section}quantization_bit", f"{section}quantization_type"
    if keys.whole(bits) == 8 and bnb:
        in_8_bits(keys, bits)
        return
    if keys.whole(bits) != 4 or not bnb:
        keys.lose(bits, "The base is stored as bitsandbytes does it in 4 or 8 bits, or in 16. Here in 4.")
    keys.put("quant.type", str(keys.given.get(kind) or "nf4"), bits, kind, *others)
    keys.put("quant.double", True, bits)
    keys.carry(f"{section}double_quantization", "quant.double", to.flag)


def uncertainty(keys: Keys, switch: str, scale: float) -> None:
    """Set `objective.eaft`, whose entropies the peer divides by `scale`."""
    if keys.asked(switch):
        power = keys.given.get("eaft_alpha")
        keys.attempt(switch, lambda: {"objective.eaft": to.number(1.0 if power is None else power)})
        keys.put("objective.eaft", keys.settings.get("objective.eaft"), switch, "eaft_alpha")
        keys.put("objective.eaft_scale", scale, switch)
        keys.carry("eaft_k", "objective.eaft_tokens", to.whole)
    else:
        for name in ("eaft_alpha", "eaft_k"):
            keys.need_not(name, f"It has no effect without {switch}.")


def method(keys: Keys, key: str, full: bool, switches: Mapping[str, str]) -> str:
    """Set `tuning.method`: full, or the variant of LoRA that one of the `switches` asks for, or LoRA itself."""
    asked = [switch for switch in switches if not full and keys.asked(switch)]
    if len(asked) > 1:
        keys.lose(asked[0], "dora is scaled by alpha / rank. tuning.method is dora or rslora.")
    name = "full" if full else switches[asked[-1]] if asked else "lora"
    keys.put("tuning.method", name, key, *asked[-1:])
    for setting in [name for name in keys.settings if full and name.startswith("tuning.") and name not in _OF_FULL]:
        keys.spare(setting, "The base itself learns, and the key of an adapter has no effect there either.")
    return name


def divided(keys: Keys, *sizes: str) -> None:
    """Count ranks that share one row, by the product of these keys, as one of the batch."""
    together, devices = math.prod(max(1, keys.whole(name, 1)) for name in sizes), world(keys)
    if together > 1 and devices % together == 0:
        rows = int(keys.settings["train.global_batch"]) // devices * (devices // together)
        keys.put("train.global_batch", rows, "gradient_accumulation_steps")
        keys.origins["train.global_batch"].append(f"on {devices} GPUs, of which {together} share a row")


def layers_that_learn(keys: Keys, section: str) -> None:
    """Set `tuning.train` to the layers and modules that LLaMA-Factory's freeze-tuning leaves to learn.

    By default these are the last two layers. A negative number counts the first ones.
    """
    names = [f"{section}freeze_{what}" for what in ("trainable_layers", "trainable_modules", "extra_modules")]
    count = keys.whole(names[0], 2)
    modules = keys.names(names[1]) or ["all"]
    numbers = [-number for number in range(count, 0, -1)] if count > 0 else range(-count)
    inside = [f"*.{number}.{'' if name == 'all' else name}*" for name in modules for number in numbers]
    keys.put("tuning.train", [*inside, *(f"*{name}*" for name in keys.names(names[2]))], *names)


def simpo(keys: Keys) -> None:
    """Set SimPO's strengths if the file names none: the peers' defaults differ from ours."""
    keys.settings.setdefault("objective.beta", 0.1)
    keys.settings.setdefault("objective.gamma", 0.5)


def ipo(keys: Keys) -> None:
    """Tell the user that the peers take IPO's margin for a token, and its authors for an answer."""
    if keys.settings.get("objective.loss_type") == "ipo":
        keys.to_do.append(
            f"objective.loss_type: {keys.peer.title}'s ipo takes the mean over an answer's tokens, and here it is their"
            " sum, as in the paper. A margin of 1 / (2 beta) is that of whole answers: divide objective.beta by the"
            " tokens that your answers have."
        )


def streamed(keys: Keys, *names: str) -> None:
    """Tell the user to limit rows that the peer reads while training: here a whole source is compiled first."""
    asked = [name for name in names if keys.asked(name) or isinstance(keys.tree.get(name), list)]
    whole = [source["path"] for source in keys.settings.get("data.train") or () if not source.get("take")]
    if not (asked and whole and keys.settings.get("train.steps")):
        return
    rows = int(keys.settings["train.steps"]) * int(keys.settings.get("train.global_batch", 1))
    for name in asked:
        keys.need_not(name, "Rows are compiled before the first step; a source's take says how many of them.")
    keys.to_do.append(
        f"data.train: {keys.peer.title} reads rows of {whole[0]} while it trains, as many as the steps need. Here all"
        f" of them are compiled first: give it take, such as {rows} without packing."
    )


def dpo_loss(keys: Keys, key: str, losses: Sequence[str]) -> None:
    """Set DPO's function of an answer's pair, of which some peers have several and more."""
    if len(losses) > 1 or losses[0] not in _DPO_LOSSES:
        keys.lose(key, f"objective.loss_type is one of {', '.join(_DPO_LOSSES)}. Left at sigmoid.")
    else:
        keys.put("objective.loss_type", losses[0], key)


def without_next_tokens(keys: Keys) -> None:
    """Tell the user that TRL's SimPO has CPO's term by default, and ours does not."""
    if keys.given.get("cpo_alpha") is None:
        keys.to_do.append(
            "objective.name: TRL adds the chosen answer's next-token loss to SimPO's, as cpo_alpha is 1 there where"
            " none is given; here it is SimPO alone."
        )


def duration(keys: Keys) -> None:
    """Set `train.steps` if the number of steps is limited. The limit then overrides epochs."""
    limit = keys.whole("max_steps")
    if limit > 0:
        keys.spare("train.epochs", "max_steps limits the run: train.steps.")
        keys.put("train.steps", limit, "max_steps")


def betas(keys: Keys) -> None:
    """Set `optim.betas`."""
    names = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    given = [name for name in names if keys.get(name) is not None]
    if given:
        keys.attempt(given[-1], lambda: {"optim.betas": [to.number(keys.get(name) or names[name]) for name in names]})
        if "optim.betas" in keys.settings:
            keys.put("optim.betas", keys.settings["optim.betas"], *given)


def schedule(keys: Keys, key: str) -> None:
    """Set the settings of `optim.schedule` beside its name, in `key`: warm-up, and the scheduler's own arguments."""
    if keys.settings.get("optim.schedule") == "polynomial" and (rate := keys.settings.get("optim.lr")):
        keys.settings["optim.min_lr_ratio"] = round(1e-7 / rate, 12)  # transformers' default of lr_end
    keys.carry("cosine_min_lr_ratio", "optim.min_lr_ratio", to.number)
    arguments = keys.given.get("lr_scheduler_kwargs")
    if isinstance(arguments, dict) and arguments:
        keys.attempt("lr_scheduler_kwargs", lambda: _arguments(arguments, keys.settings))
    if str(keys.get(key)) == "constant":
        why = f"The rate of {key}: constant does not rise first; that of constant_with_warmup does."
        for name in ("optim.warmup_steps", "optim.warmup_ratio"):
            keys.spare(name, why)


def _arguments(arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    lr, steps, made = float(settings.get("optim.lr") or 1.0), settings.get("train.steps"), dict[str, Any]()
    for name, value in arguments.items():
        match name:
            case "min_lr_rate" | "min_lr_ratio":
                made["optim.min_lr_ratio"] = to.number(value)
            case "min_lr" | "eta_min" | "lr_end":
                made["optim.min_lr_ratio"] = round(to.number(value) / lr, 12)
            case "num_cycles" if settings.get("optim.schedule") == "cosine_with_restarts":
                made["optim.cycles"] = to.whole(value)
            case "power":
                made["optim.power"] = to.number(value)
            case "num_decay_steps" if steps:
                made["optim.decay_ratio"] = to.number(value) / steps
            case "num_warmup_steps" | "warmup_type" | "decay_type":
                pass
            case _:
                raise Inconvertible(f"{name}: docs/configuration.md lists what optim.schedule has beside it.")
    return made


def evaluating_and_saving(keys: Keys) -> None:
    """Set `eval.every` or `eval.per_epoch`, and `checkpoint.every_steps` or `per_epoch`."""
    _rhythm(keys, ("eval_strategy", "evaluation_strategy"), "eval", "eval.every", "eval.per_epoch")
    if keys.off("save_strategy"):
        keys.put("checkpoint.every_steps", 0, "save_strategy")
    else:
        _rhythm(keys, ("save_strategy",), "save", "checkpoint.every_steps", "checkpoint.per_epoch")


def _rhythm(keys: Keys, strategies: Sequence[str], what: str, by_steps: str, by_epoch: str) -> None:
    """Set how often `what` is done. Peers count steps, shares of all steps, or times an epoch."""
    steps, times = f"{what}_steps", f"{what}s_per_epoch"
    given = [name for name in strategies if keys.given.get(name) or keys.off(name)]
    if any(keys.given[name] == "epoch" for name in given):
        keys.put(by_epoch, 1, *given)
    elif keys.given.get(times):
        keys.attempt(times, lambda: {by_epoch: to.passes(keys.given[times])})
    elif keys.given.get(steps) and not any(map(keys.off, given)):
        keys.attempt(steps, lambda: _in_steps(keys, steps, by_steps, by_epoch))


def _in_steps(keys: Keys, key: str, by_steps: str, by_epoch: str) -> dict[str, Any]:
    """Return a number of steps, or a number of times an epoch.

    A share of all steps is so many times an epoch, or a number of steps if their total is given.
    """
    value = to.number(keys.given[key])
    if not 0 < value < 1:
        return {by_steps: to.steps(keys.given[key])}
    if steps := keys.settings.get("train.steps"):
        return {by_steps: math.ceil(value * steps)}
    return {by_epoch: round(1 / (value * float(keys.settings.get("train.epochs") or 1)), 6)}


def early_end(keys: Keys, patience: str) -> None:
    """Set `train.stop_when`. `patience` is the key for evaluations that are no better."""
    if keys.whole(patience) > 0:
        keys.put("train.stop_when.no_better", keys.whole(patience), patience)
        keys.settings.setdefault("checkpoint.keep_best", 1)
    if keys.given.get("loss_watchdog_threshold"):
        name = "loss_watchdog_threshold"
        keys.attempt(name, lambda: {"train.stop_when.loss_above": to.number(keys.given[name])})
        keys.put(
            "train.stop_when.loss_steps", max(1, keys.whole("loss_watchdog_patience", 3)), "loss_watchdog_patience"
        )


def without_evaluation(keys: Keys) -> None:
    """Remove evaluations if there is nothing to evaluate on, as the peers do."""
    if not {"data.eval", "data.held_out"} & {name for name, value in keys.settings.items() if value}:
        for name in ("eval.every", "eval.per_epoch", "checkpoint.keep_best", "train.stop_when.no_better"):
            keys.spare(name, "The file has no evaluation data, so nothing is evaluated.")


def pairs(keys: Keys, *names: str) -> None:
    """Set `data.sequence_length` for answers that are compared.

    Two of them lie in one row, while the peers' limit is that of one answer.
    """
    if keys.settings.get("objective.name") in OF_ANSWERS and keys.settings.get("data.sequence_length"):
        keys.put("data.sequence_length", 2 * int(keys.settings["data.sequence_length"]), *names)
        keys.origins["data.sequence_length"].append("twice that, as both answers with their prompts lie in one row")


def without_dropout(keys: Keys, name: str) -> None:
    """Remove the dropout. TRL's trainers of preferences set every dropout to 0, unless they are told not to."""
    compares = keys.settings.get("objective.name") in OF_ANSWERS
    if compares and str(keys.given.get("disable_dropout", True)) != "False":
        keys.spare("tuning.dropout", f"TRL sets {name} to 0 for objective.name: {keys.settings['objective.name']}.")


def head(keys: Keys) -> None:
    """Remove the head from the modules that learn whole. PEFT is told of it by name; here it learns in any case."""
    if keys.settings.get("objective.name") in HEADS and keys.settings.get("tuning.modules_to_save") == ["score"]:
        keys.spare("tuning.modules_to_save", "The head of such a model learns in any case.")


def _bare(name: str) -> str:
    """Return the letters and digits of a name.

    By these Qwen/Qwen2.5-7B is of the family qwen_25, and DeepSeek-V3 of deepseek3.
    """
    return re.sub(r"[^a-z0-9]|(?<![a-z])v(?=[0-9])", "", name.lower())


def _is_of(base: str, asked: str) -> bool:
    """Return whether a template is that of the base's family.

    The template's last word may name some of the family's models: those that see, or those that do not think. A
    template may also have the name of an older family, as that of Qwen2.5-Omni is qwen2_omni.
    """
    family, _, kind = asked.replace("-", "_").rpartition("_")
    of_kind = kind in ("unified", "vision") or (kind == "nothink" and "instruct" in base.lower())
    of_kind = of_kind or (kind in ("instruct", "thinking") and kind in base.lower())
    other = to.words("templates_of_families").get(asked)
    return _bare(family if of_kind else asked) in _bare(base) or bool(other and re.search(other, _bare(base)))


def template(keys: Keys, key: str, name: Any) -> None:
    """Set `data.template`, if `name` is one of ours.

    A name that the tokenizer's own template stands for needs no setting.
    """
    asked, known = str(name or "").lower(), to.words("templates")
    written = keys.peer.tables.get("chat_templates", {})
    if text := next((text for names, text in written.items() if asked in names.split()), None):
        keys.put("data.template", text, key)
    elif "{%" in asked or "{{" in asked:
        keys.put("data.template", str(name), key)
    elif ours := known.get(asked):
        keys.put("data.template", ours, key)
    elif asked and _is_of(str(keys.settings.get("model.base", "")), asked):
        keys.need_not(key, "The base's own tokenizer brings the template of its family.")
    elif asked in _WITHOUT_THOUGHTS:
        keys.put("data.template", "chatml", key)
        keys.note(key, "Like theirs it writes no thoughts. It writes no tools either.")
    elif asked and not asked.startswith(("tokenizer_default", "none", "jinja")):
        keys.lose(
            key,
            f"{name} is none of ours ({', '.join(dict.fromkeys(known.values()))}). The tokenizer's own is taken;"
            " `capstan data show` shows its text.",
        )


def offloading(keys: Keys) -> None:
    """Set `sharding.deepspeed`, from a DeepSpeed configuration (a path or its content) and FSDP's."""
    given = keys.given.get("deepspeed")
    content = {
        name.removeprefix("deepspeed."): value for name, value in keys.given.items() if name.startswith("deepspeed.")
    }
    if given or content:
        keys.attempt("deepspeed", lambda: to.offload(_deepspeed(keys, given or content)))
    for name in (
        "fsdp_config",
        "fsdp_config.offload_params",
        "fsdp_config.fsdp_offload_params",
        "fsdp",
        "fsdp_cpu_offload",
    ):
        value = keys.given.get(name)
        inside = value.get("offload_params", value.get("fsdp_offload_params")) if isinstance(value, dict) else value
        if str(inside).lower() == "true" or (name == "fsdp" and "offload" in str(value)):
            keys.put("sharding.deepspeed", "zero3_offload_cpu", name)


def _deepspeed(keys: Keys, given: Any) -> Any:
    """Return the content of a DeepSpeed configuration if its file is at hand, else what was given."""
    found = isinstance(given, str) and next((place for place in keys.places(given) if place.is_file()), None)
    try:
        return read_yaml(found.read_text(), str(given)) if found else given
    except (OSError, ValueError, ConfigError):
        return given


def tokens(keys: Keys, *names: str) -> None:
    """Set `model.add_tokens`: the tokens that any of these keys lists."""
    if added := [token for name in names for token in keys.names(name)]:
        keys.put("model.add_tokens", list(dict.fromkeys(added)), *names)


def tracking(keys: Keys) -> None:
    """Set `track.trackers`, and the names of the run and its project there, by the peer's table of keys."""
    table = keys.peer.tables["tracking"]
    asked = list(keys.settings.get("track.trackers", []))
    for service, switches in table.get("services", {}).items():
        used = [switch for switch in switches.split() if keys.asked(switch)]
        if used and keys.given.get(f"use_{service}") is not False:
            asked += [service] if service not in asked else []
            keys.put("track.trackers", asked, *used)
    for setting in ("track.name", "track.project"):
        key = next((name for name in table[setting].split() if keys.given.get(name)), None)
        if key:
            keys.put(setting, str(keys.given[key])[:100], key)


def training_arguments(keys: Keys) -> None:
    """Make most of the above settings, for peers that take transformers' `TrainingArguments`.

    Method and objective must be known before. The peer's table has the keys.
    """
    table = keys.peer.tables["joint"]
    # The order matters: a batch is divided after it is known, a schedule reads the number of steps, and a sequence is
    # doubled once.
    parallel(keys, *table.get("devices", "").split())
    batch(keys, table["batch"])
    divided(keys, *table.get("sharing", "").split())
    duration(keys)
    betas(keys)
    evaluating_and_saving(keys)
    offloading(keys)
    if "optim.warmup_steps" in keys.settings and "optim.warmup_ratio" in keys.settings:
        if keys.settings["optim.warmup_steps"]:
            keys.spare("optim.warmup_ratio", "Steps of warm-up are given, which go before a ratio.")
        else:
            keys.spare("optim.warmup_steps", "0 steps of warm-up leave it to the ratio.")
    schedule(keys, table["schedule"])
    if "patience" in table:
        early_end(keys, table["patience"])
    ipo(keys)
    pairs(keys, table["length"])
    if "dropout" in table:
        without_dropout(keys, table["dropout"])
    head(keys)
    tokens(keys, *table.get("tokens", "").split())
    tracking(keys)


CONVERSATIONS = (None, "chat", "sharegpt", "pictures")
_PAIRS = (None, "preference", "preference_sharegpt", "preference_pictures")
_PICTURED = {
    "sft": ("pictures", CONVERSATIONS),
    "kto": ("labelled_pictures", (None, "labelled", "labelled_messages", "labelled_pictures")),
    **dict.fromkeys(("dpo", "orpo", "simpo", "reward"), ("preference_pictures", _PAIRS)),
}
"""The format of rows with pictures for an objective, and the formats whose rows it reads, too."""
_LANGUAGE_MODEL = re.compile(r"(?:model\\?\.)?(?:language_model|text_model)(?:\\?\.model)?(?=\\?\.layers)")
"""The path of the decoder in the classes that see, in an expression for paths of layers."""


def with_pictures(keys: Keys, *names: str, answers: bool = False) -> None:
    """Have all rows read as conversations with pictures, as the keys `names` ask for; with `answers`, also as pairs and
    judged answers. The tower stays as it is.

    Raises `ConfigError` if the training is another one, or some rows are none of these."""
    objective = keys.settings.get("objective.name", "sft")
    if objective not in _PICTURED or (objective != "sft" and not answers):
        raise no_training(f"{objective} of rows with pictures", "docs/pictures.md says what is trained with pictures.")
    whole, forms = _PICTURED[objective]
    for source in (source for setting in ("data.train", "data.eval") for source in keys.settings.get(setting) or []):
        if (form := source.pop("format", None)) not in forms:
            raise no_training(
                f"rows with pictures, and in {source.get('path')} rows of the format {form}",
                f"data.format: {whole} reads only conversations (docs/pictures.md). Turn those rows into conversations,"
                " or leave them out.",
            )
    keys.put("data.format", whole, *names)
    if keys.settings.get("model.attention") not in (None, "auto", "sdpa", "eager"):
        keys.drop("model.attention", "Rows with pictures need the attention kernel sdpa or eager.")
    if isinstance(targets := keys.settings.get("tuning.targets"), list):
        keys.settings["tuning.targets"] = [
            _LANGUAGE_MODEL.sub("model", one) if str(one).startswith(EXPRESSION) else one for one in targets
        ]
