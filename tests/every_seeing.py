"""Tries every type of model of transformers that takes pictures and text, each in a process of its own: a release script.

    python -m tests.every_model --images TABLE [TYPE ...]          writes one JSON line a type to TABLE
    python -m tests.every_model --images --record TABLE            writes what became of each type to tests/every_model.json

A tiny base of the type and its processor are written as transformers writes them, by rules that know no family;
tests/every_seeing.yaml has what the defaults of a type lack. The product compiles three documents (with one picture,
with two of unlike sizes, and with none), trains over them as one packed row, and exports. Plain transformers and PEFT
do the same with each document alone, through the processor, in the class that the base's `architectures` name. Both
compute in fp32. The tokens must be equal; the loss, the norm of the gradient and the logits, within 1e-5.
"""

import importlib
import inspect
import json
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
import yaml
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, AddedToken, AutoProcessor, PretrainedConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from tests.material import commit, make_policy
from trainer.base.describe.trial.small import HEAD, HIDDEN, small_settings
from trainer.base.load.sight import fill
from trainer.config import parse_config
from trainer.errors import CapstanError, ConfigError

CASES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
VOCABULARY, TOWER_LAYERS, POSITIONS, MLP = 1024, 4, 16384, 48
SECONDS = 900
PIXELS = (((96, 64),), ((64, 112), (160, 96)), ())
"""Width and height of the pictures of each document, if tests/every_seeing.yaml names no others for a type."""
_WORDS = (("See ", " well.\n"), ("Here ", " and there ", " too."), ("No picture at all.",))
_ANSWERS = ("it has a roof.", "Yes, both.", "None.")
_DEPTHS = (
    *("depth", "num_hidden_layers", "num_layers", "encoder_layers", "num_encoder_layers", "n_layers"),
    *("num_hidden_blocks", "vt_num_hidden_layers"),
)
_WIDE = (
    *("hidden_size", "embed_dim", "hidden_dim", "d_model", "width", "output_dim", "projection_dim", "projector_dim"),
    *("projector_dims", "output_proj_dims", "out_hidden_size", "projector_hidden_size", "vision_hidden_size"),
    *("text_hidden_size", "mm_hidden_size", "merger_hidden_size", "embedding_dim", "vision_output_dim", "n_embd"),
    *("output_hidden_size", "image_hidden_size", "adapter_hidden_size", "model_dim", "dim", "proj_dim"),
    *("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "codebook_dim"),
)
_HEADS = (
    *("num_heads", "num_attention_heads", "attention_heads", "num_key_value_heads", "encoder_attention_heads"),
    *("n_heads", "vt_num_attention_heads", "num_kv_heads"),
)
_IDS = ("_token_id", "_token_index")
WriteRows = Callable[[Path], Path]
MadeOf = Callable[..., dict[str, torch.Tensor]]
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PICTURE{% elif part.type == 'audio' %}SOUND"
    "{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def every_kind() -> list[str]:
    return sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *CASES})


def tried(kind: str, folder: str) -> dict[str, Any]:
    """What becomes of one type; a mistake of ours is a traceback."""
    torch.set_num_threads(1)
    base = Path(folder) / "base"
    try:
        write_base(kind, base, CASES.get(kind, {}))
    except Exception as error:  # transformers raises any error for settings that it cannot build a model of
        return {"status": "not built", "reason": said(error), "trace": traceback.format_exc()[-2500:]}
    try:
        case = CASES.get(kind, {})
        write_rows = partial(_write_rows, pixels=case.get("pixels", PIXELS))
        return proven(base, Path(folder), case.get("template"), write_rows, seen_or_mirrored)
    except CapstanError as refused:
        return {"status": "refused", "reason": str(refused)}
    except Exception as error:
        return {"status": "crashed", "reason": said(error), "trace": traceback.format_exc()[-2500:]}


def said(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if "transformers" in frame.filename), frames[-1])
    return f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"


# --- a tiny base


def write_base(kind: str, folder: Path, case: dict[str, Any]) -> None:
    _add_missing(case)
    config = _tiny_config(case.get("type", kind), case.get("config", {}))
    given = case.get("processor", {})
    is_processed = "like" in given or type(config) in PROCESSOR_MAPPING
    processor = _tiny_processor(config, given, case.get("vocabulary", ())) if is_processed else _TextAlone(_tokenizer())
    _name_tokens(config, processor, case.get("tokens", {}), iter(range(VOCABULARY - 1, 0, -1)))
    torch.manual_seed(5)
    lists: Sequence[Any] = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )
    made_by: Any = next(one[type(config)] for one in lists if type(config) in one)  # from_config finds no Evolla
    model = made_by._from_config(config, dtype=torch.float32).float()
    fill(model)
    model.save_pretrained(folder)
    if isinstance(processor, _TextAlone):  # a type that transformers has no processor of
        processor.tokenizer.plain().save_pretrained(folder)
        return
    heard = getattr(processor, "audio_token", None) or ""
    written = case.get("placeholder") or getattr(processor, "image_token", None)
    written = written or ("" if heard else processor.tokenizer.image_token)
    watched = case.get("placeholder_of_video") or getattr(processor, "video_token", None) or ""
    tokenizer = processor.tokenizer = processor.tokenizer.plain()
    if "template" not in case:
        template = _TEMPLATE.replace("PICTURE", written).replace("SOUND", heard)
        tokenizer.chat_template = processor.chat_template = template.replace("VIDEO", watched)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _add_missing(case: dict[str, Any]) -> None:
    """Attributes without which a class fails in plain transformers."""
    for path, name in case.get("missing", {}).items():
        module, _, owner = path.rpartition(".")
        setattr(getattr(importlib.import_module(module), owner), name, None)


def _tiny_config(kind: str, given: dict[str, Any]) -> PretrainedConfig:
    """The default settings of a type, narrow and with few layers, and what is `given` ("text_config.vocab_size")."""
    default = CONFIG_MAPPING[kind]()
    text = default.get_text_config()
    made: dict[str, Any] = _text(default) if text is default else _tower(default.to_dict(), is_top=True)
    for name, part in vars(default).items():
        if isinstance(part, PretrainedConfig):
            made[name] = _part(part, text)
    for name, part in default.sub_configs.items():
        if "vision" in name and getattr(default, name, None) is None and getattr(part, "model_type", None):
            made[name] = _part(part(), text)  # a type whose default sees nothing
    for path, value in given.items():
        *around, last = path.split(".")
        place = made
        for key in around:
            place = place[key]
        place[last] = value
    left_out = ("model_type", "transformers_version", "architectures", "dtype")
    return type(default)(**{key: value for key, value in made.items() if key not in left_out})


def _part(part: PretrainedConfig, text: PretrainedConfig) -> dict[str, Any]:
    if part is text:
        return _text(part)
    made = _tower(part.to_dict(), is_top=False)
    return made | {name: _part(own, text) for name, own in vars(part).items() if isinstance(own, PretrainedConfig)}


def _text(config: PretrainedConfig) -> dict[str, Any]:
    made = small_settings(config)
    made |= {key: VOCABULARY for key in made if key.startswith("vocab_size") or key.endswith("vocab_size")}
    if "mrope_section" in (getattr(type(config), "ignore_keys_at_rope_validation", None) or ()):
        rotary: dict[str, Any] = dict(made.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10_000.0})
        if not any(isinstance(value, dict) for value in rotary.values()) and "mrope_section" not in rotary:
            share = rotary.get("partial_rotary_factor") or made.get("partial_rotary_factor") or 1.0
            half = int((made.get("head_dim") or HEAD) * share) // 2
            rotary["mrope_section"] = [half // 3, half // 3, half - 2 * (half // 3)]
        made["rope_parameters"] = rotary
    return made | {key: POSITIONS for key in ("max_position_embeddings", "n_positions") if key in made}


def _tower(settings: dict[str, Any], *, is_top: bool) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in settings) or "model_args" in settings:  # by a name of timm's
        return settings
    layers = [value for key, value in settings.items() if "feature_layer" in key]
    flat = [one for value in layers for one in (value if isinstance(value, (list, tuple)) else [value])]
    deep = max([TOWER_LAYERS, *(max(-one, one + 1) for one in flat if isinstance(one, int))])
    count = next((settings[key] for key in _DEPTHS if isinstance(settings.get(key), int)), 0)

    def sized(key: str, value: Any) -> Any:
        if isinstance(value, dict) and value and all(str(one).isdecimal() for one in value):  # what some layers have
            return value if is_top else {one: own for one, own in value.items() if int(one) < min(deep, count)}
        if isinstance(value, dict):
            return value if "rope" in key else _tower(value, is_top=False)
        if isinstance(value, bool) or key.endswith(_IDS):
            return value
        if isinstance(value, int) and value > 0:
            if key in _DEPTHS:
                return value if is_top else min(value, deep)
            if key == "vocab_size":
                return VOCABULARY
            if "intermediate_size" in key or key.endswith(("mlp_dim", "ffn_dim")):
                return min(value, MLP)
            most = HIDDEN if key in _WIDE else 4 if key in _HEADS else 16 if key.endswith("head_dim") else value
            return min(value, most)
        if not isinstance(value, (list, tuple)) or ("layer" not in key and "index" not in key):
            return value
        is_of_layers = bool(value) and all(type(one) is int for one in value) and not is_top
        if is_of_layers and max(value) >= deep:
            return list(range(deep - len(value), deep)) if len(value) <= deep else list(range(deep))
        return value[:deep] if len(value) == count > deep and "layer" in key else value

    return {key: sized(key, value) for key, value in settings.items()}


class _TextAlone(NamedTuple):
    tokenizer: "_AsksForTokens"


class _AsksForTokens(FastTokenizer):
    """A tokenizer of bytes that gets each special token which a processor asks for."""

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        for token in [tokens] if isinstance(tokens, str) else tokens or []:
            made = isinstance(token, str) and "_special_tokens_map" in self.__dict__ and len(token) > 2
            if made and token not in self.get_vocab():
                self.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        return super().convert_tokens_to_ids(tokens)

    def __getattr__(self, name: str) -> Any:
        named = name.removesuffix("_id")
        is_asked = not name.startswith("_") and named.endswith("_token") and "_special_tokens_map" in self.__dict__
        if is_asked and named not in self.SPECIAL_TOKENS_ATTRIBUTES:
            token = self.__dict__.get(named) or f"<|{named.removesuffix('_token')}|>"
            number = self.convert_tokens_to_ids(token)
            self.__dict__.setdefault("asked", {})[named] = token
            return number if name.endswith("_id") else token
        return super().__getattr__(name)

    def plain(self) -> FastTokenizer:
        """The same tokenizer as files have it."""
        named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        asked = self.__dict__.get("asked", {})
        return FastTokenizer(tokenizer_object=self.backend_tokenizer, extra_special_tokens=asked, **named)


def _tokenizer() -> _AsksForTokens:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _AsksForTokens(tokenizer_object=made, **named)


def _tiny_processor(config: PretrainedConfig, given: dict[str, Any], vocabulary: Sequence[str]) -> Any:
    """The processor of a type with its defaults; what it shares with the model is the model's. Its tokenizer begins
    with the tokens of the `vocabulary`."""
    given = dict(given)
    like = given.pop("like", None)  # a type whose files name another one's processor
    kind: Any = type(CONFIG_MAPPING[like]()) if like else type(config)
    made_by: Any = PROCESSOR_MAPPING[kind]
    parts: dict[str, Any] = {}
    for name in made_by.get_attributes():
        if name in given:  # a class that is in no mapping
            parts[name] = getattr(transformers, given.pop(name))()
            continue
        if "tokenizer" in name:
            parts[name] = _tokenizer()
            parts[name].convert_tokens_to_ids(list(vocabulary))
            continue
        mapping: Any = IMAGE_PROCESSOR_MAPPING if "image" in name else FEATURE_EXTRACTOR_MAPPING
        mapping = VIDEO_PROCESSOR_MAPPING if "video" in name else mapping
        found = mapping[kind] if kind in mapping else _of_another(mapping, made_by)
        parts[name] = (found.get("torchvision") or found["pil"] if isinstance(found, dict) else found)()
    towers = list(_towers(config))
    seeing = next((tower for tower in towers if getattr(tower, "patch_size", None)), config)
    for name, part in list(parts.items()):
        if "image_processor" in name or "video_processor" in name:
            _as_the_tower(part, seeing)
        bins = next((tower.num_mel_bins for tower in towers if hasattr(tower, "num_mel_bins")), None)
        if bins and getattr(part, "feature_size", bins) != bins:
            parts[name] = type(part)(feature_size=bins)
    for name, parameter in inspect.signature(made_by.__init__).parameters.items():
        is_token = isinstance(parameter.default, str) and "token" in name
        if name not in (*parts, "self", "chat_template", "kwargs", "args") and not is_token:
            value = next((getattr(owner, name) for owner in towers if getattr(owner, name, None) is not None), None)
            parts |= {name: value} if value is not None else {}
    for path, value in given.items():
        owner, _, key = path.rpartition(".")
        if owner:
            old = getattr(parts[owner], key, None)
            is_typed = isinstance(value, dict) and not isinstance(old, dict)
            setattr(parts[owner], key, type(old)(**value) if is_typed else value)
        else:
            parts[key] = value
    return made_by(**parts)


def _of_another(mapping: Any, processor: type) -> Any:
    """Where a type has none registered: that of another type with the same processor."""
    for kind in CONFIG_MAPPING:
        other = CONFIG_MAPPING[kind]
        if other in mapping and other in PROCESSOR_MAPPING and PROCESSOR_MAPPING[other] is processor:
            return mapping[other]
    raise KeyError(processor.__name__)


def _towers(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig) and part is not config.get_text_config():
            yield from _towers(part)


def _as_the_tower(processor: Any, tower: PretrainedConfig) -> None:
    """Sizes of patches and of pictures of a fixed size are the tower's own."""
    names = {"spatial_merge_size": "merge_size"}
    for there in ("patch_size", "temporal_patch_size", "spatial_merge_size", "pooling_kernel_size"):
        value, old = getattr(tower, there, None), getattr(processor, here := names.get(there, there), None)
        if value is not None and isinstance(old, (int, dict)):
            setattr(processor, here, value if isinstance(old, int) else dict.fromkeys(old, value))
    side = getattr(tower, "image_size", None)
    side = side[0] if isinstance(side, (list, tuple)) else side
    if isinstance(side, int):
        for name in ("size", "crop_size"):
            value = getattr(processor, name, None)
            if value and set(keys := dict(value)) in ({"height", "width"}, {"shortest_edge"}):
                setattr(processor, name, type(value)(**dict.fromkeys(keys, side)))


def _name_tokens(config: PretrainedConfig, processor: Any, named: dict[str, Any], free: Iterator[int]) -> None:
    """The settings of a model name its special tokens by the numbers of the processor's tokenizer; `named` by hand."""
    tokenizer = processor.tokenizer
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _name_tokens(value, processor, named, free)
        elif key in named:
            setattr(config, key, tokenizer.convert_tokens_to_ids(named[key]))
        elif key.endswith(_IDS) and (type(value) is int or value is None):
            name = key.removesuffix("_id").removesuffix("_index")
            number: Any = next(
                (one for one in getattr(processor, f"{name}_ids", None) or [] if isinstance(one, int)), None
            )
            number = getattr(processor, f"{name}_id", None) if number is None else number
            if not isinstance(number, int):
                token = getattr(processor, name, None)
                number = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
            if name in ("pad_token", "bos_token", "eos_token"):
                number = getattr(tokenizer, f"{name}_id")
            if number is None and value is not None:
                number = next(free)
            if number is not None:
                setattr(config, key, number)


# --- the product beside plain transformers


def _write_rows(folder: Path, pixels: Sequence[Any] = PIXELS) -> Path:
    """Conversations with pictures of these `pixels`, each of which has colours of its own in every corner."""
    draw, lines = random.Random(7), list[str]()
    for row, (sizes, words, answer) in enumerate(zip(pixels, _WORDS, _ANSWERS, strict=True)):
        parts: list[dict[str, Any]] = [{"type": "text", "text": words[0]}]
        for number, size in enumerate(sizes):
            made = Image.frombytes("RGB", (6, 6), bytes(draw.randrange(256) for _ in range(108))).resize(size)
            made.save(folder / f"{row}-{number}.png")
            parts += [{"type": "image", "path": f"{row}-{number}.png"}, {"type": "text", "text": words[number + 1]}]
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines), encoding="utf-8")
    return rows


def proven(base: Path, folder: Path, template: str | None, write_rows: WriteRows, made_of: MadeOf) -> dict[str, Any]:
    """What becomes of a base. `made_of` makes what its class takes of a conversation, as a person does, and of one
    with other files, from the same processor."""
    from tests.dist.assembled import assemble_run
    from tests.every_model import PROVEN, UNPACKED, WITHIN
    from trainer.data.compile.prepare import prepare
    from trainer.data.order.settings import Position
    from trainer.export.write.adapter import export_adapter
    from trainer.plan.resolve import resolve
    from trainer.state.checkpoint.checkpoints import load_partitions
    from trainer.state.checkpoint.manifest import read_manifest
    from trainer.state.optimizer import MASTER
    from trainer.store.store import open_store

    rows = write_rows(folder)
    tree = {
        "run": {"name": "run", "store": str(folder / "store"), "seed": 3},
        "model": {"base": str(base), "dtype": "fp32"},
        "quant": {"type": "none"},
        "tuning": {"rank": 4, "alpha": 16},
        "data": {"train": [{"path": str(rows)}], "format": "pictures", "sequence_length": 8192, "template": template},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        "sharding": {"deepspeed": str(make_policy(folder / "policy.json"))},
    }
    config = parse_config(json.dumps(tree))
    ways_out = {"data.packing": "false", "train.activation_checkpointing": "none"}
    try:
        found = resolve(config)
    except ConfigError as refused:
        named = [f"{key}={value}" for key, value in ways_out.items() if key in str(refused)]
        if not named:
            raise
        if "data.packing=false" in named:  # documents in rows of their own are as many rows of one step
            named += [
                f"train.global_batch={len(rows.read_text(encoding='utf-8').splitlines())}",
                "data.sequence_length=1024",
            ]
        config = parse_config(json.dumps(tree), named)
        found = resolve(config)
    store = open_store(config.run.store)
    fingerprint = prepare(config, found.base, store).train
    run = store.sub("run")
    commit(run, config, dataset=fingerprint)
    ours = assemble_run(config, fingerprint)
    partitions = ours.engine.partitions()
    load_partitions(run, read_manifest(run, 4), partitions, states=(MASTER,))
    ours.engine.refresh(0)
    total, documents, ids, logits = 0.0, list[int](), list[Any](), list[Any]()
    batches = ours.stream.step(Position())
    for batch in batches:
        lengths = [batch.input.segments.lengths[number] for number in range(len(batch.documents))]
        with ours.engine.evaluating():
            found = ours.engine.look(lambda packed, row: packed.head(packed.hidden(row.input)), batch)[0]
        loss = ours.engine.loss(batch)
        ours.engine.backward(loss, last=batch is batches[-1])
        total += float(loss.detach().sum())
        documents += batch.documents
        ids += batch.input.input_ids[0][: sum(lengths)].split(lengths)
        logits += found[: sum(lengths)].split(lengths)
    norm = ours.engine.step(0.0)
    export_adapter(run, open_store(str(folder / "adapter")))
    theirs = _reference(base, folder / "adapter", rows, documents, made_of)
    if [one.tolist() for one in ids] != [one.tolist() for one in theirs["ids"]]:
        return {
            "status": "wrong",
            "reason": "the documents have other tokens",
            "lengths": [len(one) for one in ids],
            "expected": [len(one) for one in theirs["ids"]],
        }

    def apart(ones: Any, others: Any) -> float:
        return max(
            float((one - other).abs().max() / other.abs().max()) for one, other in zip(ones, others, strict=True)
        )

    off = {
        "loss": abs(total - theirs["loss"]) / abs(theirs["loss"]),
        "grad_norm": abs(norm - theirs["grad_norm"]) / theirs["grad_norm"],
        "logits": apart(logits, theirs["logits"]),
        "effect": apart(theirs["logits"], theirs["without"]),
        "sees": theirs["sees"],
    }
    within = {"loss": WITHIN, "grad_norm": WITHIN, "logits": WITHIN}
    if off["logits"] > WITHIN:
        # Where fp32 itself is not so near to fp64 in plain transformers, it cannot be asked of us to be nearer.
        exact = _reference(base, folder / "adapter", rows, documents, made_of, torch.float64)["logits"]
        off |= {"rounding": apart(theirs["logits"], exact), "from_fp64": apart(logits, exact)}
        if off["from_fp64"] <= 2 * off["rounding"]:
            within["logits"] = 2 * off["rounding"]
    good = all(off[key] <= most for key, most in within.items()) and off["effect"] > 1e-3 and off["sees"] > 1e-4
    status = (PROVEN if config.data.packing else UNPACKED) if good else "wrong"
    return {"status": status, **off, "tokens": [len(one) for one in ids]}


def seen_or_mirrored(processor: Any, talk: Any, folder: Path, *, other: bool = False) -> dict[str, torch.Tensor]:
    from tests.dist.seeing import inputs

    made = inputs(processor, talk, folder)
    return {key: value.flip(-1) if other and _is_real(value) else value for key, value in made.items()}


def _reference(
    base: Path,
    adapter: Path,
    rows: Path,
    documents: list[int],
    made_of: MadeOf,
    computed: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The documents one at a time, as the export's card loads it: class, processor and adapter."""
    from peft import PeftModel

    from tests.dist.seeing import answer
    from tests.experts import multiply_expert_by_expert

    multiply_expert_by_expert()
    processor: Any = AutoProcessor.from_pretrained(str(adapter))
    name = (transformers.AutoConfig.from_pretrained(base).architectures or [""])[0]
    made_by = getattr(transformers, name)
    plain = made_by.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(plain, str(adapter), is_trainable=True, autocast_adapter_dtype=False)
    model.eval()
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():  # Llama 4 turns by complex numbers, whose imaginary part `to` would drop
            value.data = value.data.to(computed)
    talks = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]

    def cast(made: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(computed) if _is_real(value) else value for key, value in made.items()}

    total: Any = 0.0
    found: dict[str, Any] = {"ids": [], "logits": [], "without": [], "sees": 0.0}
    for number in documents:
        given = cast(made_of(processor, talks[number], rows.parent))
        logits = model(**given, use_cache=False).logits[0]
        labels = answer(processor, given)[0, 1:]
        total = total + nn.functional.cross_entropy(logits[:-1].float(), labels, ignore_index=-100, reduction="sum")
        with torch.no_grad(), model.disable_adapter():
            without = model(**given, use_cache=False).logits[0]
        if number == 0:
            with torch.no_grad():
                changed = cast(made_of(processor, talks[number], rows.parent, other=True))
                other = model(**changed, use_cache=False).logits[0, -1]
            found["sees"] = float((other - logits[-1]).abs().max() / logits[-1].abs().max())
        found["ids"].append(given["input_ids"][0])
        found["logits"].append(logits.detach())
        found["without"].append(without)
    total.backward()
    grads = {name.replace(".default", ""): one.grad for name, one in model.named_parameters() if one.grad is not None}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    # PEFT may add layers to a tower that hears, whatever the adapter's settings say; they change nothing.
    learning = [grad for name, grad in grads.items() if name in saved or not saved <= grads.keys()]
    found["grad_norm"] = float(torch.stack([grad.double().norm() for grad in learning]).norm())
    return {**found, "loss": float(total)}


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
