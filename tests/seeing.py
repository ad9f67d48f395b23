"""Tiny bases that see, as transformers writes them, and rows with pictures."""

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.families import SIZES
from tests.material import byte_tokenizer
from trainer.base.find.media import Shown
from trainer.base.find.media.still import Size
from trainer.data.render.chat_template import NAMED, is_jinja

_TEXT = {**SIZES, "vocab_size": 264, "num_hidden_layers": 2, "head_dim": 16, "tie_word_embeddings": False}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_TOWER = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}}
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PICTURE{% elif part.type == 'video' %}<video>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def _llava(tokenizer: Any) -> tuple[dict[str, Any], Any, str]:
    from transformers import CLIPImageProcessor, LlavaProcessor

    sizes: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    image = tokenizer.convert_tokens_to_ids("<image>")
    settings = {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        "image_token_index": image,
        "image_token_id": image,
        "vision_feature_layer": -1,
        "image_seq_length": 4,
    }
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes), tokenizer, 8, "default", tokenizer.chat_template, num_additional_image_tokens=1
    )
    return settings, processor, "<image>"


def _gemma3(tokenizer: Any) -> tuple[dict[str, Any], Any, str]:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    numbers = {
        f"{name}_token_index": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("image", "<image>"), ("boi", "<begin>"), ("eoi", "<end>"))
    }
    settings = {
        "text_config": {**_TEXT, **_WINDOWS},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
        "mm_tokens_per_image": 4,
        **numbers,
        "image_token_id": numbers["image_token_index"],
    }
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 16, "width": 16}, do_pan_and_scan=False), tokenizer, image_seq_length=4
    )
    return settings, processor, "<begin>"


def _qwen3_vl(tokenizer: Any) -> tuple[dict[str, Any], Any, str]:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    numbers = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (("image", "<image>"), ("vision_start", "<begin>"), ("vision_end", "<end>"))
    }
    settings = {
        "text_config": {**_TEXT, **_TURNED, "model_type": "qwen3_vl_text"},
        "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **numbers,
        "video_token_id": tokenizer.convert_tokens_to_ids("<video>"),
    }
    sizes: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    made = Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = Qwen3VLProcessor(
        made,
        tokenizer,
        Qwen3VLVideoProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 4096}),
        tokenizer.chat_template,
    )
    return settings, processor, "<begin><image><end>"


def _paligemma(tokenizer: Any) -> tuple[dict[str, Any], Any, str]:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    # It adds tokens of places and of masks.
    processor = PaliGemmaProcessor(
        SiglipImageProcessor(size={"height": 16, "width": 16}, image_seq_length=4), tokenizer
    )
    settings = {
        "text_config": {**_TEXT, "model_type": "gemma", "vocab_size": 1536},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8},
        "projection_dim": 64,
        "vocab_size": 1536,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": False,
    }
    return settings, processor, NAMED["paligemma"].text


BASES = {"llava": _llava, "gemma3": _gemma3, "qwen3_vl": _qwen3_vl, "paligemma": _paligemma}
"""A type -> its settings, its processor, and what its chat template writes for a picture, or the whole template."""


def seeing_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32, seed: int = 3, **text: Any) -> Path:
    """A random base of a class that sees, with its processor, in several safetensors files. `text` are settings of its
    language model."""
    tokens = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>", "video_token": "<video>"}
    tokens |= {"vision_bos_token": "<begin>", "vision_eos_token": "<end>"}
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = byte_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=tokens, **named)
    settings, processor, written = BASES[kind](tokenizer)
    settings["text_config"] |= text
    tokenizer.chat_template = written if is_jinja(written) else _TEMPLATE.replace("PICTURE", written)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # Gemma 3's projection begins as zeros
                parameter.normal_(0, 0.1)
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int) -> Image.Image:
    draw = random.Random(seed)
    small = Image.frombytes("RGB", (4, 4), bytes(draw.randrange(256) for _ in range(48)))
    return small.resize((width, height))


def shown(made: Image.Image) -> Shown:
    """A picture as a processor gets it."""
    return Shown(Size(made.height, made.width), made)


def video(frames: int, width: int, height: int, seed: int, rate: int = 6, kind: str = "mp4") -> bytes:
    """The bytes of a file with a video, whose picture moves to the side."""
    import av

    codec = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mpegts": "mpeg2video"}[kind]
    pixels, buffer = np.asarray(picture(width, height, seed)), io.BytesIO()
    with av.open(buffer, "w", format=kind) as file:
        stream: Any = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            made = av.VideoFrame.from_ndarray(np.roll(pixels, number * width // 8, 1).copy(), format="rgb24")
            file.mux(stream.encode(made))
        file.mux(stream.encode())
    return buffer.getvalue()


def content(made: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    made.save(buffer, kind, **options)
    return buffer.getvalue()


def make_pictured(folder: Path, rows: int = 24, seed: int = 5, seen: Sequence[int] = (0, 1, 2, 1)) -> Path:
    """Conversations with pictures of unlike sizes in them, and some without any."""

    def made(draw: random.Random, number: int) -> bytes:
        return content(picture(draw.randint(16, 40), draw.randint(16, 40), number))

    return make_talks(folder, rows, seed, seen, ("image", "png"), made)


def make_talks(
    folder: Path,
    rows: int,
    seed: int,
    counts: Sequence[int],
    kind: tuple[str, str],
    made: Callable[[random.Random, int], bytes],
) -> Path:
    """Conversations with as many files in them as `counts` say in turn. `kind` is the type of a part and the ending of a
    file, and `made` makes a file's content by its number."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = "the ant bee cat dog emu fox gnu hen ibis jay".split()
    lines = list[str]()
    for row in range(rows):
        parts: list[dict[str, Any]] = [{"type": "text", "text": draw.choice(words)}]
        for number in range(counts[row % len(counts)]):
            name = f"{row}-{number}.{kind[1]}"
            (folder / name).write_bytes(made(draw, 100 * row + number))
            parts += [{"type": kind[0], "path": name}, {"type": "text", "text": draw.choice(words) + "?"}]
        answer = " ".join(draw.choices(words, k=draw.randint(1, 4)))
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def trained_over(base: Path, rows: Path) -> tuple[str, ...]:
    """Settings that train a base as it is, in fp32, over a file of rows."""
    return f"model.base={base}", "quant.type=none", "model.dtype=fp32", f"data.train=[{{path: {rows}}}]"


def make_watched(folder: Path, rows: int = 24, seed: int = 5) -> Path:
    """Conversations of which some have a video, some a picture, some both, and some nothing."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words, lines = "the ant bee cat dog emu fox gnu hen ibis jay".split(), list[str]()
    for row in range(rows):
        parts: list[dict[str, Any]] = [{"type": "text", "text": draw.choice(words)}]
        for kind in ((), ("video",), ("image", "video"), ("image",))[row % 4]:
            name = f"{row}.{'mp4' if kind == 'video' else 'png'}"
            sides = 16 * draw.randint(1, 2), 16 * draw.randint(1, 2)
            moving = video(draw.randint(6, 14), *sides, row)
            (folder / name).write_bytes(moving if kind == "video" else content(picture(*sides, row)))
            parts += [{"type": kind, "path": name}, {"type": "text", "text": draw.choice(words) + "?"}]
        answer = " ".join(draw.choices(words, k=draw.randint(1, 4)))
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": talk}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"
