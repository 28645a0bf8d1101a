"""Training: its settings, the state, and one jitted step.

Shapes: B batch, T = context, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlm.attention import Implementation, rounds
from jaxlm.checkpoints import BrokenCheckpoint, Checkpoints, abstract, saved_steps
from jaxlm.evaluation import WINDOWS_AT_ONCE, mean_nats
from jaxlm.faults import Policy
from jaxlm.model import LARGEST_FLOAT, LARGEST_INT, ModelConfig, Params, abstract_params, forward, init, num_parameters
from jaxlm.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer, tree_norm
from jaxlm.parallel import batch_sharding, mean_gradients, memory_bytes
from jaxlm.runs import CONFIG_FILE, Acceptable, Run, console, read_config
from jaxlm.tokenizers.base import InputError, Tokenizer, check_text, check_types, load_tokenizer

Metrics = dict[str, jax.Array]
Step = Callable[..., tuple["TrainState", Metrics]]
_MOST_AT_ONCE = 1_000  # steps, whose batches are on the device together
_PROGRAMS_LOOKED_AT = 1_000  # to find the sizes of all


@dataclass(frozen=True)
class TrainConfig:
    """How long, on what, and how often to look. The defaults are the seed recipe, cut to 5,000 steps."""

    seed: int = 0  # of parameters, batches and dropout
    steps: int = 5_000
    batch_size: int = 64  # windows of `context` tokens
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 500  # steps between evaluations
    eval_documents: int = 20  # of the held-out documents, scored during training; all are scored at the end
    sample_every: int = 1_000  # steps between samples
    sample_prompt: str = ""  # what they begin with
    checkpoint_every: int = 500  # steps between checkpoints; an evaluation that is the best so far is saved too
    keep_checkpoints: int = 2  # latest ones, beside the best
    # What to do about a step that isn't finite, or jumps: stop the run, skip the step, or rewind to the last checkpoint
    # and then pass over the step.
    on_fault: Policy = "stop"
    spike_factor: float | None = None  # a loss over so many times the mean of the last 100, of 20 at least, is a jump
    # Of activations; on a CPU with an instruction for it, bfloat16 is the type of factors alone, which saves a third.
    compute_type: Literal["float32", "bfloat16"] = "float32"
    steps_at_once: int | None = None  # in one program, where nothing else is due; None: one on a CPU, ten elsewhere
    attention: Implementation | None = None  # see attention.py; None: the best that the device has

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "steps", "batch_size", "log_every", "eval_every", "eval_documents", "sample_every", "checkpoint_every",
            "keep_checkpoints",
        ):  # fmt: skip
            if not 1 <= getattr(self, name) <= LARGEST_INT:
                raise InputError(f"{name} is from 1 to {LARGEST_INT}, not {getattr(self, name)}.")
        check_text(self.sample_prompt)
        if self.steps_at_once is not None and not 1 <= self.steps_at_once <= _MOST_AT_ONCE:
            raise InputError(f"steps_at_once is from 1 to {_MOST_AT_ONCE}, not {self.steps_at_once}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"The seed is from 0 to 4294967295, not {self.seed}.")
        if self.spike_factor is not None and not 1 < self.spike_factor <= LARGEST_FLOAT:
            raise InputError(f"The spike factor is a float32 number above 1, not {self.spike_factor}.")
        learning_rate_schedule(self.optimizer, self.steps)

    @property
    def fault_policy(self) -> str:
        """What is a fault, and what is done about it."""
        return f"{self.on_fault}, spike factor {self.spike_factor}"

    def programs(self, step: int) -> Iterator[int]:
        """How many steps each program after `step` takes: `steps_at_once`, or one where something is due sooner.

        Programs of several begin at multiples of their size, so that after an interruption they are the same ones. A
        jump of the loss is told from the losses before it, so that steps go one by one where jumps are looked for.
        """
        most = self.steps_at_once or (1 if jax.default_backend() == "cpu" else 10)
        while step < self.steps:
            due = min(self.steps, *((step // period + 1) * period for period in self._periods))
            size = most if step % most == 0 and step + most <= due and self.spike_factor is None else 1
            yield size
            step += size

    def program_sizes(self, step: int) -> set[int]:
        """Those that `programs` gives, without going to the end, which may be far."""
        found = set(itertools.islice(self.programs(step), _PROGRAMS_LOOKED_AT))
        ends = step, self.steps, *(period for period in self._periods if period < self.steps)
        return found | {1} if any(end % max(found, default=1) for end in ends) else found

    @property
    def _periods(self) -> tuple[int, int, int]:
        return self.eval_every, self.sample_every, self.checkpoint_every

    def identity(self) -> dict[str, Any]:
        """The part that decides about the result but for rounding, and but for what is done about faults.

        A constant schedule has no length, so such a run can be prolonged.
        """
        optimizer = dict(vars(self.optimizer))
        if self.optimizer.schedule != "constant" or self.optimizer.warmup_steps is None:
            optimizer["schedule_steps"] = self.steps
        return {"seed": self.seed, "batch_size": self.batch_size, "optimizer": optimizer}


def check_memory(model: ModelConfig, config: TrainConfig) -> None:
    """Raises InputError for what can't be trained here, as the least that it takes is more than there is.

    That is the float32 parameters, gradients and averages of the optimizer on each device, and the tokens of a batch or
    the logits of an evaluation.
    """
    parameters, context = num_parameters(model), model.context
    copies = jax.device_count() * (4 if config.optimizer.name == "adamw" else 3)
    batch = max(config.batch_size * (context + 1), WINDOWS_AT_ONCE * context * model.vocab_size)
    needed, memory = 4 * (copies * parameters + batch), memory_bytes()
    if needed > memory:
        raise InputError(
            f"A model of {parameters:.4g} parameters, {model.vocab_size} ids and a context of {context} takes at least "
            f"{needed / 1e9:.4g} GB to train with a batch of {config.batch_size}, and there are {memory / 1e9:.4g} GB "
            "of memory; make some of them smaller."
        )


# ---- the state and the step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes. `step` is the number of completed steps, int32."""

    step: jax.Array
    params: Params
    optimizer_state: optax.OptState


def init_state(model: ModelConfig, config: TrainConfig) -> TrainState:
    """Parameters and optimizer state before the first update."""
    return _first_state(config, init(model, random_key(config.seed, "parameters")))


@functools.cache
def abstract_state(model: ModelConfig, config: TrainConfig) -> TrainState:
    """The shapes and types of a training's state, which isn't computed for it."""
    return jax.eval_shape(partial(_first_state, config), abstract_params(model))


def _first_state(config: TrainConfig, params: Params) -> TrainState:
    optimizer_state = make_optimizer(config.optimizer, config.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer_state)


def make_train_step(model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None) -> Step:
    """The pure function (state, int batch of shape (B, T + 1), limit) -> (state, metrics), the batch divided on a mesh.

    A step whose loss is above the limit (infinity by default), or whose loss, gradients or weights aren't finite,
    leaves all but its count and the schedule of the learning rate as it was.

    Metrics: `train/loss` in nats per target, `grad_norm` and `learning_rate` of the update, `weight_norm` after it, and
    whether the update was `skipped`.
    """
    step = _make_step(model, config, mesh)
    dropout_key = random_key(config.seed, "dropout")
    return lambda state, batch, limit=math.inf: step(state, batch, limit, dropout_key, 1.0)


def several_steps(step: Step) -> Step:
    """The function that takes a step for each entry of the first axis of batches (and limits), as one program.

    It returns the last state, and metrics with that axis. Starting a program takes as long as a small step.
    """

    def take(state: TrainState, *rest: jax.Array) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, given: step(state, *given), state, rest)

    return take


def make_joint_step(
    model: ModelConfig, configs: Sequence[TrainConfig], mesh: Mesh, *, vectorize: bool | None = None
) -> Step:
    """The step of several runs that differ in seed and learning rate alone, along a new first axis of all its arrays.

    The runs are divided among the devices of the mesh.

    Args:
      vectorize: whether a device takes its runs as one (`vmap`) or one after the other, which is as fast on the core of
        a CPU, and the default there.

    Raises:
      ValueError: configs that differ in more.
    """
    first = configs[0].optimizer
    factors = [config.optimizer.learning_rate / first.learning_rate for config in configs]
    for config, factor in zip(configs, factors, strict=True):
        muon_factor = config.optimizer.muon_learning_rate / first.muon_learning_rate
        optimizer = replace(
            config.optimizer, learning_rate=first.learning_rate, muon_learning_rate=first.muon_learning_rate
        )
        if replace(config, seed=configs[0].seed, optimizer=optimizer) != configs[0] or (
            first.name == "muon" and not math.isclose(factor, muon_factor, rel_tol=1e-6)
        ):
            raise ValueError("Runs that train together differ in seed, and by one factor in learning rates, alone.")
    vectorize = jax.default_backend() != "cpu" if vectorize is None else vectorize
    step = _make_step(model, configs[0])
    keys = jnp.stack([jax.random.key_data(random_key(config.seed, "dropout")) for config in configs])

    def one(run: tuple[TrainState, jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
        state, batch, limit, key, factor = run
        return step(state, batch, limit, jax.random.wrap_key_data(key), factor)

    def local(*runs: Any) -> tuple[TrainState, Metrics]:
        return jax.vmap(one)(runs) if vectorize else jax.lax.map(one, runs)

    among = batch_sharding(mesh).spec
    divided = jax.shard_map(local, mesh=mesh, in_specs=among, out_specs=among, check_vma=False)
    unlimited = jnp.full(len(configs), math.inf)
    return lambda states, batches, limits=unlimited: divided(
        states, batches, limits, keys, jnp.array(factors, jnp.float32)
    )


def _make_step(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as a function of the key of dropout and of a factor of all learning rates, too."""
    optimizer = make_optimizer(config.optimizer, config.steps, mesh, rounded=rounds(config.compute_type))
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    loss = partial(loss_function, model, compute_type=config.compute_type, attention=config.attention)

    def train_step(
        state: TrainState,
        batch: jax.Array,
        limit: jax.Array | float,
        dropout_key: jax.Array,
        factor: jax.Array | float,
    ) -> tuple[TrainState, Metrics]:
        keys_B = None
        if model.dropout:
            keys_B = jax.random.split(jax.random.fold_in(dropout_key, state.step), len(batch))
        train_loss, grads = mean_gradients(loss, state.params, batch, keys_B, mesh)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        # Updates are proportional to the learning rate, in optax's AdamW the decay of weights too.
        params = optax.apply_updates(state.params, jax.tree.map(lambda update: factor * update, updates))
        metrics = {
            "train/loss": train_loss,
            "grad_norm": tree_norm(grads),
            "weight_norm": tree_norm(params),
            "learning_rate": factor * jnp.asarray(schedule(state.step), jnp.float32),
        }
        good = train_loss <= limit
        for name in ("train/loss", "grad_norm", "weight_norm"):
            good &= jnp.isfinite(metrics[name])
        metrics["skipped"] = ~good
        updated, before = (params, optimizer_state), (state.params, state.optimizer_state)
        return TrainState(state.step + 1, *_updated_if(good, updated, before)), metrics

    return train_step


def _updated_if(good: jax.Array, updated: Any, before: Any) -> Any:
    """One pytree or the other; but the schedule of the learning rate goes on with the steps in any case."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(good, new, old)

    return jax.tree.map(choose, updated, before, is_leaf=is_schedule)


def loss_function(
    model: ModelConfig,
    params: Params,
    batch: jax.Array,
    dropout_key: jax.Array | None = None,
    *,
    compute_type: str = "float32",
    attention: Implementation | None = None,
) -> jax.Array:
    """Mean nats per target token, end-of-text included, of a batch of shape (B, T + 1).

    Parameters and their updates are float32. Activations have the compute type, but where it `rounds`.
    """
    rounded = rounds(compute_type)
    if not rounded:
        params = jax.tree.map(lambda leaf: leaf.astype(compute_type), params)
    logits_BTV = forward(
        params, batch[:, :-1], model, dropout_key=dropout_key, attention=attention, dtype=None, rounded=rounded
    )
    return mean_nats(logits_BTV, batch[:, 1:])


def random_key(seed: int, stream: Literal["parameters", "dropout", "samples"]) -> jax.Array:
    """A random key of its own for each use of a seed."""
    return jax.random.fold_in(jax.random.key(seed), ("parameters", "dropout", "samples").index(stream))


# ---- runs as a whole


def run_identity(
    fingerprint: str, tokenizer_settings: dict[str, Any], model: ModelConfig, config: TrainConfig
) -> dict[str, Any]:
    """What makes two runs the same: the text, the tokenizer, the model, and how it is trained."""
    return {"corpus": fingerprint, "tokenizer": tokenizer_settings, "model": asdict(model), **config.identity()}


def open_run(
    path: str | os.PathLike[str],
    fingerprint: str,
    tokenizer_settings: dict[str, Any],
    model: ModelConfig,
    config: TrainConfig,
    *,
    warm_start: str | None = None,
    accept: Collection[Acceptable] | None = None,
) -> Run:
    """The directory of a run with this identity and, if it is begun from another run's parameters, that one's path.

    A setting that didn't exist yet when the run was begun counts as what is its default now. For the rest, errors too,
    see `Run`.
    """
    identity = run_identity(fingerprint, tokenizer_settings, model, config)
    if warm_start is not None:
        identity["warm_start"] = os.path.normpath(warm_start)
    defaults = {
        part: {setting.name: setting.default for setting in fields(settings) if setting.default is not MISSING}
        for part, settings in (("model", ModelConfig), ("optimizer", OptimizerConfig))
    }
    return Run(path, identity, defaults=defaults, accept=accept)


def load_warm_start(
    path: str | os.PathLike[str], tokenizer_settings: dict[str, Any], model: ModelConfig
) -> tuple[Tokenizer, Params]:
    """The tokenizer and the newest parameters of a run, to begin another one with.

    Raises:
      InputError: no run or no checkpoint there, another tokenizer, or a model that differs in more than its window,
        its dropout and, with RoPE, its context.
    """
    tokenizer, found, params = load_trained(path)
    free = {"window", "dropout", *(["context"] if model.positions == "rope" else [])}
    there = {**read_config(path)["identity"].get("tokenizer", {}), **asdict(found)}
    asked = {**tokenizer_settings, **asdict(model)}
    differing = [
        f"{name} ({there.get(name)} there, {asked.get(name)} asked for)"
        for name in sorted({*there, *asked} - free)
        if there.get(name) != asked.get(name)
    ]
    if differing:
        raise InputError(
            f"{path} is no warm start for this run, since it differs in {', '.join(differing)}; ask for the same."
        )
    return tokenizer, params


def stored_settings(identity: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """The model and the training that a `run_identity` is of. Raises InputError for what is none."""
    try:
        optimizer = {**identity["optimizer"]}
        steps = optimizer.pop("schedule_steps", None)
        model, optimizer_config = ModelConfig(**identity["model"]), OptimizerConfig(**optimizer)
        if steps is None:  # of any length that is longer than the warm-up
            steps = 1 + (optimizer_config.warmup_steps or 0)
        training = TrainConfig(
            seed=identity["seed"], steps=steps, batch_size=identity["batch_size"], optimizer=optimizer_config
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("The settings of the run don't name a model and a training.") from None
    return model, training


def load_trained(path: str | os.PathLike[str]) -> tuple[Tokenizer, ModelConfig, Params]:
    """The tokenizer, the model's config and the newest parameters of a run directory, on the first device.

    Raises:
      InputError: no run there, one that hasn't saved a checkpoint yet, or one of another model.
    """
    identity = read_config(path)["identity"]
    tokenizer = load_tokenizer(Path(path) / "tokenizer")
    try:
        model, config = stored_settings(identity)
        shapes = abstract_state(model, config)
    except (TypeError, ValueError) as error:
        reason = f" ({str(error).rstrip('.')})" if isinstance(error, InputError) else ""
        raise InputError(f"{Path(path) / CONFIG_FILE} is damaged{reason}; restore it, or train again.") from None
    if not (Path(path) / "checkpoints").is_dir():
        raise InputError(f"The run in {path} has no checkpoint yet; train it further first.")
    place = SingleDeviceSharding(jax.devices()[0])
    tried: set[int] = set()
    while new := saved_steps(Path(path) / "checkpoints") - tried:  # a training may save and delete meanwhile
        tried |= new
        checkpoints = Checkpoints(Path(path) / "checkpoints", read_only=True)
        try:
            while (step := checkpoints.latest_step) is not None:
                with contextlib.suppress(BrokenCheckpoint):
                    _check_described(path, step, checkpoints.record(step), model, config)
                    return tokenizer, model, checkpoints.restore(abstract(shapes, place), step).params
        finally:
            for notice in checkpoints.take_notices():
                console.print(notice, style="yellow", markup=False)
            checkpoints.close()
    raise InputError(f"The run in {path} has no checkpoint that can be read; restore one, or train it again.")


def _check_described(
    path: str | os.PathLike[str], step: int, record: dict[str, Any], model: ModelConfig, config: TrainConfig
) -> None:
    """Raises InputError for the checkpoint of another model, which couldn't be read."""
    if "run" in record:
        there, training = stored_settings(record["run"]["identity"])
        if (there, training.optimizer) != (model, config.optimizer):
            raise InputError(
                f"The checkpoint of step {step} in {path} isn't of the model in config.json; restore either."
            )
