"""A rank put together piece by piece, for what lies between two steps."""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from trainer.base.find.locate import resolve_base_alike
from trainer.base.load.load import LoadReport
from trainer.config import Config
from trainer.data.dataset.chapters import Chapters, open_chapters
from trainer.data.order.stream import Stream, sees_pictures, train_stream
from trainer.model.attention import Attention
from trainer.plan.assemble import ShardingPlan, assemble, attention_of
from trainer.plan.plan import choose_scope
from trainer.plan.resolve import Resolved
from trainer.processes.ranks import Team, join
from trainer.run import layout
from trainer.run.metrics import Metrics
from trainer.run.requests import StopSignal
from trainer.state.checkpoint.checkpoints import Checkpoints, CommitHooks
from trainer.state.checkpoint.identity import Identity
from trainer.state.zero.engine import Engine
from trainer.state.zero.policy import build_deepspeed_config
from trainer.store.store import Store, open_store
from trainer.train.horizon import Horizon
from trainer.train.loop import Training
from trainer.train.start import Start
from trainer.tuning.objective import Objective

LIMIT = timedelta(seconds=1500)  # of collectives: neither gloo's own nor NCCL's
STATES = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Assembled:
    resolved: Resolved
    ranks: Team
    engine: Engine
    stream: Stream
    attention: Attention
    report: LoadReport
    store: Store
    run: Store
    log: list[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return self.resolved.config

    def start(self, generation: int = 1, objective: Objective | None = None, stop: StopSignal | None = None) -> Start:
        resolved = replace(self.resolved, objective=objective or self.resolved.objective)
        stop = stop or StopSignal(self.run, watches=False, seconds=60)
        return Start(resolved, self.ranks, self.store, self.run, generation, metrics=Metrics(), stop=stop)

    def checkpoints(self, generation: int = 1, base: str = "ours") -> Checkpoints:
        method = self.resolved.method.identity
        identity = Identity("data", {"fingerprint": base, "path": "base"}, method, optimizer=self.config.optim.name)
        rules = self.config.checkpoint
        return Checkpoints(self.run, self.ranks, generation, identity, rules, CommitHooks(self.note))

    def note(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})

    def training(self, generation: int = 1, objective: Objective | None = None) -> Training:
        total = self.config.train.steps
        assert total
        return Training(
            start=self.start(generation, objective),
            engine=self.engine,
            stream=self.stream,
            checkpoints=self.checkpoints(generation),
            horizon=Horizon(total, total),
        )

    def states(self) -> dict[str, Tensor]:
        """This rank's intervals of what learns: `name|state|begin` -> values."""
        return {
            f"{part.name}|{key}|{part.begin}": part.states[key].clone()
            for part in self.engine.partitions()
            for key in STATES
        }

    def set_masters(self) -> None:
        """Adapters that are not zero, the same whatever the ranks: with B = 0 the gradient of A would be 0."""
        for part in self.engine.partitions():
            part.states["master"].copy_(adapter_value(part.name, part.shape).view(-1)[part.begin : part.end])
        self.engine.refresh(0)


def adapter_value(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    # Values that bf16 holds exactly, so that masters and 16-bit weights agree.
    return (0.1 * torch.randn(shape, generator=generator)).bfloat16().float()


def chapters_of(config: Config, fingerprint: str) -> Chapters:
    store = open_store(config.run.store)
    return open_chapters(store, fingerprint, store.sub(config.run.name))


def assemble_run(config: Config, fingerprint: str | None = None) -> Assembled:
    ranks = join(LIMIT)
    torch.set_num_threads(1)
    store = open_store(config.run.store)
    stream: Any = None
    accumulation = 1
    if fingerprint:
        stream = train_stream(config, chapters_of(config, fingerprint), ranks.rank, ranks.world_size)
        accumulation = stream.accumulation
    settings = build_deepspeed_config(config, ranks.world_size, accumulation, on_gpu=False)
    resolved = Resolved.of(config, resolve_base_alike(config.model, ranks))
    if fingerprint:
        sees_pictures(stream, config, resolved.base, store.sub(layout.dataset(fingerprint)))
    attention = attention_of(resolved, ranks.device)
    log: list[str] = []
    scope = choose_scope(config, resolved.base.architecture, ranks.world_size, ranks.ranks_per_node, None)
    engine, report = assemble(resolved, ranks, attention, ShardingPlan(settings, scope), log.append)
    return Assembled(resolved, ranks, engine, stream, attention, report, store, store.sub(config.run.name), log)
