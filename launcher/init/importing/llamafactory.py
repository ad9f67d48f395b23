"""LLaMA-Factory's keys that make settings together.

They are stage and fine-tuning type, quantization, and data sets of dataset_info.json.
"""

import json
from pathlib import Path
from typing import Any

from launcher.init.importing import joint_settings
from launcher.init.importing.mapping import MEDIA, Keys, no_training, source_paths, sources_at
from trainer.config.peers import conversions as to
from trainer.data.format.formats import FORMATS
from trainer.errors import NOT_JSON, ConfigError

_ITS_DEMOS = "REMOTE:llamafactory/"  # the Hub has them, too
_BESIDE = ("images", "videos", "audios")
"""The columns of files beside the texts."""


def join(keys: Keys) -> None:
    """Make all settings that several keys make together."""
    for name in ("ray_num_workers", "num_processes", "nproc_per_node", "num_gpus"):
        joint_settings.workers(keys, name)
    predicts = keys.asked("do_predict") and not keys.asked("do_train")
    if keys.asked("export_dir") or predicts or not (keys.given.get("stage") or keys.given.get("dataset")):
        raise no_training("a file for chats, predictions or merges")
    if not keys.given.get("stage"):
        keys.to_do.append("objective.name: sft, LLaMA-Factory's default, as the file names no stage.")
    _method(keys)
    _objective(keys)
    joint_settings.training_arguments(keys)
    if keys.settings["objective.name"] != "reward":
        joint_settings.without_dropout(keys, "lora_dropout")
    if str(keys.get("stage")) != "pt":
        keys.note(
            "cutoff_len", "There prompt and answer of a longer row are both shortened; here the row loses its end."
        )
    if keys.asked("use_kt"):
        keys.note(
            "use_kt",
            "The base stays in the host's memory. KTransformers also computes experts there, Capstan on the GPU.",
        )
    joint_settings.template(keys, "template", keys.given.get("template"))
    _thinking(keys)
    if keys.asked("use_muon"):
        keys.put("optim.name", "muon", "use_muon")
    if keys.asked("create_new_adapter"):
        keys.drop(
            "tuning.start",
            "create_new_adapter: merge the adapter that is there (capstan export --format merged), and give that as"
            " model.base.",
        )
    _data(keys)
    forms = [str(source.get("format")) for source in keys.settings.get("data.train") or []]
    if any(form.endswith("pictures") for form in forms):
        _with_pictures(keys)
    joint_settings.streamed(keys, "streaming")
    joint_settings.without_evaluation(keys)


def _thinking(keys: Keys) -> None:
    """Set what answers without a thought begin with, for templates that write an empty block into each of them."""
    asked, stage = str(keys.given.get("template") or ""), str(keys.get("stage"))
    if stage != "sft" or asked not in keys.peer.tables["reasoning"].split():
        return
    if str(keys.given.get("enable_thinking")).lower() in ("false", "0", "no"):
        keys.put("data.thinking", "always", "enable_thinking")
        keys.note("enable_thinking", "There thoughts that the rows have are removed, and here they stay.")
    elif not keys.asked("mask_history"):
        keys.to_do.append(
            f"data.thinking: LLaMA-Factory's template {asked} writes an empty block of thinking into every answer that"
            " has none and trains it, and keeps all thoughts. Here the chat template decides, which most often does so"
            " in the last answer alone. Look at rows of several answers with `capstan data show`, and set always or"
            " keep."
        )


def _with_videos(keys: Keys) -> None:
    """Set the limits of videos, the tool's own included."""
    for name, setting, usual in (
        ("video_maxlen", "data.videos.max_frames", 128),
        ("video_max_pixels", "data.videos.max_pixels", 256 * 256),
    ):
        keys.carry(name, setting, to.whole)
        if setting not in keys.settings:
            keys.assume(setting, usual, f"LLaMA-Factory's default of {name}")
    for name in ("video_fps", "video_min_pixels"):
        keys.lose(name, "The base's own processor chooses the frames of a video, and their size.")


_PIXELS = (
    ("image_max_pixels", "data.images.max_pixels", 768 * 768),
    ("image_min_pixels", "data.images.min_pixels", 32 * 32),
)
"""LLaMA-Factory brings every picture within these limits, and then the base's processor gets it."""


def _with_pictures(keys: Keys) -> None:
    """Set what rows with pictures ask for. Their paths begin in `media_dir`, or else in the folder of the data."""
    joint_settings.with_pictures(keys, "dataset", answers=True)
    folder = keys.given.get("media_dir") or keys.given.get("dataset_dir") or "data"
    if isinstance(folder, str) and not folder.startswith("REMOTE:") and folder != "ONLINE":
        place = next((place for place in keys.places(folder) if place.exists()), Path(folder))
        keys.put("data.images.root", str(place), "media_dir")
    for name, setting, pixels in _PIXELS:
        keys.carry(name, setting, to.whole)
        if setting not in keys.settings:
            keys.assume(setting, pixels, f"LLaMA-Factory's default of {name}")
    if keys.asked("use_audio_in_video"):
        keys.lose("use_audio_in_video", "The model sees a video and does not hear it. A sound is a file of its own.")
    keys.lose("audio_sampling_rate", "A sound has the sampling rate of the base's own processor.")
    for name in ("image_do_pan_and_scan", "crop_to_patches"):
        keys.lose(name, "The base's own processor decides the size in which a picture is seen.")
    for name in ("freeze_vision_tower", "freeze_multi_modal_projector"):
        if keys.given.get(name) is False:
            keys.lose(name, "tuning.towers: lora gives adapters to both encoder and projector, never to one alone.")


def _method(keys: Keys) -> None:
    """Set the method and the storage of the base. LLaMA-Factory says both together.

    Its adapters of a quantized base are QLoRA's.
    """
    kind = str(keys.get("finetuning_type"))
    low_rank = kind not in ("full", "freeze")
    if kind not in ("lora", "full", "freeze", "oft"):
        raise no_training(f"finetuning_type: {kind}", "docs/methods.md lists the methods.")
    joint_settings.method(keys, "finetuning_type", not low_rank, {"use_rslora": "rslora", "use_dora": "dora"})
    if kind == "freeze":
        joint_settings.layers_that_learn(keys, "")
    bits = keys.given.get("quantization_bit")
    if kind == "oft":
        _oft(keys)
    elif low_rank:
        keys.put("tuning.alpha", 2.0 * keys.whole("lora_rank", 8), "lora_rank")
        keys.carry("lora_alpha", "tuning.alpha", to.number)
    if low_rank and not bits and "quant.type" in keys.settings:  # accelerate's file has it
        return
    if not low_rank or not bits:
        keys.put("quant.type", "none", "quantization_bit", "finetuning_type")
        return
    of_bnb = str(keys.given.get("quantization_method") or "bnb").lower() in ("bnb", "bitsandbytes")
    joint_settings.in_bits(keys, "", of_bnb)


def _oft(keys: Keys) -> None:
    keys.put("tuning.method", "oft", "finetuning_type")
    for name in ("rank", "alpha", "dropout"):
        keys.spare(f"tuning.{name}", "tuning.method: oft has rotations, and no matrices of a rank.")
    keys.carry("oft_target", "tuning.targets", to.targets)
    keys.carry("oft_block_size", "tuning.block", to.whole)


def _objective(keys: Keys) -> None:
    """Set the objective by the stage and the loss over pairs, and whether rows are packed.

    In LLaMA-Factory packing depends on the stage.
    """
    stage, stages, losses = str(keys.get("stage")), keys.peer.tables["stages"], keys.peer.tables["losses"]
    if stage not in stages:
        raise no_training(f"stage: {stage}")
    keys.put("objective.name", stages[stage], "stage")
    loss = str(keys.given.get("pref_loss") or "sigmoid")
    if stage == "dpo" and loss in losses:
        for setting, value in losses[loss].items():
            keys.put(setting, value, "pref_loss")
    elif stage == "dpo":
        keys.lose("pref_loss", f"{loss} is none of sigmoid, hinge, ipo, orpo and simpo. Left at sigmoid.")
    if keys.settings["objective.name"] == "simpo":
        joint_settings.simpo(keys)
    joint_settings.uncertainty(keys, "use_eaft_loss", scale=3.0)
    packed = [name for name in ("packing", "neat_packing") if keys.asked(name)]
    asked = bool(packed) or (stage == "pt" and keys.given.get("packing") is None)
    keys.put("data.packing", asked and keys.settings["objective.name"] == "sft", *(packed or ["packing"]))
    if stage == "pt" and keys.settings["data.packing"]:
        keys.assume("data.on_too_long", "split", "stage: pt puts texts behind each other, and cuts them into rows")
    if stage == "sft" and keys.asked("train_on_prompt"):
        keys.put("data.train_on.roles", "all", "train_on_prompt")
        if keys.asked("mask_history"):
            keys.lose(
                "mask_history", "LLaMA-Factory refuses it beside train_on_prompt, which trains all of a conversation."
            )
    elif stage == "sft" and keys.asked("mask_history"):
        keys.put("data.train_on.turns", "last", "mask_history")
    if stage == "sft":
        keys.assume("data.train_on.frame", "tail", "LLaMA-Factory's templates end an answer with its line break")


def _data(keys: Keys) -> None:
    for name, setting in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        asked = keys.names(name)
        if not asked:
            continue
        info, place = _dataset_info(keys)
        sources = [source for one in asked for source in _sources(keys, name, one, info, place)]
        keys.put(setting, sources, name, "dataset_dir", *(("max_samples",) if keys.whole("max_samples") else ()))


def _dataset_info(keys: Keys) -> tuple[dict[str, Any], Path]:
    """Return the content of dataset_info.json.

    The file lies in `dataset_dir`: beside the file, above it, or here; or in the place that is named.
    """
    if keys.data_info is not None:
        try:
            return json.loads(keys.data_info.read_text(encoding="utf-8")), keys.data_info.parent
        except (OSError, *NOT_JSON) as error:
            raise ConfigError(f"--data-info: {keys.data_info} cannot be read as JSON: {error}.") from error
    given = keys.given.get("dataset_dir") or "data"
    if isinstance(given, dict):
        return given, keys.folder
    for place in keys.places(str(given)):
        try:
            return json.loads((place / "dataset_info.json").read_text()), place
        except (OSError, *NOT_JSON):
            continue
    remote = str(given).removeprefix("REMOTE:")
    return {}, Path(remote if remote == str(given) else f"hf:/{remote}")


def _sources(keys: Keys, key: str, name: str, info: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    given = info.get(name) or _public_set(keys, name, place)
    if not isinstance(given, dict):
        if media := next((key for key in keys.peer.tables["media"].split() if keys.asked(key)), None):
            keys.to_do.append(
                f"data.train: {media} limits {MEDIA}, and nothing here says whether rows of {name} have any. If they"
                " have, name the file that describes them by --data-info."
            )
        if keys.given.get("dataset_dir") == "ONLINE":
            return [{"path": path} for path in source_paths(name)]
        keys.lose(
            key,
            f"dataset_info.json, which says what {name} is, is not in {place}. Name it by --data-info, or write the"
            " path of its rows into the configuration.",
        )
        return sources_at([f"{place}/{name}.json"], {"take": keys.whole("max_samples") or None})
    where = (
        given.get("hf_hub_url") or given.get("ms_hub_url") or given.get("om_hub_url") or given.get("cloud_file_name")
    )
    if given.get("script_url") or not (where or given.get("file_name")):
        keys.lose(
            key, f"{name} is made by a script, which is never run. Write the path of its rows into the configuration."
        )
    columns = given.get("columns") or {}
    if columns.get("videos"):
        _with_videos(keys)
    most = keys.whole("max_samples")
    taken: dict[str, Any] = {"take": most or None}
    if given.get("num_samples"):  # a random choice there too
        taken = {"take": min(filter(None, (to.whole(given["num_samples"]), most))), "take_seed": 42}
    form, fields = (
        _pictured(key, name, given) if any(columns.get(field) for field in _BESIDE) else _format(keys, key, name, given)
    )
    local = str(place / str(given.get("file_name") or name)).replace("hf:/", "hf://")
    paths = source_paths(str(where)) if where else [f"{local}/*" if Path(local).is_dir() else local]
    return sources_at(paths, {"format": form, "fields": fields, **taken}, given.get("subset"), given.get("split"))


def _public_set(keys: Keys, name: str, place: Path) -> dict[str, Any] | None:
    """Return a data set that comes with LLaMA-Factory, or that it knows by this name, as dataset_info.json has it."""
    known, folder = keys.peer.tables["public_sets"].get(name), str(keys.given.get("dataset_dir") or "")
    if known is None or (folder and not folder.startswith(_ITS_DEMOS)):
        return None
    if "file_name" in known and not folder:
        keys.to_do.append(
            f"data: {place / known['file_name']} comes with LLaMA-Factory. Give the path that it has here."
        )
    columns = {"messages": "messages"} if known.get("formatting") == "openai" else {}
    return {**known, "columns": {**columns, **known.get("columns", {})}}


def _pictured(key: str, name: str, given: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """As `_format`, for rows with pictures."""
    if given.get("formatting", "alpaca") == "alpaca":
        raise no_training(f"{key}: {name}, whose rows have pictures and are no conversations")
    columns, beside = {"messages": "conversations", **given["columns"]}, {name: name for name in _BESIDE}
    if given.get("ranking"):
        answers = {"chosen": "chosen", "rejected": "rejected"}
        return _with_fields("preference_pictures", {"messages": "prompt", **answers, **beside}, {**answers, **columns})
    if columns.get("kto_tag"):
        return _with_fields("labelled_pictures", {"messages": "prompt", "kto_tag": "label", **beside}, columns)
    return _with_fields("pictures", {"messages": "messages", **beside}, columns)


def _format(keys: Keys, key: str, name: str, given: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the format of the rows, and the names of its fields: LLaMA-Factory's columns and tags."""
    columns, tags = given.get("columns") or {}, given.get("tags") or {}
    conversation = given.get("formatting", "alpaca") != "alpaca"
    plain = (tags.get("role_tag", "from"), tags.get("content_tag", "value")) == ("role", "content")
    openai = given.get("formatting") == "openai" or plain
    for tag, usual in keys.peer.tables["tags"].items():
        if tags.get(tag) and tags[tag] not in usual:
            keys.lose(
                key,
                f"{name}: the role {tags[tag]} is unknown; roles are system, user (human), assistant (gpt) and tool.",
            )
    if keys.settings.get("objective.name") == "sft" and str(keys.get("stage")) == "pt":
        return _with_fields("text", {"prompt": "text"}, {"prompt": columns.get("prompt", "instruction")})
    kind = "sharegpt" if conversation else "alpaca"
    table = keys.peer.tables["columns"][kind]
    asked = {"messages": "conversations", **columns} if conversation else columns
    if given.get("ranking"):
        return _with_fields(f"preference_{kind}", {**table, "chosen": "chosen", "rejected": "rejected"}, asked)
    if columns.get("kto_tag"):
        return _with_fields(
            "labelled_messages" if conversation else "labelled_alpaca", {**table, "kto_tag": "label"}, asked
        )
    return _with_fields("chat" if openai and conversation and not columns.get("system") else kind, table, asked)


def _with_fields(form: str, table: dict[str, str], columns: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return a format, and the names of its fields in the rows if they are not those that the format looks for."""
    named = {ours: str(columns[theirs]) for theirs, ours in table.items() if columns.get(theirs)}
    return form, {
        ours: name
        for ours, name in named.items()
        if ours in FORMATS[form].fields and FORMATS[form].called(ours)[0] != name
    }
