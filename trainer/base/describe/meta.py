"""Derives the architecture of a base from the model that transformers builds without weights, on torch's `meta` device.

Only transformers says which parameters there are, and how logits follow from hidden states. No family is named here.
The one table has the names that families use for the number of experts a token is routed to. A base that cannot be
trained is refused with a message that names it.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from trainer.base.architecture import (
    BESIDE_THE_LAYERS,
    KEPT_IN_FP32,
    READ_BY_ITS_FAMILY,
    UNKNOWN_EXPERTS,
    Architecture,
    Kind,
    Parameter,
)
from trainer.base.describe.attention_layers import attention_layers, declared, mixing_layers
from trainer.base.describe.description import EXPERT_COUNTS
from trainer.base.describe.empty_model import (
    NoLanguagePart,
    TransposedLinear,
    meta_model,
    output_head,
    whole_class,
    whole_model,
    with_usual_kernels,
)
from trainer.base.describe.language_model import (
    SHARED,
    beside_decoder,
    both_directions,
    causal_settings,
    first_layers,
    inner_of,
    may_read_prompts,
    outputs_lack_nothing,
    own_tokenizer,
    saved_paths,
    unknown,
    whole_names,
)
from trainer.base.describe.logits import Logits, probe_logits
from trainer.base.describe.projector import projector_of
from trainer.base.describe.trial.self_test import (
    Found,
    hollow,
    predicts_otherwise,
    reads_prompts,
    small_whole,
    try_family,
)
from trainer.base.describe.trial.small import small_model
from trainer.base.describe.trial.weight_readers import WeightPlace, paths_together, places_read, weight_place
from trainer.base.unreadable import read_by_transformers
from trainer.errors import ConfigError
from trainer.model.parts import body, decoder_layers, is_experts, tied_names

# The families' settings for the number of experts to which a token is routed.
_ROUTED_TO = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "top_k",
)
_OTHER_HEADS = (
    (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        GenericForSequenceClassification,
        "AutoModelForSequenceClassification",
    ),
    (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, GenericForTokenClassification, "AutoModelForTokenClassification"),
)
_WITHOUT_WEIGHTS = "zero_expert_num"  # the number of further experts, which return their input
_NOT_TRIED = "no small model of its kind could be tried"


def architecture_of(base_config: Mapping[str, Any], layers: int | None, name: str) -> dict[str, Any]:
    """The architecture, as JSON, of the base `name` by its parsed config.json, cut to its first `layers`.

    Raises:
        ConfigError: transformers does not know it, or it is not a causal language model that can be trained.
    """
    kind = base_config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(unknown(base_config, name))
    with read_by_transformers(name, "config.json"):
        settings = {key: value for key, value in base_config.items() if key not in ("auto_map", "quantization_config")}
        # transformers writes an infinite number as an object, which only its private function reads.
        whole = with_usual_kernels(CONFIG_MAPPING[kind].from_dict(PretrainedConfig._decode_special_floats(settings)))
        in_both_directions = may_read_prompts(whole)
        config = causal_settings(whole, name, base_config)
        text = config.get_text_config()
        count: Any = getattr(text, "num_hidden_layers", None)
        if not isinstance(count, int):
            raise ConfigError(
                f"model.base: {name} is a {kind} model, which has layers in several parts, none of which is the"
                " decoder. Give another base."
            )
        if (getattr(text, SHARED, 0) or 0) >= count:
            raise ConfigError(
                f"model.base: {name} is a {kind} model, which takes the keys of all its layers from the model that it"
                " drafts for. Give that one."
            )
        config, stored_layers = first_layers(config, layers)
        try:
            model = meta_model(config)
        except NoLanguagePart as error:
            raise ConfigError(f"model.base: {name} is a {kind} model, whose {error}. Give another base.") from error
        reader = _Reader(model, config.get_text_config(), name, whole, in_both_directions)
        return {**reader.architecture(stored_layers).to_json(), "tokenizer": own_tokenizer(kind)}


@cache
def _code(module: type[nn.Module]) -> str:
    """The source of a class, cached because Python parses the whole file each time."""
    return inspect.getsource(module)


def _is_handed_on(around: nn.Module, name: str) -> bool:
    """Whether the code of the module `around` the linear layer `name` passes the layer's weight to a function.

    Running the model would not show it: only GPU kernels that fuse several layers take a weight, and without such a
    kernel the code calls the layer. tests/unit/model/test_upstream.py fails if the code is written in another way.
    """
    return re.search(rf"[=(\s]self\.{name}\.weight,", _code(type(around))) is not None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]


@dataclass(frozen=True)
class _Reader:
    """A model on `meta`, and its settings.

    `whole` has the settings of the class that users load, which may process pictures or sound as well.
    `in_both_directions` says whether it may read prompts so.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    name: str
    whole: PretrainedConfig
    in_both_directions: bool = False

    def architecture(self, stored_layers: int) -> Architecture:
        """The description of the model. Raises `ConfigError` for models that it cannot describe correctly."""
        if not self._is_alone and not issubclass(made_by := whole_class(self.whole), GenerationMixin):
            why = f"is the language model of {made_by.__name__}, which does not generate one token after another"
            raise ConfigError(self._refusal(why))
        embedding, head = self._name(self.model.get_input_embeddings()), self._name(self._head)
        logits = self._logits()
        if logits is None:
            raise ConfigError(
                self._refusal(
                    "has more than one matrix, a factor and a cap between its last hidden states and its logits"
                )
            )
        self._check_whole()
        self._check_directions()
        parameters, trial, tied = tuple(self._parameters()), self._trial(), tied_names(self.model)
        positions = getattr(self.config, "max_position_embeddings", None)
        if not any(part.kind in ("linear", "experts") for part in parameters):
            raise ConfigError(self._refusal("has no linear layers, so nothing in it can be quantized or adapted"))
        if trial and trial.looks_ahead:
            raise ConfigError(self._refusal("lets tokens see later ones, so it is not a causal model"))
        if trial and not trial.learns:
            raise ConfigError(self._refusal("gives its layers no gradient while its embeddings stay as they are"))
        shared = (name.removesuffix(".weight") for name in tied if name != head)  # of a bias that is nothing
        if any(isinstance(self._modules.get(path), nn.Linear) for path in shared):
            raise ConfigError(self._refusal("has layers that share their weights with other layers"))
        return Architecture(
            layers=len(self._layers),
            stored_layers=stored_layers,
            hidden=self._head.in_features,
            vocabulary=next(part.shape[0] for part in parameters if part.name == embedding),
            embedding=embedding,
            head=head,
            positions=positions if positions and positions > 0 else None,
            parameters=parameters,
            attention=tuple(attention_layers(self._layers, self._modules, self.config)),
            mixing=tuple(mixing_layers(self._layers, self._modules, self._head.in_features)),
            tied=tied,
            buffers=dict(self._buffers()),
            caps_attention=declared(self.config, "attn_logit_softcapping") is not None,
            has_sinks=any("sink" in part.name.rpartition(".")[2] for part in parameters),
            isolates_documents=trial is not None and trial.keeps_documents_apart,
            padding=trial.padding if trial else 0,
            fails_packed=trial.fails_packed if trial else None,
            fails_shared=self._fails_shared(trial),
            fails_prefix=trial.fails_prefix if trial else _NOT_TRIED,
            fails_balance=trial.fails_balance if trial else None,
            tried=trial is not None,
            read_together=tuple(paths_together(self.model, trial.together)) if trial else (),
            recomputes=self.model.supports_gradient_checkpointing,
            rotary=bool(getattr(self.config, "rope_parameters", None)),
            taken_for_experts=tuple(self._taken_for_experts(parameters)),
            heads=tuple(self._heads()),
            weights_beside=self._weights_beside(),
            linears_beside=self._linears_beside(),
            projector=self._projector(),
            reads_prompts=self.in_both_directions,
            supports_sdpa=self.model._supports_sdpa,
            supports_flash=self.model._supports_flash_attn,
            logit_factor=logits.factor,
            logit_divisor=logits.divisor,
            softcap=logits.softcap,
        )

    @cached_property
    def _is_alone(self) -> bool:
        """Whether users load the language model itself, and not a class that also processes pictures or sound."""
        return self.whole.get_text_config() is self.whole

    def _weights_beside(self) -> int:
        if self._is_alone:
            return 0
        with self._given_text_alone():
            return sum(tensor.numel() for tensor in beside_decoder(whole_model(self.whole)).values())

    def _linears_beside(self) -> dict[str, tuple[int, ...]]:
        if self._is_alone:
            return {}
        with self._given_text_alone():
            whole = whole_model(self.whole)
            beside = {name.removesuffix(".weight") for name in beside_decoder(whole) if name.endswith(".weight")}
            named = ((path, whole.get_submodule(path)) for path in sorted(beside))
            # A layer of a kind of its own may be read without being called, as in torch's attention.
            return {path: tuple(layer.weight.shape) for path, layer in named if type(layer) is nn.Linear}

    def _projector(self) -> dict[str, dict[str, tuple[int, ...]]]:
        if self._is_alone:
            return {}
        try:
            return projector_of(self.whole)
        except Exception:  # a class may raise any error around a decoder of another width
            return {}

    def _logits(self) -> Logits | None:
        """How the class that users load computes logits from its decoder's result."""
        if self._is_alone:
            with suppress(TypeError, ValueError, LookupError, RuntimeError, AttributeError, NotImplementedError):
                return probe_logits(self.model, body(self.model), self._head)
            return None
        with self._given_text_alone():
            whole = hollow(whole_model(self.whole)).eval()
            return probe_logits(whole, inner_of(whole), cast(nn.Linear, output_head(whole)))

    def _check_whole(self) -> None:
        """Raises `ConfigError` if the class that users load predicts text differently than its language model."""
        if self._is_alone or self._small is None:
            return
        with self._given_text_alone():
            differs = predicts_otherwise(small_whole(self.whole, self._small[0]), self._small[0])
        if differs:
            name = whole_class(self.whole).__name__
            why = f"is the language model of {name}, which computes otherwise for text than its decoder and its head"
            raise ConfigError(self._refusal(why))

    def _check_directions(self) -> None:
        """Raises `ConfigError` if the class reads more in both directions than what stands before an answer."""
        if not self.in_both_directions:
            return
        if self._small is None:
            raise both_directions(self.name)
        with self._given_text_alone():
            reads = reads_prompts(small_whole(self.whole, self._small[0]))
        if not reads:
            raise both_directions(self.name)

    @contextmanager
    def _given_text_alone(self) -> Iterator[None]:
        """A context around the class that users load. Its code may raise any error if it needs pictures or sound."""
        try:
            with outputs_lack_nothing():
                yield
        except ImportError as error:
            why = "is the language model of a class that needs a package that is not installed"
            if command := re.search(r"pip install [\w.-]+\w", str(error)):  # transformers says which
                raise ConfigError(self._refusal(why, f"Install it: {command[0]}.")) from error
            raise ConfigError(self._refusal(f"{why} ({_reason(error)})", "Install it.")) from error
        except Exception as error:
            name = whole_class(self.whole).__name__
            why = f"is the language model of {name}, which cannot compute for text alone ({_reason(error)})"
            raise ConfigError(self._refusal(why)) from error

    def _heads(self) -> Iterator[str]:
        """transformers' classes for this model with a head for another task, if built as in most families."""
        for mapping, generic, name in _OTHER_HEADS:
            made = mapping.get(type(self.whole), None)
            if isinstance(made, type) and issubclass(made, generic):
                yield name

    def _refusal(self, why: str, remedy: str = "Give another base.") -> str:
        return f"model.base: {self.name} is a {self.config.model_type} model, which {why}. {remedy}"

    @cached_property
    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not {"weight", "bias"}.issuperset(dict(head.named_parameters())):
            raise ConfigError(self._refusal("has an output head that is no plain matrix"))
        return head

    @cached_property
    def _layers(self) -> nn.ModuleList:
        layers = decoder_layers(self.model)
        if layers is None:
            raise ConfigError(self._refusal("has no list of decoder layers"))
        return layers

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def _name(self, module: nn.Module) -> str:
        """The name of a module's weight in the model."""
        return next(f"{path}.weight" for path, found in self._modules.items() if found is module)

    def _buffers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.model.state_dict().items():
            if name not in parameters:
                yield name, tuple(tensor.shape)

    def _parameters(self) -> Iterator[Parameter]:
        numbers = {id(module): number for number, layer in enumerate(self._layers) for module in layer.modules()}
        routers = set(self._routers())
        for name, parameter in self.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            owner = self._modules[path]
            layer = numbers.get(id(owner))
            kind = self._kind(name, owner, leaf, parameter, layer)
            if kind == "linear" and (path in routers or parameter.shape[0] == 1):
                kind = "small"
            shape = tuple(parameter.shape)
            if why := self._whole(path, kind):
                yield Parameter(name, shape, "small", layer, whole=why)
                continue
            if kind == "small" and layer is None and self._is_beside_the_layers(path):
                yield Parameter(name, shape, kind, layer, whole=BESIDE_THE_LAYERS)
                continue
            if kind == "small" and layer is not None and (share := self._share_of_unknown_experts(path, parameter)):
                yield Parameter(name, shape, kind, layer, share, whole=UNKNOWN_EXPERTS)
                continue
            if kind == "experts":
                transposed = getattr(owner, "is_transposed", False)  # as PEFT sees it
                yield Parameter(name, shape, kind, layer, self._visits(path, shape[0]), transposed)
            else:
                around, _, last = path.rpartition(".")
                # Mamba's module, for example, passes the weight to a kernel.
                handed_on = kind == "linear" and _is_handed_on(self._modules[around], last)
                fixed = handed_on or (kind == "linear" and path in self._lost_by_peft)
                transposed = isinstance(owner, TransposedLinear) and leaf == "weight"
                yield Parameter(name, shape, kind, layer, transposed=transposed, adaptable=not fixed)

    def _kind(self, name: str, owner: nn.Module, leaf: str, parameter: Tensor, layer: int | None) -> Kind:
        if owner is self._head and leaf == "weight":
            return "head"
        if isinstance(owner, nn.Embedding):
            return "embedding"
        if isinstance(owner, nn.Linear) and leaf == "weight" and layer is not None:
            return "linear"
        return "experts" if layer is not None and _is_stack(owner, parameter) else "small"

    def _whole(self, path: str, kind: Kind) -> str | None:
        """Why a linear layer must stay as it is stored. None if it need not."""
        if kind != "linear":
            return None
        around, _, name = path.rpartition(".")
        if weight_place(self._modules[around], name) in self._places_read:
            return READ_BY_ITS_FAMILY
        return KEPT_IN_FP32 if self._in_fp32 and self._in_fp32.search(f"{path}.weight") else None

    def _is_beside_the_layers(self, path: str) -> bool:
        """Whether a linear layer lies in a list of decoder layers other than the model's own."""
        parts = path.split(".")
        around = (self._modules[".".join(parts[:end])] for end in range(1, len(parts)))
        return isinstance(self._modules[path], nn.Linear) and any(
            isinstance(module, GradientCheckpointingLayer) for module in around
        )

    @cached_property
    def _small(self) -> tuple[PreTrainedModel, set[WeightPlace]] | None:
        """A small model of the same kinds of layers, and the places of the linear layers whose weights its code reads.

        None if it cannot be made or does not compute."""
        try:
            small = small_model(self.config, self.model)
            return small, places_read(small)
        except Exception:  # a family's code may raise any error for sizes that it was not made for
            return None

    @cached_property
    def _places_read(self) -> set[WeightPlace]:
        """The places that the small model shows, or the text of the classes if there is no small model."""
        if self._small:
            return self._small[1]
        return {
            weight_place(around, name)
            for around in self._modules.values()
            for name, child in around.named_children()
            if isinstance(child, nn.Linear)
            and f"self.{name}.weight" in _code(type(around))
            and not _is_handed_on(around, name)
        }

    def _trial(self) -> Found | None:
        if self._small is None:
            return None
        try:
            return try_family(*self._small)
        except Exception as error:
            why = f"cannot compute as training asks it to ({_reason(error)})"
            raise ConfigError(self._refusal(why)) from error

    def _fails_shared(self, trial: Found | None) -> str | None:
        """Why ranks cannot share a row, if they cannot.

        Some rotary frequencies depend on the largest position of the tokens that a model computes. A small model never
        reaches such positions, so these are refused by their type."""
        if trial is None:
            return _NOT_TRIED
        rotary: Any = getattr(self.config, "rope_parameters", None) or {}
        kinds = {part.get("rope_type") for part in (rotary, *rotary.values()) if isinstance(part, Mapping)}
        for kind in ("dynamic", "longrope"):
            if kind in kinds:
                return f"its rotary frequencies follow from the longest position of a slice (rope_type: {kind})"
        return trial.fails_shared

    @cached_property
    def _in_fp32(self) -> re.Pattern[str] | None:
        """Matches the names of the weights that a family keeps in fp32. transformers' list of them is private."""
        names: list[Any] = [*(self.model._keep_in_fp32_modules or ()), *(self.model._keep_in_fp32_modules_strict or ())]
        return build_glob_alternation(names)[0] if names else None

    def _share_of_unknown_experts(self, path: str, parameter: Tensor) -> float | None:
        """The share of tokens that visit one expert, for a parameter that holds all experts' matrices end to end.

        None for any other parameter."""
        count = self._expert_count
        if count is None or isinstance(self._modules[path], (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):
            return None
        if parameter.ndim == 2 and len(parameter) % count == 0 and len(parameter) > count:
            parameter = parameter.unflatten(0, (count, -1))
        is_stack = parameter.ndim == 3 and self._head.in_features in parameter.shape[1:] and len(parameter) >= count
        return self._visits(path, len(parameter)) if is_stack and min(parameter.shape[1:]) > 1 else None

    @cached_property
    def _expert_count(self) -> int | None:
        declared = (getattr(owner, key, None) for owner in self._settings() for key in EXPERT_COUNTS)
        return next((count for count in declared if type(count) is int and count > 1), None)

    def _settings(self) -> Iterator[PretrainedConfig]:
        """Yield the settings of the model, and of its parts that have their own."""
        yield self.config
        yield from (value for value in vars(self.config).values() if isinstance(value, PretrainedConfig))

    def _routers(self) -> Iterator[str]:
        """Yield the paths of routers: linear layers beside a stack of experts, with one output for each expert.

        A router is alone in its module. A shared expert may be as wide, but has three linear layers."""
        for name, parameter in self.model.named_parameters():
            path = name.rpartition(".")[0]
            if _is_stack(self._modules[path], parameter):
                block = path.rpartition(".")[0]
                for inner, module in self._modules[block].named_modules(prefix=block):
                    if isinstance(module, nn.Linear) and module.out_features == parameter.shape[0]:
                        around = inner.rpartition(".")[0]
                        linears = [isinstance(child, nn.Linear) for child in self._modules[around].children()].count(
                            True
                        )
                        if around == block or linears == 1:
                            yield inner

    def _taken_for_experts(self, parameters: Sequence[Parameter]) -> Iterator[str]:
        """Yield the last names of linear layers that PEFT takes for experts.

        transformers 5 replaced the linear layers of experts by stacks. PEFT 0.21 takes any linear layer of the same
        last name for an expert, and adapts the stacks instead (huggingface/peft#3711)."""
        if self._expert_count is None and not any(part.kind == "experts" for part in parameters):
            return
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        for name in sorted({part.name.split(".")[-2] for part in parameters if part.kind == "linear"}):
            asked = LoraConfig(target_modules=[name])
            with suppress(ValueError):  # only one of two matrices that are fused in a stack
                convert_peft_config_for_transformers(asked, cast(nn.Module, SimpleNamespace(config=self.whole)), None)
                if name in (asked.target_modules or ()):
                    continue
            yield name

    @cached_property
    def _lost_by_peft(self) -> set[str]:
        """The linear layers for whose adapters PEFT finds no name."""
        linears = {path: path for path, module in self._modules.items() if isinstance(module, nn.Linear)}
        loaded = self.model
        if not self._is_alone:
            loaded = whole_model(self.whole)
            in_whole = whole_names(loaded, self.model)
            linears = {path: in_whole(path) for path in linears}
        saved = saved_paths(loaded, list(linears.values()))
        return {path for path, there in linears.items() if saved[there] is None}

    def _visits(self, path: str, experts: int) -> float:
        """The share of tokens that are routed to one of the `experts` at `path`, or 1 if it is unknown."""
        block = self._modules[path.rpartition(".")[0]]
        for owner in (*self._settings(), *block.modules()):
            for key in _ROUTED_TO:
                routed = getattr(owner, key, None)
                if type(routed) is int and routed > 0:
                    return min(1.0, routed / (experts + (getattr(owner, _WITHOUT_WEIGHTS, 0) or 0)))
        return 1.0


def _is_stack(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether it holds the matrices of a mixture's experts. Convolutions and recurrences also have three dimensions."""
    return parameter.ndim == 3 and is_experts(owner)
