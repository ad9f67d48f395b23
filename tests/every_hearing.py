"""Tries every type of model of transformers that takes sounds and text, each in a process of its own: a release script.

    python -m tests.every_model --sounds TABLE [TYPE ...]          writes one JSON line a type to TABLE
    python -m tests.every_model --sounds --record TABLE            writes what became of each type to tests/every_model.json

It is done as in tests/every_seeing.py: three documents, with one sound, with two of unlike lengths, and with none.
Bases that take one sound for each text get one in the second document.
"""

import io
import json
import traceback
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from transformers import AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from tests import every_seeing
from trainer.errors import CapstanError

CASES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SECONDS = 900
ELSEWHERE = ("audioflamingo3", "musicflamingo")
"""Types that transformers lists among models of one text from another."""
_HEAR = (
    *("apertus1p5", "dots3_note", "fun_asr_nano", "gemma3n", "gemma4", "gemma4_unified", "glmasr", "granite_speech"),
    *("granite_speech_plus", "inkling_mm_model", "kyutai_speech_to_text", "moss_transcribe_diarize", "muse_spark"),
    *("nemo_speechlm", "nemotron_h_omni", "omniasr", "phi4_multimodal", "qwen2_5_omni", "qwen2_5_omni_thinker"),
    *("qwen2_audio", "qwen3_asr", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "vibevoice_asr", "voxtral"),
    "voxtral_realtime",
)
_SECONDS = ((0.61,), (0.87, 0.42), ())
"""Length of the sounds of each document."""
_WORDS = (("Hear ", " well.\n"), ("Here ", " and there ", " too."), ("No sound at all.",))
_ANSWERS = ("it has a voice.", "Yes, both.", "None.")


def every_kind() -> list[str]:
    return sorted({*(kind for kind in _HEAR if kind in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES), *ELSEWHERE})


def tried(kind: str, folder: str) -> dict[str, Any]:
    """What becomes of one type; a mistake of ours is a traceback."""
    torch.set_num_threads(1)
    base, case = Path(folder) / "base", case_of(kind)
    try:
        every_seeing.write_base(kind, base, case)
    except Exception as error:  # transformers raises any error for settings that it cannot build a model of
        return {"status": "not built", "reason": every_seeing.said(error), "trace": traceback.format_exc()[-2500:]}
    try:
        return every_seeing.proven(base, Path(folder), case.get("template"), write_rows, heard)
    except CapstanError as refused:
        return {"status": "refused", "reason": str(refused)}
    except Exception as error:
        return {"status": "crashed", "reason": every_seeing.said(error), "trace": traceback.format_exc()[-2500:]}


def case_of(kind: str) -> dict[str, Any]:
    """What a type lacks for pictures, as its class may have a part for them, too, and what it lacks for sounds."""
    seen, own = every_seeing.CASES.get(kind, {}), CASES.get(kind, {})
    return {
        key: {**seen.get(key, {}), **own[key]} if isinstance(own.get(key), Mapping) else own.get(key, seen.get(key))
        for key in {*seen, *own}
    }


def wave_file(samples: NDArray[np.int16], rate: int) -> bytes:
    """The file of samples (n,) or (n, channels)."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, len(samples), "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def noise(seconds: float, rate: int, seed: int) -> NDArray[np.int16]:
    """Samples (n,), of which each seed has its own."""
    draw = np.random.default_rng(seed)
    steps = draw.uniform(-12_000, 12_000, int(seconds * rate) // 20 + 1)
    return np.repeat(steps, 20)[: int(seconds * rate)].astype(np.int16)


def write_rows(folder: Path) -> Path:
    """Conversations with the sounds of `_SECONDS`, at the rate of the processor of the base beside them."""
    processor: Any = AutoProcessor.from_pretrained(folder / "base")
    rate, lines = _rate(processor), list[str]()
    for row, (lengths, words, answer) in enumerate(zip(_SECONDS, _WORDS, _ANSWERS, strict=True)):
        parts: list[dict[str, Any]] = [{"type": "text", "text": words[0]}]
        for number, seconds in enumerate(lengths if _takes_several(processor) else lengths[:1]):
            name = f"{row}-{number}.wav"
            (folder / name).write_bytes(wave_file(noise(seconds, rate, 10 * row + number), rate))
            parts += [{"type": "audio", "path": name}, {"type": "text", "text": words[number + 1]}]
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines), encoding="utf-8")
    return rows


def _rate(processor: Any) -> int:
    part = getattr(processor, "feature_extractor", None) or processor.audio_processor
    return part.sampling_rate


def _takes_several(processor: Any) -> bool:
    silence = np.zeros(8_000, np.float32)
    try:
        processor(text=[f"{processor.audio_token} {processor.audio_token}"], audio=[silence] * 2, return_tensors="pt")
    except ValueError as error:
        return "1:1" not in str(error)
    return True


def heard(processor: Any, messages: Any, folder: Path, *, other: bool = False) -> dict[str, torch.Tensor]:
    """A conversation as a person gives it to the processor: the template's text, and its sounds. If `other`, these are
    played backwards."""
    sounds = [
        _samples(folder / part["path"])[:: -1 if other else 1].copy()
        for message in messages
        for part in (message["content"] if isinstance(message["content"], list) else ())
        if part["type"] == "audio"
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    if sounds:
        made = processor(text=[text], audio=sounds, sampling_rate=_rate(processor), return_tensors="pt")
    else:
        made = processor.tokenizer([text], return_tensors="pt")
    return {name: value for name, value in made.items() if name not in ("attention_mask", "text_replacement_offsets")}


def _samples(file: Path) -> NDArray[np.float32]:
    with wave.open(str(file)) as opened:
        return (np.frombuffer(opened.readframes(opened.getnframes()), "<i2") / 2**15).astype(np.float32)
