"""The kernels for GPUs against formulas in float64. As plain JAX, which is what they are where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxlm import evaluation, model, rows_triton
from jaxlm.attention import check_implementation, default_implementation
from jaxlm.model import ModelConfig, init
from jaxlm.parallel import check_compute_type, has_triton
from jaxlm.rows_triton import nats_and_gradient, normalize, normalize_backward, sums_by_token
from jaxlm.tokenizers.base import InputError
from jaxlm.training import loss_function

pytestmark = pytest.mark.usefixtures("interpreted")

Array = npt.NDArray[np.float64]


def close(found: Any, expected: Any, dtype: str, *, most: float | None = None) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    rounding = 4 * float(jnp.finfo(dtype).eps) * (np.abs(expected).max() if most is None else most)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [(1, 1, "float32"), (37, 64, "bfloat16"), (70, 100, "float32"), (3, 700, "bfloat16")]
)
def test_norms(rows: int, width: int, dtype: str, shift: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_triton, "_BLOCK", 256)  # several turns for a program, and rows wider than a block
    monkeypatch.setattr(rows_triton, "_PROGRAMS", 3)
    random = np.random.default_rng(rows)
    x, d_x, d_y = (jnp.asarray(random.normal(mean, 2.0, (rows, width)), dtype) for mean in (3.0, 0.0, 0.0))
    scale, bias = (jnp.asarray(random.normal(1.0, 0.5, width), dtype) for _ in range(2))
    epsilon = 0.02
    y, mean, inverse = normalize(x, scale, bias if shift else None, epsilon)
    d, d_scale, d_bias = normalize_backward(x, mean, inverse, scale, d_x, d_y)

    x, d_x, d_y, scale, bias = (np.asarray(each, np.float64) for each in (x, d_x, d_y, scale, bias))
    centred = x - x.mean(axis=1, keepdims=True) if shift else x
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon)
    z, g = centred / deviation, d_y * scale
    close(y, z * scale + (bias if shift else 0.0), dtype)
    close(inverse, 1 / deviation[:, 0], "float32")
    exact = (
        g - (g.mean(axis=1, keepdims=True) if shift else 0.0) - z * (g * z).mean(axis=1, keepdims=True)
    ) / deviation
    close(d, d_x + exact, dtype, most=np.abs(d_x).max() + np.abs(g / deviation).max())
    close(d_scale, (d_y * z).sum(axis=0), dtype, most=np.abs(d_y * z).sum(axis=0).max())
    assert (mean is None) == (d_bias is None) == (not shift)
    if shift:
        close(mean, x.mean(axis=1), "float32")
        close(d_bias, d_y.sum(axis=0), dtype, most=np.abs(d_y).sum(axis=0).max())


def nats_by_hand(logits: Array, targets: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    highest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - highest)
    rows = np.arange(len(logits))
    nats = np.log(weights.sum(axis=1)) + highest[:, 0] - logits[rows, targets]
    gradient = weights / weights.sum(axis=1, keepdims=True)
    gradient[rows, targets] -= 1.0
    return nats, gradient / len(logits)


@pytest.mark.parametrize(
    ("width", "dtype"), [(1, "float32"), (8, "bfloat16"), (31, "float32"), (33, "bfloat16"), (64, "float32")]
)
def test_the_loss(width: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_triton, "_LOGITS", 32)
    random = np.random.default_rng(width)
    targets = random.integers(width, size=7)
    logits = jnp.asarray(random.normal(0.0, 4.0, (7, width)), dtype)
    nats, gradient = nats_and_gradient(logits, jnp.asarray(targets, jnp.int32))
    expected_nats, expected_gradient = nats_by_hand(np.asarray(logits, np.float64), targets)
    close(nats, expected_nats, "float32", most=20.0)
    close(gradient, expected_gradient, dtype, most=1.0 if dtype == "float32" else 1.0 / 7)  # exponents are rounded


def test_the_loss_of_an_unknown_target_is_not_a_number() -> None:
    nats, _ = nats_and_gradient(jnp.zeros((3, 5)), jnp.array([4, 5, -1]))
    np.testing.assert_allclose(nats, [np.log(5), np.nan, np.nan], rtol=1e-6)


def test_the_mean_loss_takes_the_gradient_of_what_it_is_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_MANY_IDS", 8)
    random = np.random.default_rng(2)
    logits = jnp.asarray(random.normal(size=(2, 3, 11)), jnp.float32)
    targets = jnp.asarray(random.integers(11, size=(2, 3)), jnp.int32)
    found = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found[backend] = jax.value_and_grad(lambda logits: evaluation.mean_nats(logits, targets) ** 2)(logits)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found["gpu"], found["cpu"])


def test_the_loss_of_large_logits_is_finite_and_of_none_is_none() -> None:
    logits = jnp.array([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0], [-jnp.inf, 0.0, -jnp.inf], [jnp.nan, 0.0, 0.0]])
    nats, gradient = nats_and_gradient(logits, jnp.array([1, 1, 1, 1]))
    np.testing.assert_array_equal(nats, [1e4, 0.0, 0.0, np.nan])
    np.testing.assert_array_equal(gradient[:3], [[0.25, -0.25, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("count", "width", "vocab_size", "dtype"),
    [(1, 1, 1, "float32"), (40, 5, 7, "bfloat16"), (50, 600, 20, "float32"), (33, 64, 1, "bfloat16")],
)
def test_sums_by_token(count: int, width: int, vocab_size: int, dtype: str) -> None:
    random = np.random.default_rng(count)
    tokens, rows = random.integers(vocab_size, size=count), jnp.asarray(random.normal(size=(count, width)), dtype)
    expected, sizes = np.zeros((vocab_size, width)), np.zeros((vocab_size, width))
    np.add.at(expected, tokens, np.asarray(rows, np.float64))
    np.add.at(sizes, tokens, np.abs(np.asarray(rows, np.float64)))
    close(sums_by_token(jnp.asarray(tokens, jnp.int32), rows, vocab_size), expected, dtype, most=sizes.max())


@pytest.mark.parametrize("shift", [True, False])
def test_several_runs_go_through_them_at_once(shift: bool) -> None:
    random = np.random.default_rng(0)
    x, d_x, d_y = (jnp.asarray(random.normal(size=(3, 10, 12)), jnp.float32) for _ in range(3))
    scale, bias = jnp.asarray(random.normal(size=(2, 3, 12)), jnp.float32)
    tokens = jnp.asarray(random.integers(5, size=(3, 10)), jnp.int32)

    def all_of_them(x: Any, d_x: Any, d_y: Any, scale: Any, bias: Any, tokens: Any) -> Any:
        y, mean, inverse = normalize(x, scale, bias if shift else None, 1e-5)
        backward = normalize_backward(x, mean, inverse, scale, d_x, d_y)
        return y, backward, nats_and_gradient(x, tokens), sums_by_token(tokens, x, 5)

    given = x, d_x, d_y, scale, bias, tokens
    together = jax.vmap(all_of_them)(*given)
    alone = jax.tree.map(lambda *each: jnp.stack(each), *(all_of_them(*(each[i] for each in given)) for i in range(3)))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), together, alone)


KERNELS = ("norm_forward", "norm_backward", "nats_and_gradient", "sums_by_token", "keys_backward", "queries_backward")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_the_gradients_of_a_cpu(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is different on a GPU: attention, norms, the loss, look-ups, and products in parts."""
    config = ModelConfig(30, context=16, width=24, num_layers=1, num_heads=3, num_kv_heads=1, feed_forward_width=48)
    config = replace(config, tied_head=tied, norm="layer" if tied else "rms")
    params = init(config, jax.random.key(0))
    batch, key = jax.random.randint(jax.random.key(1), (4, 17), 0, 30), jax.random.key(2)
    for module, name in ((evaluation, "_MANY_IDS"), (model, "_FEW_IDS"), (model, "_ROWS_OF_PART"), (model, "_TILE")):
        monkeypatch.setattr(module, name, 8)
    found = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        step = jax.value_and_grad(partial(loss_function, config))
        program = str(jax.make_jaxpr(step)(params, batch, key))
        for kernel in KERNELS:
            assert (kernel in program) == (backend == "gpu"), kernel
        found[backend] = jax.jit(step)(params, batch, key)
    jax.tree.map(partial(np.testing.assert_allclose, atol=3e-6), found["gpu"], found["cpu"])


@pytest.mark.parametrize(("rows", "parts", "dtype"), [(96, 8, "bfloat16"), (7, 1, "float32"), (20, 4, "float32")])
def test_the_gradient_of_a_kernel_in_parts(rows: int, parts: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_ROWS_OF_PART", 5)
    monkeypatch.setattr(model, "_MULTIPROCESSORS", 8)
    random = np.random.default_rng(rows)
    x, kernel, d = (jnp.asarray(random.normal(size=shape), dtype) for shape in ((rows, 6), (6, 9), (rows, 9)))
    y, pull_back = jax.vjp(model._split_product, x, kernel)
    text = str(jax.make_jaxpr(lambda d: pull_back(d))(d))
    assert (f"[{parts},6,9]" in text) == (parts > 1)
    d_x, d_kernel = pull_back(d)
    x, kernel, d = (np.asarray(each, np.float64) for each in (x, kernel, d))
    close(y, x @ kernel, dtype)
    close(d_x, d @ kernel.T, dtype)
    close(d_kernel, x.T @ d, dtype)


@pytest.mark.parametrize(
    ("backend", "capability", "expected"),
    [("gpu", "9.0", True), ("gpu", "8.0", True), ("gpu", "7.5", False), ("gpu", "gfx942", True), ("cpu", None, False)],
)
def test_old_gpus_do_without_them(
    backend: str, capability: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(device_kind="Tesla", **({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert has_triton() == expected
    assert (default_implementation("float32", 64) == "triton") == expected
    if backend == "gpu" and not expected:
        with pytest.raises(InputError, match="Tesla has no bfloat16; make the compute type float32"):
            check_compute_type("bfloat16")
        with pytest.raises(InputError, match="needs compute capability 8, and Tesla has less; leave it out"):
            check_implementation("triton", "float32", 0.0, 64, 64)
    else:
        check_compute_type("bfloat16")
