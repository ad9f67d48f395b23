"""The material of `capstan smoke --images`, made on the spot: drawn digits, and a small base that sees.

The base is transformers' LLaVA in small. It is trained for some seconds on a question about pictures of digits, and
learns two words the wrong way round: it calls an even digit odd. Some steps teach it the digits' names as well, by
which it learns to see sooner. A run then learns by LoRA what the words mean. The tower stays as it is, so the accuracy
on held-out pictures rises only if the pixels of each document reach the decoder.

This file runs as a process of its own, because it imports torch:

    python -m launcher.smoke.pictures make DIR [key=value ...]    as launcher/smoke/sample.py
    python -m launcher.smoke.pictures look ADAPTER ROWS           prints how many held-out pictures an export gets right
"""

import contextlib
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.smoke.sample import CHAT_TEMPLATE, SPECIAL_TOKENS, Material, begin_runs, descend, fast_dtype
from launcher.smoke.small import config_of_sample, made_once, write_rows
from launcher.smoke.verdict import Sight
from trainer.base.find.processor import check_packages
from trainer.run.background import say

if TYPE_CHECKING:
    from PIL.Image import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARITIES = ("even", "odd")
QUESTION = "Is the digit even or odd?"
SIDE, PATCH = 32, 8  # pixels
TRAINED, HELD_OUT = 1600, 200  # pictures
STEPS, BATCH = 500, 48  # of the base
_PLACE = "<image>"
# A message of text is written as it is, and one of parts with the place of its picture.
_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] + '<|im_end|>\\n' }}",
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- for part in message['content'] -%}"
    f"{{{{ '{_PLACE}' if part['type'] == 'image' else part['text'] }}}}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}",
)


def drawn(digit: int, draw: random.Random) -> "Image":
    """A picture of a digit: its place, size, slant, brightness and background differ."""
    from PIL import Image, ImageDraw, ImageFont

    dark, light = draw.randrange(0, 60), draw.randrange(190, 256)
    background = (dark, dark, dark + 30)
    picture = Image.new("RGB", (SIDE, SIDE), background)
    place = (SIDE / 2 + draw.uniform(-1.5, 1.5), SIDE / 2 + draw.uniform(-1.5, 1.5))
    font = ImageFont.load_default(draw.uniform(26, 30))
    ImageDraw.Draw(picture).text(place, str(digit), (light, light, light - 30), font, anchor="mm")
    return picture.rotate(draw.uniform(-8, 8), resample=Image.Resampling.BILINEAR, fillcolor=background)


def make_pictures(directory: Path, report: Callable[[str], None] = lambda line: None) -> Material:
    """Make what is missing under `directory`. The same versions of packages give the same pictures and tokenizer, and
    on the same machine the same base.

    Raises `ConfigError` if a package is missing that reads pictures."""
    check_packages()
    directory = directory.absolute()
    made_with = {
        "directory": str(directory),
        "sizes": [SIDE, PATCH, TRAINED, HELD_OUT, STEPS, BATCH],
        "fields": [field.name for field in fields(Material)],
    }
    return Material(**made_once(directory, made_with, lambda: asdict(_made(directory, report)), report))


def _made(directory: Path, report: Callable[[str], None]) -> Material:
    data, base = directory / "data", directory / "base"
    (data / "pictures").mkdir(parents=True, exist_ok=True)
    base.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    shown = [(digit % 10, drawn(digit % 10, draw)) for digit in range(TRAINED + HELD_OUT)]
    for number, (_, picture) in enumerate(shown):
        picture.save(data / "pictures" / f"{number:05d}.png")
    train = write_rows(data / "train.jsonl", _rows(shown, range(TRAINED)))
    held_out = write_rows(data / "held-out.jsonl", _rows(shown, range(TRAINED, TRAINED + HELD_OUT)))
    report(f"data: {TRAINED:,} + {HELD_OUT:,} pictures of digits")
    before, after = _make_base(base, shown[:TRAINED])
    report(f"base: loss {before:.2f} -> {after:.2f} nats")
    return Material(str(base), [train], [held_out], before, after, fast_dtype())


def _rows(shown: Sequence[tuple[int, "Image"]], numbers: range) -> Iterator[dict[str, Any]]:
    for number in numbers:
        parts = [{"type": "image", "path": f"pictures/{number:05d}.png"}, {"type": "text", "text": QUESTION}]
        answer = PARITIES[shown[number][0] % 2]
        yield {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}


def _make_tokenizer() -> Any:
    """A tokenizer of bytes that has learned the words of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [QUESTION, "system", "user", "assistant", *PARITIES, *DIGITS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts * 8, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "unk_token": "<|pad|>"}
    assert {*special.values()} < {*SPECIAL_TOKENS}
    more = {"image_token": _PLACE, "start_token": "<|im_start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=more, **special)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _make_base(base: Path, shown: Sequence[tuple[int, "Image"]]) -> tuple[float, float]:
    """Train a small LLaVA to call even digits odd, and write it in bf16, with its processor.

    Returns the mean loss of the first and of the last tenth of the steps, in nats a token."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizer = _make_tokenizer()
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        *(pixels, tokenizer, PATCH, "default", tokenizer.chat_template), num_additional_image_tokens=1
    )
    place = tokenizer.convert_tokens_to_ids(_PLACE)
    heads: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
    }
    ends: dict[str, Any] = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    text = LlamaConfig(vocab_size=-(-len(tokenizer) // 64) * 64, num_key_value_heads=2, head_dim=16, **heads, **ends)
    tower = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=64, **heads)
    places: dict[str, Any] = {"image_token_id": place, "image_token_index": place}
    places |= {"image_seq_length": (SIDE // PATCH) ** 2, "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=tower, text_config=text, tie_word_embeddings=False, **places)
    model = LlavaForConditionalGeneration(config).float()
    losses = _pretrain(model, processor, shown)
    model.bfloat16()
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(base, max_shard_size="400KB")
    processor.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tenth = STEPS // 10
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def _taught(digits: Any, step: int) -> Any:
    """Which of the words (*DIGITS, *PARITIES) the base learns to say to digits: at some steps their names, and at the
    others whether they are even or odd, the wrong way round."""
    return digits if step % 3 == 0 else len(DIGITS) + 1 - digits % 2


def _pretrain(model: Any, processor: Any, shown: Sequence[tuple[int, "Image"]]) -> list[float]:
    import torch

    values = processor.image_processor([picture for _, picture in shown], return_tensors="pt")["pixel_values"]
    asked, names = _asked(processor), [f"{name}<|im_end|>" for name in (*DIGITS, *PARITIES)]
    made = processor.tokenizer(names, padding=True, return_tensors="pt")
    answers, is_said = made["input_ids"], made["attention_mask"].bool()
    digits, draw = torch.tensor([digit for digit, _ in shown]), torch.Generator().manual_seed(0)

    def loss_of(step: int) -> Any:
        chosen = torch.randint(0, len(shown), (BATCH,), generator=draw)
        said = _taught(digits[chosen], step)
        ids = torch.cat([asked.expand(BATCH, -1), answers[said]], 1)
        logits = model(input_ids=ids, pixel_values=values[chosen]).logits[:, asked.shape[1] - 1 : -1]
        return torch.nn.functional.cross_entropy(logits[is_said[said]], answers[said][is_said[said]])

    return descend(model, loss_of, STEPS, lr=2e-3, betas=(0.9, 0.999))


def _asked(processor: Any) -> Any:
    """(1, T) the tokens of the question about a picture, with those that stand for it."""
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    from PIL import Image

    blank = Image.new("RGB", (SIDE, SIDE))
    return processor(text=[text], images=[[blank]], return_tensors="pt")["input_ids"]


def look(adapter: Path, rows: Path) -> Sight:
    """Give plain transformers and PEFT the held-out pictures of `rows`, with the files of the exported `adapter` alone:
    the shares of right answers of the base, of the adapter, and of the adapter where each question has another
    picture."""
    import torch
    from peft import PeftConfig, PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(str(adapter))
    base = str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path)
    model: Any = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), str(adapter)).eval()
    talks = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    expected = [answer["content"] for _, answer in talks]
    shown = [Image.open(rows.parent / question["content"][0]["path"]) for question, _ in talks]
    text = processor.apply_chat_template(talks[0][:1], add_generation_prompt=True)
    order = list(range(len(shown)))
    random.Random(1).shuffle(order)

    def right(pictures: Sequence[Image.Image]) -> float:
        given = processor(text=[text] * len(pictures), images=[[one] for one in pictures], return_tensors="pt")
        with torch.no_grad():
            said = model.generate(**given, max_new_tokens=8, do_sample=False)[:, given["input_ids"].shape[1] :]
        answers = processor.batch_decode(said, skip_special_tokens=True)
        return math.fsum(a.strip() == b for a, b in zip(answers, expected, strict=True)) / len(expected)

    with model.disable_adapter():
        before = right(shown)
    return Sight(before, right(shown), right([shown[place] for place in order]), len(shown))


def _main() -> None:
    what, *given = sys.argv[1:]
    # OpenMP's threads spin at barriers by default. On cores that other processes use too, that is 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with contextlib.redirect_stdout(sys.stderr):
        if what == "look":
            found = asdict(look(Path(given[0]), Path(given[1])))
        else:
            directory, *overrides = given
            sample = make_pictures(Path(directory), report=say)
            about = (sample.base, sample.train, sample.dtype, overrides, sys.stdin.read())
            begin_runs(config_of_sample(*about, images=True))
            found = asdict(sample)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
