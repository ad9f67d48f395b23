"""Tries the tower of a base before anything is trained, by a small model of its class and its own processor.

Documents with real pixels go through the class alone, and through the front and the decoder as one row. Both must give
the same, and another picture must change it. So the trial finds a class that counts positions through a row, that finds
pictures at other places than its own document's, that hands its decoder what no row can have, or that sees nothing.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from trainer.base.describe.empty_model import whole_class, with_usual_kernels
from trainer.base.describe.language_model import beside_decoder, inner_of, outputs_lack_nothing
from trainer.base.describe.trial.small import small_settings
from trainer.base.find.media import Modality
from trainer.base.find.media.still import STILL
from trainer.base.find.processor import TYPES, Processor, read_processor
from trainer.base.unreadable import read_by_transformers
from trainer.errors import CapstanError, DataError, first_line
from trainer.model.documents import keep_documents_apart
from trainer.model.features import FEATURES
from trainer.model.front import CannotSee, Front, as_taken
from trainer.model.micro_batch import Seen
from trainer.model.rows.row import lengths_known

_DIFFERENT = 1e-4  # of the largest value
_SEES = 1e-5
_WORDS = (("See", " it."), ("Here ", " and there ", " too."), ("No picture here.",))
_ANSWER = " It is an answer."
_WIDTH, _NARROW, _DEEP, _HEADS_AT_MOST, _HEAD = 64, 48, 4, 4, 16
_CHANNELS = 32  # as many as groups in which such towers norm them
_DEPTHS = (
    *("depth", "num_hidden_layers", "num_layers", "encoder_layers", "num_encoder_layers", "n_layers"),
    *("num_hidden_blocks", "vt_num_hidden_layers"),
)
_WIDE = (
    *("hidden_size", "embed_dim", "hidden_dim", "d_model", "width", "output_dim", "projection_dim", "projector_dim"),
    *("projector_dims", "output_proj_dims", "out_hidden_size", "projector_hidden_size", "vision_hidden_size"),
    *("text_hidden_size", "mm_hidden_size", "merger_hidden_size", "embedding_dim", "vision_output_dim", "n_embd"),
    *("output_hidden_size", "image_hidden_size", "adapter_hidden_size", "model_dim", "dim", "proj_dim"),
    *("projection_hidden_size", "mm_embed_dim", "projector_input_dim", "projector_output_dim"),
    *("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "codebook_dim", "encoder_hidden_size"),
)
_HEADS = (
    *("num_heads", "num_attention_heads", "attention_heads", "num_key_value_heads", "encoder_attention_heads"),
    *("n_heads", "vt_num_attention_heads", "num_kv_heads"),
)
_IDS = ("token_id", "token_index", "token_ids", "vocab_size")


def sight_of(directory: str, name: str, isolates: bool, kind: str | None = None) -> dict[str, Any]:
    """`fails`: why rows with pictures cannot be trained with the base in `directory`, as a clause, or None.
    `keeps` if that is None: why features of pictures cannot be kept, or None, and how often as many `values` as a
    token's state has they take for each token of a picture. Rows have several documents if its decoder `isolates`
    them. With a `kind`, the same for files of that modality; without one for those of the first that the base takes.

    Raises `ConfigError` if the base takes none."""
    folder = Path(directory)
    processor = read_processor(folder, name)
    with read_by_transformers(name, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    modality = next((one for one in processor.takes if one.kind == kind), processor.takes[0])
    try:
        return try_pictures(small_seeing(config), processor, isolates, modality)
    except CapstanError:
        raise
    except CannotSee as error:
        return {"fails": str(error)}
    except Exception as error:  # a family's code may raise any error for sizes that it was not made for
        said = f"{type(error).__name__}: {first_line(error)}"[:300]
        return {"fails": f"a small model of its class could not be tried with {modality.noun}s ({said})"}


@torch.no_grad()
def mixture_of(directory: str, name: str, kinds: Sequence[str]) -> dict[str, str | None]:
    """`fails`: why no document can have files of all modalities of these `kinds`, as a clause, or None. With files of
    each alone the base in `directory` can be trained."""
    processor = read_processor(Path(directory), name)
    with read_by_transformers(name, "config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    shapes = tuple(one.small for one in processor.takes if one.kind in kinds)
    words = ("See", *(" and",) * (len(shapes) - 1), " it.")
    try:
        with torch.random.fork_rng(devices=[]), outputs_lack_nothing():
            _states(small_seeing(config), _document(processor, words, shapes))
    except Exception as error:  # a family's code may raise any error
        return {"fails": f"{type(error).__name__}: {first_line(error)}"[:300]}
    return {"fails": None}


@torch.no_grad()
def try_pictures(
    whole: PreTrainedModel, processor: Processor, isolates: bool = True, modality: Modality | None = None
) -> dict[str, Any]:
    """As `sight_of`, for the small model `whole`, which is unusable afterwards. Raises any error of the class."""
    modality = modality or processor.takes[0]
    documents = [_document(processor, words, shapes) for words, shapes in _tried(processor, modality)]
    other = _document(processor, _WORDS[0], modality.tried[0], seed=7)
    with torch.random.fork_rng(devices=[]), outputs_lack_nothing():
        alone = [_states(whole, one) for one in documents]
        moved, again = _states(whole, other), _states(whole, documents[0])
    if _far(again, alone[0], _DIFFERENT):
        return {"fails": f"a small model of its class draws random numbers when it computes {modality.noun}s"}
    if not _far(moved[:, -1], alone[0][:, -1], _SEES):
        return {"fails": f"another {modality.noun} changes nothing in a small model of its class"}
    frozen = _without_decoder(whole)
    front = Front(frozen, inner_of(frozen), frozen.get_input_embeddings())
    decoder: Any = whole.get_decoder()
    keep_documents_apart(whole if decoder.get_output_embeddings() is None else decoder)  # Llama 4's has the head
    # A decoder that sees all of its row gets one document, with text in the place of padding behind it.
    rows = [documents] if isolates else [[one, documents[-1]] for one in documents]
    computed = list[Tensor]()
    for row in rows:
        try:
            computed += _packed(front, whole, row, isolates)[: len(documents) // len(rows)]
        except RuntimeError as error:  # torch's, of a tensor on `meta`
            if "meta" in str(error):
                return {"fails": "its class computes with weights of its decoder in front of the decoder"}
            raise
    for number, (one, expected) in enumerate(zip(computed, alone, strict=True), 1):
        if _far(one, expected, _DIFFERENT):
            return {"fails": f"document {number} of a row is another than alone in a small model of its class"}
    return {"fails": None, "keeps": _keeps(front, documents, processor, modality)}


def _tried(processor: Processor, modality: Modality) -> Iterator[tuple[Sequence[str], tuple[Any, ...]]]:
    """The words of each document that is tried, and the shapes of the files between them."""
    for words, shapes in zip(_WORDS, modality.tried, strict=True):
        try:
            processor.gaps(words, shapes)
        except DataError:
            if len(shapes) < 2:
                raise
            yield words[:2], shapes[:1]  # a base may take one for each text
        else:
            yield words, shapes


def _packed(
    front: Front, whole: PreTrainedModel, documents: Sequence[dict[str, Tensor]], isolates: bool
) -> list[Tensor]:
    """The states (1, T, H) of each of the documents of a row. A decoder that does not isolate them takes it for one."""
    lengths = tuple(one["input_ids"].shape[1] for one in documents)
    ids = torch.cat([one["input_ids"] for one in documents], 1)
    seen = [
        Seen(number, {key: value for key, value in one.items() if key != "input_ids"})
        for number, one in enumerate(documents)
        if len(one) > 1
    ]
    told = lengths if isolates else (sum(lengths),)
    with lengths_known(told), torch.random.fork_rng(devices=[]):
        handed = front.row(ids, whole.get_input_embeddings(), lengths, seen, decoder=inner_of(whole))
        found: Tensor = inner_of(whole)(**handed, use_cache=False)[0]
    return list(found.split(list(lengths), 1))


def _keeps(
    front: Front, documents: Sequence[dict[str, Tensor]], processor: Processor, modality: Modality
) -> dict[str, Any]:
    values = tokens = 0
    whole: Any = front.whole
    width = whole.get_input_embeddings().weight.shape[1]
    for (_, shapes), one in zip(_tried(processor, modality), documents, strict=True):
        if not shapes:
            continue
        ids, types = one["input_ids"], {name: value for name, value in one.items() if name in TYPES}
        pixels = {name: value for name, value in one.items() if name not in ("input_ids", *TYPES)}
        try:
            kept = front.taken_out(ids, pixels, types, torch.ones(*ids.shape, width)).kept
        except CannotSee as error:
            return {"fails": str(error), "values": 0.0}
        except Exception as error:  # a class that sees may still be trained with its tower
            said = f"{type(error).__name__}: {first_line(error)}"[:300]
            return {"fails": f"a small model of its class fails over them ({said})", "values": 0.0}
        values += sum(value.numel() for name, value in kept.items() if name.startswith(FEATURES))
        tokens += sum(len(processor.encode(text)) for text in processor.replacements(shapes))
    return {"fails": None, "values": values / width / tokens}


def _without_decoder(whole: PreTrainedModel) -> PreTrainedModel:
    """A copy whose decoder, head and embedding have no weights, as in a run (`load_front`)."""
    frozen = copy.deepcopy(whole)
    kept = beside_decoder(frozen)
    for name in [name for name, _ in frozen.named_parameters() if name not in kept]:
        path, _, leaf = name.rpartition(".")
        module = frozen.get_submodule(path)
        module._parameters[leaf] = nn.Parameter(torch.empty_like(module.get_parameter(leaf), device="meta"), False)
    return frozen


def _document(
    processor: Processor, words: Sequence[str], shapes: tuple[Any, ...], seed: int | None = None
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(len(shapes) if seed is None else seed)
    words = _within(processor, words, shapes)
    gaps = processor.gaps(words, shapes)
    text = gaps.head + words[0] + "".join(one + word for one, word in zip(gaps.pictures, words[1:], strict=True))
    prompt: list[int] = processor.encode(text + gaps.tail)
    ids = [*prompt, *(processor.encode(_ANSWER) if processor.reads_prompts else [])]
    files = [shape.modality.noise(shape, draw) for shape in shapes]
    is_plain = processor.is_plain and all(shape.modality is STILL for shape in shapes)
    if shapes and not is_plain and not _ends(processor.tokens(words, files), prompt):
        noun = shapes[0].modality.noun
        raise CannotSee(f"its processor writes other tokens for real {noun}s than for blank ones of the same sizes")
    inputs = processor.inputs(files, ids, len(prompt)) if shapes else processor.token_types(ids, len(prompt))
    if not shapes and not processor.reads_prompts:
        inputs = {}
    # One processor makes pixels in 16 bits, and the small model is in fp32.
    made = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    return {"input_ids": torch.tensor([ids]), **made}


def _within(processor: Processor, words: Sequence[str], shapes: tuple[Any, ...]) -> Sequence[str]:
    """The words with what the chat template writes around files. Classes of GLM need it around a video."""
    given = list(words)
    for number, shape in enumerate(shapes):
        before, behind = ("", "") if shape.modality is STILL else processor.written_around(shape.modality)
        given[number] += before
        given[number + 1] = behind + given[number + 1]
    return given


def _ends(every: Sequence[int], own: Sequence[int]) -> bool:
    """Whether tokens are `own`, which one that begins a text may precede."""
    return len(every) - len(own) in (0, 1) and list(every[-len(own) :]) == list(own)


def _states(whole: PreTrainedModel, document: dict[str, Tensor]) -> Tensor:
    """The result of the class's decoder for a document, (1, T, H)."""
    found = list[Tensor]()
    hook = inner_of(whole).register_forward_hook(lambda module, given, result: found.append(result[0]))
    try:
        whole(**as_taken(document, torch.float32), use_cache=False)
    finally:
        hook.remove()
    return found[-1]


def _far(one: Tensor, other: Tensor, share: float) -> bool:
    return not bool(((one - other).abs().max() <= share * other.abs().max()).item())


def small_seeing(config: PretrainedConfig) -> PreTrainedModel:
    """A model in fp32 with random weights of the class that `config` describes: narrow, and of few layers.

    Patches, sizes of pictures and tokens are those of the base, for which its processor works."""
    text = config.get_text_config()
    made = _smaller(config, text)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        kind = whole_class(config)
        options: dict[str, Any] = {"experts_implementation": "eager"}
        model = kind._from_config(with_usual_kernels(made), dtype=torch.float32, **options)
        fill(model)
    return model.float().eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Have random weights let through what they get, through all layers."""
    for parameter in model.parameters():
        if parameter.ndim >= 3 and parameter.numel() == max(parameter.shape):
            parameter.fill_(0.1)  # a factor for each channel, which may begin near zero
        elif parameter.ndim >= 4:
            parameter.normal_(0, parameter[0].numel() ** -0.5)  # tens of convolutions leave a signal its size
        elif parameter.ndim >= 2 and not 1e-6 < float(parameter.abs().max()) < 3:
            parameter.normal_(0, 0.05)  # a projection may begin near zero, and a codebook far from its inputs
        elif parameter.ndim >= 2:
            parameter.mul_(4.0)  # so that attention is not near even, and it matters what a token sees


def _smaller(config: PretrainedConfig, text: PretrainedConfig, deep: int = _DEEP) -> PretrainedConfig:
    """`config` in small. Its tower has `deep` layers, or as many as the class takes features of."""
    settings = config.to_dict()
    if "model_args" in settings:  # timm makes such a tower, by a name that decides its sizes
        return config
    deep = max(deep, *(max(-one, one + 1) for one in _layers_of_features(settings)), 0)
    inner = {name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    merged = _merged_widths([part for part in inner.values() if part is not text], text)
    if config is text:
        made = small_settings(config) | {key: value for key, value in settings.items() if key.endswith(_IDS)}
    else:
        # The settings around a language model have its own sizes again, under the same names.
        made = _sized(settings, is_tower=text not in inner.values(), deepest=deep)
    made |= {key: _WIDTH * merged[value] for key, value in settings.items() if key in _WIDE and value in merged}
    made |= {name: _smaller(part, text, deep) for name, part in inner.items()}
    left = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config")
    return type(config)(**{key: value for key, value in made.items() if key not in left})


def _merged_widths(towers: Sequence[PretrainedConfig], text: PretrainedConfig) -> dict[Any, int]:
    """The widths of squares of patches that a tower puts side by side, and of how many patches each is.

    The settings around such a tower have this width again. The language model's own width is none of them."""
    found = dict[Any, int]()
    for tower in towers:
        wide, side = getattr(tower, "hidden_size", None), getattr(tower, "merge_size", None)
        side = getattr(tower, "spatial_merge_size", None) if side is None else side
        if type(wide) is int and type(side) is int and side > 1 and wide * side**2 != text.hidden_size:
            found[wide * side**2] = side**2
    return found


def _layers_of_features(settings: dict[str, Any]) -> Iterator[int]:
    """The layers of the tower that the settings around it take features of."""
    for key, value in settings.items():
        if "feature_layer" in key:
            yield from (one for one in (value if isinstance(value, list) else [value]) if type(one) is int)


def _sized(settings: dict[str, Any], is_tower: bool, deepest: int = _DEEP) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in settings):  # such as the names of classes
        return settings
    count = next((settings[key] for key in _DEPTHS if isinstance(settings.get(key), int)), 0)
    deep = min(count, deepest) if is_tower else count
    made = {key: _setting(key, value, is_tower, count, deep) for key, value in settings.items()}
    wide, inner = settings.get("hidden_size"), settings.get("intermediate_size")
    if is_tower and isinstance(base := settings.get("base_channels"), int):
        made["base_channels"] = min(base, _CHANNELS)
        if isinstance(wide, int) and wide % base == 0:  # the width of its last level
            made["hidden_size"] = wide // base * made["base_channels"]
    if isinstance(wide, int) and isinstance(inner, int) and inner > wide and inner % wide == 0:
        # Llama 4 puts as many patches side by side as make this width.
        made["intermediate_size"] = made["hidden_size"] * (inner // wide)
    return made


def _setting(key: str, value: Any, is_tower: bool, count: int, deep: int) -> Any:
    if isinstance(value, dict) and value and all(str(one).isdecimal() for one in value):  # what some layers have
        return {one: own for one, own in value.items() if int(one) < deep} if is_tower else value
    if isinstance(value, dict):
        return value if "rope" in key else _sized(value, is_tower, deep or _DEEP)
    if isinstance(value, bool) or key.endswith(_IDS):
        return value
    if isinstance(value, int) and value > 0:
        if key in _DEPTHS:
            return min(value, deep) if is_tower else value
        if key in _WIDE:
            return min(value, _WIDTH)
        if key in _HEADS:
            return min(value, _HEADS_AT_MOST)
        if "intermediate_size" in key or key.endswith(("mlp_dim", "ffn_dim")):
            return min(value, _NARROW)
        return min(value, _HEAD) if key in ("head_dim", "attention_head_dim") else value
    if isinstance(value, list) and is_tower and value and all(type(one) is int for one in value):
        if key.endswith("channels") and "conv" not in key:  # those of Gemma 4 fit its mel bins
            return [min(one, _WIDTH) for one in value]
        if ("index" in key or "layer" in key) and max(value) >= deep > 0:
            return list(range(max(0, deep - len(value)), deep))
    if isinstance(value, list) and is_tower and len(value) == count > deep and "layer" in key:
        return value[:deep]
    return value
