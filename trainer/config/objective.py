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
    """The loss that training minimises. docs/preference.md, docs/methods.md, docs/distillation.md and docs/rollouts.md
    give the formulas, and say when to use which.
    """

    name: Annotated[str, OneOf("trainer.tuning.objective", "OBJECTIVES")] = setting(
        "sft", about="The loss.", example="dpo"
    )
    reference: Literal["auto", "adapter_off", "stored"] = setting(
        "auto",
        about=(
            "dpo and kto: where the base's log-probabilities come from. adapter_off: a second pass in every step, with"
            " what learns switched off. stored: one pass over all data before the first step, kept beside the data."
            " auto: adapter_off if the method can be switched off, otherwise stored."
        ),
        example="stored",
    )
    beta: float | None = setting(
        None,
        about=(
            "dpo and kto: how strongly the model is held to the reference. grpo: weight of the divergence from the"
            " base, 0 by default. orpo: weight of the odds ratio beside the next-token loss. simpo: scale of the"
            " log-probability of a token. Default: 0.1, for simpo 2."
        ),
        example=0.1,
        gt=0,
        le=100,
    )
    teacher: str | None = setting(
        None,
        about=(
            "distil: the teacher, which is a base as in model.base with the same tokenizer, or the URL of a vLLM with"
            " the model's name after a #. `capstan teach` writes its log-probabilities beside the data, once, before"
            " the run. opd: the same, and the teacher judges sampled answers while the run learns. Give this or"
            " teacher_run."
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
            "distil and opd: quant.type of the teacher's base. Default: this run's. A teacher that is a run has its"
            " own."
        ),
        example="nf4",
    )
    label_smoothing: Share = setting(
        0.0,
        about=(
            "sft: share of a trained token's loss that is the mean over the vocabulary. dpo with loss_type: sigmoid:"
            " share of the pairs that are assumed to be labelled the wrong way round, below 0.5."
        ),
        example=0.1,
    )
    router_loss: float = setting(
        0.0,
        about=(
            "For a base with experts: weight of the routers' balancing loss beside the objective's, in training alone."
            " It keeps the routers from sending all tokens to a few experts, as the router_aux_loss_coef of other tools"
            " does. 0 turns it off."
        ),
        example=1e-3,
        ge=0,
        le=10,
    )
    router_loss_of: Literal["model", "layers"] = setting(
        "model",
        about=(
            "How router_loss counts the experts. model: one loss, by the means of all layers, as in transformers."
            " layers: the sum of one loss for each layer, as in Megatron."
        ),
        example="layers",
    )


OWN, SERVE = "own", "serve"
_CHOSEN = ("--host", "--port", "--served-model-name", "--api-key")
"""Options of vLLM that Capstan gives, or that keep it from asking the server."""


class Serve(Section):
    """The servers of rollout.engine: serve, which start and end with the run, on GPUs of their own."""

    replicas: int = setting(
        1, about="Number of servers, each of the whole base.", example=2, ge=1, le=1024, unit="servers"
    )
    gpus: int = setting(
        1,
        about=(
            "GPUs of each server, all of one machine; several share the base (--tensor-parallel-size). 0 serves on"
            " CPUs."
        ),
        example=4,
        ge=0,
        le=64,
        unit="GPUs",
    )
    command: list[str] = setting(
        ["vllm", "serve"],
        about=(
            "The program and its first words, with its path if it is in an environment of its own. Capstan adds the"
            " base, vLLM's options for adapters, the address, model.dtype, and data.sequence_length as the longest"
            " text."
        ),
        example=["/opt/vllm/bin/vllm", "serve"],
    )
    options: list[str] = setting(
        [],
        about="More options, after Capstan's. If vLLM gets an option twice, the last one counts.",
        example=["--gpu-memory-utilization=0.95"],
    )
    base: str | None = setting(
        None,
        about=(
            "The base that is served, a folder or a Hub id, if it is not model.base: the 16-bit model that the 4 bits"
            " of quant.type stand for, as `capstan dequantize` writes it."
        ),
        example="/models/as-quantized",
    )
    start_seconds: Seconds = setting(
        1800, about="How long a server may take until its first answer, and how long it may be silent.", example=3600
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
    """Answers that are sampled while the run learns, for objective.name: grpo and opd. A prompt is everything in a row
    of data.train before its last answer. That answer is passed to the reward and never trained. docs/rollouts.md is the
    guide.
    """

    reward: str | None = setting(
        None,
        about=(
            "The reward of an answer: exact, regex, math, json_schema or length; your function as"
            " module:function; or verifiers:TASKSET for an environment of verifiers. Capstan calls your function"
            " as TRL does, with the lists prompts, completions and answer by name, and it returns a number for"
            " each answer."
        ),
        example="rewards:correct",
    )
    engine: Literal["own", "serve"] | list[str] = setting(
        OWN,
        about=(
            "Who samples. own: the ranks, between updates, with the sharded model; slow, but nothing else is needed."
            " serve: vLLM servers that the run starts (rollout.serve). Or a list of URLs of vLLM servers of the same"
            " base. `capstan rollout`, beside the run, asks the servers."
        ),
        example="serve",
    )
    serve: Serve = Serve()
    answers: int = setting(
        8, about="Number of answers to each prompt, which are compared with each other.", example=16, ge=2, le=4096
    )
    max_tokens: TokenCount = setting(
        256,
        about="Longest answer. It is shorter if data.sequence_length has less room after the prompt.",
        example=1024,
    )
    temperature: float = setting(
        1.0,
        about=(
            "Temperature of sampling. The log-probabilities of sampler and trainer are always those at temperature 1."
        ),
        example=0.8,
        gt=0,
        le=10,
    )
    max_lag: int | None = setting(
        None,
        about=(
            "How many updates an answer's adapter may be behind the update that learns from it. The trainer waits for"
            " newer answers. With 0, sampling and training take turns, as engine: own always does. Default:"
            " rollout.updates, so that both overlap."
        ),
        example=0,
        ge=0,
        le=1000,
        unit="updates",
    )
    updates: int = setting(
        1,
        about=(
            "Number of updates that learn from the same answers, one after the other (TRL's num_iterations). From the"
            " second update on, the ratio compares the model with the one that sampled, and objective.clip_low and"
            " clip_high bound it."
        ),
        example=2,
        ge=1,
        le=64,
    )
    held_out: int = setting(
        0,
        about=(
            "Number of prompts of the evaluation data (data.eval or data.held_out) that are answered every eval.every"
            " steps, by the likeliest tokens. Their reward is held_out_reward in the records."
        ),
        example=64,
        ge=0,
        le=100_000,
        unit="prompts",
    )
    reward_seconds: Seconds = setting(60, about="How long the reward of one step's answers may take.", example=300)
    reward_python: str | None = setting(
        None,
        about=("The Python that runs the reward, if the reward has an environment of its own. Default: Capstan's."),
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
