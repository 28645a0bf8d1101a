"""The fast attention is the formula: the same values, the same gradients, the same dropout, in memory that grows with
the context and not with its square."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxlm import attention_numba
from jaxlm.attention import (
    Implementation,
    attention_reference,
    causal_attention,
    check_implementation,
    default_implementation,
    rounds,
)
from jaxlm.attention_triton import attention_triton
from jaxlm.dropout import row_seeds
from jaxlm.lanes import HAS_PAIRS
from jaxlm.tokenizers.base import InputError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

attend = jax.jit(causal_attention, static_argnames=("scale", "window", "dropout_rate", "implementation"))


@dataclass(frozen=True)
class Case:
    """What attention is asked for."""

    time: int
    heads: int = 2
    kv_heads: int = 2
    width: int = 3
    batch: int = 2
    window: int | None = None
    documents: int = 1
    rate: float = 0.0
    scale: float | None = None

    def arrays(self) -> tuple[Float32, ...]:
        """q, k, v and a gradient to come from above."""
        random = np.random.default_rng(self.time)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        return tuple(random.normal(size=(self.batch, self.time, n, self.width)).astype(np.float32) for n in heads)

    def documents_BT(self) -> Int32 | None:
        """Documents of random lengths, some of a single position, numbered in no order; None for a single one."""
        if self.documents == 1:
            return None
        random = np.random.default_rng(self.documents)
        changes = [random.choice(np.arange(1, self.time), self.documents - 1, replace=False) for _ in range(self.batch)]
        numbers = random.permutation(self.documents).astype(np.int32)
        return np.stack([numbers[np.isin(np.arange(self.time), row).cumsum()] for row in changes])

    def keys_B(self) -> jax.Array | None:
        return jax.random.split(jax.random.key(self.time), self.batch) if self.rate else None

    def attention(self, implementation: Implementation, rounded: bool = False) -> partial[jax.Array]:
        """A function of q, k, v and what isn't differentiated: documents and keys."""

        def attention(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array, keys: jax.Array) -> jax.Array:
            return causal_attention(
                q, k, v, scale=self.scale, window=self.window, documents_BT=documents, dropout_rate=self.rate,
                dropout_keys_B=keys, implementation=implementation, rounded=rounded,
            )  # fmt: skip

        return attention


def attention_by_hand(case: Case, q: Float32, k: Float32, v: Float32) -> npt.NDArray[np.float64]:
    """One position, one head after another, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scale = 1 / math.sqrt(case.width) if case.scale is None else case.scale
    window = case.window or case.time
    documents_BT = np.zeros((case.batch, case.time)) if case.documents_BT() is None else case.documents_BT()
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h * case.kv_heads // case.heads  # heads that follow each other share their keys and values
        seen = [s for s in range(t + 1) if t - s < window and documents_BT[b, s] == documents_BT[b, t]]
        scores = [scale * math.fsum(q[b, t, h] * k[b, s, g]) for s in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        out[b, t, h] = sum(weight / math.fsum(weights) * v[b, s, g] for s, weight in zip(seen, weights, strict=True))
    return out


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
@pytest.mark.parametrize(
    "case",
    [
        Case(65),
        Case(1),
        Case(70, heads=6, kv_heads=2),
        Case(70, window=1),
        Case(70, window=9),
        Case(70, documents=7),
        Case(70, heads=4, kv_heads=1, window=9, documents=4, scale=0.3),
    ],
    ids=["plain", "one position", "groups", "window of one", "window", "documents", "all"],
)
def test_all_are_the_formula(case: Case, implementation: Implementation) -> None:
    attention = jax.jit(case.attention(implementation))
    qkv = case.arrays()[:3]
    found = attention(*qkv, case.documents_BT(), None)
    np.testing.assert_allclose(found, attention_by_hand(case, *qkv), atol=3e-6)


# Around the edges of the blocks of 64 queries, and of 16 or 32 in kernels: within one, exactly one, one more, several
# with a rest. Above 1,024, a segment of the program has several blocks: two at 1,100 and three at 2,300.
CASES = [
    *(Case(time) for time in (1, 2, 63, 64, 131)),
    Case(7, heads=4, kv_heads=4, width=1),
    Case(64, heads=6, kv_heads=3, window=64, rate=0.5),
    Case(65, heads=4, kv_heads=1, width=8, documents=5),
    Case(127, heads=1, kv_heads=1, window=64, documents=40),
    Case(128, heads=2, kv_heads=1, window=1, rate=0.1),
    Case(129, heads=4, kv_heads=2, window=65, documents=3, rate=0.3, scale=1.7),
    Case(200, window=300, rate=0.9),
    Case(131, heads=4, kv_heads=2, width=33, window=32, documents=3, rate=0.1),
    Case(97, heads=2, kv_heads=1, width=64),
    Case(33, heads=1, kv_heads=1, batch=1, width=300),
    Case(1100, heads=4, kv_heads=2, batch=1, window=100, documents=6, rate=0.2),
    Case(1100, heads=2, kv_heads=1, rate=0.5),
    Case(2300, heads=1, kv_heads=1, batch=1, window=700, documents=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_and_kernels_equal_the_reference_in_values_and_gradients(case: Case) -> None:
    *qkv, above = case.arrays()

    @jax.jit
    def all_of_them(
        q: jax.Array, k: jax.Array, v: jax.Array, above: jax.Array, *rest: jax.Array
    ) -> list[list[jax.Array]]:
        outputs = []
        for implementation in ("blocks", "numba", "reference"):
            attention = case.attention(implementation)
            values, pull_back = jax.vjp(lambda q, k, v, f=attention: f(q, k, v, *rest), q, k, v)
            outputs.append([values, *pull_back(above)])
        return outputs

    *fast, reference = all_of_them(*qkv, above, case.documents_BT(), case.keys_B())
    for found in fast:
        for name, got, expected in zip(("values", "dq", "dk", "dv"), found, reference, strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, atol=3e-6 * max(1.0, np.abs(expected).max()), err_msg=name)


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounded_kernels_are_near_the_reference_in_values_and_gradients(case: Case) -> None:
    *qkv, above = case.arrays()

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, above: jax.Array, *rest: jax.Array) -> list[list[jax.Array]]:
        outputs = []
        for attention in (case.attention("numba", rounded=True), case.attention("reference")):
            values, pull_back = jax.vjp(lambda q, k, v, f=attention: f(q, k, v, *rest), q, k, v)
            outputs.append([values, *pull_back(above)])
        return outputs

    found, reference = both(*qkv, above, case.documents_BT(), case.keys_B())
    for name, got, expected in zip(("values", "dq", "dk", "dv"), found, reference, strict=True):
        error, size = (float(jnp.sqrt(jnp.square(x).mean())) for x in (got - expected, expected))
        # A weight that is the only one of its query has no gradient but for rounding, so that of q and k may be zero.
        assert error < 0.01 * max(0.5, size), name
        assert error > 1e-4 * size, f"{name}: nothing is rounded"


@pytest.mark.skipif(not HAS_PAIRS, reason="this processor has no instruction for pairs of bfloat16")
def test_a_rounded_kernel_keeps_to_its_working_memory_for_wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def note(_: str, __: object, results: list[tuple[int, ...]], size: int, *___: jax.Array) -> list[jax.Array]:
        sizes.append(size)
        return [jnp.zeros(shape) for shape in results]

    monkeypatch.setattr(attention_numba, "_call", note)
    q, k, v, _ = Case(33, heads=1, kv_heads=1, batch=1, width=300).arrays()
    attention_numba._attend_forward((1.0, 33, 0.0, True), jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None, None)
    memory = np.full(sizes[0] + 10_000, 7.0, np.float32)  # more than is the kernel's
    scratch, nothing, one = memory[: sizes[0]], np.zeros(0, np.uint32), np.float32(1.0)
    of_queries = np.zeros(64, np.float32), np.zeros(64, np.float32)
    attention_numba._forward(
        q.ravel(), k.ravel(), v.ravel(), nothing, nothing, np.zeros(q.size, np.float32), *of_queries, scratch,
        1, 33, 1, 1, 300, one, 33, 0, one, None, scratch.view(np.uint32),
    )  # fmt: skip
    assert (memory[sizes[0] :] == 7.0).all()


TRITON_CASES = [
    Case(131, width=20),
    Case(64, heads=3, kv_heads=1, window=2**31 - 1, rate=0.5),
    Case(200, heads=4, kv_heads=2, batch=1, window=70, documents=3, rate=0.3, scale=1.7),
    Case(140, batch=1, heads=2, width=40, documents=2),  # 64 wide with its padding: other tiles
    Case(100, batch=1, heads=2, width=72, window=9),
    *(Case(130, batch=1, heads=2, width=16, window=window) for window in (33, 64)),
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_triton_kernels_equal_the_reference_in_values_and_gradients(case: Case) -> None:
    """As plain JAX, which is what they are where there is no GPU."""
    *qkv, above = case.arrays()
    seeds = row_seeds(case.keys_B(), case.heads) if case.rate else None
    scale = case.width**-0.5 if case.scale is None else case.scale

    @partial(jax.jit, static_argnums=0)
    def both(attention: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        rest = scale, case.window, case.documents_BT(), case.rate, seeds
        values, pull_back = jax.vjp(lambda q, k, v: attention(q, k, v, *rest), q, k, v)
        return [values, *pull_back(above)]

    triton, reference = both(attention_triton, *qkv), both(attention_reference, *qkv)
    for name, got, expected in zip(("values", "dq", "dk", "dv"), triton, reference, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=5e-6 * max(1.0, np.abs(expected).max()), err_msg=name)


@pytest.mark.usefixtures("interpreted")
def test_triton_kernels_keep_sixteen_bits() -> None:
    q, k, v, above = (jnp.asarray(x, jnp.bfloat16) for x in Case(100, heads=4, kv_heads=2, width=16).arrays())
    values, pull_back = jax.vjp(lambda q, k, v: attention_triton(q, k, v, 0.25), q, k, v)
    gradients = pull_back(above)
    assert {x.dtype for x in (values, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    expected, pull_back = jax.vjp(lambda *x: attention_reference(*x, 0.25), *(x.astype(jnp.float32) for x in (q, k, v)))
    for got, exact in zip((values, *gradients), (expected, *pull_back(above.astype(jnp.float32))), strict=True):
        assert np.linalg.norm(got.astype(jnp.float32) - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
def test_large_scores_neither_overflow_nor_lose_precision(implementation: Implementation) -> None:
    """Scores of whole numbers are exact, so a softmax that subtracts the highest is as good as with small ones."""
    case = Case(130, scale=1.0)
    q, k, v, above = case.arrays()
    q, k = np.round(300 * q), np.round(300 * k)
    values, pull_back = jax.vjp(partial(attend, scale=1.0, implementation=implementation), q, k, v)
    np.testing.assert_allclose(values, attention_by_hand(case, q, k, v), atol=1e-6)
    # Weights are zero or one but for some close calls: v's gradients are sums of whole rows.
    _, _, dv = pull_back(above)
    np.testing.assert_allclose(dv.sum(axis=1), above.sum(axis=1), atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in pull_back(above))


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
def test_no_position_sees_a_later_one(implementation: Implementation) -> None:
    q, k, v, above = Case(131).arrays()
    attention = partial(attend, implementation=implementation)
    before = attention(q, k, v)
    np.testing.assert_allclose(before[:, 0], v[:, 0], rtol=1e-6)
    pull_back = jax.jit(lambda q, k, v, above: jax.vjp(attention, q, k, v)[1](above))
    for cut in (1, 63, 64, 130):
        later_k, later_v = k.copy(), v.copy()
        later_k[:, cut:] += 7.0
        later_v[:, cut:] -= 3.0
        after = attention(q, later_k, later_v)
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert (after[:, cut:] != before[:, cut:]).all()
        early = np.where(np.arange(131)[:, None, None] < cut, above, 0.0)
        dq, dk, dv = pull_back(q, k, v, early)
        assert not any(gradient[:, cut:].any() for gradient in (dq, dk, dv))
        assert dv[:, :cut].all()


# ---- what it costs and where it runs


def temporary_bytes(implementation: Implementation, time: int) -> int:
    """What forward and backward take beside inputs and outputs, with documents and dropout. Compiled, never run."""
    case = Case(time, heads=1, kv_heads=1, width=8, batch=1, rate=0.1)
    numbers = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
    documents = jax.ShapeDtypeStruct((1, time), jnp.int32)

    @partial(jax.grad, argnums=(0, 1, 2))
    def slope(*arguments: jax.Array) -> jax.Array:
        return case.attention(implementation)(*arguments).sum()

    lowered = jax.jit(slope).lower(numbers, numbers, numbers, documents, jax.eval_shape(case.keys_B))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_context_and_that_of_the_reference_with_its_square() -> None:
    times = (16_384, 32_768)
    blocks, kernels, reference = (
        [temporary_bytes(name, time) for time in times] for name in ("blocks", "numba", "reference")
    )
    for short, long in (*pairwise(blocks), *pairwise(kernels)):
        assert 1.8 < long / short < 2.1
    for short, long in pairwise(reference):
        assert 3.8 < long / short < 4.2
    assert max(blocks[-1], kernels[-1]) < 128 * 2**20 < 8 * 2**30 < reference[-1]


@pytest.mark.parametrize(
    ("backend", "dtype", "width", "expected"),
    [
        ("cpu", "float32", 32, "numba"),
        ("cpu", "bfloat16", 256, "numba"),
        ("cpu", "float64", 32, "blocks"),
        ("tpu", "bfloat16", 32, "blocks"),
        ("gpu", "bfloat16", 32, "triton"),
        ("gpu", "float32", 128, "triton"),
        ("gpu", "bfloat16", 129, "blocks"),
    ],
)
def test_the_default_is_what_the_device_has_for_it(
    backend: str, dtype: str, width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_implementation(jnp.dtype(dtype), width) == expected


def test_what_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, on a CPU with the instruction and a device for each core, and with numba's compiler."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 1_000)
    for has_pairs in (False, True):
        monkeypatch.setattr("jaxlm.lanes.HAS_PAIRS", has_pairs)
        assert rounds("bfloat16") == has_pairs
        assert not rounds("float32")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(jax, "local_device_count", lambda: 0)
        assert not rounds("bfloat16")
    for backend in ("gpu", "tpu"):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(jax, "default_backend", lambda backend=backend: backend)
            assert not rounds("bfloat16")
    monkeypatch.setattr("jaxlm.machine_code.COMPILED", False)
    assert not rounds("bfloat16")


def test_without_a_word_it_is_the_default() -> None:
    q, k, v, _ = Case(70).arrays()
    kernels = attend(q, k, v, implementation="numba")
    np.testing.assert_array_equal(attend(q, k, v), kernels)
    for other in ("reference", "blocks"):
        assert not np.array_equal(attend(q, k, v, implementation=other), kernels)  # roundings tell them apart


def test_without_the_compiler_it_is_blocks_and_numba_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm.machine_code.COMPILED", False)
    assert default_implementation(jnp.dtype("float32"), 32) == "blocks"
    with pytest.raises(InputError, match="NUMBA_DISABLE_JIT turns it off; unset it"):
        causal_attention(*Case(7).arrays()[:3], implementation="numba")


def test_kernels_keep_sixteen_bits_and_may_be_mapped() -> None:
    q, k, v, above = (jnp.asarray(x, jnp.bfloat16) for x in Case(70, heads=4, kv_heads=2, width=16).arrays())
    values, pull_back = jax.vjp(partial(attend, implementation="numba"), q, k, v)
    gradients = pull_back(above)
    assert {x.dtype for x in (values, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    mapped, pull_back = jax.vjp(jax.vmap(partial(attend, implementation="numba")), q[:, None], k[:, None], v[:, None])
    for one, together in zip((values, *gradients), (mapped, *pull_back(above[:, None])), strict=True):
        np.testing.assert_array_equal(together[:, 0], one)


def test_kernels_refuse_shapes_that_do_not_belong_together() -> None:
    q, k, v = (jnp.zeros((2, 8, heads, 4)) for heads in (4, 2, 2))
    attention = partial(causal_attention, implementation="numba")
    for wrong in ((q, k[:, :4], v[:, :4]), (q, k, v[..., :2]), (q[:, :, :3], k, v), (q[:1], k, v), (q, k, v[:, :, :1])):
        with pytest.raises(ValueError, match="don't go together"):
            attention(*wrong)
    with pytest.raises(ValueError, match="Seeds of shape"):
        attention(q, k, v, dropout_rate=0.5, dropout_keys_B=jax.random.split(jax.random.key(0), 3))
    one_for_all = attention(q, k, v + 1, documents_BT=jnp.arange(8)[None] // 3)
    np.testing.assert_allclose(one_for_all, 1.0, rtol=1e-6)


def test_cudnn_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = Case(7).arrays()

    def refusal(**settings: object) -> str:
        with pytest.raises(InputError) as caught:
            causal_attention(q, k, v, implementation="cudnn", **settings)
        return str(caught.value)

    assert refusal() == "cudnn attention needs a GPU, and JAX runs on cpu here; leave it out."
    with pytest.raises(InputError, match="triton attention needs a GPU, and JAX runs on cpu here"):
        causal_attention(q, k, v, implementation="triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="numba attention needs a CPU, and JAX runs on gpu here"):
        causal_attention(q, k, v, implementation="numba")
    assert "computes in 16 bits, not in float32" in refusal()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    with pytest.raises(InputError, match="cudnn attention takes an even number of tokens, and heads whose width"):
        causal_attention(*half, implementation="cudnn")
    for time, width, given in ((15, 64, "15 and 64"), (16, 60, "16 and 60"), (16, 136, "16 and 136")):
        with pytest.raises(InputError, match=f"a multiple of 8 up to 128, not {given}; leave it out"):
            check_implementation("cudnn", "bfloat16", 0.0, time, width)
    check_implementation("cudnn", "bfloat16", 0.0, 16, 128)
    with pytest.raises(InputError, match="triton attention takes heads up to 128 wide, not 136; leave it out"):
        check_implementation("triton", "bfloat16", 0.0, 16, 136)
    assert "set the dropout to 0" in refusal(dropout_rate=0.1, dropout_keys_B=jax.random.split(jax.random.key(0), 2))
    with pytest.raises(InputError, match="one of reference, blocks, numba, cudnn, triton, not 'flash'"):
        causal_attention(q, k, v, implementation="flash")  # type: ignore[arg-type]


# ---- dropout


def weights_of(
    q_BTHK: Float32, k_BTGK: Float32, rate: float, keys_B: jax.Array | None, name: Implementation
) -> Float32:
    """The attention weights that `causal_attention` used, (B, T, H, S): values that are the identity show them."""
    batch, time, heads, _ = q_BTHK.shape
    assert q_BTHK.shape[3] == time, "the identity needs heads as wide as the sequence is long"
    identity = np.broadcast_to(np.eye(time, dtype=np.float32)[None, :, None, :], (batch, time, heads, time))
    return np.asarray(attend(q_BTHK, k_BTGK, identity, dropout_rate=rate, dropout_keys_B=keys_B, implementation=name))


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
def test_without_a_rate_or_without_keys_nothing_is_dropped(implementation: Implementation) -> None:
    q, k, v, _ = Case(65).arrays()
    attention = partial(attend, q, k, v, implementation=implementation)
    keys_B = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(attention(dropout_rate=0.5, dropout_keys_B=None), attention())
    np.testing.assert_array_equal(attention(dropout_rate=0.0, dropout_keys_B=keys_B), attention())
    assert not np.array_equal(attention(dropout_rate=0.5, dropout_keys_B=keys_B), attention())


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
def test_dropout_acts_on_the_attention_weights_each_by_itself(implementation: Implementation) -> None:
    time, rate = 100, 0.25
    q, k, *_ = Case(time, width=time).arrays()
    plain = weights_of(q, k, 0.0, None, implementation)
    dropped = weights_of(q, k, rate, jax.random.split(jax.random.key(9), 2), implementation)
    allowed = np.broadcast_to(np.tril(np.ones((time, time), bool))[None, :, None, :], plain.shape)
    np.testing.assert_allclose(plain.sum(axis=-1), 1.0, rtol=1e-5)
    assert not plain[~allowed].any()
    assert not dropped[~allowed].any()
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - rate), rtol=1e-4)
    assert kept[allowed].mean() == pytest.approx(1 - rate, abs=0.01)
    # Two masks drawn apart agree in (1 - rate)^2 + rate^2 of their entries, one drawn once and used twice in all.
    by_chance = (1 - rate) ** 2 + rate**2
    for first, second, seen in (
        (kept[0], kept[1], allowed[0]),
        (kept[:, :, 0], kept[:, :, 1], allowed[:, :, 0]),
        (kept[:, :36, :, :36], kept[:, 64:, :, :36], allowed[:, :36, :, :36]),  # the first and the second block
    ):
        assert seen.sum() > 2000
        assert (first == second)[seen].mean() == pytest.approx(by_chance, abs=0.03)


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
def test_the_mean_over_many_masks_is_attention_without_dropout(implementation: Implementation) -> None:
    count, rate = 5000, 0.4
    q, k, v, _ = (np.broadcast_to(x, (count, *x.shape[1:])) for x in Case(8, kv_heads=1, batch=1).arrays())
    attention = partial(attend, implementation=implementation)
    plain = np.asarray(attention(q[:1], k[:1], v[:1]))[0]
    keys_B = jax.random.split(jax.random.key(10), count)
    drawn = np.asarray(attention(q, k, v, dropout_rate=rate, dropout_keys_B=keys_B), np.float64)
    errors = (drawn.mean(axis=0) - plain) / (drawn.std(axis=0) / math.sqrt(count))
    assert np.abs(errors).max() < 4.5
    assert np.square(errors).mean() < 2.0


@pytest.mark.parametrize("implementation", ["reference", "blocks", "numba"])
def test_a_sequence_has_the_same_weights_dropped_in_whatever_batch(implementation: Implementation) -> None:
    q, k, v, _ = Case(70, batch=3).arrays()
    keys_B = jax.random.split(jax.random.key(11), 3)
    attention = partial(attend, dropout_rate=0.5, implementation=implementation)
    together = attention(q, k, v, dropout_keys_B=keys_B)
    alone = attention(q[1:2], k[1:2], v[1:2], dropout_keys_B=keys_B[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=2e-6)
    assert np.abs(together[1:2] - attention(q[1:2], k[1:2], v[1:2], dropout_keys_B=keys_B[:1])).max() > 0.1
