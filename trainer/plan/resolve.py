"""A run's settings, resolved once: the things that they name are found, and it is checked that these fit together.

Every program that works on a run begins here, on a login node as on a rank, and passes the `Resolved` on. Nothing that
trains looks a method or an objective up again. Plans and the order of data follow from the configuration alone, and
look up what they count with. No torch.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from trainer.base.base import Base
from trainer.base.find.check import check_base_files
from trainer.base.find.content import content_of
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.data.compile.inputs import with_labels
from trainer.data.dataset.taught import taught_identity
from trainer.data.order.settings import train_order
from trainer.data.render.text_files import text_of
from trainer.errors import ConfigError, shown
from trainer.plan.mismatches import mismatches, reference_of
from trainer.plan.number_type import typed
from trainer.state.checkpoint.identity import Identity
from trainer.state.optimizer.optimizer import Optimizer, find_optimizer
from trainer.store.store import open_run_store
from trainer.tuning.method import Method, method_of
from trainer.tuning.objective.objective import Objective, find_objective
from trainer.tuning.objective.rollouts import rollout_identity
from trainer.tuning.objective.teacher import teacher_of
from trainer.tuning.shared.beginning import SETTING, Beginning, find_beginning, starting_at

if TYPE_CHECKING:
    from trainer.processes.ranks import Ranks


@dataclass(frozen=True)
class Resolved:
    """The settings of a run, and the things that they name."""

    config: Config
    base: Base
    method: Method
    objective: Objective
    optimizer: Optimizer
    beginning: Beginning | None = None  # the one that `tuning.start` names; `resolve` sets it

    @classmethod
    def of(cls, config: Config, base: Base) -> "Resolved":
        """Find the things that `config` names, over `base`. This does not check whether they fit together.

        Raises:
            ConfigError: a name is unknown, or a setting has a value that the named thing does not read.
        """
        method = method_of(config)
        return cls(config, base, method, find_objective(config, method), find_optimizer(config.optim))

    @property
    def reference(self) -> Literal["adapter_off", "stored"] | None:
        """`objective.reference`, with auto decided. None if the objective reads none."""
        return reference_of(self.config, self.objective, self.method)

    @property
    def longest(self) -> int | None:
        """The tokens of the longest text that the base has positions for, beside virtual tokens."""
        return self.method.virtual.longest(self.base.architecture.positions)

    def identity(self, dataset: str) -> Identity:
        """Return the facts that a checkpoint must share to be continued.

        `dataset` is the fingerprint of the compiled training data.

        Every key is named here, by the method or by the objective, and never taken from a dump of settings. So a
        setting that is added later stays out, or has a default for the checkpoints that were written before it. Reads
        samples of the base's weights. Raises as `content_of`.
        """
        model, quant, base = self.config.model, self.config.quant, self.base
        teacher = teacher_of(self.objective)
        taught = {} if teacher is None else taught_identity(open_run_store(self.config), dataset, teacher)
        return Identity(
            dataset=dataset,
            base={
                "path": base.name,
                "name": model.base,
                "revision": model.revision,
                "dtype": model.dtype,
                "fingerprint": base.fingerprint,
                "layers": model.layers,
                "quant.type": quant.type,
                "quant.block_size": quant.block_size,
                "quant.double": quant.double,
                **({"add_tokens": model.add_tokens} if model.add_tokens else {}),
                **({"special_tokens": dict(model.tokens.special)} if model.tokens.special else {}),
                **(self.beginning.facts if self.beginning else {}),
                **content_of(base),
            },
            adapter=self.method.identity,
            order=train_order(self.config).to_json(),
            objective={
                **self.objective.identity,
                **rollout_identity(self.config, self.objective),
                **taught,
            },
            optimizer=self.config.optim.name,
            text=text_of(self.config.data, base.directory).hashes,
            defaults={**self.objective.defaults, **self.method.defaults},
        )


def resolve(config: Config, base: Base | None = None, start: str | None = None) -> Resolved:
    """Find everything that the settings name, and refuse what does not fit together.

    `base` is found too, unless it is given. If `tuning.start` names a run, the result's settings name a checkpoint of
    it: that of `start`, if this is given.

    Raises:
        ConfigError: the base is missing or unsupported, a name is unknown, or settings do not suit the base or each
            other; the last with a sentence for each.
        StorageError: the bucket of the base does not answer or refuses.
    """
    base = base or resolve_base(config.model)
    config = with_labels(typed(config.decided(base.description.in_4_bits), base.description))
    found = Resolved.of(starting_at(config, start) if start else config, base)
    if wrong := mismatches(found.config, base.description, found.method, found.objective):
        raise ConfigError("\n".join(wrong))
    check_base_files(base, found.config)
    beginning = find_beginning(found.config, found.method)
    if beginning is None:
        return found
    if wrong := beginning.differences(found.config, found.method, base):
        raise ConfigError("\n".join(wrong))
    return replace(found, beginning=beginning, config=starting_at(found.config, beginning.place))


def resolve_alike(config: Config, ranks: "Ranks") -> Resolved:
    """Resolve the settings with one adapter to begin from on all ranks. Collective.

    A run that is learning may have a newer checkpoint by the time that another rank looks, so all ranks take the one
    that rank 0 has found.

    Raises as `resolve`, and `ConfigError` if a folder of PEFT has other weights on another machine.
    """
    if config.leaves_type_open:  # the machine of rank 0 decides for all
        config = config.computing_in(ranks.broadcast(typed(config).model.dtype if ranks.rank == 0 else None))
    with ranks.agreeing():
        resolved = resolve(config)
    if resolved.beginning is None:
        return resolved
    facts = ranks.broadcast(resolved.beginning.facts)
    with ranks.agreeing():
        if resolved.beginning.place != facts["start"]:
            resolved = resolve(config, resolved.base, facts["start"])
        if resolved.beginning is None or resolved.beginning.facts != facts:
            raise ConfigError(
                f"{SETTING}: {shown(config.tuning.start)} has other weights on one machine than on another. Copy one of"
                " them to every machine."
            )
    return resolved
