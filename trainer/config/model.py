"""The settings of the model: the base, its quantization, what learns."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import field_validator, model_validator

from trainer.config.reading.patterns import check_patterns
from trainer.config.registry import OneOf
from trainer.config.section import Section, setting, with_parts


class Tokens(NamedTuple):
    """Everything by which a run's tokenizer differs from its base's: texts that become tokens, and (role, text) of
    special ones.
    """

    added: tuple[str, ...] = ()
    special: tuple[tuple[str, str], ...] = ()


class SpecialTokens(Section):
    """Tokens that the tokenizer has, for uses that its own files give to others."""

    pad: str | None = setting(None, about="Padding; Capstan itself pads nothing.", example="<pad>", min_length=1)
    eos: str | None = setting(
        None, about="The end of a text, behind which answers stop.", example="<|im_end|>", min_length=1
    )
    bos: str | None = setting(None, about="The beginning of a text.", example="<s>", min_length=1)


SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "yarn": ((), ("attention_factor", "beta_fast", "beta_slow")),
    "llama3": (("low_freq_factor", "high_freq_factor"), ()),
    "longrope": (("short_factor", "long_factor"), ("attention_factor",)),
}
"""The settings that each kind of scaling needs beside its factor, and those that it may be given."""


class RopeScaling(Section):
    """Rotary positions for documents longer than the base's, as transformers scales them; exports have them in their
    config.json.
    """

    rope_type: Literal["linear", "yarn", "llama3", "longrope"] | None = setting(
        None,
        about=(
            "How frequencies are scaled: linear (all alike), yarn, llama3, or longrope, whose factors are given."
            " dynamic is not possible, as its frequencies would follow from the rows before. Default: the base's own."
        ),
        example="yarn",
    )
    factor: float | None = setting(
        None, about="How many times as many positions there are.", example=4.0, gt=1, le=1024
    )
    original_max_position_embeddings: int | None = setting(
        None,
        about="The positions that the base was trained for. Default: by its config.json.",
        example=32768,
        ge=1,
        unit="tokens",
    )
    attention_factor: float | None = setting(
        None, about="yarn and longrope: factor of the attention's scores. Default: by factor.", example=1.2, gt=0
    )
    beta_fast: float | None = setting(
        None, about="yarn: rotations above which a frequency stays. Default: 32.", example=32.0, gt=0
    )
    beta_slow: float | None = setting(
        None, about="yarn: rotations below which one is divided by factor. Default: 1.", example=1.0, gt=0
    )
    low_freq_factor: float | None = setting(
        None, about="llama3: of the longest wavelength that stays.", example=1.0, gt=0
    )
    high_freq_factor: float | None = setting(
        None, about="llama3: of the shortest that is divided by factor.", example=4.0, gt=0
    )
    short_factor: list[float] | None = setting(
        None, about="longrope: a divisor for each frequency, in rows within the original positions.", example=[1.0, 1.1]
    )
    long_factor: list[float] | None = setting(None, about="longrope: the same for longer rows.", example=[1.0, 4.0])

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
            "A Hugging Face model with safetensors files: a directory, an s3://, gs:// or az:// URI (read from there by"
            " ranges, without a local copy), or a Hub id (downloaded into Hugging Face's cache)."
        ),
        example="/models/Llama-3.1-8B",
    )
    revision: str | None = setting(None, about="Branch, tag or commit of a Hub id.", example="main")
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
            "Attention kernel. auto takes the first of these that can run here and does what the base needs, values and"
            " gradients: those of the flash-attn packages, varlen (PyTorch's own), sdpa, flex_attention, eager (plain"
            " products, which hold all scores at once). The log says which and why; docs/attention.md says which where."
        ),
        example="sdpa",
    )
    kernels: Literal["auto", "liger", "none"] = setting(
        "auto",
        about=(
            "Kernels for norms, rotary embeddings and gated MLPs. liger: those of the liger-kernel package, on a GPU"
            " (the extra gpu). none: the base's own operations. auto is liger where it is installed and knows the base,"
            " and otherwise none. The log says which and why."
        ),
        example="none",
    )
    dtype: Literal["bf16", "fp32"] = setting(
        "bf16", about="Type of activations and of everything that is not quantized.", example="bf16"
    )
    layers: int | None = setting(
        None,
        about="Use only the first layers of the base: for smoke runs of a large model.",
        example=2,
        ge=1,
        unit="layers",
    )
    add_tokens: list[str] = setting(
        [],
        about=(
            "Texts that become one token each, whose rows of the embedding and of the output head learn beside the"
            " adapter. A token that the tokenizer has already, such as a reserved one, learns in its own row."
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
    def _tokens(self) -> "Model":
        for index, token in enumerate(self.add_tokens):
            if not token.strip():
                raise ValueError(f"model.add_tokens: {token!r} is no text. Remove it.")
            if token in self.add_tokens[:index]:
                raise ValueError(f"model.add_tokens: {token!r} is there twice. Remove one of them.")
        return self


class Quant(Section):
    """How the linear layers are stored, which then stay frozen."""

    type: Literal["nf4", "fp4", "int8", "stored", "none"] = setting(
        "nf4",
        about=(
            "Type that the base is quantized to: nf4 or fp4 in 4 bits, or int8; none for 16-bit weights; or stored:"
            " weights stay as the base's files have them, in INT4, MXFP4, FP4, FP8 or INT8, and those in 16 bits too."
            " Where a configuration says nothing of quant and the base is published in 4 bits, it is stored."
            " docs/bases.md says which bases can."
        ),
        example="nf4",
    )
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = setting(
        64, about="Weights that share one scale (absmax).", example=64, unit="weights"
    )
    double: bool = setting(False, about="Quantize the scales too, to 8 bits (saves 0.37 bits a weight).", example=True)

    cache: bool = setting(
        False,
        about=(
            "Keep the quantized base in the store (under bases/, half a byte a weight in 4 bits, shared by all runs)"
            " and read it from there next time: a quarter of the bytes, at any number of ranks. Every byte is checked"
            " against its hash."
        ),
        example=True,
    )

    @property
    def quantizes(self) -> bool:
        """Whether weights are quantized that files have in 16 bits, or in other codes."""
        return self.type in ("nf4", "fp4", "int8")

    @property
    def in_words(self) -> str:
        """The base in a sentence: `trained over the base ...`."""
        return "as it is stored" if self.type == "stored" else f"in {self.type}"

    @model_validator(mode="after")
    def _scales(self) -> "Quant":
        if self.type in ("none", "stored"):
            for name in ("double", "cache"):
                if getattr(self, name):
                    raise ValueError(
                        f"quant.{name}: true has no effect with quant.type: {self.type}. Remove it, or set quant.type:"
                        " nf4."
                    )
        if self.type == "int8" and self.double:
            raise ValueError(
                "quant.double: true is for the scales of 4 bits. With quant.type: int8 set quant.block_size: 256 for"
                " fewer scales."
            )
        return self


@with_parts("trainer.tuning")
class Tuning(Section):
    """The part that learns, on the frozen layers or of them. docs/methods.md says when to use which method."""

    method: Annotated[str, OneOf("trainer.tuning", "METHODS")] = setting(
        "lora", about="The way to fine-tune.", example="rslora"
    )
    rank: int = setting(16, about="Rank of the adapters.", example=16, ge=1, le=4096)
    alpha: float = setting(
        32.0, about="Scale of the adapters' output, before the division by the rank.", example=32, gt=0
    )
    dropout: float = setting(0.0, about="Share of the adapters' inputs dropped in training.", example=0.05, ge=0, lt=1)
    targets: Literal["auto", "all-linear"] | list[str] = setting(
        "auto",
        about=(
            "Which linear layers get an adapter: all-linear (those of attention, of MLPs, of shared experts and of"
            " linear attention, but no router and not the output head), names, which are ends of paths, patterns of"
            " whole paths, where * is any text, or behind re: regular expressions for whole paths, as in PEFT. auto is"
            " all-linear, but k_proj, v_proj and down_proj for ia3."
        ),
        example=["q_proj", "v_proj"],
    )
    layers: tuple[int, int] | None = setting(
        None,
        about=(
            "Adapt the targets in these decoder layers only: the number of the first one, counted from 0, and that"
            " behind the last. Default: in all."
        ),
        example=[10, 32],
    )
    virtual_tokens: int = setting(
        20,
        about="Tokens that are learnt and put before each document.",
        example=100,
        ge=1,
        le=4096,
        unit="tokens",
    )
    init_text: str | None = setting(
        None,
        about=(
            "Text whose tokens, repeated or cut to virtual_tokens, are those that the virtual ones start from."
            " Default: tokens drawn from the vocabulary by run.seed."
        ),
        example="Classify the message as spam or not: ",
        min_length=1,
    )
    experts: bool = setting(
        False,
        about="Adapters on every matrix of a mixture's experts as well. Routers stay frozen.",
        example=True,
    )
    experts_rank: int | None = setting(
        None, about="Rank of the experts' adapters. Default: tuning.rank.", example=4, ge=1, le=4096
    )
    modules_to_save: list[str] = setting(
        [],
        about=(
            "Modules of the base that learn whole beside adapters of linear layers, by the ends of their paths: norms,"
            " embed_tokens, lm_head, routers. As in PEFT."
        ),
        example=["norm", "lm_head"],
    )

    start: str | None = setting(
        None,
        about=(
            "An adapter that learning begins from: a run of this store by its name (its newest checkpoint at the first"
            " start) or NAME@STEP, the path or URI of a run, of one of its checkpoints/step-... or of a LoRA adapter in"
            " PEFT's folder. Its rank, alpha and layers must be those of this section. The reference of dpo and kto is"
            " then the base with that adapter. Default: the method's own start."
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
