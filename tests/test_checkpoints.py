"""Checkpoints: the same bits back, the latest and the best kept, and only whole ones seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoints import BrokenCheckpoint, Checkpoints, abstract
from jaxlm.tokenizers import InputError


def state(value: float) -> dict[str, Any]:
    return {"weights": jnp.full((3, 5), value) / 3, "nested": {"step": jnp.int32(value)}}


def steps(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


def test_state_and_record_come_back_as_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    checkpoints.save(7, state(7), {"seconds": 1.5, "log_sizes": {"metrics.jsonl": 12}})
    checkpoints.close()
    reopened = Checkpoints(tmp_path)
    assert reopened.latest_step == 7
    restored = reopened.restore(state(0), 7)
    assert reopened.record(7) == {"seconds": 1.5, "log_sizes": {"metrics.jsonl": 12}}
    reopened.close()
    np.testing.assert_array_equal(restored["weights"], state(7)["weights"])
    assert int(restored["nested"]["step"]) == 7


def test_a_state_donated_right_after_saving_is_saved_as_it_was(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    increase = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + 1, s), donate_argnums=0)
    current = {"weights": jnp.zeros((500, 500))}
    checkpoints.save(1, current, {})
    for _ in range(20):
        current = increase(current)
    restored = checkpoints.restore({"weights": jnp.ones((500, 500))}, 1)
    checkpoints.close()
    np.testing.assert_array_equal(restored["weights"], np.zeros((500, 500)))


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, score in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 2.5), (60, None)):
        checkpoints.save(step, state(step), {}, bits_per_byte=score)
    checkpoints.close()
    assert steps(tmp_path) == {20, 50, 60}


def test_a_save_that_was_cut_off_is_not_seen_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state(10), {})
    checkpoints.close()
    half = tmp_path / "20.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_bytes(b"half")
    reopened = Checkpoints(tmp_path)
    assert reopened.latest_step == 10
    reopened.close()


def test_a_failed_save_is_raised_by_the_next_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state(10), {})
    with pytest.raises(TypeError):
        checkpoints.save(20, state(20), {"not json": object()})
        checkpoints.close()


def test_abstract_keeps_shapes_and_types_and_sets_the_place() -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = abstract(state(1), sharding)
    assert shapes["weights"].shape == (3, 5)
    assert shapes["nested"]["step"].dtype == jnp.int32
    assert shapes["weights"].sharding == sharding


def large(value: float) -> dict[str, Any]:
    """Numbers that are kept in a file of their own."""
    return {"weights": jnp.sin(jnp.arange(5_000.0) + value)}


def part(folder: Path, kind: str) -> Path:
    """A file of a checkpoint: its record, what describes the arrays, or what holds them."""
    data = sorted((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    return {"record": folder / "_CHECKPOINT_METADATA", "arrays": folder / "state" / "_METADATA", "data": data[-1]}[kind]


@pytest.mark.parametrize("kind", ["record", "arrays", "data"])
@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "flipped"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_is_the_newest(
    kind: str, fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (5, 10):
        checkpoints.save(step, large(step), {"step": step})
    checkpoints.close()
    file = part(tmp_path / "checkpoints" / "10", kind)
    data = file.read_bytes()
    if fault == "missing":
        file.unlink()
    else:
        middle = len(data) // 2
        # Of the record, a byte that orbax stumbles over; one in a time of day would do no harm.
        middle = data.index(b"init_timestamp") if kind == "record" else middle
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        file.write_bytes({"empty": b"", "cut": data[:middle], "flipped": flipped}[fault])
    capfd.readouterr()
    reopened = Checkpoints(tmp_path / "checkpoints")
    if reopened.latest_step == 10:
        with pytest.raises(BrokenCheckpoint, match="step 10 is broken"):
            reopened.restore(large(0), 10)
    assert reopened.latest_step == 5
    assert reopened.record(5) == {"step": 5}
    restored = reopened.restore(large(0), 5)
    np.testing.assert_array_equal(restored["weights"], large(5)["weights"])
    (notice,) = reopened.take_notices()
    assert notice.endswith(f"it is kept in {tmp_path / 'broken_checkpoints' / '10'}.")
    assert reopened.take_notices() == []
    assert not reopened.only_broken
    reopened.save(10, large(10), {"step": 10})
    assert reopened.latest_step == 10, "the step can be saved again"
    reopened.close()
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_checkpoint_from_before_there_were_checksums_opens(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state(3), {"step": 3, "seconds": 1.0})
    checkpoints.close()
    file = tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_bytes())
    content["custom_metadata"] = content["custom_metadata"]["record"]
    file.write_text(json.dumps(content))
    reopened = Checkpoints(tmp_path / "checkpoints")
    reopened.restore(state(0), 3)
    assert reopened.record(3) == {"step": 3, "seconds": 1.0}
    reopened.close()


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state(3), {"step": 3})
    checkpoints.close()
    file = tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_bytes())
    content["custom_metadata"]["format"] = 99
    file.write_text(json.dumps(content))
    reopened = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="newer jaxlm"):
        reopened.restore(state(0), 3)
    assert reopened.steps == [3]
    reopened.close()


@pytest.mark.parametrize("change", [('"seconds"', '"secondz"'), (": 5751", ": 1751"), ('"record"', '"recorc"')])
def test_a_record_of_which_a_byte_was_flipped_is_broken(tmp_path: Path, change: tuple[str, str]) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state(3), {"step": 3, "seconds": 1.5, "log_sizes": {"metrics.jsonl": 5751}})
    checkpoints.close()
    file = tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA"
    content = file.read_text()
    assert content.count(change[0]) == 1
    file.write_text(content.replace(*change))
    reopened = Checkpoints(tmp_path / "checkpoints")
    if reopened.steps:
        with pytest.raises(BrokenCheckpoint, match="its record isn't what was saved"):
            reopened.record(3)
    assert reopened.only_broken
    reopened.close()


def test_a_reader_moves_nothing_and_passes_over_what_is_broken_or_gone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 4, 5):
        checkpoints.save(step, large(step), {"step": step})
    checkpoints.close()
    reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
    part(tmp_path / "checkpoints" / "5", "data").write_bytes(b"")
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with pytest.raises(BrokenCheckpoint):
        reader.restore(large(0), 5)
    assert reader.latest_step is None
    reader.close()
    assert steps(tmp_path / "checkpoints") == {5}
    assert not (tmp_path / "broken_checkpoints").exists()


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state(3), {"step": 3})
    checkpoints.close()
    read_bytes = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "_CHECKPOINT_METADATA":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError):
        Checkpoints(tmp_path / "checkpoints")
    assert steps(tmp_path / "checkpoints") == {3}
