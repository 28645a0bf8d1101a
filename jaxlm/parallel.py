"""Devices: a mesh over all of them, batches divided along it, parameters on each (data parallelism)."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.tokenizers.base import InputError

_DATA = "data"


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


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())
