"""A tiny base that hears, as transformers writes it, and sounds."""

import io
import random
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from tests.families import SIZES
from tests.material import byte_tokenizer
from tests.seeing import make_talks

RATE = 16_000
_TEXT = {**SIZES, "vocab_size": 264, "num_hidden_layers": 2, "tie_word_embeddings": False, "model_type": "qwen2"}
_EARS = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'audio' %}<begin><audio><end>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def hearing_base(
    folder: Path, dtype: torch.dtype = torch.float32, seed: int = 3, *, seconds: int = 2, **text: Any
) -> Path:
    """A random base of the class of Qwen2-Audio, with its processor, in several safetensors files. It hears so many
    `seconds` at most. `text` are settings of its language model."""
    tokens = {"audio_token": "<audio>", "audio_bos_token": "<begin>", "audio_eos_token": "<end>"}
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = byte_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=tokens, **named)
    number = tokenizer.convert_tokens_to_ids("<audio>")
    config = AutoConfig.for_model(
        "qwen2_audio",
        text_config={**_TEXT, **text},
        audio_config={**_EARS, "num_mel_bins": 16, "max_source_positions": 50 * seconds},
        audio_token_index=number,
        audio_token_id=number,
    )
    torch.manual_seed(seed)
    model: Any = Qwen2AudioForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    listens = WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)
    Qwen2AudioProcessor(listens, tokenizer, chat_template=_TEMPLATE).save_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def noise(seconds: float, seed: int, rate: int = RATE) -> NDArray[np.int16]:
    """Samples (n,), of which each seed has its own."""
    draw = np.random.default_rng(seed)
    steps = draw.uniform(-12_000, 12_000, int(seconds * rate) // 20 + 1)
    return np.repeat(steps, 20)[: int(seconds * rate)].astype(np.int16)


def wave_file(samples: NDArray[np.int16], rate: int = RATE) -> bytes:
    """The file of samples (n,) or (n, channels)."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, len(samples), "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def samples_of(content: bytes) -> NDArray[np.float32]:
    """The samples (n,) of a file of `wave_file` with one channel, between -1 and 1."""
    with wave.open(io.BytesIO(content)) as file:
        return (np.frombuffer(file.readframes(file.getnframes()), "<i2") / 2**15).astype(np.float32)


def make_sounding(folder: Path, rows: int = 24, seed: int = 5, heard: Sequence[int] = (0, 1, 2, 1)) -> Path:
    """Conversations with sounds of unlike lengths in them, and some without any."""

    def made(draw: random.Random, number: int) -> bytes:
        return wave_file(noise(draw.uniform(0.2, 0.9), number))

    return make_talks(folder, rows, seed, heard, ("audio", "wav"), made)
