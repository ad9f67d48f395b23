"""The shapes of a decoder-only model, from its config.json alone: what `plan` counts without loading torch.

The counts are tested against the models that transformers builds from the same config.json.
"""

from collections.abc import Iterable
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
class Architecture:
    """Sizes of a Llama-like model: an embedding, equal decoder layers, a final norm, an output head.

    `linears` and `norm_weights` are those of one decoder layer. `tied` means that head and embedding are one matrix.
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

    @property
    def embedding_weights(self) -> int:
        """Elements of the embedding, and of the head when it has a matrix of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def linear_weights(self) -> int:
        """Elements of the weight matrices of all decoder layers: what can be quantized."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def small_weights(self) -> int:
        """Elements of all norms and biases."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        return self.layers * (self.norm_weights + biases) + self.hidden

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Tensor name -> (outputs, inputs) of every linear weight of the decoder layers."""
        return {
            f"model.layers.{layer}.{linear.path}.weight": (linear.outputs, linear.inputs)
            for layer in range(self.layers)
            for linear in self.linears
        }

    def adapted(self, targets: str | Iterable[str]) -> list[Linear]:
        """The linear layers of the whole model that get an adapter; PEFT matches a target to the end of a name."""
        if targets == "all-linear":
            return list(self.linears) * self.layers
        names = tuple(f".{target}" for target in ([targets] if isinstance(targets, str) else targets))
        return [
            linear
            for layer in range(self.layers)
            for linear in self.linears
            if f".model.layers.{layer}.{linear.path}".endswith(names)
        ]


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

    hidden, heads, intermediate = size("hidden_size"), size("num_attention_heads"), size("intermediate_size")
    head = base_config.get("head_dim") or hidden // heads
    query, key_value = heads * head, (base_config.get("num_key_value_heads") or heads) * head
    own_layers = size("num_hidden_layers")
    return Architecture(
        layers=min(layers or own_layers, own_layers),
        hidden=hidden,
        intermediate=intermediate,
        query_size=query,
        key_value_size=key_value,
        vocabulary=size("vocab_size"),
        tied=bool(base_config.get("tie_word_embeddings")),
        positions=base_config.get("max_position_embeddings"),
        linears=_LINEARS[kind](base_config, hidden, intermediate, query, key_value),
        # qwen3 normalises queries and keys by head too.
        norm_weights=2 * hidden + (2 * head if kind == "qwen3" else 0),
    )


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
    for target in [] if config.tuning.targets == "all-linear" else config.tuning.targets:
        if not model.adapted([target]):
            names = ", ".join(linear.path.rpartition(".")[2] for linear in model.linears)
            found.append(f"tuning.targets: {target!r} is no linear layer that can be adapted. The base has {names}.")
    return found


def _split(
    base_config: dict[str, Any], hidden: int, intermediate: int, query: int, key_value: int
) -> tuple[Linear, ...]:
    """Separate query, key, value, gate and up projections, as in Llama."""
    kind = base_config["model_type"]
    bias = kind == "qwen2" or (kind in ("llama", "qwen3") and bool(base_config.get("attention_bias")))
    output_bias = bias and kind != "qwen2"
    mlp_bias = kind == "llama" and bool(base_config.get("mlp_bias"))
    return (
        Linear("self_attn.q_proj", hidden, query, bias),
        Linear("self_attn.k_proj", hidden, key_value, bias),
        Linear("self_attn.v_proj", hidden, key_value, bias),
        Linear("self_attn.o_proj", query, hidden, output_bias),
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


_LINEARS = {"llama": _split, "mistral": _split, "qwen2": _split, "qwen3": _split, "phi3": _fused}
# Decoder-only architectures whose logits are tested against transformers + bitsandbytes.
ARCHITECTURES = tuple(sorted(_LINEARS))
