"""The shapes of a decoder-only model, from its config.json alone: what `plan` counts without loading torch.

The counts are tested against the models that transformers builds from the same config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.config import Config
from trainer.errors import ConfigError


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer; `path` is its module's name inside the decoder layer."""

    path: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight matrix; the bias is not counted."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of one decoder layer, of which a token visits `active`.

    Each expert has a fused gate and up matrix and a down matrix, (outputs, inputs) or, where `transposed`, (inputs,
    outputs); `biases` is whether each of them has one. The router is a matrix (count, hidden), with a bias likewise.
    """

    count: int
    active: int
    hidden: int
    intermediate: int
    biases: bool = False
    transposed: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """Parameter of `mlp.experts` -> its shape, one slice an expert."""
        up, down = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        if self.transposed:
            up, down = (up[1], up[0]), (down[1], down[0])
        return {"gate_up_proj": (self.count, *up), "down_proj": (self.count, *down)}

    @property
    def slices(self) -> list[int]:
        """Weights of each matrix: what is quantized by itself."""
        return [rows * columns for count, rows, columns in self.matrices.values() for _ in range(count)]

    @property
    def small_weights(self) -> int:
        """Router and biases, which are not quantized."""
        biases = self.count * (2 * self.intermediate + self.hidden + 1) if self.biases else 0
        return self.count * self.hidden + biases


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama-like model: an embedding, equal decoder layers, a final norm, an output head.

    `linears`, `experts` and `norm_weights` are those of one decoder layer. `intermediate` is the width of its MLP for one
    token, all active experts together. `tied` means that head and embedding are one matrix.
    """

    layers: int
    hidden: int
    intermediate: int
    query_size: int
    key_value_size: int
    vocabulary: int
    tied: bool
    positions: int | None
    linears: tuple[Linear, ...]
    norm_weights: int
    experts: Experts | None = None

    @property
    def matrices(self) -> list[int]:
        """Weights of each matrix of one decoder layer that is quantized by itself."""
        return [linear.weights for linear in self.linears] + (self.experts.slices if self.experts else [])

    @property
    def embedding_weights(self) -> int:
        """Elements of the embedding, and of the head when it has a matrix of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def linear_weights(self) -> int:
        """Elements of the weight matrices of all decoder layers: what can be quantized."""
        return self.layers * sum(self.matrices)

    @property
    def small_weights(self) -> int:
        """Elements of all norms, biases and routers."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        experts = self.experts.small_weights if self.experts else 0
        return self.layers * (self.norm_weights + biases + experts) + self.hidden

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape of every weight of the decoder layers that can be quantized."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in (f"model.layers.{number}" for number in range(self.layers)):
            shapes |= {f"{layer}.{linear.path}.weight": (linear.outputs, linear.inputs) for linear in self.linears}
            if self.experts:
                shapes |= {f"{layer}.mlp.experts.{name}": shape for name, shape in self.experts.matrices.items()}
        return shapes

    @property
    def linear_names(self) -> list[str]:
        """The last names of the linear layers of a decoder layer, as tools that adapt them are told, sorted."""
        return sorted({linear.path.rpartition(".")[2] for linear in self.linears})

    def linear_layers(self) -> dict[str, Linear]:
        """Path in the model -> every linear layer that can be adapted, in the model's order."""
        return {
            f"model.layers.{layer}.{linear.path}": linear for layer in range(self.layers) for linear in self.linears
        }


def read_architecture(base_config: dict[str, Any], layers: int | None = None) -> Architecture:
    """Read the parsed config.json of a base; `layers` cuts it to its first so many.

    Raises:
        ConfigError: the model_type is unknown here, or a size is missing.
    """
    kind = base_config.get("model_type")
    if kind not in _LINEARS:
        raise ConfigError(
            f"model.base: config.json has the model_type {kind!r}. Supported are {', '.join(sorted(_LINEARS))}."
        )

    def size(key: str) -> int:
        if not isinstance(base_config.get(key), int):
            raise ConfigError(f"model.base: config.json has no whole number {key}. Copy the model again.")
        return base_config[key]

    gemma = kind.startswith("gemma")
    hidden, heads, intermediate = size("hidden_size"), size("num_attention_heads"), size("intermediate_size")
    head = base_config.get("head_dim") or (256 if gemma else hidden // heads)
    query, key_value = heads * head, (base_config.get("num_key_value_heads") or heads) * head
    experts = _experts(base_config, hidden, intermediate, size) if kind in _EXPERTS else None
    own_layers = size("num_hidden_layers")
    # Two norms a layer; qwen3 and gemma3 normalise queries and keys by head too, gemma what leaves a block as well.
    norm_weights = (4 if gemma else 2) * hidden + (2 * head if kind in ("qwen3", "qwen3_moe", "gemma3_text") else 0)
    return Architecture(
        layers=min(layers or own_layers, own_layers),
        hidden=hidden,
        intermediate=experts.active * experts.intermediate if experts else intermediate,
        query_size=query,
        key_value_size=key_value,
        vocabulary=size("vocab_size"),
        tied=bool(base_config.get("tie_word_embeddings", gemma)),
        positions=base_config.get("max_position_embeddings"),
        linears=_LINEARS[kind](base_config, hidden, intermediate, query, key_value),
        norm_weights=norm_weights + (heads if kind == "gpt_oss" else 0),  # its attention sinks
        experts=experts,
    )


def _experts(base_config: dict[str, Any], hidden: int, intermediate: int, size: Callable[[str], int]) -> Experts:
    kind = base_config["model_type"]
    # transformers 5 writes num_local_experts where qwen3_moe's own files say num_experts.
    count = size("num_local_experts" if "num_local_experts" in base_config else "num_experts")
    if kind == "qwen3_moe":
        if base_config.get("mlp_only_layers") or base_config.get("decoder_sparse_step", 1) != 1:
            raise ConfigError(
                "model.base: config.json mixes dense layers (mlp_only_layers, decoder_sparse_step) with mixtures of "
                "experts. Supported are models whose layers are all alike."
            )
        intermediate = size("moe_intermediate_size")
    gpt_oss = kind == "gpt_oss"
    return Experts(count, size("num_experts_per_tok"), hidden, intermediate, biases=gpt_oss, transposed=gpt_oss)


def stored_names(base_config: dict[str, Any], name: str) -> tuple[str, ...]:
    """The tensors of the files that make up the model's parameter `name`, in order.

    transformers 5 holds the experts of a layer in one parameter, most files hold each by itself.
    """
    kind = base_config["model_type"]
    if kind == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    path, _, leaf = name.rpartition(".")
    parts = _EXPERTS.get(kind, {}).get(leaf)
    if parts is None or not path.endswith(".experts"):
        return (name,)
    count = base_config.get("num_local_experts") or base_config["num_experts"]
    return tuple(f"{path}.{expert}.{part}.weight" for expert in range(count) for part in parts)


def mismatches(config: Config, base_config: dict[str, Any]) -> list[str]:
    """A sentence for each setting of `config` that asks more of the base than its config.json says it has."""
    model = read_architecture(base_config, config.model.layers)
    length, layers, found = config.data.sequence_length, base_config["num_hidden_layers"], list[str]()
    if model.positions and length > model.positions:
        found.append(
            f"data.sequence_length: {length} exceeds the base's {model.positions} positions (config.json). Lower it."
        )
    if config.model.layers and config.model.layers > layers:
        found.append(f"model.layers: {config.model.layers} exceeds the base's {layers} layers (config.json). Lower it.")
    if config.data.packing and base_config["model_type"] == "gpt_oss":
        found.append(
            "data.packing: documents of one row would see each other, as transformers' gpt_oss has no mask for their "
            "borders. Set data.packing: false."
        )
    if stored := base_config.get("quantization_config"):
        kind, double = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))
        if (config.quant.type, config.quant.double) != (kind, double):
            found.append(
                f"quant: the base is quantized already, and loaded as it is. Set quant.type: {kind} and quant.double: "
                f"{str(double).lower()}."
            )
        if config.quant.cache:
            found.append("quant.cache: true has no effect, as the base is quantized already. Remove it.")
    return found


def _split(
    base_config: dict[str, Any], hidden: int, intermediate: int, query: int, key_value: int
) -> tuple[Linear, ...]:
    """Separate query, key, value, gate and up projections, as in Llama."""
    kind = base_config["model_type"]
    bias = kind == "qwen2" or (
        kind not in ("mistral", "mixtral") and bool(base_config.get("attention_bias", kind == "gpt_oss"))
    )
    output_bias = bias and kind != "qwen2"
    mlp_bias = kind == "llama" and bool(base_config.get("mlp_bias"))
    attention = (
        Linear("self_attn.q_proj", hidden, query, bias),
        Linear("self_attn.k_proj", hidden, key_value, bias),
        Linear("self_attn.v_proj", hidden, key_value, bias),
        Linear("self_attn.o_proj", query, hidden, output_bias),
    )
    if kind in _EXPERTS:
        return attention
    return (
        *attention,
        Linear("mlp.gate_proj", hidden, intermediate, mlp_bias),
        Linear("mlp.up_proj", hidden, intermediate, mlp_bias),
        Linear("mlp.down_proj", intermediate, hidden, mlp_bias),
    )


def _fused(
    base_config: dict[str, Any], hidden: int, intermediate: int, query: int, key_value: int
) -> tuple[Linear, ...]:
    """Query, key and value in one projection, gate and up in another, as in Phi-3."""
    return (
        Linear("self_attn.qkv_proj", hidden, query + 2 * key_value),
        Linear("self_attn.o_proj", query, hidden),
        Linear("mlp.gate_up_proj", hidden, 2 * intermediate),
        Linear("mlp.down_proj", intermediate, hidden),
    )


# Architectures with a mixture of experts -> the names in their files of what transformers has as one parameter.
_EXPERTS: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "qwen3_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    "gpt_oss": {},
}
_LINEARS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", *_EXPERTS), _split),
    "phi3": _fused,
}
# Decoder-only architectures whose logits are tested against transformers + bitsandbytes.
ARCHITECTURES = tuple(sorted(_LINEARS))
