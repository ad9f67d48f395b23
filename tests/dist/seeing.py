"""Loss curves over rows with pictures, by transformers and PEFT alone: each document by itself, through the class that
people load and its processor, in one process."""

import inspect
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from tests.dist import curves, runs
from tests.dist.assembled import assemble_run, chapters_of
from tests.hearing import RATE, samples_of
from tests.nf4 import decode_layers
from trainer.base.find.locate import resolve_base
from trainer.base.find.media import still
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.data.order.stream import sees_pictures, train_stream
from trainer.run import layout
from trainer.store.store import open_store
from trainer.train import loop
from trainer.train.horizon import learning_rate
from trainer.tuning.method import method_of
from trainer.tuning.towers import WithProjector, WithTowers

ADAPTED = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def stock_losses(config_text: str, fingerprint: str) -> list[float]:
    """The loss of every step, in nats a target. Only the order of the documents is the product's."""
    from peft import inject_adapter_in_model
    from peft.utils import ModulesToSaveWrapper
    from transformers import AutoModelForMultimodalLM, AutoProcessor, BitsAndBytesConfig

    from trainer.tuning.lora import METHODS

    config = parse_config(config_text)
    torch.set_num_threads(1)
    packed = config.quant.type == "nf4"
    options: dict[str, Any] = {"dtype": torch.bfloat16 if packed else torch.float32, "attn_implementation": "sdpa"}
    if packed:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "visual", "lm_head"],
        )
    model: Any = AutoModelForMultimodalLM.from_pretrained(config.model.base, **options)
    if packed:
        decode_layers(model)
    model.requires_grad_(False).eval()
    torch.manual_seed(config.run.seed)
    adapter = METHODS[config.tuning.method](config.tuning).adapting(["q_proj"])
    adapter.target_modules = ADAPTED
    inject_adapter_in_model(adapter, model)
    if isinstance(method := method_of(config), WithTowers):
        beside = resolve_base(config.model).architecture.linears_beside
        inject_adapter_in_model(METHODS[config.tuning.method](config.tuning).adapting(list(beside)), model)
        for path, (tall, wide) in beside.items():
            for kind, values in zip("AB", method.start(path, tall, wide, config.run.seed), strict=True):
                model.get_parameter(f"{path}.lora_{kind}.default.weight").data = values
    whole = list[Any]()
    for path in resolve_base(config.model).architecture.projector if isinstance(method, WithProjector) else ():
        saved = ModulesToSaveWrapper(model.get_submodule(path), "default")
        model.set_submodule(path, saved)
        whole += saved.requires_grad_(True).modules_to_save.parameters()
        saved.original_module.requires_grad_(False)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert adapters
    optim = config.optim
    groups: list[dict[str, Any]] = [{"params": adapters}, {"params": whole, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    processor = AutoProcessor.from_pretrained(config.model.base)
    files = [Path(source.path) for source in config.data.train]
    rows = [(json.loads(line)["messages"], file.parent) for file in files for line in file.read_text().splitlines()]
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    folder = open_store(config.run.store).sub(layout.dataset(fingerprint))
    sees_pictures(stream, config, resolve_base(config.model), folder)
    curve, position, steps = [], Position(), config.train.steps
    assert steps
    for step in range(1, steps + 1):
        batches = stream.step(position)
        targets, nats = sum(batch.targets for batch in batches), 0.0
        for number in (number for batch in batches for number in batch.documents):
            made = inputs(processor, *rows[number])
            given = {
                name: value.to(options["dtype"]) if value.is_floating_point() else value for name, value in made.items()
            }
            logits = model(**given, use_cache=False).logits[0, :-1]
            labels = answer(processor, made)[0, 1:]
            loss = functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum") / targets
            loss.backward()
            nats += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([*adapters, *whole], optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(nats)
        position = stream.advance(position)
    return curve


def inputs(processor: Any, messages: Any, folder: Path, *, asks: bool = False) -> dict[str, torch.Tensor]:
    """A conversation as a person gives it to the processor: the template's text, and its pictures. One that `asks` is
    to be answered."""
    if _tells_answers(processor):
        return _prompt_and_suffix(processor, messages, folder)
    parts = [
        part for message in messages for part in (message["content"] if isinstance(message["content"], list) else ())
    ]
    pictures = [Image.open(folder / part["path"]).convert("RGB") for part in parts if part["type"] == "image"]
    videos = [_read_video(folder / part["path"]) for part in parts if part["type"] == "video"]
    # SmolVLM takes another template for videos than the one that it has.
    template = {"chat_template": processor.chat_template} if videos else {}
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **template)
    sounds = [samples_of((folder / part["path"]).read_bytes()) for part in parts if part["type"] == "audio"]
    options = {"text": [text], "return_tensors": "pt", "return_mm_token_type_ids": bool(pictures or videos)}
    if videos:
        options |= {
            "videos": [one for one, _ in videos],
            "video_metadata": [said for _, said in videos],
            "return_metadata": True,
        }
    if sounds:
        options |= {"audio": sounds, "sampling_rate": RATE}
    try:
        made = processor(**options, **({"images": [pictures]} if pictures else {}))
    except ValueError:  # a few processors take one list of the pictures of all texts, and no text without one
        made = processor(**options, images=pictures) if pictures else processor.tokenizer([text], return_tensors="pt")
    return {name: value for name, value in made.items() if name not in ("attention_mask", "video_metadata")}


def _read_video(path: Path) -> tuple[Any, Any]:
    """All frames of a video and its metadata, as transformers' own reader gives them to a processor."""
    from transformers.video_utils import read_video_pyav

    read: Any = read_video_pyav  # its types are no types
    pixels, said = read(path, lambda metadata: np.arange(metadata.total_num_frames))
    return pixels, {**said, "frames_indices": list(range(len(pixels)))}


def _tells_answers(processor: Any) -> bool:
    return "suffix" in inspect.signature(processor.__call__).parameters


def _prompt_and_suffix(processor: Any, messages: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A prompt, and its answer if there is one, as a person gives them to PaliGemma's processor. That takes no text
    without a picture."""
    parts = messages[0]["content"]
    parts = parts if isinstance(parts, list) else [{"type": "text", "text": parts}]
    pictures = [Image.open(folder / part["path"]).convert("RGB") for part in parts if part["type"] == "image"]
    text = "".join(part.get("text", processor.image_token) for part in parts)
    said = [message["content"] for message in messages[1:]]
    if pictures:
        made = processor(text=[text], images=[pictures], suffix=said or None, return_tensors="pt")
        return {name: value for name, value in made.items() if name not in ("attention_mask", "labels")}
    tokenizer = processor.tokenizer
    asked, answered = (
        tokenizer(one, add_special_tokens=False)["input_ids"]
        for one in (f"{tokenizer.bos_token}{text}\n", "".join(f"{one}{tokenizer.eos_token}" for one in said))
    )
    types = [0] * len(asked) + [1] * len(answered)
    return {"input_ids": torch.tensor([asked + answered]), "token_type_ids": torch.tensor([types])}


def answer(processor: Any, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The labels of `inputs`: what stands behind the last "assistant: ", up to the end of the turn, or the suffix."""
    ids = made["input_ids"]
    if _tells_answers(processor):
        return ids.where(made["token_type_ids"] == 1, -100)
    said = processor.tokenizer("assistant: ", add_special_tokens=False)["input_ids"]
    labels, every = torch.full_like(ids, -100), ids[0].tolist()
    begin = max(place for place in range(len(every)) if every[place : place + len(said)] == said) + len(said)
    end = every.index(processor.tokenizer.eos_token_id, begin) + 1
    labels[0, begin:end] = ids[0, begin:end]
    return labels


def decoded(config_text: str, fingerprint: str, how: str) -> int:
    """Start or resume the run and let it end: the number of pictures that this rank has decoded."""
    plain, count = still.decoded, [0]

    def counted(*given: Any) -> Image.Image:
        count[0] += 1
        return plain(*given)

    still.decoded = counted
    assert runs.run(config_text, fingerprint, how)["outcome"] == "finished"
    return count[0]


def trained(config_text: str, fingerprint: str, how: str = "start", evaluated: str | None = None) -> dict[str, int]:
    """Start or resume the run and let it end: the pictures that this rank has decoded, and the weights of the tower
    which it has read."""
    from trainer.base.load import front

    count = {"pictures": 0, "weights": 0}
    plain_decoded, plain_read = still.decoded, front._read

    def counted(*given: Any) -> Image.Image:
        count["pictures"] += 1
        return plain_decoded(*given)

    def read(*given: Any) -> torch.Tensor:
        count["weights"] += 1
        return plain_read(*given)

    still.decoded, front._read = counted, read
    outcome = runs.run(config_text, fingerprint, how, evaluated)
    assert outcome["outcome"] == "finished", outcome
    return count


def stuck_pass(config_text: str, fingerprint: str) -> None:
    """A start whose pass over the pictures goes on no more once this rank has written the features of two documents."""
    from trainer.data.dataset.features import FeatureFiles

    plain, written = FeatureFiles.write, [0]

    def write(*given: Any, **more: Any) -> int:
        if written[0] == 2:
            threading.Event().wait()  # until SIGKILL
        written[0] += 1
        return plain(*given, **more)

    FeatureFiles.write = write  # pyright: ignore[reportAttributeAccessIssue]
    runs.run(config_text, fingerprint)


def seeing_operations(config_text: str, fingerprint: str) -> list[tuple[float, int]]:
    """For each step the operations of the tower that the run has counted, and those that PyTorch counts of
    the whole class while it makes the features of each document by itself."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForImageTextToText

    config = parse_config(config_text)
    here = assemble_run(config, fingerprint)
    training, found = here.training(), list[tuple[float, int]]()
    whole: Any = AutoModelForImageTextToText.from_pretrained(
        config.model.base, dtype=torch.float32, attn_implementation="eager"
    )
    plain, counted = loop._exchange, list[float]()

    def exchange(run: Any, mine: Any, *others: Any) -> Any:
        counted.append(mine.operations)
        return plain(run, mine, *others)

    loop._exchange = exchange  # pyright: ignore[reportPrivateUsage]
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    folder = open_store(config.run.store).sub(layout.dataset(fingerprint))
    sees_pictures(stream, config, resolve_base(config.model), folder)
    position = Position()
    for _ in loop.train(training, 0, Position()):
        batches = stream.step(position)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for seen in (one for batch in batches for one in batch.input.seen):
                # A document without pictures may have types of its tokens.
                if given := {name: value for name, value in seen.inputs.items() if "token_type" not in name}:
                    whole.get_image_features(**given)
        found.append((counted[-1] - training.work.of(batches), counter.get_total_flops()))
        position = stream.advance(position)
    loop._exchange = plain
    return found


def kinds_of_rows(config_text: str, fingerprint: str, world_size: int) -> list[list[str]]:
    """For each step and rank what the first row has: "text", "pictures" or "both"."""
    config = parse_config(config_text)
    folder, found = open_store(config.run.store).sub(layout.dataset(fingerprint)), list[list[str]]()
    for rank in range(world_size):
        stream = train_stream(config, chapters_of(config, fingerprint), rank=rank, world_size=world_size)
        sees_pictures(stream, config, resolve_base(config.model), folder)
        position, own = Position(), list[str]()
        for _ in range(config.train.steps or 0):
            row = stream.step(position)[0]
            counts = row.column("pictures").tolist()
            own.append("text" if not any(counts) else "pictures" if all(counts) else "both")
            position = stream.advance(position)
        found.append(own)
    return [list(step) for step in zip(*found, strict=True)]


def losses_and_decoded(config_text: str, fingerprint: str) -> tuple[list[float], int]:
    """The loss of every step, and the number of pictures that this rank has decoded."""
    plain, count = still.decoded, [0]

    def counted(*given: Any) -> Image.Image:
        count[0] += 1
        return plain(*given)

    still.decoded = counted
    return curves.losses(config_text, fingerprint), count[0]
