"""The settings of rollouts: who samples the answers that an objective learns from, and what they are worth."""

from typing import Literal

from pydantic import field_validator

from trainer.config.section import Section, setting

OWN = "own"
LAG = 1
"""The updates of `max_lag`, where servers sample and nothing is said."""


class Rollout(Section):
    """Answers that are sampled while the run learns, for objective.name: grpo. The prompts are those of data.train: all before the last answer of a row,
    which is given to the reward and never trained. docs/rollouts.md says how to go about it."""

    reward: str | None = setting(
        None,
        about="What an answer is worth: exact, regex, json_schema or length, or your function as module:function, called as TRL calls one: with lists "
        "prompts, completions and answer, by name; it returns a number for each.",
        example="rewards:correct",
    )
    engine: Literal["own"] | list[str] = setting(
        OWN,
        about="Who samples. own: the ranks themselves, between updates, with the sharded model; slow, and nothing else is needed. Or URLs of vLLM "
        "servers of the same base, which `capstan rollout` asks beside the run.",
        example=["http://gpu-1:8000"],
    )
    answers: int = setting(
        8, about="Answers sampled to each prompt, which are compared with each other.", example=16, ge=2, le=4096
    )
    max_tokens: int = setting(
        256,
        about="Longest answer. It is shorter where data.sequence_length has less room behind the prompt.",
        example=1024,
        ge=1,
        le=2**20,
        unit="tokens",
    )
    temperature: float = setting(
        1.0,
        about="Temperature of sampling. Log-probabilities, the sampler's and the trainer's, are those at 1.",
        example=0.8,
        gt=0,
        le=10,
    )
    max_lag: int | None = setting(
        None,
        about="Updates that an answer's adapter may be behind the update that learns from it; the trainer waits for newer answers. 0 samples and "
        "trains in turns. Not with engine: own, which always does. Default: 1.",
        example=0,
        ge=0,
        le=1000,
        unit="updates",
    )
    held_out: int = setting(
        0,
        about="So many prompts of the evaluation data (data.eval or data.held_out) are answered, by the likeliest tokens, every eval.every steps, and get the "
        "same reward: held_out_reward in the records.",
        example=64,
        ge=0,
        le=100_000,
        unit="prompts",
    )
    reward_seconds: float = setting(
        60, about="How long the reward of one step's answers may take.", example=300, gt=0, unit="seconds"
    )

    @property
    def lag(self) -> int:
        return 0 if self.engine == OWN else LAG if self.max_lag is None else self.max_lag

    @field_validator("engine")
    @classmethod
    def _some_server(cls, engine: str | list[str]) -> str | list[str]:
        if isinstance(engine, list) and (
            not engine or any(not url.startswith(("http://", "https://")) for url in engine)
        ):
            raise ValueError(
                f"rollout.engine: {engine} is not allowed. Give own, or a list of URLs. Example: [http://gpu-1:8000]."
            )
        return engine
