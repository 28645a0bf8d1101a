"""Training: the state, one jitted step, and the loop around it.

Shapes: B batch, T = context, V vocabulary.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn, Self

import grain
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding
from rich.progress import Progress

from jaxlm.attention import Implementation, check_implementation, default_implementation
from jaxlm.checkpoints import Checkpoints, abstract
from jaxlm.data.batches import make_batches
from jaxlm.data.shards import TokenizedCorpus
from jaxlm.evaluation import Evaluation, evaluate, token_nats
from jaxlm.model import ModelConfig, Params, count_parameters, flops_per_token, forward, init
from jaxlm.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer
from jaxlm.parallel import (
    batch_sharding,
    check_compute_type,
    data_mesh,
    mean_gradients,
    one_at_a_time,
    peak_flops,
    replicated,
)
from jaxlm.runs import Run, console, environment, read_config, read_metrics, training_progress
from jaxlm.sampling import sample_text
from jaxlm.tokenizers.base import InputError, Tokenizer, load_tokenizer

Metrics = dict[str, jax.Array]


class RunFailed(RuntimeError):
    """The run can't go on. The message is one sentence: what happened, and what is left."""


class RunInterrupted(Exception):
    """A signal stopped the run after it was saved."""


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
    compute_type: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters and their updates are float32
    attention: Implementation | None = None  # reference, blocks or cudnn; None takes the best that the device has

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "eval_every", "eval_documents", "sample_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}.")
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"The seed is from 0 to 4294967295, not {self.seed}.")
        if self.compute_type not in ("float32", "bfloat16"):
            raise InputError(f"The compute type is float32 or bfloat16, not {self.compute_type!r}.")
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
    """All that a step changes. `step` is the number of completed updates, int32."""

    step: jax.Array
    params: Params
    optimizer_state: optax.OptState


def init_state(model: ModelConfig, config: TrainConfig) -> TrainState:
    """Parameters and optimizer state before the first update."""
    params = init(model, _key(config.seed, "parameters"))
    optimizer_state = make_optimizer(config.optimizer, config.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer_state)


def make_train_step(
    model: ModelConfig, config: TrainConfig, mesh: Mesh | None = None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """The pure function (state, int batch of shape (B, T + 1)) -> (state, metrics), the batch divided along a mesh.

    Metrics: `train/loss` in nats per target, `grad_norm` and `learning_rate` of the update; `weight_norm` after it.
    """
    optimizer = make_optimizer(config.optimizer, config.steps, mesh)
    schedule = learning_rate_schedule(config.optimizer, config.steps)
    dropout_key = _key(config.seed, "dropout")
    loss = partial(loss_function, model, compute_type=config.compute_type, attention=config.attention)

    def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
        keys_B = None
        if model.dropout:
            keys_B = jax.random.split(jax.random.fold_in(dropout_key, state.step), len(batch))
        train_loss, grads = mean_gradients(loss, state.params, batch, keys_B, mesh)
        updates, optimizer_state = optimizer.update(grads, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "train/loss": train_loss,
            "grad_norm": optax.tree.norm(grads),
            "weight_norm": optax.tree.norm(params),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return train_step


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


def _key(seed: int, stream: Literal["parameters", "dropout", "samples"]) -> jax.Array:
    """A random key of its own for each use of the seed."""
    return jax.random.fold_in(jax.random.key(seed), ("parameters", "dropout", "samples").index(stream))


# ---- the loop


def train(
    run: Run,
    tokenizer: Tokenizer,
    data: TokenizedCorpus,
    model: ModelConfig,
    config: TrainConfig,
) -> TrainState:
    """Trains to `config.steps`, from the newest checkpoint of the run if it has one, and returns the last state.

    Nothing is written before all that can be wrong with the input has been checked. Metrics are fetched one step late,
    so that the device has its next step before the host looks at the last one.

    Raises:
      InputError: too little text for one window, a batch that the devices don't divide, another tokenizer in the run,
        a run that has more steps already, or another process that trains it.
      RunFailed: the loss, the gradients, the weights or the held-out loss are no longer finite.
      RunInterrupted: SIGINT or SIGTERM came; the step was finished and saved.
    """
    mesh = data_mesh(config.batch_size)
    check_compute_type(config.compute_type)
    check_implementation(config.attention, config.compute_type, model.dropout)
    everywhere, divided = replicated(mesh), batch_sharding(mesh)
    batches = make_batches(data.train, context=model.context, batch_size=config.batch_size, seed=config.seed)
    run.start(tokenizer, environment([str(device) for device in jax.devices()]))
    checkpoints = Checkpoints(run.path / "checkpoints", keep=config.keep_checkpoints)
    train_step = jax.jit(make_train_step(model, config, mesh), donate_argnums=0)
    loop = _Loop(run, tokenizer, data, model, config, checkpoints)
    try:
        if checkpoints.latest_step is None:
            state = jax.device_put(init_state(model, config), everywhere)
            loop.resume({})
        else:
            shapes = jax.eval_shape(partial(init_state, model, config))
            if checkpoints.latest_step > config.steps:
                raise InputError(
                    f"{run.path} has {checkpoints.latest_step} steps already, and {config.steps} were asked for; "
                    "ask for no fewer, or choose another --workdir."
                )
            state, record = checkpoints.restore(abstract(shapes, everywhere))
            if is_finished(run, config):
                return state
            loop.resume(record)
        if loop.step == config.steps:
            return state
        compiled = train_step.lower(state, jax.device_put(batches[loop.step], divided)).compile()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        with _Signals() as signals, training_progress() as progress:
            loop.begin(progress, state.params)
            for batch in batches[loop.step : config.steps].to_iter_dataset(options):
                state, metrics = compiled(state, jax.device_put(batch, divided))
                one_at_a_time(mesh, metrics)
                stop = signals.received
                loop.after_step(state, metrics, stop=stop)
                if stop:
                    break
            # The last step is saved however it came to be the last.
            if signals.received:
                raise RunInterrupted(f"Interrupted after step {loop.step}, which is saved.")
        return state
    finally:
        checkpoints.close()
        run.close()


class _Loop:
    """What happens between steps: metrics, evaluation, samples, checkpoints, and the clock that leaves out two."""

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        data: TokenizedCorpus,
        model: ModelConfig,
        config: TrainConfig,
        checkpoints: Checkpoints,
    ) -> None:
        self.run, self.tokenizer, self.data, self.model, self.config = run, tokenizer, data, model, config
        self.checkpoints = checkpoints
        self.tokens_per_step = config.batch_size * model.context
        self.utilization = math.nan  # FLOPs per token over the peak, so that tokens per second make it MFU
        self.step = 0
        self.clock = _Clock(0.0)
        self.pending: tuple[int, Metrics] | None = None
        self.bits_per_byte: float | None = None
        self.best = math.inf
        self.tokens_per_second = math.nan

    def resume(self, record: dict[str, Any]) -> None:
        """Takes up the record of a checkpoint, or an empty one for a new run."""
        self.step = record.get("step", 0)
        self.clock = _Clock(record.get("seconds", 0.0))
        self.best = record.get("best") or math.inf
        self.run.rewind(record.get("log_sizes", {}), self.step)
        if self.step:
            console.print(f"Continuing {self.run.path} after step {self.step:,}.", markup=False)

    def begin(self, progress: Progress, params: Params) -> None:
        self.progress = progress
        peak, flops = peak_flops(), flops_per_token(params, self.model)
        if peak is not None:
            self.utilization = flops / peak[0]
            console.print(f"{flops / 1e6:,.1f} MFLOP a token; peak {peak[0] / 1e9:,.0f} GFLOP/s ({peak[1]})")
        attention = self.config.attention or default_implementation(self.config.compute_type, self.model.dropout)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        console.print(f"attention: {attention}; {self.config.compute_type} on {devices}")
        self.task = progress.add_task("training", total=self.config.steps, completed=self.step)
        self.last_log = (self.step, self.clock.seconds)
        self.clock.start()

    def after_step(self, state: TrainState, metrics: Metrics, *, stop: bool) -> None:
        """Reports the step before this one, and on the steps where something is due, this one too."""
        config = self.config
        self.step += 1
        self._report()
        self.pending = (self.step, metrics)
        last = self.step == config.steps
        evaluation_due = self.step % config.eval_every == 0 or last
        sample_due = self.step % config.sample_every == 0 or last
        checkpoint_due = self.step % config.checkpoint_every == 0 or last or stop
        if not (evaluation_due or sample_due or checkpoint_due):
            return
        self._report()
        self.clock.pause()
        evaluation = self._evaluate(state.params) if evaluation_due else None
        if sample_due:
            self._sample(state.params)
        self.clock.start()
        best = evaluation is not None and evaluation.bits_per_byte < self.best
        if evaluation is not None and best:
            self.best = evaluation.bits_per_byte
        if checkpoint_due or best:
            record = {
                "step": self.step,
                "seconds": self.clock.seconds,
                "best": self.best if math.isfinite(self.best) else None,
                "log_sizes": self.run.log_sizes(),
            }
            self.checkpoints.save(
                self.step, state, record, bits_per_byte=None if evaluation is None else evaluation.bits_per_byte
            )

    def _report(self) -> None:
        """Fetches the metrics of the last reported step, checks them, and writes them if their step is to be logged."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(values[name]) for name in ("train/loss", "grad_norm", "weight_norm")):
            self._fail(step, f"loss {values['train/loss']}, gradient norm {values['grad_norm']}")
        self.progress.update(self.task, completed=step, figures=self._figures(values["train/loss"]))
        if step % self.config.log_every == 0 or step == self.config.steps:
            steps, seconds = step - self.last_log[0], self.clock.seconds - self.last_log[1]
            self.tokens_per_second = steps * self.tokens_per_step / seconds
            self.last_log = (step, self.clock.seconds)
            speed = {"tokens_per_second": self.tokens_per_second, "mfu": self.tokens_per_second * self.utilization}
            self._log(step, **values, **speed)

    def _fail(self, step: int, figures: str) -> NoReturn:
        saved = self.checkpoints.latest_step
        raise RunFailed(
            f"The run diverged at step {step} ({figures}); "
            + (f"the checkpoint of step {saved} is kept; " if saved else "no checkpoint had been saved; ")
            + "start again in another --workdir with a lower learning rate, or with --clip-norm 1."
        )

    def _figures(self, loss: float) -> str:
        bits = loss / math.log(2) / self.data.train.bytes_per_token
        figures = f"loss {loss:.3f}  {bits:.3f} bits/byte"
        if self.bits_per_byte is not None:
            figures += f" (held out {self.bits_per_byte:.3f})"
        return figures if math.isnan(self.tokens_per_second) else f"{figures}  {self.tokens_per_second:,.0f} tokens/s"

    def _log(self, step: int, **values: float) -> None:
        tokens = step * self.tokens_per_step
        num_bytes = round(tokens * self.data.train.bytes_per_token)
        self.run.log(step, tokens=tokens, bytes=num_bytes, seconds=round(self.clock.seconds, 3), **values)

    def _evaluate(self, params: Params) -> Evaluation:
        end_of_text_id = self.tokenizer.end_of_text_id
        assert end_of_text_id is not None
        evaluation = evaluate(
            params, self.model, self.data.held_out, end_of_text_id, num_documents=self.config.eval_documents
        )
        if not math.isfinite(evaluation.bits_per_byte):
            self._fail(self.step, f"held-out loss {evaluation.loss}")
        self.bits_per_byte = evaluation.bits_per_byte
        self._log(
            self.step,
            **{
                "eval/loss": evaluation.loss,
                "eval/bits_per_byte": evaluation.bits_per_byte,
                "eval/bits_per_byte_se": evaluation.standard_error,
            },
        )
        console.print(
            f"step {self.step:>7,}  {self.clock.seconds:>7,.0f} s  held-out loss {evaluation.loss:.4f}  "
            f"[bold]{evaluation.bits_per_byte:.4f}[/] ± {evaluation.standard_error:.4f} bits per byte"
        )
        return evaluation

    def _sample(self, params: Params) -> None:
        key = jax.random.fold_in(_key(self.config.seed, "samples"), self.step)
        prompt = self.config.sample_prompt
        text = prompt + "".join(sample_text(params, self.model, self.tokenizer, prompt, key=key, num_tokens=200))
        self.run.log_sample(self.step, text)
        console.print(f"[bold]{'sample':>12}[/]  ", end="")
        console.print(text.replace("\n", "\n" + " " * 14), style="cyan", markup=False)


class _Clock:
    """Seconds of training, with pauses."""

    def __init__(self, seconds: float) -> None:
        self._before = seconds
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        self._started = time.perf_counter()

    def pause(self) -> None:
        self._before, self._started = self.seconds, None


class _Signals:
    """SIGINT and SIGTERM are noted, for the loop to stop after its step; a second one stops at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


# ---- runs as a whole


def run_identity(
    fingerprint: str, tokenizer_settings: dict[str, Any], model: ModelConfig, config: TrainConfig
) -> dict[str, Any]:
    """What makes two runs the same: the text, the tokenizer, the model, and how it is trained."""
    return {"corpus": fingerprint, "tokenizer": tokenizer_settings, "model": asdict(model), **config.identity()}


def is_finished(run: Run, config: TrainConfig) -> bool:
    """Whether the last thing in the metrics is the final evaluation after `config.steps`."""
    last = read_metrics(run.path)[-1:]
    return bool(last) and last[0]["step"] == config.steps and "final/loss" in last[0]


def evaluate_run(
    run: Run, tokenizer: Tokenizer, data: TokenizedCorpus, model: ModelConfig, config: TrainConfig, state: TrainState
) -> None:
    """Scores all held-out documents and appends the figures to the metrics, as `final/...`, unless they are there."""
    if is_finished(run, config):
        return
    assert tokenizer.end_of_text_id is not None
    evaluation = evaluate(state.params, model, data.held_out, tokenizer.end_of_text_id)
    tokens = config.steps * config.batch_size * model.context
    values = {
        "tokens": tokens,
        "bytes": round(tokens * data.train.bytes_per_token),
        "seconds": read_metrics(run.path)[-1]["seconds"],
        "parameters": count_parameters(state.params),
        "vocab_size": tokenizer.vocab_size,
        "final/loss": evaluation.loss,
        "final/bits_per_byte": evaluation.bits_per_byte,
        "final/bits_per_byte_se": evaluation.standard_error,
        "final/documents": evaluation.documents,
        "final/bytes_per_token": evaluation.bytes / evaluation.tokens,
    }
    run.log(config.steps, **values)


def load_trained(path: str | os.PathLike[str]) -> tuple[Tokenizer, ModelConfig, Params]:
    """The tokenizer, the model's config and the newest parameters of a run directory, on the first device.

    Raises:
      InputError: no run there, or one that hasn't saved a checkpoint yet.
    """
    identity = read_config(path)["identity"]
    tokenizer = load_tokenizer(Path(path) / "tokenizer")
    model = ModelConfig(**identity["model"])
    optimizer = dict(identity["optimizer"])
    steps = optimizer.pop("schedule_steps", 1 + (optimizer["warmup_steps"] or 0))
    config = TrainConfig(seed=identity["seed"], steps=steps, optimizer=OptimizerConfig(**optimizer))
    if not (Path(path) / "checkpoints").is_dir():
        raise InputError(f"The run in {path} has no checkpoint yet; train it further first.")
    checkpoints = Checkpoints(Path(path) / "checkpoints", read_only=True)
    try:
        if checkpoints.latest_step is None:
            raise InputError(f"The run in {path} has no checkpoint yet; train it further first.")
        shapes = jax.eval_shape(partial(init_state, model, config))
        state, _ = checkpoints.restore(abstract(shapes, SingleDeviceSharding(jax.devices()[0])))
    finally:
        checkpoints.close()
    return tokenizer, model, state.params
