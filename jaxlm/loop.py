"""The loop around the training step: metrics, evaluations, samples, checkpoints, and what a signal does.

A single run has all devices for itself. Runs that differ in their seed or learning rate alone can be trained together,
as one program over a stack of states, and each still leaves a run directory of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.attention import check_implementation, default_implementation, rounds
from jaxlm.checkpoints import BrokenCheckpoint, Checkpoints, SaveFailed, abstract, saved_steps
from jaxlm.data.batches import make_batches
from jaxlm.data.shards import TokenizedCorpus
from jaxlm.evaluation import Evaluation, evaluate
from jaxlm.faults import Faults, Rewind
from jaxlm.final_score import is_finished
from jaxlm.model import ModelConfig, Params, abstract_params, flops_per_token
from jaxlm.parallel import (
    batch_sharding,
    check_compute_type,
    compiler_options,
    data_mesh,
    one_at_a_time,
    peak_flops,
    replicated,
    stacked,
)
from jaxlm.progress import Figures, Reporter, TerminalReporter
from jaxlm.runs import Run, RunFailed, RunInterrupted, console, environment
from jaxlm.sampling import sample_text
from jaxlm.tokenizers.base import InputError, Tokenizer
from jaxlm.training import (
    Metrics,
    Step,
    TrainConfig,
    TrainState,
    abstract_state,
    init_state,
    make_joint_step,
    make_train_step,
    random_key,
    several_steps,
)


def train(
    run: Run,
    tokenizer: Tokenizer,
    data: TokenizedCorpus,
    model: ModelConfig,
    config: TrainConfig,
    initial_params: Params | None = None,
) -> TrainState:
    """Trains one run to `config.steps`, from its newest checkpoint if it has one, and returns the last state.

    A new run begins with `initial_params`, or with random ones. Nothing is written before all that can be wrong with
    the input has been checked. Metrics are fetched one program late where the device still computes, so that it
    has its next one before the host looks at the last.

    Raises:
      InputError: too little text for one window, a batch that the devices don't divide, another tokenizer in the run,
        a run that has more steps already, or another process that trains it.
      RunFailed: a step was at fault, and the policy is to stop, or ten were in a row; the held-out loss isn't finite;
        or writing failed.
      RunInterrupted: SIGINT, SIGTERM or SIGHUP came; the steps under way were finished and saved.
    """
    (state,) = train_together([run], tokenizer, data, model, [config], TerminalReporter(), initial_params)
    if isinstance(state, RunFailed):
        raise state
    return state


def train_together(
    runs: Sequence[Run],
    tokenizer: Tokenizer,
    data: TokenizedCorpus,
    model: ModelConfig,
    configs: Sequence[TrainConfig],
    reporter: Reporter,
    initial_params: Params | None = None,
) -> list[TrainState | RunFailed]:
    """Trains runs that differ in seed or learning rate alone, as one program; for the rest see `train`.

    Each run has batches, dropout, metrics and checkpoints of its own, and ends as it would have alone but for rounding.
    The runs are divided among the devices, which have to divide their number; the seconds of training are divided among
    them too. A run that diverges leaves its RunFailed in its place, and the others go on. They can't be rewound.
    """
    config, count = configs[0], len(runs)
    if count > 1 and config.on_fault == "rewind":
        raise InputError("Runs that train together don't go back together; take --on-fault skip, or --together 1.")
    mesh = data_mesh(config.batch_size if count == 1 else count)
    check_compute_type(config.compute_type)
    head_width = model.width // model.num_heads
    check_implementation(config.attention, config.compute_type, model.dropout, model.context, head_width)
    everywhere = replicated(mesh)
    streams = [
        make_batches(data.train, context=model.context, batch_size=config.batch_size, seed=config.seed)
        for config in configs
    ]
    step = make_train_step(model, config, mesh) if count == 1 else make_joint_step(model, configs, mesh)
    loops: list[_Loop] = []
    with _all_written(runs), contextlib.ExitStack() as stack:
        stack.callback(reporter.end)
        for run in runs:
            stack.enter_context(run)
            run.start(tokenizer, environment([str(device) for device in jax.devices()]))
        clock = _Clock()
        for index, (run, each) in enumerate(zip(runs, configs, strict=True)):
            loops.append(_Loop(run, tokenizer, data, model, each, clock, (index, count), reporter, initial_params))
            stack.callback(loops[-1].checkpoints.close)
        first, states = _resume(loops, everywhere)
        if first > config.steps:
            raise InputError(
                f"{runs[0].path} has {first} steps already, and {config.steps} were asked for; ask for no fewer, or "
                "choose another --workdir."
            )
        if first == config.steps:
            if any(run.accepted(tokenizer) for run in runs):
                raise InputError(
                    f"{runs[0].path} has all its {first} steps already, and was scored on what it had; ask for more "
                    "steps, or choose another --workdir."
                )
            console.print(f"{runs[0].path} has all its {first:,} steps already.", markup=False)
            return list(states)
        for run in runs:
            run.adopt(tokenizer)

        programs = _Programs(step, model, config, count, mesh)
        for size in config.program_sizes(first):
            programs.program(size)
        facts = _Facts(model, config)
        reporter.begin(first, config.steps, facts.lines)

        def advance(states: list[TrainState], signals: _Signals) -> Any:
            """Takes all steps that are left, or those until a signal."""
            state = programs.placed(states)
            states.clear()
            clock.start()
            for loop in loops:
                loop.begin(facts.utilization)
            done = loops[0].step
            for size, batch in programs.batches(streams, done):
                numbers = range(done + 1, done + size + 1)
                done += size
                limits = programs.limits(*(tuple(loop.faults.limit(number) for loop in loops) for number in numbers))
                state, metrics = programs.program(size)(state, batch, limits)
                waited = one_at_a_time(mesh, metrics)
                stop = signals.received
                for index, loop in enumerate(loops):
                    get_state = partial(_part, state, index, count, everywhere)
                    loop.after_steps(size, get_state, metrics, waited=waited, stop=stop)
                if stop or all(loop.failure for loop in loops):
                    break
            return state

        with _Signals() as signals:
            state = None
            while state is None:
                try:
                    state = advance(states, signals)
                except Rewind:
                    _, states = _resume(loops, everywhere)
            # The last step is saved however it came to be the last.
            if signals.received and not all(loop.failure for loop in loops):
                raise RunInterrupted(f"Interrupted after step {max(loop.step for loop in loops)}, which is saved.")
        return [loop.failure or _part(state, index, count, everywhere) for index, loop in enumerate(loops)]


@contextlib.contextmanager
def _all_written(runs: Sequence[Run]) -> Iterator[None]:
    """Turns the error of a run directory that can't be written or read any more into one that says what is left.

    Raises:
      RunFailed: it is such an error.
    """
    try:
        yield
    except (SaveFailed, OSError) as error:
        if isinstance(error, OSError):
            place = None if error.filename is None else Path(str(error.filename)).absolute()
            if place is None or not any(place.is_relative_to(run.path.absolute()) for run in runs):
                raise
            problem = f"{error.filename} can't be written or read: {error.strerror}."
        else:
            problem = str(error)
        saved = max(set.intersection(*(saved_steps(run.path / "checkpoints") for run in runs)), default=None)
        left = "No checkpoint had been saved" if saved is None else f"The checkpoint of step {saved} is kept"
        raise RunFailed(f"{problem} {left}; mend that, and run the same command again.") from error


def _stacked(rows: Sequence[Any]) -> Any:
    """A single pytree as it is; several along a new first axis."""
    return rows[0] if len(rows) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _part(joint: Any, index: int, count: int, sharding: jax.sharding.Sharding) -> Any:
    """One run's state of a stack of `count`, laid out as `sharding` says."""
    return joint if count == 1 else jax.device_put(jax.tree.map(lambda leaf: leaf[index], joint), sharding)


def _resume(loops: Sequence[_Loop], sharding: jax.sharding.Sharding) -> tuple[int, list[TrainState]]:
    """The newest step that all runs have intact, 0 if there is none, and their states and logs as they were then.

    A kill can come between the saves of two runs, and a checkpoint can turn out to be broken.

    Raises:
      RunFailed: a run has none but broken checkpoints, or all have some, but none of the same step.
    """
    while True:
        for loop in loops:
            for notice in loop.checkpoints.take_notices():
                console.print(notice, style="yellow", markup=False)
            if loop.checkpoints.only_broken:
                raise RunFailed(
                    f"All checkpoints of {loop.run.path} are broken, and kept in its broken_checkpoints; restore one "
                    "from elsewhere, or start again in another --workdir."
                )
        first = max(set.intersection(*(set(loop.checkpoints.steps) for loop in loops)), default=None)
        saved = [loop for loop in loops if loop.checkpoints.steps]
        if first is None and saved and (len(saved) == len(loops) or any(x.checkpoints.any_broken for x in saved)):
            raise RunFailed(
                f"{loops[0].run.path} and the runs beside it have no step in common with intact checkpoints; go on "
                "with each alone, by --together 1."
            )
        if first is None:
            return 0, [loop.begin_anew(sharding) for loop in loops]
        if first > loops[0].config.steps:
            return first, []
        with contextlib.suppress(BrokenCheckpoint):
            return first, [loop.resume(first, sharding) for loop in loops]


class _Programs:
    """Steps as compiled programs, and the arrays that these take.

    Arrays are (steps of the program, runs, ...), but an axis of length 1 is left out.
    """

    def __init__(self, step: Step, model: ModelConfig, config: TrainConfig, count: int, mesh: Mesh) -> None:
        self._step, self._model, self._config, self._count, self._mesh = step, model, config, count, mesh
        self._divided = batch_sharding(mesh)
        self._of_runs = self._divided if count > 1 else replicated(mesh)
        self._compiled: dict[int, Callable[..., tuple[TrainState, Metrics]]] = {}
        self._limits: tuple[Any, Any] = None, None  # the last ones and their array, as most often they are infinite

    def placed(self, rows: Sequence[Any]) -> Any:
        """What each run has, on the devices."""
        return jax.device_put(_stacked(rows), self._of_runs)

    def batches(self, streams: Sequence[grain.MapDataset[np.ndarray]], step: int) -> Iterator[tuple[int, jax.Array]]:
        """For each program from `step` on, how many steps it takes, and their batches."""
        config = self._config
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * max(config.program_sizes(step)))
        rows = zip(*(stream[step : config.steps].to_iter_dataset(options) for stream in streams), strict=True)
        for size in config.programs(step):
            batch = [_stacked(row) for row in itertools.islice(rows, size)]
            yield size, jax.device_put(_stacked(batch), _of_steps(size, self._divided))

    def limits(self, *limits: tuple[float, ...]) -> jax.Array:
        """The limit of the loss for each step and run."""
        if limits != self._limits[0]:
            array = np.array(limits, np.float32).reshape(self._axes(len(limits)))
            self._limits = limits, jax.device_put(array, _of_steps(len(limits), self._of_runs))
        found: jax.Array = self._limits[1]
        return found

    def program(self, size: int) -> Callable[..., tuple[TrainState, Metrics]]:
        """`size` steps, compiled at the first call."""
        if size not in self._compiled:
            self._compiled[size] = self._compile(size)
        return self._compiled[size]

    def _compile(self, size: int) -> Callable[..., tuple[TrainState, Metrics]]:
        model, config, count = self._model, self._config, self._count
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*self._axes(1), *x.shape), x.dtype, sharding=self._of_runs),
            abstract_state(model, config),
        )
        shape = (*self._axes(size), config.batch_size, model.context + 1)
        batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=_of_steps(size, self._divided))
        function = self._step if size == 1 else several_steps(self._step)
        limits = self.limits(*[(math.inf,) * count] * size)
        tokens = count * config.batch_size * model.context // self._mesh.size
        lowered = jax.jit(function, donate_argnums=0).lower(state, batch, limits)
        return lowered.compile(compiler_options(tokens * model.width))

    def _axes(self, size: int) -> tuple[int, ...]:
        return tuple(length for length in (size, self._count) if length > 1)


def _of_steps(size: int, sharding: NamedSharding) -> NamedSharding:
    return sharding if size == 1 else stacked(sharding)


class _Facts:
    """What the runs of a program have in common: on what they run, and what a token costs."""

    def __init__(self, model: ModelConfig, config: TrainConfig) -> None:
        flops, peak = flops_per_token(abstract_params(model), model), peak_flops(rounds(config.compute_type))
        attention = config.attention or default_implementation(config.compute_type, model.width // model.num_heads)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self.utilization = math.nan if peak is None else flops / peak[0]  # times tokens per second makes MFU
        kind = "products of bfloat16" if rounds(config.compute_type) else config.compute_type
        self.lines = [f"attention: {attention}; {kind} on {devices}"]
        if peak is not None:
            self.lines.insert(0, f"{flops / 1e6:,.1f} MFLOP a token; peak {peak[0] / 1e9:,.0f} GFLOP/s ({peak[1]})")


class _Loop:
    """What happens to one run between steps: metrics, evaluations, samples, checkpoints.

    The clock stands still during evaluations and samples.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        data: TokenizedCorpus,
        model: ModelConfig,
        config: TrainConfig,
        clock: _Clock,
        place: tuple[int, int],
        reporter: Reporter,
        initial_params: Params | None,
    ) -> None:
        self.run, self.tokenizer, self.data, self.model, self.config = run, tokenizer, data, model, config
        self.checkpoints = Checkpoints(run.path / "checkpoints", keep=config.keep_checkpoints)
        self.clock, self.reporter, self.initial_params = clock, reporter, initial_params
        self.index, self.count = place
        self.tokens_per_step = config.batch_size * model.context
        self.step = 0
        self.seconds_before = 0.0
        # Of the last program: its last step, how many steps it took, and their metrics.
        self.pending: tuple[int, int, Metrics] | None = None
        self.held_out: float | None = None
        self.best = math.inf
        self.tokens_per_second = math.nan
        self.failure: RunFailed | None = None
        self.faults = Faults(config.on_fault, config.spike_factor)

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.clock.seconds / self.count

    def begin_anew(self, sharding: jax.sharding.Sharding) -> TrainState:
        """The state before the first step, and empty logs."""
        self.step, self.seconds_before, self.best = 0, 0.0, math.inf
        self.pending = self.held_out = None
        self.faults.restore({})
        self.checkpoints.forget_after(-1)
        self.run.rewind({}, 0)
        state = init_state(self.model, self.config)
        if self.initial_params is None:
            return jax.device_put(state, sharding)
        params = jax.tree.map(np.array, self.initial_params)  # the first step takes the arrays that it is given
        state = jax.device_put(replace(state, params=params), sharding)
        self._save(state, None)  # the run that they are from may change or go
        return state

    def resume(self, step: int, sharding: jax.sharding.Sharding) -> TrainState:
        """The state after `step` steps, and the logs as they were then.

        Raises:
          BrokenCheckpoint: it can't be read, and has been set aside.
          InputError: it is another run's.
        """
        self.step = step
        self.pending = self.held_out = None
        record = self.checkpoints.record(step)
        if "run" in record:  # else it is from before checkpoints described their runs
            self.run.check_description(record["run"], step)
        self.run.check_logs(record["log_sizes"])
        state = self.checkpoints.restore(abstract(abstract_state(self.model, self.config), sharding), step)
        if step == self.config.steps and is_finished(self.run, self.config):
            return state
        self.faults.restore(record.get("faults", {}))
        self.seconds_before = record["seconds"]
        self.best = record["best"] or math.inf
        self.checkpoints.forget_after(step)
        self.run.rewind(record["log_sizes"], step)
        console.print(f"Continuing {self.run.path} after step {step:,}.", markup=False)
        return state

    def begin(self, utilization: float) -> None:
        self.utilization = utilization
        self.last_log = (self.step, self.seconds)
        self.reported = self.seconds

    def after_steps(
        self, size: int, get_state: Callable[[], TrainState], metrics: Metrics, *, waited: bool, stop: bool
    ) -> None:
        """Reports the program before this one and, if this one was waited for or something is due, it too."""
        if self.failure is not None:
            return
        try:
            self._after_steps(size, get_state, metrics, waited=waited, stop=stop)
        except RunFailed as failure:
            self.failure = failure
            self.run.fail(str(failure), self.config.fault_policy)

    def _after_steps(
        self, size: int, get_state: Callable[[], TrainState], metrics: Metrics, *, waited: bool, stop: bool
    ) -> None:
        config = self.config
        self.step += size
        self._report()
        self.pending = (self.step, size, metrics)
        last = self.step == config.steps
        evaluation_due = self.step % config.eval_every == 0 or last
        sample_due = self.step % config.sample_every == 0 or last
        checkpoint_due = self.step % config.checkpoint_every == 0 or last or stop
        due = evaluation_due or sample_due or checkpoint_due
        if due or waited:
            self._report()
        if not due:
            return
        state = get_state()
        with self.clock.paused():
            evaluation = self._evaluate(state.params) if evaluation_due else None
            if sample_due:
                self._sample(state.params)
        best = evaluation is not None and evaluation.bits_per_byte < self.best
        if evaluation is not None and best:
            self.best = evaluation.bits_per_byte
        # Runs that train together save together, so that all can go on from a step that all have.
        if checkpoint_due or (best and self.count == 1):
            self._save(state, None if evaluation is None else evaluation.bits_per_byte)

    def _save(self, state: TrainState, bits_per_byte: float | None) -> None:
        record = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best if math.isfinite(self.best) else None,
            "log_sizes": self.run.log_sizes(),
            "faults": self.faults.record(),
            "run": self.run.description,
        }
        self.checkpoints.save(self.step, state, record, bits_per_byte=bits_per_byte)

    def _report(self) -> None:
        """Fetches the metrics of the last program, checks them, and writes those whose step is to be logged."""
        if self.pending is None:
            return
        last, size, metrics = self.pending
        self.pending = None
        columns = {name: np.asarray(value).reshape(size, self.count)[:, self.index] for name, value in metrics.items()}
        before, self.reported = self.reported, self.seconds
        for done in range(1, size + 1):
            values = {name: column[done - 1].item() for name, column in columns.items()}
            self._report_step(last - size + done, values, before + (self.reported - before) * done / size)
        bits_per_byte = values["train/loss"] / math.log(2) / self.data.train.bytes_per_token
        figures = Figures(last, values["train/loss"], bits_per_byte, self.held_out, self.tokens_per_second)
        self.reporter.progress(self.index, figures)

    def _report_step(self, step: int, values: dict[str, float], seconds: float) -> None:
        if values.pop("skipped"):
            self._fault(step, values, seconds)
            return
        self.faults.good(step, values["train/loss"])
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.tokens_per_second = (step - self.last_log[0]) * self.tokens_per_step / (seconds - self.last_log[1])
            self.last_log = (step, seconds)
            speed = {"tokens_per_second": self.tokens_per_second, "mfu": self.tokens_per_second * self.utilization}
            self._log(step, seconds, **values, **speed)

    def _fault(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Logs a step that left the model as it was, and stops or goes back if that is the policy."""
        self._log(step, seconds, **values, skipped=1, batch=step - 1)
        norms = f"gradient norm {values['grad_norm']:.4g}, weight norm {values['weight_norm']:.4g}"
        figures = f"batch {step - 1}, loss {values['train/loss']:.4g}, {norms}"
        if math.isfinite(limit := self.faults.limit(step)) and values["train/loss"] > limit:
            figures += f"; more than {limit:.4g} is a jump"
        try:
            if not self.faults.skip(step):
                stopped = self.config.on_fault == "stop"
                self._fail(step, figures if stopped else f"the tenth at fault in a row: {figures}", skippable=stopped)
        except Rewind:
            back = self.checkpoints.latest_step or 0
            console.print(f"Step {step} was at fault ({figures}): back to step {back}.", style="yellow")
            raise
        if self.config.on_fault == "skip":
            console.print(f"Step {step} was skipped ({figures}).", style="yellow")

    def _fail(self, step: int, figures: str, *, skippable: bool) -> NoReturn:
        saved = self.checkpoints.latest_step
        raise RunFailed(
            f"The run diverged at step {step} ({figures}); "
            + (f"the checkpoint of step {saved} is kept; " if saved is not None else "no checkpoint had been saved; ")
            + "start again in another --workdir with a lower learning rate"
            + ("" if self.config.optimizer.clip_norm else " or with --clip-norm 1")
            + (", or go on in this one with --on-fault skip." if skippable else ".")
        )

    def _log(self, step: int, seconds: float, **values: float) -> None:
        tokens = step * self.tokens_per_step
        num_bytes = round(tokens * self.data.train.bytes_per_token)
        self.run.log(step, tokens=tokens, bytes=num_bytes, seconds=round(seconds, 3), **values)

    def _evaluate(self, params: Params) -> Evaluation:
        end_of_text_id = self.tokenizer.end_of_text_id
        assert end_of_text_id is not None
        evaluation = evaluate(
            params, self.model, self.data.held_out, end_of_text_id, num_documents=self.config.eval_documents
        )
        if not math.isfinite(evaluation.bits_per_byte):
            self._fail(self.step, f"held-out loss {evaluation.loss}", skippable=False)
        self.held_out = evaluation.bits_per_byte
        self._log(
            self.step,
            self.seconds,
            **{
                "eval/loss": evaluation.loss,
                "eval/bits_per_byte": evaluation.bits_per_byte,
                "eval/bits_per_byte_se": evaluation.standard_error,
            },
        )
        self.reporter.evaluated(self.index, self.step, self.seconds, evaluation)
        return evaluation

    def _sample(self, params: Params) -> None:
        key = jax.random.fold_in(random_key(self.config.seed, "samples"), self.step)
        prompt = self.config.sample_prompt
        text = prompt + "".join(sample_text(params, self.model, self.tokenizer, prompt, key=key, num_tokens=200))
        self.run.log_sample(self.step, text)
        self.reporter.sampled(self.index, self.step, text)


class _Clock:
    """Seconds since `start`, with pauses."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def start(self) -> None:
        self._before, self._started = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._before, self._started = self.seconds, None
        try:
            yield
        finally:
            self._started = time.perf_counter()


class _Signals:
    """SIGINT, SIGTERM and SIGHUP are noted, for the loop to stop after its program; a second one stops at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
