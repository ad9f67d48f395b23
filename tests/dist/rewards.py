"""Rewards of the tests' runs, as users write them."""

import time


def printable(completions: list[str], **_: object) -> list[float]:
    """The share of an answer's characters that are printed as one byte."""
    return [sum(" " <= sign <= "~" for sign in said) / max(1, len(said)) for said in completions]


def hangs(completions: list[str]) -> list[float]:
    time.sleep(600)
    return []


def fails(completions: list[str], answer: list[str]) -> list[float]:
    raise ValueError(f"no way to judge {len(completions)} answers")


def too_few(prompts: list[str]) -> list[float]:
    return [1.0]
