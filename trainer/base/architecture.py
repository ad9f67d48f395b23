"""The architecture of a causal language model: its parameters and sizes, known without loading torch.

`trainer/base/describe/meta.py` derives it from the model that transformers builds. Code that plans, loads, tunes or
picks a kernel asks the classes here, and never looks at the name of a model.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from pydantic import TypeAdapter

from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.model.held.codes import KeptWeight
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

    Attributes:
        kind: `linear` is the matrix (outputs, inputs) of a linear layer that can be quantized and adapted. `experts` is
            a stack (experts, rows, columns) of a mixture's matrices, which are quantized one by one. Embedding and head
            have kinds of their own. `small` is everything else: norms, biases, routers, convolutions.
        layer: the decoder layer, or None outside these.
        visits: the share of a row's tokens that each of its matrices multiplies. It is below 1 for routed experts.
        transposed: whether a stack has matrices (inputs, outputs), as its class says; or whether the files hold the
            transpose of a linear layer's matrix.
        whole: why a matrix of a quantizable form stays in 16 bits, as a clause. Such a matrix is `small`.
        kept: how the files hold it, if it may stay so (`quant.type: stored`).
        adaptable: whether a linear layer can have an adapter. It cannot if the module around it also hands its weight
            to a kernel, which PEFT refuses, or if PEFT finds the adapter's weights under no name.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None
    visits: float = 1.0
    transposed: bool = False
    adaptable: bool = True
    whole: str | None = None
    kept: KeptWeight | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> list[int]:
        """The number of weights of each matrix that is quantized by itself. Empty if it is not quantized."""
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
    """The attention of one decoder layer, at `path` in the model.

    The keys of a token are (key_value_heads, head_size); both are None if its keys have no such form. `window` is the
    number of tokens that a token sees, itself included, or None if it sees all. `query_heads` is the number of query
    heads, if it is known.
    """

    path: str
    layer: int
    key_value_heads: int | None
    head_size: int | None
    window: int | None = None
    query_heads: int | None = None


@dataclass(frozen=True)
class MixingLayer:
    """A layer at `path` that mixes tokens, but not by a known form of attention.

    With `exchanges`, ranks that share a row exchange the inputs and results of its functions. Otherwise each rank
    computes the layer for the whole row."""

    path: str
    layer: int
    exchanges: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class KeptOfPictures:
    """The bytes that a tower keeps for its backward pass where it learns, of a row's pictures.

    Attributes:
        plain, recomputed: those of any row, and those for each token of a picture, where no layer is computed again and
            where all that have adapters are.
        layer: those of one layer, for each token.
        largest: those of the largest tensor, for each token.
    """

    plain: tuple[float, float]
    recomputed: tuple[float, float]
    layer: float
    largest: float


@dataclass(frozen=True)
class Architecture:
    """A causal language model, cut to its first `layers` of `stored_layers` in the files. Layers may differ.

    Capstan tries the family's code on a small model of the same kinds of layers; some attributes record the result.

    Attributes:
        rotary: whether it has rotary positions, whose frequencies transformers can scale.
        embedding, head: the names of these weights.
        tied: a name -> the parameter of which it is another name, such as the head's -> the embedding's.
        buffers: the shapes of tensors in the files that are not parameters.
        positions: the longest sequence, or None if the model has no limit.
        caps_attention, has_sinks: whether attention caps its logits (Gemma 2), or has a sink for each head. Not every
            kernel computes these.
        supports_sdpa, supports_flash: whether transformers runs it with SDPA, and with kernels that take no mask.
        isolates_documents: whether documents of a packed row do not see each other in the small model. If not, a row
            has one document, and the padding behind it is not a document of its own.
        padding: the token that fills rows.
        fails_packed, fails_shared, fails_prefix: why the small model cannot compute with 4-bit weights, on ranks that
            share a row, or with documents that share a prefix.
        fails_balance: why the routers of a mixture cannot be balanced (objective.router_loss), as a clause.
        recomputes: whether layers can recompute their activations in the backward pass.
        tried: whether the small model could be tried; a family's code may run at no other sizes.
        read_together: groups of linear layers that are called with one tensor, in this order. Those of a group lie in
            one layer whose activations can be recomputed.
        taken_for_experts: last names of linear layers for which PEFT would adapt the experts instead.
        heads: transformers' classes with another kind of head on the same model, if the head has its usual name.
        tokenizer: the class that transformers always uses for its tokenizer, or None if the tokenizer's own settings
            decide.
        weights_beside: weights of the class that users load, without its language model's: those of its tower
            (encoders and projectors of pictures, of sound, or of video).
        linears_beside: path in that class -> (outputs, inputs) of each linear layer among them.
        projector: path in that class of each module that turns features of pictures into states of the decoder -> names
            below it and shapes of its parameters. Empty if it cannot be told which these are.
        kept_of_pictures: the activations of the tower, if it learns in the planned run and they could be
            measured (`trainer.plan.seeing`).
        reads_prompts: whether tokens before an answer see each other in both directions, where the class that users
            load is told which they are.
        logit_factor, logit_divisor, softcap: with z = logit_factor / logit_divisor * the product with the head, and
            softcap c, the logits are c * tanh(z / c).
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
    fails_balance: str | None = None
    tried: bool = True
    read_together: tuple[tuple[str, ...], ...] = ()
    recomputes: bool = True
    rotary: bool = True
    taken_for_experts: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    tokenizer: str | None = None
    weights_beside: int = 0
    linears_beside: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    projector: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict[str, dict[str, tuple[int, ...]]])
    kept_of_pictures: KeptOfPictures | None = None
    reads_prompts: bool = False
    logit_factor: float = 1.0
    logit_divisor: float = 1.0
    softcap: float | None = None

    @property
    def head_is_embedding(self) -> bool:
        """Whether the head and the embedding are one matrix."""
        return self.tied.get(self.head) == self.embedding

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of all layers, in tokens, itself included. None if every layer sees all tokens."""
        return min((layer.window for layer in self.attention if layer.window), default=None)

    @cached_property
    def width(self) -> int:
        """Values of a token between decoder layers: `hidden`, unless a linear layer follows these (OPT-350M)."""
        inputs = [part.shape[1] for part in self.parameters if part.kind == "linear"]
        if not inputs or any(self.hidden in part.shape for part in self.parameters if part.kind == "linear"):
            return self.hidden
        return max(inputs, key=inputs.count)

    @property
    def widest_head(self) -> int:
        """The width of the widest head with keys and values of equal width. 0 if there is none."""
        return max((layer.head_size or 0 for layer in self.attention), default=0)

    @property
    def attention_needs(self) -> AttentionNeeds:
        return AttentionNeeds(
            self.caps_attention, self.has_sinks, self.supports_sdpa, self.supports_flash, self.widest_head
        )

    @cached_property
    def computed_whole(self) -> frozenset[str]:
        """The paths of the layers that every rank of a shared row computes for all of the row's tokens."""
        return frozenset(mixing.path for mixing in self.mixing if not mixing.exchanges)

    def to_json(self) -> dict[str, Any]:
        """A tree of plain values."""
        return asdict(self)

    @staticmethod
    def from_json(tree: Any) -> "Architecture":
        """The architecture of a tree. Raises `ValueError` if `to_json` did not make the tree."""
        return _READER.validate_python(tree)

    def first(self, layers: int) -> "Architecture | None":
        """The architecture cut to its first `layers`, if these are built like all others. None if they are not: what
        was tried with the whole model may then not hold for a part of it.
        """
        if layers >= self.layers:
            return self
        built = [self._built(layer) for layer in range(self.layers)]
        if built.count(built[0]) < len(built):
            return None
        left = {part.name for part in self.parameters if part.layer is not None and part.layer >= layers}
        paths = {name.rpartition(".")[0] for name in left}

        def stays(name: str) -> bool:
            return name not in left and name not in paths and name.rpartition(".")[0] not in paths

        return replace(
            self,
            layers=layers,
            parameters=tuple(part for part in self.parameters if part.name not in left),
            attention=tuple(part for part in self.attention if part.layer < layers),
            tied={name: other for name, other in self.tied.items() if stays(name) and stays(other)},
            read_together=tuple(group for group in self.read_together if stays(group[0])),
        )

    def _built(self, layer: int) -> Any:
        """Everything that is known of a decoder layer, without its number."""
        marked = f".{layer}."
        parts = [replace(part, name=part.name.replace(marked, "..", 1), layer=0) for part in self.in_layer(layer)]
        seen = [
            replace(part, path=f"{part.path}.".replace(marked, "..", 1), layer=0)
            for part in self.attention
            if part.layer == layer
        ]
        mixed = [part for part in self.mixing if part.layer == layer]
        kept = [name for name in self.buffers if marked in name]
        return parts, seen, mixed, kept

    def weights(self, *kinds: Kind) -> int:
        """The number of elements of all parameters of these kinds."""
        return sum(parameter.numel for parameter in self.parameters if parameter.kind in kinds)

    def largest(self, *kinds: Kind) -> int:
        """The number of elements of the largest parameter of these kinds."""
        return max(parameter.numel for parameter in self.parameters if parameter.kind in kinds)

    def whole(self) -> dict[tuple[str, str], int]:
        """(last name of the module, reason) -> weights that have a packable form but stay in 16 bits."""
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
        """Decoder layer -> the paths of its blocks, whose outputs are added to the hidden states.

        The first is attention, the last is the MLP or the mixture of experts."""
        found: dict[int, dict[str, None]] = {}
        for parameter in self.parameters:
            if parameter.layer is not None and parameter.kind in ("linear", "experts"):
                before, number, rest = parameter.name.partition(f".{parameter.layer}.")
                found.setdefault(parameter.layer, {})[before + number + rest.partition(".")[0]] = None
        return {layer: list(paths) for layer, paths in found.items()}


_READER = TypeAdapter(Architecture)


def architecture_mismatches(config: Config, model: Architecture) -> list[str]:
    """One sentence for each setting of `config` that the architecture cannot meet."""
    if ROW_KINDS[config.data.kind].sees and not model.weights_beside:  # no other setting could help
        return [
            f"data.format: {config.data.format}: this base has no tower (an encoder beside its language model that"
            " turns pictures or sounds into features). Give a base that has one."
        ]
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
