"""The exported side of a proof: what a user loads, with transformers, bitsandbytes and PEFT alone.

If PEFT does not know the adapter, the export's own loader loads it. Nothing of Capstan's own model is used here, so a
mistake in Capstan's model cannot hide itself.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from trainer.base.describe.empty_model import is_part, unfilled_model, whole_class
from trainer.base.describe.language_model import beside_decoder, outputs_lack_nothing, place_of_decoder
from trainer.base.find.processor import TYPES
from trainer.config import Quant
from trainer.errors import ConfigError
from trainer.export.proof.rows import ProbeRow, as_shares
from trainer.export.proof.streamed import PackedWeight, StreamedLayers, bnb_form
from trainer.model.parts import body, in_order
from trainer.model.towers import seeing_name
from trainer.processes.accelerator import kind
from trainer.tuning.head import MODULE
from trainer.tuning.method import Method

_LONGEST_REASON = 600


def device() -> torch.device:
    return torch.device(kind() or "cpu")


def load_plain(
    folder: Path,
    held: torch.dtype,
    computed: torch.dtype,
    config: PretrainedConfig | None = None,
    streamed: StreamedLayers | None = None,
    values: dict[str, Tensor] | None = None,
    made: Any = None,
) -> Any:
    """Load a model as transformers reads it, ready to predict.

    It is of the class `made`, or of the one that people load. Its weights are in `held`, and `config` replaces the
    folder's own settings. A `streamed` model is on the device already, and its layers are read at their turns. `values`
    are the weights by name, for files that transformers cannot read.

    Its constants are those of a model in `computed`: Gemma's factor on embeddings is rounded to the type of the model.

    Raises:
        ConfigError: transformers cannot read it.
    """
    with _reading("transformers", folder):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = config or (whole if is_part(whole) else whole.get_text_config())
        options: dict[str, Any] = {
            "dtype": held,
            "trust_remote_code": False,
            "experts_implementation": "eager",  # grouped products need sizes that are multiples of 16 bytes
            **(streamed.options if streamed else {}),
        }
        alone = whole.get_text_config() is whole
        auto: Any = made or (AutoModelForCausalLM if alone else None)
        if not alone and made:
            whole.num_labels = config.num_labels or 0
        if alone or made:
            options["config"] = config if alone else whole
        if values:
            model: Any = _of_values(config if alone else whole, values, auto, options)
        else:
            model = (auto or whole_class(whole)).from_pretrained(folder, **options)
        if streamed:
            streamed.take_over(model)
        if whole.get_text_config() is not whole:
            model = _language_model(model, config, held)
        if streamed:
            streamed.begin(model, unfilled_model(config, held), device())
    if held != computed:
        round_buffers(model, dict(unfilled_model(config, computed).named_buffers()))
    return model.eval()


def _of_values(config: PretrainedConfig, values: dict[str, Tensor], auto: Any, options: dict[str, Any]) -> Any:
    """Make the model of `config` with these values, as `from_pretrained` makes it from files that hold them.

    transformers' `auto` class finds its class; without one it is the class of a whole model that also sees or hears.
    """
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    made: Any = auto._model_mapping[type(config)] if auto else whole_class(config)
    given = {key: value for key, value in options.items() if key not in ("trust_remote_code", "config")}
    return made.from_pretrained(None, config=config, state_dict=values, **given)


class _Partner(NamedTuple):
    """The whole model of a language model that is a part of it, or the reverse.

    It is a tuple, so torch does not take it for a submodule.
    """

    model: Any


def _language_model(whole: Any, config: PretrainedConfig, held: torch.dtype) -> Any:
    """Make the causal language model of `config` from the modules of a model that also sees or hears."""
    decoder = whole.get_decoder()
    language: Any = unfilled_model(config, held, experts_implementation="eager")
    place = place_of_decoder(whole, language)
    inner: Any = body(decoder) if place == "" else decoder
    del inner.layers[config.get_text_config().num_hidden_layers :]
    if place == "":
        language = decoder
    else:
        language.set_submodule(place, decoder)
        language.set_output_embeddings(whole.get_output_embeddings())
    language.whole_class, whole.language_part = _Partner(whole), _Partner(language)
    return language


def _whole_class(model: Any) -> Any:
    """Return the model of the class that people load: `model` is this model or a part of it."""
    return vars(model).get("whole_class", _Partner(model)).model


def language_part(model: Any) -> Any:
    """Return the causal language model that `model` is or has. PEFT may have wrapped `model`."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return vars(plain).get("language_part", _Partner(plain)).model


def round_buffers(model: nn.Module, alike: Mapping[str, Tensor]) -> None:
    """Give buffers whose type follows the model's type the values that they have in a model of another type.

    `alike` has that model's buffers by name. Buffers on `meta` come from files, and are rounded to the model's type
    instead.

    `alike` may belong to the model without what was put around its modules. Then it lacks the buffers that only these
    wrappers have, as quantized weights do.
    """
    for name, buffer in model.named_buffers():
        other = alike.get(name.replace(".base_layer.", "."))
        if other is not None and other.dtype != buffer.dtype:
            values = buffer.to(other.dtype) if other.is_meta else other
            buffer.data = values.float().to(buffer.device)


def grow(model: Any, vocabulary: int) -> Any:
    """Grow `model` to so many rows for tokens, if it has fewer: an adapter for new tokens brings their rows."""
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        _whole_class(model).set_output_embeddings(model.get_output_embeddings())
    return model


def add_adapter(model: Any, adapter: Path, method: Method) -> tuple[Any, AbstractContextManager[None]]:
    """Return `model` with an exported adapter, and a context without the adapter.

    PEFT or the method's own loader reads the adapter. For a model that also sees or hears, PEFT gets the whole class,
    as users load it: an adapter under other names changes nothing there.

    Raises:
        ConfigError: it cannot be read.
    """
    with _reading("the method's own loader", adapter):
        without = method.load_exported(model, adapter)
    if without is not None:
        return model, without
    with _reading("PEFT", adapter):
        whole = _whole_class(model)
        adapted = PeftModel.from_pretrained(whole, str(adapter)).eval()
        if model.get_output_embeddings() is not None:
            model.set_output_embeddings(whole.get_output_embeddings())  # PEFT may have replaced them
    keep_packed(adapted)
    return adapted, adapted.disable_adapter()


def keep_packed(model: nn.Module) -> None:
    """Leave weights in 4 bits as they are.

    In eval mode bitsandbytes repacks them for a fused CPU kernel, which only takes widths divisible by 32.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()


@contextmanager
def _reading(library: str, folder: Path) -> Iterator[None]:
    """Wrap a library that raises all kinds of exceptions for a folder that it cannot read."""
    try:
        yield
    except Exception as error:
        # In an error of several lines the reason is seldom in the first: there PEFT says what it was about to do.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST_REASON]
        raise ConfigError(
            f"--verify: {library} cannot read {folder} ({reason}), so nothing is proven of the export."
        ) from error


def place_logits(model: Any, rows: Sequence[ProbeRow]) -> list[Tensor]:
    """Return for each row the logits (P, V) fp32 at its places, on the CPU, by the class that people load."""
    virtual = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    asked = model if virtual else _whole_class(language_part(model))  # PEFT's wrapper adds virtual tokens
    where = language_part(model).device
    with torch.no_grad(), outputs_lack_nothing():
        return [
            # Count from the end: virtual tokens of an adapter also have logits, before those of the row.
            asked(input_ids=row.tokens.to(where), use_cache=False, **_pictures(row, where))
            .logits[0, row.places - row.tokens.shape[1]]
            .float()
            .cpu()
            for row in rows
        ]


def _pictures(row: ProbeRow, where: torch.device, end: int | None = None) -> dict[str, Tensor]:
    """Return what the class gets beside the first `end` tokens of a row."""
    return {name: (values[:, :end] if name in TYPES else values).to(where) for name, values in row.pictures.items()}


def head_logits(model: Any, rows: Sequence[ProbeRow]) -> list[Tensor]:
    """Return the outputs (P, outputs) of a model with a head of another kind.

    The head looks at the last token that it is given, or at each token.
    """
    with torch.no_grad():
        return [as_shares(_head_outputs(model, row).float().cpu(), row) for row in rows]


def _head_outputs(model: Any, row: ProbeRow) -> Tensor:
    whole = _whole_class(language_part(model))

    def look(end: int | None) -> Tensor:
        return whole(input_ids=row.tokens[:, :end].to(whole.device), **_pictures(row, whole.device, end)).logits

    first = look(None)
    return first[0, row.places] if first.ndim == 3 else torch.cat([look(place + 1) for place in row.places.tolist()])


def adapted_weights(adapter: Path) -> tuple[str, ...]:
    """Return the ends of the names of the weights to which PEFT adds the adapter's matrices.

    PEFT cannot add them to packed weights.
    """
    settings = adapter / "adapter_config.json"
    return tuple(json.loads(settings.read_bytes()).get("target_parameters") or ()) if settings.exists() else ()


def quantize(
    model: nn.Module,
    quant: Quant,
    dtype: torch.dtype,
    weights: Collection[str],
    unpacked: tuple[str, ...] = (),
    streamed: StreamedLayers | None = None,
) -> None:
    """Have bitsandbytes quantize every matrix among the `weights`, by name, and multiply in `dtype`.

    Some matrices get the values that quantizing leaves of them instead: those whose names end in one of `unpacked`,
    those in 8 bits, and all that are `streamed`.

    transformers' own way has blocks of 64 only, and leaves experts in 16 bits.
    """
    if streamed:
        streamed.quantize(model, quant, dtype, weights)
        return
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or f"{path}.weight" not in weights:
            continue
        # bitsandbytes quantizes the matrix (outputs, inputs), even if a layer has its transpose.
        transposed = isinstance(module, Conv1D)
        matrix: Tensor = module.weight.data.t().contiguous() if transposed else module.weight.data
        outputs, inputs = matrix.shape
        misread = device().type == "cpu" and inputs % quant.block_size
        if misread or not quant.held.in_linear4bit or f"{path}.weight".endswith(unpacked):
            values = _dequantized(matrix, quant, dtype)
            module.weight.data = values.t().contiguous() if transposed else values
        else:
            layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, device="meta")
            weight: Any = Params4bit(matrix, requires_grad=False, **bnb_form(quant))
            weight = weight.to(device())  # this quantizes the weight
            weight.quant_state.dtype = dtype
            layer.weight = weight
            layer.bias = module.bias
            model.set_submodule(path, layer)
    stacks = (part for name, part in model.named_parameters() if name in weights and part.ndim == 3)
    for parameter in stacks:
        parameter.data = _dequantized(parameter.data, quant, dtype)


def _dequantized(weight: Tensor, quant: Quant, dtype: torch.dtype) -> Tensor:
    return PackedWeight(weight.to(device()), quant, dtype).values().to(weight.device)


@contextmanager
def computing_in_fp32(model: Any) -> Iterator[None]:
    """Compute one decoder layer at a time in fp32: a 16-bit weight is in fp32 only while its layer computes.

    This is exact. The class's tower is in fp32 as a whole, because the class rounds pixels to the type
    of its weights before the tower computes.
    """
    plain = language_part(model)
    top = plain.get_output_embeddings()
    parts = [*in_order(plain), _whole_class(plain).get_submodule(MODULE) if top is None else top]
    with ExitStack() as hooks:
        for part in parts:
            _have_in_fp32(part, hooks)
        hooks.enter_context(_seeing_in_fp32(_whole_class(plain)))
        yield


@contextmanager
def _seeing_in_fp32(whole: Any) -> Iterator[None]:
    """Put the tower of a class into fp32 once it gets pictures."""
    before: list[tuple[Tensor, Tensor]] = []

    def widen(_module: nn.Module, _arguments: Any, given: Mapping[str, Any]) -> None:
        for tensor in beside_decoder(whole).values() if given.keys() - {"input_ids", "use_cache"} else ():
            if tensor.dtype in (torch.bfloat16, torch.float16):
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    hook = whole.register_forward_pre_hook(widen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for tensor, data in before:
            tensor.data = data


def _have_in_fp32(part: nn.Module, hooks: ExitStack) -> None:
    before: list[tuple[Tensor, Tensor]] = []

    def widen(*_: Any) -> None:
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.dtype in (torch.bfloat16, torch.float16):
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.float()

    def restore(*_: Any) -> None:
        while before:
            tensor, data = before.pop()
            tensor.data = data

    # This hook runs first after the layer: if the layer is streamed, its weights are dropped then.
    hooks.enter_context(part.register_forward_hook(restore, prepend=True, always_call=True))
    hooks.enter_context(part.register_forward_pre_hook(widen))


@contextmanager
def shaken(model: nn.Module, size: float) -> Iterator[None]:
    """Move every linear layer's outputs by up to `size` of themselves, at random but always in the same way."""
    generator = torch.Generator(device()).manual_seed(0)

    def shake(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):  # it is a router: a linear layer that chooses as well
            return output
        noise = torch.rand(output.shape, generator=generator, device=output.device, dtype=torch.float32).mul_(2).sub_(1)
        return (output.float() * (1 + size * noise)).to(output.dtype)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                hooks.enter_context(module.register_forward_hook(shake))
        yield


def merge_and_round(
    model: Any, stored: dict[str, torch.dtype], embedding: str, streamed: StreamedLayers | None = None
) -> None:
    """Merge the adapters with PEFT's own merge, in fp32, and round each weight to the type it is `stored` in.

    Weights of layers that are `streamed` are merged at each turn. `embedding` is the name of that weight. The names of
    weights that only the whole class has are those of `seeing_name`.
    """
    inside: Any = dict(language_part(model).named_modules())
    known = {id(module) for module in inside.values()}
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    others = ((seeing_name(path), module) for path, module in plain.named_modules() if id(module) not in known)
    for path, module in [*inside.items(), *others]:
        if isinstance(module, ModulesToSaveWrapper) and path.startswith(seeing_name("")):
            _round_whole(path, module, stored, embedding)
        if not isinstance(module, BaseTunerLayer):
            continue
        layer: Any = module
        merge = partial(_merge_and_round, path.removesuffix(".token_adapter"), layer, stored, embedding)
        if not (streamed and streamed.at_each_turn(layer, merge, layer.merged_adapters.clear)):
            merge()


def _round_whole(path: str, module: ModulesToSaveWrapper, stored: dict[str, torch.dtype], embedding: str) -> None:
    for name, weight in module.modules_to_save["default"].named_parameters():
        kind = stored.get(f"{path}.{name}", stored[embedding])
        weight.data = weight.data.to(kind).to(weight.dtype)


def _merge_and_round(path: str, module: Any, stored: dict[str, torch.dtype], embedding: str) -> None:
    weights = list(module.get_base_layer().named_parameters(recurse=False))
    held = {name: weight.dtype for name, weight in weights}
    module.float()
    module.merge()
    for name, weight in weights:  # a bias too, because some methods change it
        # A tied head has the embedding's weight, and none of its own in the files.
        kind = stored.get(f"{path}.{name}", stored[embedding])
        weight.data = weight.data.to(kind).to(held[name])
