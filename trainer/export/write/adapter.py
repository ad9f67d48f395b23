"""Exports what a committed checkpoint has learnt, without a GPU and without the base in memory.

If the base itself has learnt, the export is the whole model (trainer/export/write/merged.py). Otherwise the folder, on
a disk or in a bucket, holds the files of the run's method (for LoRA what PEFT's `save_pretrained` writes), the
tokenizer's files and a model card with the run's facts. The file without which nothing loads is written last, so a
killed export is not mistaken for a whole one.

The files are arranged for those that read them: as PEFT finds them (`as_peft_reads`), for the class that people load if
the base also sees or hears (`for_whole_class`), and expert by expert for vLLM (`per_expert_files`).
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_model import (
    composite_class,
    composite_model,
    model_config,
    saved_paths,
    whole_names,
)
from trainer.base.find.locate import base_files, describe_base, in_bucket
from trainer.base.find.small_files import PROCESSOR_FILES, TOKENIZER_PATTERNS, seen_files
from trainer.base.find.tokenizer import beside_no_config, tokenizer_files
from trainer.base.load.load import DTYPES
from trainer.config import Config, Model, Tuning
from trainer.data.render.chat_template import template_text
from trainer.errors import ConfigError, NotFound
from trainer.export.card import CardContent, cut_sentence, head_usage, model_card, peft_usage, sees
from trainer.export.destination import CARD, TRAINED, BytesWritten, check_destination
from trainer.export.trained import check_base_at_hand, trained_checkpoint, trained_directory
from trainer.export.write.merged import write_model
from trainer.model.towers import SEEING
from trainer.servers import TOWERS_IGNORED
from trainer.state.checkpoint.learnt_weights import LearntWeights
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.safetensors_index import INDEX_FILE
from trainer.store.store import Store, open_store
from trainer.tuning.experts import saved_as
from trainer.tuning.head import MODULE, WithHead, head_of
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS, PREFIX
from trainer.tuning.method import methods


def export_adapter(
    folder: Store,
    destination: Store,
    step: int | None = None,
    report: BytesWritten = lambda done, total: None,
    arranged: Callable[[Mapping[str, bytes], Model], Mapping[str, bytes]] = lambda files, model: files,
) -> CheckpointManifest:
    """Write what `step`, or the newest whole checkpoint, has learnt to `destination`.

    Returns the checkpoint's manifest.

    `report` is told of the progress if a whole model is written. `arranged` gives the adapter's files another layout,
    in the same order.

    Raises:
        NothingToResume: the run has no such checkpoint.
        StorageError: it is damaged, or a store fails.
        ConfigError: `destination` holds something other than a half export, or the base's folder is not here, or PEFT
            would load only a part of the adapter; if a whole model is written, also what `write_model` raises.
    """
    # This check comes before the shards are read, so it uses the files of every method.
    ours = [name for make in methods().values() for name in make(Tuning()).file_names]
    check_destination(destination, *ours, *TOKENIZER_PATTERNS, *PROCESSOR_FILES)
    manifest, config, method = trained_checkpoint(folder, step)
    check_destination(destination, *method.file_names, *TOKENIZER_PATTERNS, *PROCESSOR_FILES)
    if method.exports_model:
        write_model(folder, manifest, config, destination, report)
        return manifest
    check_base_at_hand(config.model, manifest)
    directory = trained_directory(folder, base_files(config.model), manifest)
    tokenizer = tokenizer_files(directory, config.model, template_text(config.data))
    tokenizer = {**seen_files(directory, config), **tokenizer}
    tokenizer = beside_no_config(tokenizer, directory, config.model.base)
    weights = LearntWeights(folder, manifest, DTYPES[config.model.dtype])
    exported = method.export(weights.whole, config.model)
    in_layout = arranged(exported.files, config.model)
    files = for_whole_class(in_layout, config.model)
    if in_layout is exported.files:  # in PEFT's own layout
        files = as_peft_reads(files, config.model, head_of(method))
    files = saying_it_is_cut(files, config)
    *names, last = files
    assert not any(fnmatch(last, pattern) for pattern in method.file_names), "a whole export would count as a half one"
    whole = composite_class(directory)
    grows = bool(config.model.add_tokens)
    usage = peft_usage(whole, grows=grows, sees=sees(folder, config, manifest)) if exported.library == "peft" else ""
    if (head := head_of(method)) is not None:
        usage = head_usage(head, sees=sees(folder, config, manifest))
    through = (
        " It was trained through the codes of its base (tuning.through: stored), so beside the base it is another model"
        " than the trained one, which --format merged as=stored writes."
    )
    ignored = f" {TOWERS_IGNORED}" if config.tuning.towers == "lora" else ""
    what = f"{exported.what} {TRAINED}.{through if method.through else ''}{ignored}"
    content = CardContent(exported.library, what, "adapter", usage)
    destination.put(CARD, model_card(folder, config, manifest, content))
    for name, content in {**{name: files[name] for name in names}, **tokenizer}.items():
        destination.put(name, content)
    destination.create(last, files[last])
    return manifest


def saying_it_is_cut(files: Mapping[str, bytes], config: Config) -> Mapping[str, bytes]:
    """Return `files`, an adapter, whose settings say so if the run has only the first layers of its base.

    The words are in `auto_mapping`. PEFT reads and keeps that setting for every method, and uses it only for an adapter
    without a task. PEFT warns of any setting that it does not know, and `layers_to_transform` would count the experts
    of a mixture as layers.
    """
    sentence = cut_sentence(config)
    described: dict[str, Any] = json.loads(files[PEFT_SETTINGS]) if PEFT_SETTINGS in files else {}
    if sentence is None or described.get("task_type") is None:
        return files
    described["auto_mapping"] = {"base_layers": config.model.layers, "remark": sentence}
    return {**files, PEFT_SETTINGS: json.dumps(described, indent=2, sort_keys=True).encode()}


_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def per_expert_files(files: Mapping[str, bytes], model: Model) -> dict[str, bytes]:
    """Return an adapter's files, name -> content, with the experts' adapters as vLLM reads them. `model` is the base.

    vLLM reads PEFT's stacked layout for those classes whose files hold a layer's experts as one tensor
    (`is_3d_moe_weight`, gpt-oss, Qwen3.5, Llama 4). For the others it expects the adapter of each matrix by itself,
    under the name that this matrix has in the files of the base: `...mlp.experts.3.gate_proj.lora_A.weight`,
    `...block_sparse_moe.experts.3.w1.lora_A.weight` (https://docs.vllm.ai/en/latest/features/lora, "Mixed 2D and 3D MoE
    adapters"; vllm/lora/model_manager.py). It has one rank and one scaling for the whole adapter.

    In a stack gate and up share their A; here each has a copy of it. Everything else stays as it was. An adapter
    without experts, or of a base whose files hold stacks, stays as it was as a whole.
    """
    described: dict[str, Any] = json.loads(files[PEFT_SETTINGS])
    weights, stacks = load(files[PEFT_WEIGHTS]), saved_as(describe_base(model).architecture)
    there = {name: saved for name, saved in stacks.items() if f"{PREFIX}{saved.b}.weight" in weights}
    if not there or not _stored_singly(model):
        return dict(files)
    empty = meta_model(model_config(base_files(model), model.layers))
    rank = next(iter(described["rank_pattern"].values()), described["r"])
    power = 0.5 if described["use_rslora"] else 1.0
    factor = math.pow(rank / described["r"], power)  # of the experts' scaling to that of the other adapters
    single, alone = set[str](), set[str]()
    for name, saved in there.items():
        a, b = (weights[f"{PREFIX}{part}.weight"] for part in saved)
        experts = empty.get_parameter(name).shape[0]
        up = b.view(len(b), -1, experts).permute(2, 0, 1)  # (E, outputs, rank)
        ups = _by_file(empty, name, up if factor == 1 else (up.float() * factor).to(up.dtype))
        if len(ups) < experts:
            continue  # the files hold the stack
        down = a.view(experts, -1, a.shape[1]).repeat(1, len(ups) // experts, 1)
        for kind, parts in (("lora_A", _by_file(empty, name, down)), ("lora_B", ups)):
            weights |= {f"{PREFIX}{path}.{kind}.weight": part.contiguous() for path, part in parts.items()}
        for part in saved:
            del weights[f"{PREFIX}{part}.weight"]
        single |= {path.rpartition(".")[2] for path in ups}
        alone.add(".".join(name.split(".")[-2:]))
    if not alone:
        return dict(files)
    others = set(described["target_parameters"]) - alone
    # These are linear layers that only PEFT must be told of by their weights, see `as_peft_reads`.
    linear = {name for name in others if name.endswith(".weight")}
    described["target_parameters"] = sorted(others - linear) or None
    single |= {name.removesuffix(".weight").rpartition(".")[2] for name in linear}
    described["target_modules"] = sorted({*described["target_modules"], *single})
    described |= {"r": rank, "rank_pattern": {}}
    content = save(weights, metadata={"format": "pt"})
    return {**files, PEFT_WEIGHTS: content, PEFT_SETTINGS: json.dumps(described, indent=2, sort_keys=True).encode()}


def _stored_singly(model: Model) -> bool:
    """Return whether the files of the base hold each expert's matrices by themselves.

    A base in a single file has no index. Then this returns True, and transformers' own conversion decides.
    """
    try:
        index = (
            open_store(model.base, setting="model.base").get(INDEX_FILE)
            if in_bucket(model.base)
            else (base_files(model) / INDEX_FILE).read_bytes()
        )
    except (NotFound, FileNotFoundError):
        return True
    return any(_ONE_EXPERT.search(name) for name in json.loads(index)["weight_map"])


def _by_file(model: PreTrainedModel, name: str, values: Tensor) -> dict[str, Tensor]:
    """Return `values` of the parameter `name` in the parts and under the names in which transformers would save it.

    The names lack `.weight`.
    """
    parts = revert_weight_conversion(model, {name: values})
    return {
        path.removesuffix(".weight"): torch.squeeze(part, 0) if part.ndim > 2 else part for path, part in parts.items()
    }


def as_peft_reads(files: Mapping[str, bytes], model: Model, head: WithHead | None = None) -> Mapping[str, bytes]:
    """Return `files`, an adapter, with all weights under names that PEFT loads.

    The adapter is for the base `model`, or for the class with its `head`. PEFT renames a LoRA adapter's weights, and
    its targets, by transformers' tables of the names in a base's files. For a few families it takes the names that the
    class has now for the names in its files. Then it loads only a part of the adapter, and only warns. Such weights are
    written under the names that the base's files would have for them. PEFT renames these to the right ones.

    Raises:
        ConfigError: PEFT would leave out some of them under either name.
    """
    described: dict[str, Any] = json.loads(files[PEFT_SETTINGS]) if PEFT_SETTINGS in files else {}
    if described.get("peft_type") != "LORA":
        return files
    weights = load(files[PEFT_WEIGHTS])
    lost = _left_out(described, weights, _loaded(model, head), weights)
    if not lost:
        return files
    layers = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in lost & weights.keys()}
    saved = saved_paths(_loaded(model, head), layers)
    renamed = {_renamed(name, saved) if name in lost else name: weight for name, weight in weights.items()}
    if lost := _left_out(described, renamed, _loaded(model, head), weights):
        layers = sorted({name.partition(".lora_")[0] for name in lost})
        raise ConfigError(
            f"--format peft: PEFT would load an adapter of this base without the weights of {layers[0]}"
            f"{f' and of {len(layers) - 1} more layers' if layers[1:] else ''}, as it takes their names for others. "
            "Take --format merged, which writes the whole model."
        )
    return {**files, PEFT_WEIGHTS: save(renamed, metadata={"format": "pt"})}


def _renamed(name: str, saved: Mapping[str, str | None]) -> str:
    path, lora, matrix = name.removeprefix(PREFIX).partition(".lora_")
    return f"{PREFIX}{saved[path] or path}{lora}{matrix}"


def _left_out(
    described: dict[str, Any], weights: Mapping[str, torch.Tensor], loaded: PreTrainedModel, names: Collection[str]
) -> set[str]:
    """Return the `names` whose weights PEFT leaves out as it loads `weights`.

    They include the names that PEFT makes of others and finds no place for.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        # PEFT stores in the settings what a base was loaded from, and makes no other use of it.
        adapted = get_peft_model(loaded, PeftConfig.from_peft_type(**described))
        found = set_peft_model_state_dict(adapted, {name: weight.to("meta") for name, weight in weights.items()})
    missing = {name.replace(".default", "") for name in found.missing_keys} & set(names)
    return missing | {name.replace(".default", "") for name in found.unexpected_keys}


def _loaded(model: Model, head: WithHead | None) -> PreTrainedModel:
    """Load the class that people load, on `meta`."""
    directory = base_files(model)
    config, whole = model_config(directory, model.layers), composite_model(directory)
    if head is None:
        return whole or meta_model(config)
    config = config if whole is None else whole.config
    config.num_labels = head.outputs
    with torch.device("meta"):
        return getattr(transformers, head.head.transformers_class).from_config(config)


_BESIDE = f"{PREFIX}{SEEING}."
"""The names of weights beside the language model begin so. Their path in the whole class follows."""
# These settings of PEFT's name modules by the ends of their paths. PEFT takes a regular expression in place of the
# first two.
_BY_PATTERN, _BY_END = ("target_modules", "feedforward_modules"), ("modules_to_save", "target_parameters")


def for_whole_class(files: Mapping[str, bytes], model: Model) -> Mapping[str, bytes]:
    """Return the files of an adapter, name -> content, under the names of the whole class of the base `model`.

    Only the language model of a base that also sees or hears is trained, and that has other names by itself than inside
    the whole model. PEFT and vLLM load the whole class, which config.json names: an adapter under the other names would
    change nothing there, and PEFT would only warn.

    They stay as they are if the class is a language model alone. Files of methods that PEFT does not know have names of
    their own.
    """
    whole = composite_model(base_files(model)) if PEFT_SETTINGS in files else None
    if whole is None:
        return files
    names = _Names(whole, meta_model(model_config(base_files(model), model.layers)))
    weights = {names.of_weight(name): weight for name, weight in load(files[PEFT_WEIGHTS]).items()}
    beside = sorted(
        {name.partition(".lora_")[0].removeprefix(_BESIDE) for name in weights if _BESIDE in name and ".lora_" in name}
    )
    weights = {name.replace(_BESIDE, PREFIX): weight for name, weight in weights.items()}
    described: dict[str, Any] = json.loads(files[PEFT_SETTINGS])
    for setting in _BY_PATTERN:
        if described.get(setting):
            described[setting] = names.pattern(described[setting])
    if beside:
        described["target_modules"] = _and_paths(described["target_modules"], beside)
    for setting in _BY_END:
        if described.get(setting):
            described[setting] = names.ends(described[setting])
    if isinstance(rows := described.get("trainable_token_indices"), dict):
        described["trainable_token_indices"] = {names.ends([end])[0]: found for end, found in rows.items()}
    return {
        **files,
        PEFT_WEIGHTS: save(weights, metadata={"format": "pt"}),
        PEFT_SETTINGS: json.dumps(described, indent=2, sort_keys=True).encode(),
    }


def _and_paths(found: Collection[str] | str, paths: Collection[str]) -> list[str] | str:
    """Return a value of PEFT's setting that finds what it has `found`, and the modules at these paths."""
    if not isinstance(found, str):
        return sorted({*found, *paths})
    return "|".join([found, *sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(path)) for path in paths})])


class _Names:
    """Names in the language model, and the names of the same parts in the whole model."""

    def __init__(self, whole: PreTrainedModel, language: PreTrainedModel) -> None:
        self._in_whole: Callable[[str], str] = whole_names(whole, language)
        self._language = _paths(language)
        self._whole = _paths(whole)

    def of_weight(self, name: str) -> str:
        """Return the name of a weight. Virtual tokens have no path: PEFT keeps them by themselves. What learns beside
        the language model has its name in the whole model already, and so has an objective's head.
        """
        if name.startswith((_BESIDE, f"{PREFIX}{MODULE}.")) or not name.startswith(PREFIX):
            return name
        return f"{PREFIX}{self._in_whole(name.removeprefix(PREFIX))}"

    def pattern(self, ends: Collection[str]) -> Collection[str] | str:
        """Return a value of PEFT's setting that finds the same layers in the whole model and none in its towers.

        It is `ends` itself, or a regular expression.
        """
        if self._find_the_same(ends):
            return ends
        paths = [
            self._in_whole(path)
            for path in self._language
            if path.endswith(tuple(f".{end}" for end in ends)) or path in ends
        ]
        shapes = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(path)) for path in paths}
        expression = "|".join(sorted(shapes))
        found = {path for path in map(self._in_whole, self._language) if re.fullmatch(expression, path)}
        return expression if found == set(paths) else sorted(paths)

    def ends(self, ends: Collection[str]) -> list[str]:
        """Return the same ends, or else whole paths. Paths beside the language model are those already."""
        beside = [path.removeprefix(f"{SEEING}.") for path in ends if path.startswith(f"{SEEING}.")]
        ours = [end for end in ends if not end.startswith(f"{SEEING}.")]
        if not ours or self._find_the_same(ours):
            return [*ours, *beside]
        return sorted([*(self._in_whole(path) for path in self._language if path.endswith(tuple(ours))), *beside])

    def _find_the_same(self, ends: Collection[str]) -> bool:
        ours = {self._in_whole(path) for path in self._language if path.endswith(tuple(ends))}
        # The whole model has all layers, while the language model may be cut to its first ones.
        parts = {re.sub(r"\.\d+\.", ".*.", path) for path in ours}
        found = {path for path in self._whole if path.endswith(tuple(ends))}
        return ours <= found and {re.sub(r"\.\d+\.", ".*.", path) for path in found} == parts


def _paths(model: PreTrainedModel) -> set[str]:
    """Return the paths of all modules, and of parameters, because PEFT names experts by these."""
    return {path for path, _ in model.named_modules() if path} | {path for path, _ in model.named_parameters()}
