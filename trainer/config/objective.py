"""The settings of the objective, what training minimises, and of the answers that are sampled for one that learns from
rewards.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import field_validator

from trainer.config.registry import OneOf, kinds
from trainer.config.section import Seconds, Section, Share, TokenCount, setting, with_parts


@dataclass(frozen=True)
class Head:
    """A head of an objective's own. It learns beside the method, in the place of the language model's head.

    It is a matrix (outputs, hidden), with a bias if it is `biased`. If it is `labelled` it has an output for each of
    `data.labels`, otherwise one. It reads the last token of a text, or each token (`per_token`). With `several` each
    output says for itself whether its label holds. `task` is PEFT's name for its task, and `pipeline` the Hub's.
    `transformers_class` loads base and head together. `what` describes it at the beginning of a sentence.
    """

    task: str
    pipeline: str
    transformers_class: str
    what: str
    labelled: bool
    biased: bool = False
    per_token: bool = False
    several: bool = False


HEADS: dict[str, Head] = kinds("trainer.tuning.objective", "HEADS")
"""The heads of the objectives that have one, by the objective's name. The file of an objective names its head
in `HEADS`.
"""


@with_parts("trainer.tuning.objective")
class ObjectiveSettings(Section):
    """The loss that training minimises. docs/preference.md, docs/heads.md, docs/distillation.md and docs/rollouts.md
    give the formulas, and say when to use which objective. In the table, `grpo and opd: ...` means that only
    these two objectives read the setting.
    """

    name: Annotated[str, OneOf("trainer.tuning.objective", "OBJECTIVES")] = setting(
        "sft", about="The objective: what the model learns.", example="dpo"
    )
    reference: Literal["auto", "adapter_off", "stored"] = setting(
        "auto",
        about=(
            "dpo and kto: where the reference's log-probabilities come from. adapter_off: a second pass in every"
            " step, with the adapter switched off. stored: one pass over all data before the first step; the result"
            " is kept in the store with the data. auto: adapter_off if the method can be switched off, otherwise"
            " stored."
        ),
        example="stored",
    )
    beta: float | None = setting(
        None,
        about=(
            "dpo and kto: how strongly the model is kept near the reference. grpo: weight of the KL divergence from"
            " the base, by default 0. orpo: weight of the odds-ratio loss, which is added to the next-token loss."
            " simpo: scale of the mean log-probability of a token. Default: 0.1 for dpo, kto and orpo, 2 for simpo."
        ),
        example=0.1,
        gt=0,
        le=100,
    )
    teacher: str | None = setting(
        None,
        about=(
            "distil and opd: the teacher. Either a base as in model.base, with the same tokenizer, or the URL of a"
            " vLLM server, followed by # and the model's name. distil: `capstan teach` stores the teacher's"
            " log-probabilities with the data, once, before the run. opd: the teacher judges sampled answers while"
            " the run trains. Give this or teacher_run."
        ),
        example="Qwen/Qwen3-235B-A22B",
    )
    teacher_run: str | None = setting(
        None,
        about=("distil and opd: a run as the teacher, by its name in run.store, as NAME@STEP, or by its path or URI."),
        example="big@1200",
    )
    teacher_quant: str | None = setting(
        None,
        about=(
            "distil and opd: quant.type of the teacher's base. Default: quant.type of this run. A teacher of"
            " teacher_run uses its own."
        ),
        example="nf4",
    )
    label_smoothing: Share = setting(
        0.0,
        about=(
            "sft: the part of a trained token's loss that is the mean over the whole vocabulary. dpo with loss_type:"
            " sigmoid: the share of pairs that you assume to be labelled the wrong way round; below 0.5."
        ),
        example=0.1,
    )
    router_loss: float = setting(
        0.0,
        about=(
            "For a mixture of experts: weight of the routers' load-balancing loss, which is added to the objective's"
            " loss in training, not in evaluations. It keeps the routers from sending all tokens to a few experts"
            " (router_aux_loss_coef in other tools). 0 turns it off."
        ),
        example=1e-3,
        ge=0,
        le=10,
    )
    router_loss_of: Literal["model", "layers"] = setting(
        "model",
        about=(
            "How router_loss is computed. model: one loss from the means over all layers, as in transformers. layers:"
            " the sum of one loss for each layer, as in Megatron."
        ),
        example="layers",
    )


OWN, SERVE = "own", "serve"
_CHOSEN = ("--host", "--port", "--served-model-name", "--api-key")
"""Options of vLLM that Capstan gives, or that keep it from asking the server."""


class Serve(Section):
    """The vLLM servers of rollout.engine: serve. They start and end with the run, on GPUs of their own."""

    replicas: int = setting(
        1, about="Number of servers. Each holds the whole base.", example=2, ge=1, le=1024, unit="servers"
    )
    gpus: int = setting(
        1,
        about=(
            "GPUs of each server, all on one machine. The base is divided over them (--tensor-parallel-size). 0: the"
            " server runs on CPUs."
        ),
        example=4,
        ge=0,
        le=64,
        unit="GPUs",
    )
    command: list[str] = setting(
        ["vllm", "serve"],
        about=(
            "The command that starts a server; with the program's path, if vLLM is in a virtual environment of its"
            " own. Capstan adds the base, vLLM's options for adapters, the address, model.dtype, and"
            " data.sequence_length as the longest text."
        ),
        example=["/opt/vllm/bin/vllm", "serve"],
    )
    options: list[str] = setting(
        [],
        about=(
            "Further options for the server. They follow Capstan's own; if vLLM gets an option twice, the last one"
            " counts."
        ),
        example=["--gpu-memory-utilization=0.95"],
    )
    base: str | None = setting(
        None,
        about=(
            "The base to serve, if it is not model.base: a folder or a Hub id. With a 4-bit quant.type, serve the"
            " folder that `capstan dequantize` writes: a 16-bit model whose weights equal the quantized ones."
        ),
        example="/models/as-quantized",
    )
    start_seconds: Seconds = setting(
        1800, about="How long a server may take to start, and later how long it may go without an answer.", example=3600
    )

    @field_validator("command")
    @classmethod
    def _some_program(cls, command: list[str]) -> list[str]:
        if not command or not command[0].strip():
            raise ValueError("rollout.serve.command: names no program. Example: [vllm, serve].")
        return command

    @field_validator("options")
    @classmethod
    def _not_those_that_are_given(cls, options: list[str]) -> list[str]:
        if found := [option for option in options if option.partition("=")[0].replace("_", "-") in _CHOSEN]:
            raise ValueError(
                f"rollout.serve.options: {found[0]} is not allowed, as Capstan chooses the address and asks without a"
                " key. Leave it out."
            )
        return options


class RolloutSettings(Section):
    """How a run with objective.name: grpo or opd samples its answers. The prompt is everything in a row of data.train
    before the row's last answer. The reward function gets this last answer, and the run never trains on it.
    docs/rollouts.md is the guide.
    """

    reward: str | None = setting(
        None,
        about=(
            "The reward of an answer: exact, regex, math, json_schema or length; your function as module:function; or"
            " verifiers:TASKSET for an environment of the library verifiers. Capstan calls your function as TRL does,"
            " with the lists prompts, completions and answer as keyword arguments. The function returns a number for"
            " each answer."
        ),
        example="rewards:correct",
    )
    engine: Literal["own", "serve"] | list[str] = setting(
        OWN,
        about=(
            "Who samples the answers. own: the ranks, between updates, with the sharded model; this is slow, but"
            " needs nothing else. serve: vLLM servers that the run starts (rollout.serve). Or a list of URLs of vLLM"
            " servers that you have started with the same base."
        ),
        example="serve",
    )
    serve: Serve = Serve()
    answers: int = setting(8, about="Number of answers that are sampled for each prompt.", example=16, ge=2, le=4096)
    max_tokens: TokenCount = setting(
        256,
        about=(
            "Most tokens of an answer. The limit is lower if data.sequence_length leaves less room after the prompt."
        ),
        example=1024,
    )
    temperature: float = setting(
        1.0,
        about="Sampling temperature. The loss always uses log-probabilities at temperature 1.",
        example=0.8,
        gt=0,
        le=10,
    )
    max_lag: int | None = setting(
        None,
        about=(
            "By how many updates the adapter that samples an answer may be older than the first update that learns"
            " from the answer. If all answers are older, the trainer waits for newer ones. With 0, and always with"
            " engine: own, sampling and training take turns. Default: rollout.updates, so that both overlap."
        ),
        example=0,
        ge=0,
        le=1000,
        unit="updates",
    )
    updates: int = setting(
        1,
        about=(
            "Number of consecutive updates that learn from the same answers (TRL's num_iterations). From the second"
            " update on, the model differs from the one that sampled; objective.clip_low and clip_high limit the"
            " effect of this difference."
        ),
        example=2,
        ge=1,
        le=64,
    )
    held_out: int = setting(
        0,
        about=(
            "Number of prompts of the evaluation data (data.eval or data.held_out) that are answered every eval.every"
            " steps, always with the likeliest token. The mean reward of these answers is held_out_reward in the"
            " records."
        ),
        example=64,
        ge=0,
        le=100_000,
        unit="prompts",
    )
    reward_seconds: Seconds = setting(
        60, about="Time limit for computing the rewards of one step's answers.", example=300
    )
    reward_python: str | None = setting(
        None,
        about=(
            "Path of the Python that runs the reward function, if the function has a virtual environment of its own."
            " Default: the Python that runs Capstan."
        ),
        example="/envs/verifiers/bin/python",
    )

    def chapter(self, step: int) -> int:
        """Return the number of the chapter of answers that the update after `step` learns from."""
        return step // self.updates

    def first_step(self, chapter: int) -> int:
        """Return the step after which the first update learns from the answers of this chapter."""
        return chapter * self.updates

    def chapters(self, steps: int) -> int:
        """Return how many chapters a run of `steps` updates has."""
        return -(-steps // self.updates)

    @property
    def serving_gpus(self) -> int:
        """GPUs of the servers that start with the run."""
        return self.serve.replicas * self.serve.gpus if self.engine == SERVE else 0

    @property
    def lag(self) -> int:
        return 0 if self.engine == OWN else self.updates if self.max_lag is None else self.max_lag

    @field_validator("engine")
    @classmethod
    def _some_server(cls, engine: str | list[str]) -> str | list[str]:
        if isinstance(engine, list) and (
            not engine or any(not url.startswith(("http://", "https://")) for url in engine)
        ):
            raise ValueError(
                f"rollout.engine: {engine} is not allowed. Give own, serve, or a list of URLs. Example:"
                " [http://gpu-1:8000]."
            )
        return engine
