"""Devices: a mesh over all of them, batches divided along it, parameters on each (data parallelism)."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.tokenizers.base import InputError
from jaxlm.tokenizers.threads import num_cores

_DATA = "data"
_CACHE_TOKENS = 512  # whose activations stay in a core's cache
_SMALL_ACTIVATION = 2**22  # numbers

LossFunction = Callable[[Any, jax.Array, jax.Array | None], jax.Array]


def use_cores(batch_size: int, num_devices: int | None = None) -> None:
    """Lets JAX see one CPU device per core, so that data parallelism uses them all.

    Takes the most devices that divide the batch, or `num_devices`. To be called before JAX starts, after which it can't
    be changed. A count in XLA_FLAGS is left as it is; other backends don't care.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_collective_call_terminate_timeout_seconds" not in flags:
        # By default the process is ended if a device waits 40 s for another, as after the sleep of a laptop.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_collective_call_terminate_timeout_seconds=1000000"
    if "xla_force_host_platform_device_count" in flags:
        return
    most = max(count for count in range(1, num_cores() + 1) if batch_size % count == 0)
    try:
        jax.config.update("jax_num_cpu_devices", num_devices or most)
    except RuntimeError:  # JAX has started
        return


def compiler_options(activation: int) -> dict[str, Any]:
    """How XLA is to compile a training step; for GPUs alone, as a CPU's defaults are the best that was found.

    Args:
      activation: how many numbers a device has in one: those of its tokens times the width of the model.
    """
    if jax.default_backend() != "gpu":
        return {}
    options: dict[str, Any] = {
        # Products by cuBLAS, by an algorithm of its choice. XLA would try many at each start, and when a run goes on it
        # might choose others, with other roundings.
        "xla_gpu_autotune_level": 0,
        "xla_gpu_enable_triton_gemm": False,
        # Only small products that share an operand become one, as their operands and results are copied for it.
        "xla_gpu_dot_merger_threshold_mb": 16,
    }
    if activation <= _SMALL_ACTIVATION:
        # Kernels that don't need each other run side by side, where one takes less than the gap to the next.
        options["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
    return options


# Dense bfloat16 without sparsity, FLOP/s of one device, from its maker's data sheet.
_DATASHEETS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


@functools.cache
def peak_flops(rounded: bool = False) -> tuple[float, str] | None:
    """What all devices together could do, FLOP/s, and where the figure is from; None for an unknown device.

    On CPUs it is measured, once a process, by a product of two 2,048-square float32 matrices on all cores, or by our
    own, `rounded` to bfloat16, of one such for each device.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        squares, kernel, product = 1, jnp.ones((2048, 2048)), jax.jit(jnp.dot)
        x = kernel
        if rounded:
            from jaxlm import products_numba  # numba takes its time to import

            squares = jax.device_count()
            mesh = data_mesh(squares)
            x = jax.device_put(jnp.ones((squares * 2048, 2048)), batch_sharding(mesh))
            kernel = jax.device_put(kernel, replicated(mesh))
            product = jax.jit(divided(lambda kernel, x: products_numba.product(x, kernel, True), mesh))
        product(kernel, x).block_until_ready()
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            product(kernel, x).block_until_ready()
            seconds.append(time.perf_counter() - started)
        return 2 * squares * 2048**3 / min(seconds), f"a measured {'bfloat16' if rounded else 'float32'} matrix product"
    for name, flops in sorted(_DATASHEETS.items(), key=lambda entry: -len(entry[0])):
        if device.device_kind.startswith(name):
            return flops * jax.device_count(), f"dense bfloat16 of {name}, data sheet"
    return None


def memory_bytes() -> int:
    """The memory of all devices together; of the machine, if they are its CPU."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit * jax.device_count() if limit else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compute_capability() -> float | None:
    """Of an NVIDIA GPU; None for all other devices."""
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, TypeError, ValueError):
        return None


def has_triton() -> bool:
    """Whether our kernels for GPUs run here, which takes compute capability 8."""
    return jax.default_backend() == "gpu" and (compute_capability() or 8) >= 8


def check_compute_type(compute_type: str) -> None:
    """Raises InputError for bfloat16 on a GPU that has none (it came with compute capability 8)."""
    if compute_type == "bfloat16" and (compute_capability() or 8) < 8:
        raise InputError(f"{jax.devices()[0].device_kind} has no bfloat16; make the compute type float32.")


def data_mesh(batch_size: int) -> Mesh:
    """A one-dimensional mesh over all devices. Raises InputError if they don't divide the batch."""
    devices = jax.device_count()
    if batch_size % devices:
        raise InputError(f"A batch of {batch_size} doesn't divide among {devices} devices; make it a multiple of them.")
    # Explicit axes, the default of make_mesh, would need every array of the model to be annotated.
    return jax.make_mesh((devices,), (_DATA,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec(_DATA))


def stacked(sharding: NamedSharding) -> NamedSharding:
    """The same with another axis before the first, whole on each device."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def one_at_a_time(mesh: Mesh, results: Any) -> bool:
    """Waits for the results of a step on several CPU devices, and does nothing elsewhere. Says whether it waited.

    These devices share the few threads of one process. If steps are queued, all threads can come to wait for exchanges
    with a device that none is left for, and the program stands still (seen within some hundred steps).
    """
    waits: bool = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    if waits:
        jax.block_until_ready(results)
    return waits


def sharding_beside(params: Any, batch_size: int) -> NamedSharding | None:
    """How a batch is divided among the devices that all hold `params`; None for a single device, or if it can't be."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding) or batch_size % sharding.mesh.size:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(_DATA))


def mean_gradients(
    loss: LossFunction, params: Any, batch: jax.Array, keys_B: jax.Array | None, mesh: Mesh | None
) -> tuple[jax.Array, Any]:
    """The mean over a batch of (B, ...) of a loss, which is a mean over sequences too, and its gradients.

    Each device of the mesh takes its share of the batch. A CPU takes it in pieces whose activations stay in the cache,
    one after the other. Either way the result is that of `jax.value_and_grad` of the whole batch but for rounding.
    """

    def local(params: Any, batch: jax.Array, keys_B: jax.Array | None) -> tuple[jax.Array, Any]:
        size = sequences_at_once(*batch.shape[:2])
        if size == len(batch):
            return jax.value_and_grad(loss)(params, batch, keys_B)

        def add(total: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, *piece)), None

        pieces = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (batch, keys_B))
        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        total, _ = jax.lax.scan(add, zero, pieces)
        return jax.tree.map(lambda x: x * (size / len(batch)), total)

    if mesh is None or mesh.size == 1:
        return local(params, batch, keys_B)
    everywhere, divided = PartitionSpec(), PartitionSpec(_DATA)
    return jax.shard_map(
        lambda *arguments: jax.lax.pmean(local(*arguments), _DATA),
        mesh=mesh,
        in_specs=(everywhere, divided, divided),
        out_specs=everywhere,
        check_vma=False,
    )(params, batch, keys_B)


def divided(function: Callable[[Any, Any], jax.Array], mesh: Mesh | None) -> Callable[[Any, Any], jax.Array]:
    """`function` of parameters and a batch, entry by entry, each device taking its share; None: as it is.

    Left to itself, XLA would divide what it knows how to, which a kernel of ours isn't.
    """
    if mesh is None or mesh.size == 1:
        return function
    among = PartitionSpec(_DATA)
    return jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), among), out_specs=among, check_vma=False)


def share_among(
    mesh: Mesh | None, function: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """`function` of each array, which treats the entries along the first axis alike, each device having a part of them.

    All devices have the arrays, and get all results, in a single exchange. (Exchanges that don't wait for one another
    could each hold one of a CPU's few threads, until none is left for the device that they wait for.)
    """
    if mesh is None or mesh.size == 1:
        return [function(array) for array in arrays]

    def local(*arrays: jax.Array) -> list[jax.Array]:
        parts = []
        for array in arrays:
            size = -(-len(array) // mesh.size)
            padded = jnp.pad(array, ((0, size * mesh.size - len(array)), *[(0, 0)] * (array.ndim - 1)))
            parts.append(function(jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(_DATA) * size, size)))
        together = jax.lax.all_gather(jnp.concatenate([part.reshape(-1) for part in parts]), _DATA)
        ends = itertools.accumulate(part.size for part in parts)
        return [
            together[:, end - part.size : end].reshape(-1, *part.shape[1:])[: len(array)]
            for array, part, end in zip(arrays, parts, ends, strict=True)
        ]

    everywhere = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)(*arrays)


def sequences_at_once(batch_size: int, time: int) -> int:
    """How many of a device's sequences go through the model together."""
    if jax.default_backend() != "cpu":
        return batch_size
    most = max(1, _CACHE_TOKENS // (time - 1))
    return max(count for count in range(1, min(most, batch_size) + 1) if batch_size % count == 0)
