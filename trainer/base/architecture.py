"""The architecture of a causal language model: its parameters and sizes, known without loading torch.

`trainer/base/describe/meta.py` reads it off the model that transformers builds. Code that plans, loads, tunes or picks
a kernel asks here, and no other file knows what a model is called.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import TypeAdapter

from trainer.config import Config
from trainer.model.held.codes import Kept
from trainer.model.kernels.attention import AttentionNeeds
from trainer.model.rows.heads import Exchange

Kind = Literal["linear", "experts", "embedding", "head", "small"]


READ_BY_ITS_FAMILY = "code of its family reads its weight"
KEPT_IN_FP32 = "transformers keeps it in fp32"
BESIDE_THE_LAYERS = "it is outside of the list of decoder layers that all else is counted by"
UNKNOWN_EXPERTS = "its experts are in a form that cannot be packed"


@dataclass(frozen=True)
class Parameter:
    """One parameter, by its name and shape in the model that transformers builds.

    `kind`: the matrix (outputs, inputs) of a linear layer that can be quantized and adapted; a stack (experts, rows,
    columns) of a mixture's matrices, quantized one by one; embedding and head; `small` is all the rest: norms, biases,
    routers, convolutions. `layer` is None outside the decoder layers. `visits` is the share of a row's tokens that each
    of its matrices multiplies: less than 1 for experts to which tokens are routed. A matrix that could be quantized by
    its form and is not says in `whole` why, as a clause; it is `small`. A stack that is `transposed` has matrices
    (inputs, outputs), and its class says so; of a linear layer the files have the transpose. `kept` is how the files
    hold it, where it may stay so (`quant.type: stored`). A linear layer that is not `adaptable` is multiplied by code
    of the module around it as well, which hands its weight to a
    kernel: PEFT refuses adapters on such. Or PEFT would not find the adapter's weights under any name.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None
    visits: float = 1.0
    transposed: bool = False
    adaptable: bool = True
    whole: str | None = None
    kept: Kept | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> list[int]:
        """Weights of each matrix in it that is quantized by itself; none where it is not quantized."""
        if self.kind == "linear":
            return [self.numel]
        return [math.prod(self.shape[1:])] * self.shape[0] if self.kind == "experts" else []


@dataclass(frozen=True)
class Linear:
    """One linear layer: its weight is (outputs, inputs)."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one decoder layer, at `path` in the model: the keys of a token are (key_value_heads, head_size),
    or None where they are no such thing. `window` is the number of tokens that a token sees, itself included, where it
    does not see all. `query_heads` are its heads of queries, where they are known.
    """

    path: str
    layer: int
    key_value_heads: int | None
    head_size: int | None
    window: int | None = None
    query_heads: int | None = None


@dataclass(frozen=True)
class MixingLayer:
    """A layer at `path` that mixes tokens otherwise than by attention as it is known here. Ranks that share a row
    exchange what its functions take and return; without `exchanges` each computes the whole row in it."""

    path: str
    layer: int
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A causal language model, cut to its first `layers` of `stored_layers` in the files.

    Layers may differ; `rotary` says that it has rotary positions, whose frequencies transformers can scale. `embedding`
    and `head` are the names of these weights; `tied` maps a name to the parameter that it is another name of, as often
    the head's to the embedding's. `buffers` are the shapes of those tensors in the files that are no parameters.
    `positions` is the longest sequence, where the model has a limit. The attention caps its logits (`caps_attention`,
    Gemma 2), or has a sink for each head (`has_sinks`), which not every kernel computes. transformers runs it with SDPA
    (`supports_sdpa`), and with kernels that take no mask (`supports_flash`). `isolates_documents`: documents of a
    packed row do not see each other in a small model of the same kinds; elsewhere a row has one document, with padding
    behind it that is no document of its own. `padding` is the token that fills rows. The small model cannot compute
    over 4 bits where `fails_packed` says why, and not on ranks that share a row where `fails_shared` does, nor
    documents that share a prefix where `fails_prefix` does. The layers can compute their activations again in the
    backward pass (`recomputes`). It is not `tried` where its family's code runs at no other sizes. The linear layers of
    each entry of `read_together` are called with one tensor, in this order, and are in one layer whose activations can
    be.
    `taken_for_experts` are the last names of linear layers in whose place PEFT adapts the experts. `heads` are
    transformers' classes with a head of another kind on the same model, where they have it under the name that all
    families but a few use. `tokenizer` is the class that transformers reads its tokenizer by whatever the tokenizer's
    own settings name; None where it goes by these. With logits z = `logit_factor` / `logit_divisor` * the product with
    the head, and `softcap` c, the model's are c * tanh(z / c).
    """

    layers: int
    stored_layers: int
    hidden: int
    vocabulary: int
    embedding: str
    head: str
    positions: int | None
    parameters: tuple[Parameter, ...]
    attention: tuple[AttentionLayer, ...] = ()
    mixing: tuple[MixingLayer, ...] = ()
    tied: dict[str, str] = field(default_factory=dict[str, str])
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    caps_attention: bool = False
    has_sinks: bool = False
    supports_sdpa: bool = True
    supports_flash: bool = True
    isolates_documents: bool = True
    padding: int = 0
    fails_packed: str | None = None
    fails_shared: str | None = None
    fails_prefix: str | None = None
    tried: bool = True
    read_together: tuple[tuple[str, ...], ...] = ()
    recomputes: bool = True
    rotary: bool = True
    taken_for_experts: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    tokenizer: str | None = None
    logit_factor: float = 1.0
    logit_divisor: float = 1.0
    softcap: float | None = None

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head and the embedding are one matrix."""
        return self.tied.get(self.head) == self.embedding

    @property
    def sliding_window(self) -> int | None:
        """The fewest tokens that a token sees in some layer, itself included; None where it sees all in every layer."""
        return min((layer.window for layer in self.attention if layer.window), default=None)

    @cached_property
    def width(self) -> int:
        """Values of a token between decoder layers: `hidden`, unless a linear layer stands behind them (OPT-350M)."""
        inputs = [part.shape[1] for part in self.parameters if part.kind == "linear"]
        if not inputs or any(self.hidden in part.shape for part in self.parameters if part.kind == "linear"):
            return self.hidden
        return max(inputs, key=inputs.count)

    @property
    def widest_head(self) -> int:
        """The width of the widest head whose keys and values are alike; 0 without any."""
        return max((layer.head_size or 0 for layer in self.attention), default=0)

    @property
    def attention_needs(self) -> AttentionNeeds:
        return AttentionNeeds(
            self.caps_attention, self.has_sinks, self.supports_sdpa, self.supports_flash, self.widest_head
        )

    @cached_property
    def computed_whole(self) -> frozenset[str]:
        """The paths of the layers that each of the ranks which share a row computes for all of its tokens."""
        return frozenset(mixing.path for mixing in self.mixing if not mixing.exchanges)

    def to_json(self) -> dict[str, Any]:
        """A tree of plain values."""
        return asdict(self)

    @staticmethod
    def from_json(tree: Any) -> "Architecture":
        """Raises `ValueError` for a tree that `to_json` has not made."""
        return TypeAdapter(Architecture).validate_python(tree)

    def weights(self, *kinds: Kind) -> int:
        """Elements of all parameters of these kinds."""
        return sum(parameter.numel for parameter in self.parameters if parameter.kind in kinds)

    def largest(self, *kinds: Kind) -> int:
        """Elements of the largest parameter of these kinds."""
        return max(parameter.numel for parameter in self.parameters if parameter.kind in kinds)

    def whole(self) -> dict[tuple[str, str], int]:
        """The weights that could be packed by their form and stay in 16 bits, by the last name of their module and the
        reason.
        """
        found = dict[tuple[str, str], int]()
        for part in self.parameters:
            if part.whole and len(part.shape) > 1:
                key = part.name.removesuffix(".weight").rpartition(".")[2], part.whole
                found[key] = found.get(key, 0) + part.numel
        return found

    def in_layer(self, layer: int) -> list[Parameter]:
        """The parameters of one decoder layer, in the model's order."""
        return self._layers.get(layer, [])

    @cached_property
    def _layers(self) -> dict[int | None, list[Parameter]]:
        found: dict[int | None, list[Parameter]] = {}
        for parameter in self.parameters:
            found.setdefault(parameter.layer, []).append(parameter)
        return found

    def quantizable(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight that can be quantized."""
        return {
            parameter.name: parameter.shape for parameter in self.parameters if parameter.kind in ("linear", "experts")
        }

    @property
    def linear_names(self) -> list[str]:
        """The last names of all linear layers that can be adapted, in the model's order."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.linear_layers()))

    def linear_layers(self) -> dict[str, Linear]:
        """Path in the model -> every linear layer that can be adapted, in the model's order."""
        return {
            parameter.name.removesuffix(".weight"): Linear(inputs=parameter.shape[1], outputs=parameter.shape[0])
            for parameter in self.parameters
            if parameter.kind == "linear" and parameter.adaptable
        }

    def stacks(self) -> dict[str, Parameter]:
        """Name -> every stack of a mixture's matrices, in the model's order."""
        return {parameter.name: parameter for parameter in self.parameters if parameter.kind == "experts"}

    def blocks(self) -> dict[int, list[str]]:
        """Decoder layer -> the paths in the model of its blocks, each of whose outputs is added to the hidden states:
        first attention, last the MLP or the mixture of experts."""
        found: dict[int, dict[str, None]] = {}
        for parameter in self.parameters:
            if parameter.layer is not None and parameter.kind in ("linear", "experts"):
                before, number, rest = parameter.name.partition(f".{parameter.layer}.")
                found.setdefault(parameter.layer, {})[before + number + rest.partition(".")[0]] = None
        return {layer: list(paths) for layer, paths in found.items()}


def mismatches(config: Config, model: Architecture) -> list[str]:
    """A sentence for each setting of `config` that asks more of the architecture than it has."""
    length, found = config.data.sequence_length, list[str]()
    if model.positions and length > model.positions:
        scaled, times = config.model.rope_scaling, math.ceil(length / model.positions)
        remedy = "Lower it."
        if model.rotary and scaled.rope_type is None:
            remedy = f"Lower it, or set model.rope_scaling: {{rope_type: yarn, factor: {times}}}."
        elif model.rotary:
            remedy = "Lower it, or raise model.rope_scaling.factor."
        found.append(
            f"data.sequence_length: {length} exceeds the base's {model.positions} positions (config.json). {remedy}"
        )
    if config.model.rope_scaling.rope_type and not model.rotary:
        found.append("model.rope_scaling: this base has no rotary positions that transformers could scale. Remove it.")
    if config.model.rope_scaling.rope_type == "longrope" and config.data.packing:
        found.append(
            "model.rope_scaling.rope_type: longrope has frequencies by the longest document of a row, which its other"
            " documents would have too. Set data.packing: false, or yarn."
        )
    if config.model.layers and config.model.layers > model.stored_layers:
        found.append(
            f"model.layers: {config.model.layers} exceeds the base's {model.stored_layers} layers (config.json)."
            " Lower it."
        )
    kept = config.train.activation_checkpointing
    if isinstance(kept, int) and kept > model.layers:
        found.append(
            f"train.activation_checkpointing: {kept} exceeds the {model.layers} layers that are trained on. Lower it,"
            " or say none."
        )
    if kept == model.layers and config.train.activation_offload:
        found.append(
            f"train.activation_offload: has no effect with train.activation_checkpointing: {kept}, as all"
            f" {model.layers} layers keep their activations then and none is computed again. Remove one of them, or"
            " give a smaller number."
        )
    if not model.recomputes and config.train.activation_checkpointing != "none":
        found.append(
            "train.activation_checkpointing: the layers of this base cannot be computed again, as transformers says of"
            " its class. Set it to none."
        )
    held = config.quant.held
    if held.packs and not held.quantizes and not any(parameter.kept for parameter in model.parameters):
        found.append(
            "quant.type: stored keeps weights as the base's files have them in 4 or 8 bits, and by its config.json this"
            " base has none that can stay so. Set quant.type: nf4, or none."
        )
    if config.data.packing and not model.tried:
        found.append(
            "data.packing: documents of one row might see each other, as the code of this base runs at no small size to"
            " be tried at. Set data.packing: false."
        )
    elif config.data.packing and not model.isolates_documents:
        found.append(
            "data.packing: documents of one row would see each other, as this base takes no position_ids, which tell"
            " where they begin, or does not heed them. Set data.packing: false."
        )
    elif not model.isolates_documents and config.train.micro_batch > 1:
        found.append(
            f"train.micro_batch: {config.train.micro_batch} documents of one row would see each other with this base,"
            " which computes one at a time. Set it to 1; train.global_batch says how many are in a step."
        )
    if held.packs and model.fails_packed:
        found.append(
            "quant.type: this base cannot be computed with weights in 4 bits, as a small model of its kind shows"
            f" ({model.fails_packed}). Set quant.type: none."
        )
    return found
