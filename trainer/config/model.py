"""The settings of the model: the base, its quantization, what learns."""

from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import field_validator, model_validator

from trainer.config.registry import OneOf, chosen, kinds
from trainer.config.section import Section, check_patterns, setting, with_parts
from trainer.errors import ConfigError


class Tokens(NamedTuple):
    """How a run's tokenizer differs from its base's: texts that become tokens, and (role, text) of special ones."""

    added: tuple[str, ...] = ()
    special: tuple[tuple[str, str], ...] = ()


class SpecialTokens(Section):
    """Existing tokens to use instead of the padding, end and begin tokens that the tokenizer's own files name."""

    pad: str | None = setting(
        None, about="The padding token. Capstan itself pads nothing.", example="<pad>", min_length=1
    )
    eos: str | None = setting(
        None, about="The token that ends a text, and an answer.", example="<|im_end|>", min_length=1
    )
    bos: str | None = setting(None, about="The token that begins a text.", example="<s>", min_length=1)


SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "yarn": ((), ("attention_factor", "beta_fast", "beta_slow")),
    "llama3": (("low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("short_factor", "long_factor"), ("attention_factor",)),
}
"""The settings that each kind of scaling needs beside its factor, and those that it may be given."""


class RopeScaling(Section):
    """Scaling of rotary positions, for documents longer than those that the base was trained for. The settings have
    transformers' names. Exports have the scaling in their config.json.
    """

    rope_type: Literal["linear", "yarn", "llama3", "longrope"] | None = setting(
        None,
        about=(
            "How the rotary frequencies are scaled: linear (all by the same factor), yarn, llama3, or longrope (with"
            " short_factor and long_factor). dynamic is refused, because its frequencies depend on earlier rows."
            " Default: the base's own scaling."
        ),
        example="yarn",
    )
    factor: float | None = setting(
        None, about="Factor by which the number of positions grows.", example=4.0, gt=1, le=1024
    )
    original_max_position_embeddings: int | None = setting(
        None,
        about="The number of positions that the base was trained for. Default: from the base's config.json.",
        example=32768,
        ge=1,
        unit="tokens",
    )
    attention_factor: float | None = setting(
        None,
        about="yarn and longrope: the factor that multiplies the attention scores. Default: computed from factor.",
        example=1.2,
        gt=0,
    )
    beta_fast: float | None = setting(
        None,
        about=(
            "yarn: a frequency stays unchanged if it makes more than this number of rotations over the original"
            " positions. Default: 32."
        ),
        example=32.0,
        gt=0,
    )
    beta_slow: float | None = setting(
        None,
        about=(
            "yarn: a frequency is divided by factor if it makes fewer than this number of rotations over the original"
            " positions. Default: 1."
        ),
        example=1.0,
        gt=0,
    )
    low_freq_factor: float | None = setting(
        None,
        about=(
            "llama3: a wavelength is multiplied by factor if it is longer than the original positions divided by"
            " low_freq_factor."
        ),
        example=1.0,
        gt=0,
    )
    high_freq_factor: float | None = setting(
        None,
        about=(
            "llama3: a wavelength stays unchanged if it is shorter than the original positions divided by"
            " high_freq_factor."
        ),
        example=4.0,
        gt=0,
    )
    short_factor: list[float] | None = setting(
        None,
        about="longrope: a divisor for each frequency, for rows within the original positions.",
        example=[1.0, 1.1],
    )
    long_factor: list[float] | None = setting(
        None,
        about=("longrope: a divisor for each frequency, for rows longer than the original positions."),
        example=[1.0, 4.0],
    )

    @property
    def given(self) -> dict[str, Any]:
        """The keys of transformers that have a value."""
        return self.model_dump(mode="json", exclude_none=True)

    @model_validator(mode="before")
    @classmethod
    def _not_dynamic(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("rope_type") == "dynamic":
            raise ValueError(
                "model.rope_scaling.rope_type: dynamic frequencies follow from the longest row so far, so that a"
                " resumed run would differ. Set yarn or linear."
            )
        return given

    @model_validator(mode="after")
    def _complete(self) -> "RopeScaling":
        named = self.given.keys() - {"rope_type"}
        if self.rope_type is None:
            if named:
                raise ValueError(
                    f"model.rope_scaling.{min(named)}: has no effect without model.rope_scaling.rope_type. Set that"
                    " too."
                )
            return self
        needed, allowed = SCALINGS[self.rope_type]
        for name in ("factor", *needed):
            if name not in named:
                raise ValueError(
                    f"model.rope_scaling.rope_type: {self.rope_type} needs model.rope_scaling.{name}. Set it."
                )
        for name in sorted(named - {"factor", "original_max_position_embeddings", *needed, *allowed}):
            raise ValueError(f"model.rope_scaling.{name}: has no effect with rope_type: {self.rope_type}. Remove it.")
        return self


class Model(Section):
    """The base model."""

    base: str = setting(
        about=(
            "The base: a Hugging Face model with safetensors files. Either a folder, a URI (s3://, gs://, az://), of"
            " which each rank reads its byte ranges without a local copy, or a Hub id, which is downloaded into"
            " Hugging Face's cache."
        ),
        example="/models/Llama-3.1-8B",
    )
    revision: str | None = setting(None, about="Branch, tag or commit of a Hub id.", example="main")
    local_copy: str | None = setting(
        None,
        about=(
            "If the base is in a bucket: a folder on each machine's own disk that keeps the bytes that its ranks have"
            " read. Later starts with the same number of ranks read them from there. Every byte is checked against"
            " its hash. Default: nothing is kept."
        ),
        example="/local/bases",
        min_length=1,
    )
    attention: Literal[
        "auto",
        "flash_attention_4",
        "flash_attention_3",
        "flash_attention_2",
        "varlen",
        "sdpa",
        "flex_attention",
        "eager",
    ] = setting(
        "auto",
        about=(
            "Attention kernel. auto takes the first kernel in this order that runs on the machine and supports the"
            " base, with gradients: the flash-attn packages, varlen (PyTorch's variable-length attention), sdpa,"
            " flex_attention, eager (plain products, which hold all scores in memory). The log names the kernel and"
            " the reason. docs/attention.md has a table."
        ),
        example="sdpa",
    )
    kernels: Literal["auto", "liger", "none"] = setting(
        "auto",
        about=(
            "Kernels for norms, rotary embeddings and gated MLPs. liger: the kernels of the package liger-kernel, on"
            " a GPU (extra gpu). none: the operations of the base's class in transformers. auto: liger if it is"
            " installed and supports the base, otherwise none. The log names the choice and the reason."
        ),
        example="none",
    )
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16",
        about=(
            "Type of activations and of all weights that are not quantized. Default: bf16, but fp32 on processors"
            " without AVX-512 and on GPUs below compute capability 8.0, where bf16 is slow. The first start of a run"
            " decides, and later starts keep the type."
        ),
        example="bf16",
    )
    layers: int | None = setting(
        None,
        about="Use only the first N layers of the base, for smoke runs of a large model.",
        example=2,
        ge=1,
        unit="layers",
    )
    add_tokens: list[str] = setting(
        [],
        about=(
            "Texts that become one token each. For each of them, a row of the embedding and a row of the output head"
            " learn together with the adapter. The base's own rows stay frozen. If the tokenizer already has a token,"
            " such as a reserved one, a copy of the token's row learns, and the model uses the copy."
        ),
        example=["<tool>", "</tool>"],
    )

    special_tokens: SpecialTokens = SpecialTokens()
    rope_scaling: RopeScaling = RopeScaling()

    @property
    def tokens(self) -> Tokens:
        given = self.special_tokens.model_dump(exclude_none=True)
        return Tokens(tuple(self.add_tokens), tuple(sorted(given.items())))

    @model_validator(mode="after")
    def _copied(self) -> "Model":
        if self.local_copy and "://" not in self.base:
            raise ValueError(
                f"model.local_copy: {self.local_copy} copies a base from a bucket, and model.base: {self.base} is"
                " in none. Remove it."
            )
        return self

    @model_validator(mode="after")
    def _tokens(self) -> "Model":
        for index, token in enumerate(self.add_tokens):
            if not token.strip():
                raise ValueError(f"model.add_tokens: {token!r} is no text. Remove it.")
            if token in self.add_tokens[:index]:
                raise ValueError(f"model.add_tokens: {token!r} is there twice. Remove one of them.")
        return self


@cache
def _held(name: str, block_size: int, double: bool) -> Any:
    """A plan asks for every parameter of the base."""
    known = kinds("trainer.model.held.formats", "HELD")
    return chosen(known, "quant.type", name).with_settings(block_size, double)


class Quant(Section):
    """The format of the frozen linear layers in memory."""

    type: Annotated[str, OneOf("trainer.model.held.formats", "HELD")] = setting(
        "nf4",
        about=(
            "The format of the frozen linear layers in memory. The default is nf4, or stored if the configuration has"
            " no section quant and the base is published in 4 bits."
        ),
        example="nf4",
    )
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = setting(
        64, about="Number of weights that share one scale (absmax).", example=64, unit="weights"
    )
    double: bool = setting(
        False, about="Also quantize the scales to 8 bits, which saves 0.37 bits a weight.", example=True
    )

    cache: bool = setting(
        False,
        about=(
            "Keep the quantized base in the store, under bases/, for all runs. In 4 bits it takes half a byte a"
            " weight. Later starts, on any number of ranks, then read a quarter of the bytes. Every byte is checked"
            " against its hash."
        ),
        example=True,
    )

    @property
    def held(self) -> Any:
        """The format that these settings mean, a trainer.model.held.HeldFormat. Raises `ConfigError` if there is
        none of that name.
        """
        return _held(self.type, self.block_size, self.double)

    @model_validator(mode="after")
    def _scales(self) -> "Quant":
        try:
            held = self.held
        except ConfigError as error:
            raise ValueError(str(error)) from error
        for name in ("double", "cache"):
            if getattr(self, name) and (remedy := held.unread(name)):
                raise ValueError(f"quant.{name}: true has no effect with quant.type: {self.type}. {remedy}")
        return self


@with_parts("trainer.tuning")
class Tuning(Section):
    """A run trains adapters on a frozen base, or the base itself. docs/methods.md helps to choose a method."""

    method: Annotated[str, OneOf("trainer.tuning", "METHODS")] = setting(
        "lora", about="The way to fine-tune.", example="rslora"
    )
    rank: int = setting(16, about="Rank of the adapters.", example=16, ge=1, le=4096)
    alpha: float = setting(
        32.0,
        about=(
            "Numerator of the scale of the adapters' output. lora and dora divide it by the rank, rslora by the root"
            " of the rank."
        ),
        example=32,
        gt=0,
    )
    dropout: float = setting(
        0.0, about="Dropout: the share of the adapters' inputs that training sets to 0.", example=0.05, ge=0, lt=1
    )
    targets: Literal["auto", "all-linear"] | list[str] = setting(
        "auto",
        about=(
            "Which linear layers get an adapter. all-linear: those of attention, of MLPs, of shared experts and of"
            " linear attention, but no router and not the output head. Or a list. Each entry is a name, which matches"
            " the end of a module's path; a pattern for the whole path, in which * is any text; or re: and a regular"
            " expression for the whole path, as in PEFT. auto: all-linear; for ia3, k_proj, v_proj and down_proj."
        ),
        example=["q_proj", "v_proj"],
    )
    layers: tuple[int, int] | None = setting(
        None,
        about=(
            "Only these decoder layers get adapters, as [first, end]: layers are counted from 0, and end is the"
            " number after the last one. Default: all layers."
        ),
        example=[10, 32],
    )
    virtual_tokens: int = setting(
        20,
        about="Number of learnt tokens before each document.",
        example=100,
        ge=1,
        le=4096,
        unit="tokens",
    )
    init_text: str | None = setting(
        None,
        about=(
            "A text that initialises the virtual tokens: its tokens, repeated or cut to virtual_tokens. Default:"
            " random tokens of the vocabulary, by run.seed."
        ),
        example="Classify the message as spam or not: ",
        min_length=1,
    )
    experts: bool = setting(
        False,
        about="Also put adapters on every matrix of the experts of a mixture. Routers stay frozen.",
        example=True,
    )
    experts_rank: int | None = setting(
        None, about="Rank of the experts' adapters. Default: tuning.rank.", example=4, ge=1, le=4096
    )
    towers: Literal["lora", "projector"] | None = setting(
        None,
        about=(
            "What learns in the base's tower, from rows with pictures (data.format: pictures). The tower is the"
            " encoder and the projector (docs/pictures.md). lora: the linear layers of both get adapters; only with the"
            " methods lora and rslora. projector: all weights of the projector learn, together with adapters of any"
            " kind. Default: the tower stays frozen."
        ),
        example="projector",
    )
    modules_to_save: list[str] = setting(
        [],
        about=(
            "Modules of the base whose weights all learn, together with the adapters: norms, embed_tokens, lm_head,"
            " routers. Name them by the ends of their paths, as in PEFT."
        ),
        example=["norm", "lm_head"],
    )

    start: str | None = setting(
        None,
        about=(
            "An existing adapter to begin from: a run of this store by its name (its newest checkpoint at the first"
            " start) or as NAME@STEP; the path or URI of a run or of one of its checkpoints/step-...; or a folder"
            " with a LoRA adapter in PEFT's format. The adapter must have the rank, alpha and layers of this section."
            " The reference of dpo and kto is then the base with that adapter. Default: new weights."
        ),
        example="runs/support-sft/checkpoints/step-000000400",
        min_length=1,
    )

    @field_validator("targets")
    @classmethod
    def _expressions(cls, targets: str | list[str]) -> str | list[str]:
        check_patterns("tuning.targets", targets)
        return targets

    @field_validator("layers")
    @classmethod
    def _range(cls, layers: tuple[int, int] | None) -> tuple[int, int] | None:
        if layers is not None and not 0 <= layers[0] < layers[1]:
            raise ValueError(
                f"tuning.layers: {list(layers)} is not allowed. Give the number of the first layer, from 0, and that"
                " behind the last. Example: [10, 32]."
            )
        return layers

    @model_validator(mode="after")
    def _experts(self) -> "Tuning":
        if self.experts_rank is not None and not self.experts:
            raise ValueError(
                f"tuning.experts_rank: {self.experts_rank} has no effect without tuning.experts: true. Remove it, or"
                " set that."
            )
        return self
