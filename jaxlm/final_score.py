"""The end of a run: all held-out documents are scored, once."""

from __future__ import annotations

import math

from jaxlm.data.shards import TokenizedCorpus
from jaxlm.evaluation import Evaluation, evaluate
from jaxlm.model import ModelConfig, count_parameters
from jaxlm.runs import NATS_FILE, Run, RunFailed, read_metrics
from jaxlm.tokenizers.base import Tokenizer, save_array
from jaxlm.training import TrainConfig, TrainState


def is_finished(run: Run, config: TrainConfig) -> bool:
    """Whether the last thing in the metrics is the final evaluation after `config.steps`."""
    last = read_metrics(run.path)[-1:]
    return bool(last) and last[0]["step"] == config.steps and "final/loss" in last[0]


def evaluate_run(
    run: Run, tokenizer: Tokenizer, data: TokenizedCorpus, model: ModelConfig, config: TrainConfig, state: TrainState
) -> None:
    """Scores all held-out documents and appends the figures to the metrics, as `final/...`, unless they are there.

    The nats of each document are kept beside them, for runs to be compared document by document.

    Raises:
      RunFailed: the score isn't finite.
      InputError: another process is training the run, or its metrics are damaged.
    """
    assert tokenizer.end_of_text_id is not None
    with run.locked():
        if is_finished(run, config):
            return
        evaluation = evaluate(state.params, model, data.held_out, tokenizer.end_of_text_id)
        if not math.isfinite(evaluation.bits_per_byte):
            raise RunFailed(f"The trained model of {run.path} scores {evaluation.bits_per_byte} bits per byte.")
        _log_final(run, tokenizer, data, model, config, state, evaluation)


def _log_final(
    run: Run,
    tokenizer: Tokenizer,
    data: TokenizedCorpus,
    model: ModelConfig,
    config: TrainConfig,
    state: TrainState,
    evaluation: Evaluation,
) -> None:
    save_array(run.path / NATS_FILE, evaluation.document_nats)
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
