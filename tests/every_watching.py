"""Tries every type of model of transformers that takes videos, each in a process of its own: a release script.

    python -m tests.every_model --videos TABLE [TYPE ...]          writes one JSON line a type to TABLE

As tests/every_seeing.py does it, over rows with a video, with a picture and a video, and with neither. transformers'
own reader gives the class's processor all frames of the file.
"""

import json
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from tests import every_seeing
from tests.seeing import content, picture, video
from trainer.errors import CapstanError

CASES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SECONDS = every_seeing.SECONDS
_FRAMES = 32
"""As many as Gemma 4 takes, and as Capstan takes where a processor chooses none."""


def every_kind() -> list[str]:
    """The types whose processor has a part for videos."""
    return [kind for kind in every_seeing.every_kind() if _watches(kind)]


def _watches(kind: str) -> bool:
    case = every_seeing.CASES.get(kind, {})
    name = case.get("processor", {}).get("like") or case.get("type", kind)
    config, mapping = type(CONFIG_MAPPING[name]()), PROCESSOR_MAPPING
    made_by: Any = mapping.get(config, None)
    return made_by is not None and "video_processor" in made_by.get_attributes()


def tried(kind: str, folder: str) -> dict[str, Any]:
    """What becomes of one type; a mistake of ours is a traceback."""
    torch.set_num_threads(1)
    base = Path(folder) / "base"
    try:
        case = _case(kind)
        every_seeing.write_base(kind, base, case)
    except Exception as error:  # transformers raises any error for settings that it cannot build a model of
        return {"status": "not built", "reason": every_seeing.said(error), "trace": traceback.format_exc()[-2500:]}
    try:
        write_rows = partial(_write_rows, mixed=case.get("mixed", True))
        return every_seeing.proven(base, Path(folder), case.get("template"), write_rows, every_seeing.seen_or_mirrored)
    except CapstanError as refused:
        return {"status": "refused", "reason": str(refused)}
    except Exception as error:
        return {"status": "crashed", "reason": every_seeing.said(error), "trace": traceback.format_exc()[-2500:]}


def _case(kind: str) -> dict[str, Any]:
    """What a type lacks for pictures, and what it lacks for videos."""
    seen, own = every_seeing.CASES.get(kind, {}), CASES.get(kind, {})
    return {
        key: {**seen.get(key, {}), **own[key]} if isinstance(own.get(key), Mapping) else own.get(key, seen.get(key))
        for key in {*seen, *own}
    }


def _write_rows(folder: Path, *, mixed: bool) -> Path:
    (folder / "one.mp4").write_bytes(video(_FRAMES, 96, 64, 1))
    (folder / "two.mp4").write_bytes(video(_FRAMES, 64, 80, 2))
    (folder / "still.png").write_bytes(content(picture(64, 112, 3)))
    still, one, two = (
        {"type": kind, "path": name}
        for kind, name in (("image", "still.png"), ("video", "one.mp4"), ("video", "two.mp4"))
    )
    talks = [
        [_text("See "), one, _text(" well.\n")],
        [_text("Here "), *([still, _text(" and ")] if mixed else []), two, _text(" too.")],
        [_text("No picture at all.")],
    ]
    answers = ("it has a roof.", "Yes, both.", "None.")
    rows = folder / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}
        for parts, answer in zip(talks, answers, strict=True)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return rows


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
