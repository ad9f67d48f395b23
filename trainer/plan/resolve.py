"""A run's settings, resolved once: the things that they name are found, and it is checked that these fit together.

Every program that works on a run begins here, on a login node as on a rank, and passes the `Resolved` on. Nothing that
trains looks a method or an objective up again. Plans and the order of data follow from the configuration alone, and
look up what they count with. No torch.

If settings, base, method and objective do not suit each other, there is a sentence for each mismatch. Where an
objective's reference comes from follows from all of them, so it is decided here too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trainer.base.architecture import Architecture
from trainer.base.base import Base, Description, StoredFormat
from trainer.base.find.check import check_base_files, check_sight, content_of
from trainer.base.find.locate import resolve_base, resolve_base_alike
from trainer.config import Config, ObjectiveSettings, Optim
from trainer.config.objective import HEADS
from trainer.config.registry import without_defaults
from trainer.config.row_kinds import ROW_KINDS, kind_of
from trainer.data.compile.inputs import with_labels
from trainer.data.order.settings import train_order
from trainer.data.render.text_files import run_text
from trainer.errors import ConfigError, shown
from trainer.model.kernels.attention import (
    kernels_without_masks,
    kernels_without_pictures,
    uncountable,
    uncountable_mixing,
)
from trainer.plan.beginning import SETTING, Beginning, find_beginning, starting_at
from trainer.plan.seeing import with_pictures_kept
from trainer.processes.bf16 import why_slow
from trainer.state.checkpoint.identity import Identity
from trainer.state.optimizer import Optimizer, find_optimizer
from trainer.store.store import open_run_store
from trainer.tuning.method import OPTIM_OF_SOME, Method, VirtualTokens, method_of
from trainer.tuning.objective import OF_ROUTERS, Objective, find_objective
from trainer.tuning.objective.rollouts import rollout_identity, rollout_mismatches
from trainer.tuning.objective.teacher import teacher_of

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
        from trainer.data.dataset.taught import taught_identity  # its numpy is nothing that a plan should import

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
                **_of_routers(self.config),
                **rollout_identity(self.config, self.objective),
                **taught,
            },
            optimizer=self.config.optim.name,
            text=run_text(self.config.data, base.directory).hashes,
            defaults={**_NO_ROUTER_LOSS, **self.objective.defaults, **self.method.defaults},
        )


_NO_ROUTER_LOSS = {name: ObjectiveSettings.model_fields[name].default for name in OF_ROUTERS}


def _of_routers(config: Config) -> dict[str, Any]:
    """Return the settings of the routers' balancing loss, without those that are defaults."""
    return without_defaults({name: getattr(config.objective, name) for name in OF_ROUTERS}, _NO_ROUTER_LOSS)


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
    if ROW_KINDS[found.config.data.kind].sees:
        check_sight(base, keeps=keeps_features(config, base.architecture))
        found = replace(found, base=replace(base, description=with_pictures_kept(found.config, base)))
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
    base = resolve_base_alike(config.model, ranks)
    # The machine of rank 0 decides for all. Its settings may say already what the others still leave open.
    config = config.computing_in(ranks.broadcast(typed(config, base.description).model.dtype))
    with ranks.agreeing():
        resolved = resolve(config, base)
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


_SHARED_ROWS = "sharding.sequence_parallel"
_ALONE = "Set it to 1."
_SHARED_PREFIX = "data.share_prefix"


def mismatches(config: Config, base: Description, method: Method, objective: Objective) -> list[str]:
    """Return a sentence for each setting that does not suit the base, the method or the objective.

    config.json describes the base.
    """
    own = [
        *tuning_mismatches(config, method, base.architecture),
        *_of_stored(config, method, base.stored),
        *objective_mismatches(config, objective, method),
        *_of_experts(config, base.architecture),
        *_of_shared_rows(config, base.architecture, method, objective),
        *_of_shared_prefix(config, base.architecture, method),
        *_of_pictures(config, base.architecture, method),
        *_of_prompts(config, base.architecture),
        *_of_segments(config, base.architecture, objective),
        *_of_long_rows(config, base.architecture, method, objective),
        *rollout_mismatches(config, objective, method),
    ]
    return [*base.mismatches(config), *own]


def base_trained_by(config: Config) -> str:
    """Return the setting that makes parameters of the base learn, for messages."""
    modules = config.tuning.modules_to_save
    return f"tuning.modules_to_save: {modules}" if modules else f"tuning.method: {config.tuning.method}"


def tuning_mismatches(config: Config, method: Method, architecture: Architecture) -> Iterator[str]:
    """Yield a sentence for each setting of the run or fact of the base that does not suit the run's `method`."""
    yield from method.mismatches(architecture)
    for name in OPTIM_OF_SOME:
        field = name.removeprefix("optim.")
        if name not in method.settings and getattr(config.optim, field) != Optim.model_fields[field].default:
            yield f"{name}: has no effect with tuning.method: {config.tuning.method}. Remove it."
    if method.trains_base and config.sharding.scope == "node":
        yield (
            f"sharding.scope: node keeps a copy of the base on every node, which {base_trained_by(config)} would train"
            " apart. Set sharding.scope: world."
        )
    if method.exports_model and config.checkpoint.adapters:
        yield (
            f"checkpoint.adapters: tuning.method: {config.tuning.method} trains the base itself, so there is no adapter"
            " to write beside a commit. Set it to false; capstan export writes the whole model."
        )
    if method.exports_model and config.quant.held.packs:
        yield (
            f"quant.type: {config.quant.type} keeps the base in fewer bits, and tuning.method: {config.tuning.method}"
            " trains its weights themselves. Set quant.type: none, over a base that is stored in 16 or 32 bits."
        )
    yield from _of_codes(config, method, architecture)
    yield from _of_virtual_tokens(config, method.virtual, architecture)


def _of_codes(config: Config, method: Method, architecture: Architecture) -> Iterator[str]:
    """Yield a sentence for each reason why the run cannot compute by the codes of an export as stored."""
    if not method.through:
        return
    if not any(config.quant.held.of(part.kept).moves for part in architecture.parameters if part.kept):
        yield (
            "tuning.through: stored needs layers that are held in the codes of the base's files, and with quant.type:"
            f" {config.quant.type} this base has none. Set quant.type: stored over a base in INT4, MXFP4, FP4, FP8 or"
            " INT8 (docs/bases.md), or remove tuning.through."
        )
    if config.tuning.dropout:
        yield (
            f"tuning.dropout: {config.tuning.dropout} drops inputs of an adapter that has a product of its own, and"
            " tuning.through: stored has none. Set it to 0."
        )


def _of_stored(config: Config, method: Method, stored: StoredFormat) -> Iterator[str]:
    """Yield a sentence if the files of the base cannot hold the new weights with which the run would export them."""
    if method.exports_model and stored.unmergeable:
        yield (
            f"tuning.method: {config.tuning.method} exports the base's own files with the trained weights in them, and"
            f" this base is {stored.unmergeable}. Give the 16-bit model, or choose another method, such as lora."
        )


def _of_virtual_tokens(config: Config, virtual: VirtualTokens, architecture: Architecture) -> Iterator[str]:
    """Yield a sentence for each setting of the run that leaves no room for the virtual tokens, or would hide them."""
    if not virtual.count:
        return
    method, length = f"tuning.method: {config.tuning.method}", config.data.sequence_length
    needed, window, kernel = length + virtual.count, architecture.sliding_window, config.model.attention
    if config.data.on_too_long == "split":
        yield (
            f"data.on_too_long: split makes documents that begin in the middle of a text, and {method} puts its virtual"
            " tokens before a text's beginning. Set it to truncate, drop or fail."
        )
    if architecture.positions and length <= architecture.positions < needed:
        yield (
            f"tuning.virtual_tokens: {virtual.count} before {length} tokens (data.sequence_length) exceed the base's "
            f"{architecture.positions} positions (config.json). Lower one of them."
        )
    if window and not virtual.in_row:
        yield (
            f"{method} gives each layer keys and values that every token sees, and layers of this base see {window}"
            " tokens back only (a sliding window). Choose another method, such as prompt or lora."
        )
    elif window and window < needed:
        yield (
            f"{method} needs every token to see its virtual tokens, and layers of this base see {window} tokens back"
            f" only (a sliding window), fewer than the {needed} of tuning.virtual_tokens and data.sequence_length."
            " Lower these, or choose another method."
        )
    if kernel in virtual.refused_kernels:
        yield (f"model.attention: {kernel} cannot run with {method}: {virtual.refused_kernels[kernel]}. Use auto.")


def objective_mismatches(config: Config, objective: Objective, method: Method) -> Iterator[str]:
    """Yield a sentence for each setting of the run that does not suit the run's `objective` and `method`."""
    name, reference = config.objective.name, reference_of(config, objective, method)
    yield from objective.mismatches()
    if config.data.format != "auto" and config.data.kind not in objective.formats:
        sees = ROW_KINDS[config.data.kind].sees
        blind = sees and not any(ROW_KINDS[kind].sees for kind in objective.formats)
        yield (
            f"data.format: {config.data.format} has no rows for objective.name: {name}"
            f"{', which takes text alone' if blind else ''}. Set it to "
            f"{' or '.join(objective.formats)}, or choose another objective."
        )
    if reference == "adapter_off" and method.trains_base:
        yield (
            f"objective.reference: adapter_off is not possible with {base_trained_by(config)}, which changes the base"
            " and cannot be switched off. Set it to stored."
        )
    elif reference == "adapter_off" and config.tuning.start:
        yield (
            "objective.reference: adapter_off would compare with the base without the adapter of tuning.start. Set it"
            " to stored."
        )


def _of_experts(config: Config, model: Architecture) -> Iterator[str]:
    """Yield a sentence for a setting of routers that this base lacks."""
    asked = config.objective
    if asked.router_loss and not any(part.kind == "experts" for part in model.parameters):
        yield f"objective.router_loss: {asked.router_loss:g} is for a mixture, and this base has no experts. Remove it."
    elif asked.router_loss and model.fails_balance:
        yield f"objective.router_loss: {model.fails_balance}. Remove it."
    if not asked.router_loss and asked.router_loss_of != _NO_ROUTER_LOSS["router_loss_of"]:
        yield (
            f"objective.router_loss_of: {asked.router_loss_of} has no effect without objective.router_loss. Set that,"
            " or remove it."
        )


def _of_shared_rows(config: Config, model: Architecture, method: Method, objective: Objective) -> Iterator[str]:
    """Yield a sentence for each setting that does not suit rows which ranks share.

    trainer/model/rows has the exchange itself.
    """
    size, data = config.sharding.sequence_parallel, config.data
    reserved = method.virtual.reserved * data.segments(objective.formats)
    tokens = config.train.micro_batch * (data.sequence_length + reserved)
    if size == 1:
        return
    if model.fails_shared:
        yield f"{_SHARED_ROWS}: {size} ranks cannot share a row of this base, as {model.fails_shared}. {_ALONE}"
    heads = {
        one.heads: "heads or channels of a layer of this base that passes states on"
        for mixing in model.mixing
        for one in mixing.exchanges
    }
    heads |= {layer.query_heads: "heads of this base's attention" for layer in model.attention if layer.query_heads}
    if uneven := sorted(count for count in heads if count % size):
        yield (
            f"{_SHARED_ROWS}: {size} ranks cannot share the {uneven[0]} {heads[uneven[0]]} evenly. Set a divisor of"
            f" {uneven[0]}."
        )
    if tokens % size:
        less = f", less the {reserved} of tuning.virtual_tokens" if reserved else ""
        yield (
            f"{_SHARED_ROWS}: {size} ranks cannot share a row of {tokens} tokens evenly. Set data.sequence_length to a"
            f" multiple of {size}{less}."
        )


def _of_shared_prefix(config: Config, model: Architecture, method: Method) -> Iterator[str]:
    """Yield a sentence for each setting that does not suit answers which share their prompt in a row."""
    kernel = config.model.attention
    if not config.data.share_prefix:
        return
    if model.fails_prefix:
        yield f"{_SHARED_PREFIX}: answers cannot share a prompt with this base, as {model.fails_prefix}. Remove it."
    if why := kernels_without_masks(config.data.share_prefix).get(kernel):
        yield f"model.attention: {kernel} cannot run with {_SHARED_PREFIX}: {why}. Use auto."
    if method.virtual.count:
        yield (
            f"{_SHARED_PREFIX}: tuning.method: {config.tuning.method} has virtual tokens before each answer, which"
            " differ from the prompt's. Remove it."
        )


def _of_pictures(config: Config, model: Architecture, method: Method) -> Iterator[str]:
    """Yield a sentence for each setting that does not suit rows with pictures."""
    if not ROW_KINDS[config.data.kind].sees:
        for name, given in config.eval.sets.items():
            if ROW_KINDS[kind_of(given.format or config.data.format)].sees:
                yield f"eval.sets.{name}: its rows have pictures, and those of data.train have none. Remove it."
        if config.tuning.towers is not None:
            yield "tuning.towers: the rows have no pictures from which it could learn. Remove it."
        return
    rows = f"data.format: {config.data.format}"
    if method.virtual.reserved:
        yield (
            f"tuning.method: {config.tuning.method} puts virtual tokens before each document, which rows with pictures"
            " cannot have. Use lora."
        )
    if config.tuning.towers is not None:
        yield from _of_towers(config, model)
    if why := kernels_without_pictures(True).get(config.model.attention):
        yield f"model.attention: {config.model.attention} cannot run with {rows}, as {why}. Use sdpa."


def _of_prompts(config: Config, model: Architecture) -> Iterator[str]:
    """Yield a sentence for each setting that does not suit a base that reads prompts in both directions."""
    if not model.reads_prompts:
        return
    reads = "this base reads everything before an answer in both directions"
    if not ROW_KINDS[config.data.kind].sees:
        yield (
            f"data.format: {config.data.format}: {reads}, and only rows with pictures say where an answer begins. Set"
            " data.format: pictures; rows without pictures may be among them."
        )
    for name, given in config.eval.sets.items():
        if not ROW_KINDS[kind_of(given.format or config.data.format)].sees:
            yield f"eval.sets.{name}: {reads}, and rows of text do not say where one begins. Set its format: pictures."
    for setting, given in (("eval.tasks", config.eval.tasks), ("eval.bias", config.eval.bias)):
        if given:
            yield f"{setting}: {reads}, and its texts do not say where an answer begins. Remove this setting."


def _of_towers(config: Config, model: Architecture) -> Iterator[str]:
    """Yield a sentence for each setting that does not suit a tower that learns."""
    if config.tuning.towers == "projector" and model.weights_beside and not model.projector:
        yield "tuning.towers: Capstan cannot tell which weights of this base are its projector. Use lora, or remove it."
    if config.tuning.towers == "lora" and model.weights_beside and not model.linears_beside:
        yield "tuning.towers: the tower of this base has no linear layer. Remove it."
    if keeps_features(config, model):
        yield (
            "tuning.towers: a tower that learns must be held by each rank, and this one is larger than"
            f" sharding.tower_limit: {config.sharding.tower_limit:g} GiB. Raise the limit, or remove tuning.towers."
        )
    if config.objective.name in HEADS:
        yield f"tuning.towers: it cannot go with the head of objective.name: {config.objective.name}. Remove it."


def _of_long_rows(config: Config, model: Architecture, method: Method, objective: Objective) -> Iterator[str]:
    """Yield a sentence if a row has more numbers than the kernels that mix its tokens can count."""
    if config.cluster.gpus_per_worker == 0:
        return
    reserved = method.virtual.reserved * config.data.segments(objective.formats)
    tokens = config.train.micro_batch * (config.data.sequence_length + reserved)
    kernel, ranks = config.model.attention, config.sharding.sequence_parallel
    for layer in model.attention:
        heads, size = -(-(layer.query_heads or 0) // ranks), layer.head_size or model.widest_head
        masked = model.has_sinks or bool(layer.window and layer.window < tokens)
        if uncountable(kernel, tokens, heads, size, masked=masked):
            yield (
                f"model.attention: {kernel} counts the numbers of a row in 32 bits, and a row of {tokens} tokens"
                f" (data.sequence_length) with {heads} heads of {size} has more. Set a shorter one, or"
                f" {_SHARED_ROWS} to more than {ranks}, which divides the heads."
            )
            return
    for mixing in model.mixing:
        inside = [part.shape[0] for part in model.parameters if part.kind == "linear" and part.layer == mixing.layer]
        values = -(-max(inside, default=0) // (ranks if mixing.exchanges else 1))
        if uncountable_mixing(tokens, values):
            yield (
                f"data.sequence_length: kernels of {mixing.path} count the numbers of a row in 32 bits, and a row of"
                f" {tokens} tokens with {values} values each has more. Set a shorter one."
            )
            return


def _of_segments(config: Config, model: Architecture, objective: Objective) -> Iterator[str]:
    """Yield a sentence if a document is several texts that the base cannot hide from each other."""
    if not model.isolates_documents and not config.data.packing and config.data.segments(objective.formats) > 1:
        yield (
            f"objective.name: {config.objective.name} has two texts in one row, such as a chosen and a rejected answer,"
            " which would see each other with this base. Give another base."
        )


def value_bytes(config: Config) -> int:
    """Return the bytes of a value of `model.dtype`."""
    return 2 if config.model.dtype == "bf16" else 4


def tower_bytes(config: Config, model: Architecture) -> int:
    """Return the bytes of the base's tower, 0 for rows without pictures."""
    return value_bytes(config) * model.weights_beside if ROW_KINDS[config.data.kind].sees else 0


def keeps_features(config: Config, model: Architecture) -> bool:
    """Return whether features of pictures are kept in the store, because the tower is over its limit."""
    return tower_bytes(config, model) > config.sharding.tower_limit * 2**30


def reference_of(config: Config, objective: Objective, method: Method) -> Literal["adapter_off", "stored"] | None:
    """Return `objective.reference`, with auto decided. None if the objective reads none."""
    if not objective.reads_reference:
        return None
    if config.objective.reference != "auto":
        return config.objective.reference
    return "stored" if method.trains_base or config.tuning.start else "adapter_off"


def typed(config: Config, base: Description | None = None, *, slow: bool | None = None) -> Config:
    """Return `config` with `model.dtype` decided, if nothing was said of it: fp32 where bf16 is slow.

    `slow` says whether it is on the machines of the run; by default this machine is asked. A `base` that is stored in
    bits that were made of one type keeps that type.
    """
    if not config.leaves_type_open:
        return config
    if base is not None and base.stored.quantized:
        return config.computing_in("bf16")
    if slow is None:
        slow = why_slow(config.cluster.gpus_per_worker) is not None
    return config.computing_in("fp32" if slow else "bf16")
