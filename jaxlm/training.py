"""Training: its settings, the state, and one jitted step.

Shapes: B batch, T = context, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlm.attention import Implementation
from jaxlm.checkpoints import BrokenCheckpoint, Checkpoints, abstract
from jaxlm.evaluation import token_nats
from jaxlm.faults import Policy
from jaxlm.model import ModelConfig, Params, forward, init
from jaxlm.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxlm.parallel import batch_sharding, mean_gradients
from jaxlm.runs import read_config
from jaxlm.tokenizers.base import InputError, Tokenizer, check_types, load_tokenizer, shown

Metrics = dict[str, jax.Array]
Step = Callable[..., tuple["TrainState", Metrics]]


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
    on_fault: Policy = "stop"  # or skip, or rewind: what to do about a step that isn't finite, or jumps
    spike_factor: float | None = None  # a loss over so many times the mean of the last 100 is a jump
    compute_type: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters and their updates are float32
    attention: Implementation | None = None  # reference, blocks or cudnn; None takes the best that the device has

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "log_every", "eval_every", "eval_documents", "sample_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}.")
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}.")
        if self.steps >= 2**31:
            raise InputError(f"steps is below 2147483648, not {self.steps}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"The seed is from 0 to 4294967295, not {self.seed}.")
        if self.compute_type not in ("float32", "bfloat16"):
            raise InputError(f"The compute type is float32 or bfloat16, not {shown(self.compute_type)}.")
        if self.on_fault not in get_args(Policy):
            raise InputError(f"on_fault is one of {', '.join(get_args(Policy))}, not {shown(self.on_fault)}.")
        if self.spike_factor is not None and not (math.isfinite(self.spike_factor) and self.spike_factor > 1):
            raise InputError(f"The spike factor is a number above 1, not {self.spike_factor}.")
        learning_rate_schedule(self.optimizer, self.steps)

    def identity(self) -> dict[str, Any]:
        """The part that decides about the result. A constant schedule has no length, so such a run can be prolonged."""
        optimizer = dict(vars(self.optimizer))
        if self.optimizer.schedule != "constant" or self.optimizer.warmup_steps is None:
            optimizer["schedule_steps"] = self.steps
        return {"seed": self.seed, "batch_size": self.batch_size, "optimizer": optimizer}


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
    params = init(model, random_key(config.seed, "parameters"))
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
    optimizer = make_optimizer(config.optimizer, config.steps, mesh)
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
            "grad_norm": optax.tree.norm(grads),
            "weight_norm": optax.tree.norm(params),
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
    """Mean nats per target token, end-of-text included, of a batch of shape (B, T + 1)."""
    params = jax.tree.map(lambda leaf: leaf.astype(compute_type), params)
    logits_BTV = forward(params, batch[:, :-1], model, dropout_key=dropout_key, attention=attention)
    return token_nats(logits_BTV, batch[:, 1:]).mean()


def random_key(seed: int, stream: Literal["parameters", "dropout", "samples"]) -> jax.Array:
    """A random key of its own for each use of a seed."""
    return jax.random.fold_in(jax.random.key(seed), ("parameters", "dropout", "samples").index(stream))


# ---- runs as a whole


def run_identity(
    fingerprint: str, tokenizer_settings: dict[str, Any], model: ModelConfig, config: TrainConfig
) -> dict[str, Any]:
    """What makes two runs the same: the text, the tokenizer, the model, and how it is trained."""
    return {"corpus": fingerprint, "tokenizer": tokenizer_settings, "model": asdict(model), **config.identity()}


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
        raise InputError("It doesn't name a model and a training; restore it.") from None
    return model, training


def load_trained(path: str | os.PathLike[str]) -> tuple[Tokenizer, ModelConfig, Params]:
    """The tokenizer, the model's config and the newest parameters of a run directory, on the first device.

    Raises:
      InputError: no run there, or one that hasn't saved a checkpoint yet.
    """
    identity = read_config(path)["identity"]
    tokenizer = load_tokenizer(Path(path) / "tokenizer")
    try:
        model, config = stored_settings(identity)
    except InputError as error:
        raise InputError(f"The config of the run in {path} can't be used. {error}") from None
    if not (Path(path) / "checkpoints").is_dir():
        raise InputError(f"The run in {path} has no checkpoint yet; train it further first.")
    checkpoints = Checkpoints(Path(path) / "checkpoints", read_only=True)
    try:
        shapes = jax.eval_shape(partial(init_state, model, config))
        while checkpoints.latest_step is not None:
            with contextlib.suppress(BrokenCheckpoint):
                state, _ = checkpoints.restore(abstract(shapes, SingleDeviceSharding(jax.devices()[0])))
                return tokenizer, model, state.params
        raise InputError(f"The run in {path} has no checkpoint that can be read; train it further first.")
    finally:
        checkpoints.close()
