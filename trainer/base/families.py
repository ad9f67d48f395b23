"""The families of models that can be trained, each from its config.json: names and shapes as transformers builds them.

Tested against the models that transformers builds from the same config.json, name by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.base.architecture import Architecture, Kind, Parameter
from trainer.errors import ConfigError, shown

# Mixtures of experts -> the names in their files of the matrices that transformers has as one parameter.
_EXPERTS: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    "qwen3_moe": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    "gpt_oss": {},
}
# The name of a cap on logits in config.json -> the families that compute with it, each with its default.
_CAPS: dict[str, dict[str, float | None]] = {
    "final_logit_softcapping": {"gemma2": 30.0, "gemma3_text": None},
    "attn_logit_softcapping": {"gemma2": 50.0},
}
# The families whose layers may see a window of tokens back only -> its size where config.json does not say.
_WINDOWS: dict[str, int | None] = {
    "gemma2": 4096,
    "gemma3_text": 4096,
    "gpt_oss": 128,
    "mistral": 4096,
    "mixtral": None,
    "phi3": None,
    "qwen2": 4096,
    "qwen3": 4096,
    "qwen3_moe": 4096,
}
# Decoder-only families whose logits are tested against transformers + bitsandbytes.
FAMILIES = ("gemma2", "gemma3_text", "gpt_oss", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")


def read_architecture(
    base_config: dict[str, Any], layers: int | None = None, *, name: str = "the base"
) -> Architecture:
    """Read the parsed config.json of the base that messages call `name`; `layers` cuts it to its first so many.

    Raises:
        ConfigError: the model_type is unknown here, or a size is missing.
    """
    kind = base_config.get("model_type")
    if kind not in FAMILIES:
        code = " Its own code (auto_map) is never run." if base_config.get("auto_map") else ""
        raise ConfigError(f"model.base: {name} is a {shown(kind)} model.{code} Supported are {', '.join(FAMILIES)}.")
    if base_config.get("use_bidirectional_attention"):
        raise ConfigError(
            f"model.base: {name} attends in both directions (use_bidirectional_attention). Give a causal model."
        )
    return _Reader(base_config).architecture(layers)


@dataclass(frozen=True)
class _Reader:
    """The sizes in one config.json."""

    config: dict[str, Any]

    def size(self, key: str) -> int:
        if not isinstance(self.config.get(key), int):
            raise ConfigError(f"model.base: config.json has no whole number {key}. Copy the model again.")
        return self.config[key]

    @property
    def kind(self) -> str:
        return self.config["model_type"]

    @property
    def gemma(self) -> bool:
        return self.kind.startswith("gemma")

    @cached_property
    def hidden(self) -> int:
        return self.size("hidden_size")

    @cached_property
    def heads(self) -> int:
        return self.size("num_attention_heads")

    @cached_property
    def head(self) -> int:
        return self.config.get("head_dim") or (256 if self.gemma else self.hidden // self.heads)

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def key_value(self) -> int:
        return (self.config.get("num_key_value_heads") or self.heads) * self.head

    @property
    def experts(self) -> int:
        # transformers 5 writes num_local_experts where qwen3_moe's own files say num_experts.
        return self.size("num_local_experts" if "num_local_experts" in self.config else "num_experts")

    @cached_property
    def intermediate(self) -> int:
        """The width of one MLP, or of one expert."""
        if self.kind != "qwen3_moe":
            return self.size("intermediate_size")
        if self.config.get("mlp_only_layers") or self.config.get("decoder_sparse_step", 1) != 1:
            raise ConfigError(
                "model.base: config.json mixes dense layers (mlp_only_layers, decoder_sparse_step) with mixtures of "
                "experts. Supported are models whose layers are all alike."
            )
        return self.size("moe_intermediate_size")

    def architecture(self, layers: int | None) -> Architecture:
        hidden, vocabulary = self.hidden, self.size("vocab_size")
        stored_layers = self.size("num_hidden_layers")
        used = min(layers or stored_layers, stored_layers)
        tied = bool(self.config.get("tie_word_embeddings", self.gemma))
        parameters = [Parameter("model.embed_tokens.weight", (vocabulary, hidden), "embedding")]
        for layer in range(used):
            for name, shape, kind in self._layer():
                parameters.append(Parameter(f"model.layers.{layer}.{name}", shape, kind, layer))
        parameters.append(Parameter("model.norm.weight", (hidden,), "small"))
        if not tied:
            parameters.append(Parameter("lm_head.weight", (vocabulary, hidden), "head"))
        active = self.size("num_experts_per_tok") if self.kind in _EXPERTS else 1
        stored = {parameter.name: self._stored(parameter.name) for parameter in parameters}
        return Architecture(
            layers=used,
            stored_layers=stored_layers,
            hidden=hidden,
            intermediate=active * self.intermediate,
            query_size=self.query,
            key_value_size=self.key_value,
            head_size=self.head,
            vocabulary=vocabulary,
            tied=tied,
            positions=self.config.get("max_position_embeddings"),
            parameters=tuple(parameters),
            stored_as={name: names for name, names in stored.items() if names != (name,)},
            caps_attention=self._cap("attn_logit_softcapping") is not None,
            has_sinks=self.kind == "gpt_oss",
            isolates_documents=self.kind != "gpt_oss",
            softcap=self._cap("final_logit_softcapping"),
            sliding_window=self._window(),
        )

    def _window(self) -> int | None:
        kinds = self.config.get("layer_types")
        if self.kind not in _WINDOWS or (kinds and "sliding_attention" not in kinds):
            return None
        if self.kind.startswith("qwen") and not self.config.get("use_sliding_window"):
            return None
        return self.config.get("sliding_window", _WINDOWS[self.kind]) or None

    def _cap(self, key: str) -> float | None:
        defaults = _CAPS[key]
        value = self.config.get(key, defaults[self.kind]) if self.kind in defaults else None
        if value is not None and not (type(value) in (int, float) and 0 < value < 2**31):
            raise ConfigError(
                f"model.base: config.json has {key} {shown(value)}. Possible are positive numbers and null. Copy the model "
                "again."
            )
        return value

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...], Kind]]:
        """Name in the decoder layer, shape and kind of each of its parameters."""
        for path, inputs, outputs, bias in self._linears():
            yield f"{path}.weight", (outputs, inputs), "linear"
            if bias:
                yield f"{path}.bias", (outputs,), "small"
        if self.kind in _EXPERTS:
            yield from self._mixture()
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.gemma:  # it normalises what leaves a block as well
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for norm in norms:
            yield f"{norm}.weight", (self.hidden,), "small"
        if self.kind in ("qwen3", "qwen3_moe", "gemma3_text"):  # these normalise queries and keys by head too
            yield "self_attn.q_norm.weight", (self.head,), "small"
            yield "self_attn.k_norm.weight", (self.head,), "small"
        if self.kind == "gpt_oss":
            yield "self_attn.sinks", (self.heads,), "small"

    def _linears(self) -> Iterator[tuple[str, int, int, bool]]:
        """Path in the decoder layer, inputs, outputs, and whether there is a bias."""
        hidden, intermediate, query, key_value = self.hidden, self.intermediate, self.query, self.key_value
        if self.kind == "phi3":  # query, key and value in one projection, gate and up in another
            yield "self_attn.qkv_proj", hidden, query + 2 * key_value, False
            yield "self_attn.o_proj", query, hidden, False
            yield "mlp.gate_up_proj", hidden, 2 * intermediate, False
            yield "mlp.down_proj", intermediate, hidden, False
            return
        bias = self.kind == "qwen2" or (
            self.kind not in ("mistral", "mixtral") and bool(self.config.get("attention_bias", self.kind == "gpt_oss"))
        )
        yield "self_attn.q_proj", hidden, query, bias
        yield "self_attn.k_proj", hidden, key_value, bias
        yield "self_attn.v_proj", hidden, key_value, bias
        yield "self_attn.o_proj", query, hidden, bias and self.kind != "qwen2"
        if self.kind not in _EXPERTS:
            mlp_bias = self.kind == "llama" and bool(self.config.get("mlp_bias"))
            yield "mlp.gate_proj", hidden, intermediate, mlp_bias
            yield "mlp.up_proj", hidden, intermediate, mlp_bias
            yield "mlp.down_proj", intermediate, hidden, mlp_bias

    def _mixture(self) -> Iterator[tuple[str, tuple[int, ...], Kind]]:
        """A router, and for each expert a fused gate and up matrix and a down matrix."""
        count, hidden = self.experts, self.hidden
        up, down = (2 * self.intermediate, hidden), (hidden, self.intermediate)
        gpt_oss = self.kind == "gpt_oss"  # its matrices are (inputs, outputs), with biases, as is its router
        router = "mlp.router" if gpt_oss else "mlp.gate"
        yield f"{router}.weight", (count, hidden), "small"
        for name, (rows, columns) in (("gate_up_proj", up), ("down_proj", down)):
            yield f"mlp.experts.{name}", (count, columns, rows) if gpt_oss else (count, rows, columns), "experts"
            if gpt_oss:
                yield f"mlp.experts.{name}_bias", (count, rows), "small"
        if gpt_oss:
            yield f"{router}.bias", (count,), "small"

    def _stored(self, name: str) -> tuple[str, ...]:
        """transformers 5 holds the experts of a layer in one parameter, most files hold each by itself."""
        if self.kind == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        path, _, leaf = name.rpartition(".")
        parts = _EXPERTS.get(self.kind, {}).get(leaf)
        if parts is None or not path.endswith(".experts"):
            return (name,)
        return tuple(f"{path}.{expert}.{part}.weight" for expert in range(self.experts) for part in parts)
