"""A suite that cannot fail proves nothing: here are backends with one fault each, all caught.

Each fault is one that an author could really make, and names the check that must find it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvcache.backends import HOST_DTYPES, Backend
from kvcache.backends._numpy import NumpyBackend
from kvcache.backends.products import VisibleColumns
from kvcache.testing import run_suite
from kvcache.testing.checks import all_checks


class Faulty(NumpyBackend):
    """NumPy with few dtypes, of different kinds: enough to find a fault by."""

    finds: str

    def _framework_dtypes(self):
        return {name: HOST_DTYPES[name] for name in ("float32", "bfloat16", "int32", "bool")}


class WritesOneToTheRight(Faulty):
    finds = "slice_update_writes_there_only"

    def write_slice(self, buffer, update, start, stop, axis):
        shift = 1 if stop < buffer.shape[axis] else 0
        return super().write_slice(buffer, update, start + shift, stop + shift, axis)


class WritesOneLess(Faulty):
    finds = "slice_update_writes_there_only"

    def write_slice(self, buffer, update, start, stop, axis):
        if stop - start == 1:
            return super().write_slice(buffer, update, start, stop, axis)
        some = update[(*(slice(None),) * axis, slice(0, -1))]
        return super().write_slice(buffer, some, start, stop - 1, axis)


class WritesOnTheTokenAxisOnly(Faulty):
    finds = "slice_update_writes_there_only"

    def write_slice(self, buffer, update, start, stop, axis):
        if axis != 2:
            buffer[...] = update if update.shape == buffer.shape else buffer
            return buffer
        return super().write_slice(buffer, update, start, stop, axis)


class WritesTheFirstBatchOnly(Faulty):
    finds = "slice_update_writes_there_only"

    def write_slice(self, buffer, update, start, stop, axis):
        if axis == 0:
            return super().write_slice(buffer, update, start, stop, axis)
        super().write_slice(buffer[:1], update[:1], start, stop, axis)
        return buffer


class WritesNothing(Faulty):
    finds = "slice_update_chains"

    def write_slice(self, buffer, update, start, stop, axis):
        return buffer


class AddsInsteadOfWriting(Faulty):
    finds = "slice_update_writes_there_only"

    def write_slice(self, buffer, update, start, stop, axis):
        key = (*(slice(None),) * axis, slice(start, stop))
        with np.errstate(all="ignore"):
            return super().write_slice(buffer, buffer[key] + update, start, stop, axis)


class KeepsTheUpdateWhenItFillsTheBuffer(Faulty):
    finds = "slice_update_leaves_the_update_alone"

    def write_slice(self, buffer, update, start, stop, axis):
        if update.shape == buffer.shape:
            return update
        return super().write_slice(buffer, update, start, stop, axis)


class ChecksNoBounds(Faulty):
    finds = "slice_update_refuses"

    def slice_update(self, buffer, update, start, axis):
        start = max(0, min(start, buffer.shape[axis] - update.shape[axis]))  # as JAX clamps
        return self.write_slice(buffer, update, start, start + update.shape[axis], axis)


class Broadcasts(Faulty):
    finds = "slice_update_refuses"

    def slice_update(self, buffer, update, start, axis):
        stop = start + update.shape[min(axis, update.ndim - 1)]
        return self.write_slice(buffer, update, start, stop, axis)


class WritesBeforeItChecks(Faulty):
    finds = "slice_update_refuses"

    def slice_update(self, buffer, update, start, axis):
        if 0 <= start < buffer.shape[axis] and update.ndim == buffer.ndim == axis + 2:
            buffer[:, :, start:] = update[:, :, : buffer.shape[axis] - start]
        return super().slice_update(buffer, update, start, axis)


class SharesZeros(Faulty):
    finds = "alloc_is_zero_and_unshared"

    def __init__(self):
        super().__init__()
        self.made = {}

    def alloc(self, shape, dtype):
        return self.made.setdefault((tuple(shape), dtype), super().alloc(shape, dtype))


class AllocatesUninitialised(Faulty):
    finds = "alloc_is_zero_and_unshared"

    def alloc(self, shape, dtype):
        buffer = np.empty(math.prod(shape) * HOST_DTYPES[dtype].itemsize, np.uint8)
        buffer[:] = 0x5A  # what np.empty may give on an unlucky day
        return buffer.view(self.dtype(dtype)).reshape(shape)


class ToHostIsAView(Faulty):
    finds = "host_copies_are_independent"

    def to_host(self, array):
        return array


class ToHostIsReadOnly(Faulty):
    finds = "host_copies_are_independent"

    def to_host(self, array):
        host = super().to_host(array)
        host.flags.writeable = False
        return host


class FromHostAliases(Faulty):
    finds = "host_copies_are_independent"

    def from_host(self, array, dtype=None):
        return self._host(array, dtype)


class FromHostCleansNans(Faulty):
    finds = "host_round_trip"

    def from_host(self, array, dtype=None):
        host = super().from_host(array, dtype)
        if host.dtype == np.float32:
            host[np.isnan(host)] = np.nan
        return host


class GoesThroughFloat32(Faulty):
    finds = "host_round_trip"

    def to_host(self, array):
        with np.errstate(all="ignore"):
            return array.astype(np.float32).astype(array.dtype)


class FlushesSubnormals(Faulty):
    finds = "host_round_trip"

    def to_host(self, array):
        host = super().to_host(array)
        if host.dtype == np.float32:
            host[np.abs(host) < np.finfo(np.float32).tiny] = 0
        return host


class LosesTheSignOfZero(Faulty):
    finds = "host_round_trip"

    def to_host(self, array):
        host = super().to_host(array)
        host[host == 0] = 0
        return host


class IgnoresTheDtypeAskedFor(Faulty):
    finds = "host_cast"

    def from_host(self, array, dtype=None):
        host = np.asarray(array)
        return host.astype(np.float32) if host.dtype == np.float64 else host.copy()


class GatherIsAView(Faulty):
    finds = "copies_outlive_their_source"

    def read_rows(self, buffer, index, axis):
        if index.size and np.array_equal(index, np.arange(index[0], index[0] + index.size)):
            return self.read_slice(buffer, int(index[0]), int(index[0]) + index.size, axis)
        return super().read_rows(buffer, index, axis)


class GatherSorts(Faulty):
    finds = "gather_reads_rows"

    def read_rows(self, buffer, index, axis):
        return super().read_rows(buffer, np.sort(index), axis)


class GatherDropsRepeats(Faulty):
    finds = "gather_reads_rows"

    def read_rows(self, buffer, index, axis):
        return super().read_rows(buffer, np.array(list(dict.fromkeys(index.tolist())), int), axis)


class ScatterSorts(Faulty):
    finds = "scatter_writes_rows"

    def write_rows(self, buffer, rows, index, axis):
        return super().write_rows(buffer, rows, np.sort(index), axis)


class ScatterWritesARun(Faulty):
    finds = "scatter_writes_rows"

    def write_rows(self, buffer, rows, index, axis):
        first = min(int(index[0]), buffer.shape[axis] - index.size)
        return self.write_slice(buffer, rows, first, first + index.size, axis)


class ScatterWritesTheFirstRowOnly(Faulty):
    finds = "scatter_writes_rows"

    def write_rows(self, buffer, rows, index, axis):
        some = rows[(*(slice(None),) * axis, slice(0, 1))]
        return super().write_rows(buffer, some, index[:1], axis)


class ScatterWraps(Faulty):
    finds = "scatter_refuses"

    def scatter(self, buffer, rows, index, axis):
        wrapped = np.asarray(index, np.int32) % buffer.shape[axis]
        return super().scatter(buffer, rows, wrapped, axis)


class SliceIsTooLong(Faulty):
    finds = "slice_reads_a_range"

    def read_slice(self, buffer, start, stop, axis):
        return super().read_slice(buffer, start, stop + 1, axis)


class SliceCountsFromTheEnd(Faulty):
    finds = "slice_reads_a_range"

    def slice(self, buffer, start, stop, axis):
        return self.read_slice(buffer, start, stop, axis)


class WritesTheKeysOnly(Faulty):
    finds = "write_slices_writes_all"

    def write_slices(self, buffers, updates, start, stop, axis):
        return (*super().write_slices(buffers[:1], updates[:1], start, stop, axis), *buffers[1:])


class WritesAllOnTheFirstAxis(Faulty):
    finds = "write_slices_writes_all"

    def write_slices(self, buffers, updates, start, stop, axis):
        if isinstance(axis, tuple) and axis[0] != axis[1]:
            for buffer, update in zip(buffers, updates, strict=True):
                buffer[:, start:stop] = update[:, :1]
            return buffers
        return super().write_slices(buffers, updates, start, stop, axis)


class WritesTheKeysToValues(Faulty):
    finds = "write_row_sets_writes_all"

    def write_row_sets(self, buffers, rows, index, axis):
        own_rows = [rows[0][..., : array.shape[-1]] for array in rows]
        return super().write_row_sets(buffers, own_rows, index, axis)


class WritesAllRowsAsARun(Faulty):
    finds = "write_row_sets_writes_all"

    def write_row_sets(self, buffers, rows, index, axis):
        first = int(index.min())
        return self.write_slices(buffers, rows, first, first + index.size, axis)


class ReadsTheKeysOnly(Faulty):
    finds = "read_slices_reads_all"

    def read_slices(self, buffers, start, stop, axis):
        keys, *others = super().read_slices(buffers, start, stop, axis)
        return keys, *[keys for _ in others]


class WritesEveryLayerAsTheFirst(Faulty):
    finds = "pools_write_scattered_cells"

    def row_index(self, index):
        return [index, None]

    def write_finite_row_sets(self, buffers, rows, index, axis):
        index[1] = index[1] or axis  # kept with the index, though it is not the same for all layers
        return self.write_row_sets(buffers, self.replace_nonfinite(rows, axis), index[0], index[1])


class PoolsKeepNan(Faulty):
    finds = "pools_store_finite_numbers"
    write_finite_slices = NumpyBackend.write_slices


class PoolsKeepNanInScatteredCells(Faulty):
    finds = "a_neighbour_cannot_pass_on_nan"
    write_finite_row_sets = NumpyBackend.write_row_sets


class ProgramsKeepNan(Faulty):
    finds = "programs_store_finite_numbers"

    @classmethod
    def traced_replace_nonfinite(cls, arrays, axis):
        return arrays


class EvaluateClears(Faulty):
    finds = "evaluate_changes_nothing"

    def evaluate(self, *arrays):
        for array in arrays:
            array[...] = 0


class ConcatOfOneIsThatOne(Faulty):
    finds = "copies_outlive_their_source"

    def concat(self, arrays, axis):
        return arrays[0] if len(arrays) == 1 else super().concat(arrays, axis)


class ConcatIgnoresTheAxis(Faulty):
    finds = "concat_joins"

    def concat(self, arrays, axis):
        return super().concat(arrays, 2)


class ConcatReverses(Faulty):
    finds = "concat_joins"

    def concat(self, arrays, axis):
        return super().concat(arrays[::-1], axis)


class FreeClearsEverything(Faulty):
    finds = "free_spares_others"

    def __init__(self):
        super().__init__()
        self.made = []

    def from_host(self, array, dtype=None):
        self.made.append(super().from_host(array, dtype))
        return self.made[-1]

    def free(self, buffer):
        for array in self.made:
            array[...] = 0


class NamesTheWrongDtype(Faulty):
    finds = "dtype_is_named"

    def dtype_name(self, array):
        return "float32"


class FromDlpackCastsIt(Faulty):
    finds = "dlpack_from_numpy"

    def from_dlpack(self, array):
        return np.asarray(array).astype(np.float32)


class ItsOwnArraysComeBackFlat(Faulty):
    finds = "dlpack_from_itself"

    def from_dlpack(self, array):
        return array.reshape(-1)


class OneBranchOnly(Faulty):
    finds = "conditions_choose"

    @classmethod
    def traced_cond(cls, condition, yes, no, *operands):
        return yes(*operands)


class DetachesFromItsValues(Faulty):
    finds = "detached_is_the_same"

    def detached(self, array):
        return array * 0


class OwnsWhatIsWrittenToNext(Faulty):
    finds = "recurrent_cache_returns_the_state_of_its_position"

    def __init__(self):
        super().__init__()
        self.scratch = {}

    def owned(self, arrays):
        copies = [self.scratch.setdefault((a.shape, a.dtype), a.copy()) for a in arrays]
        for copy, array in zip(copies, arrays, strict=True):
            copy[...] = array
        return tuple(copies)


class OwnsInTwoBuffersInTurn(Faulty):
    """The present state is right, and so is the one before; states kept longer are not."""

    finds = "recurrent_cache_keeps_states_apart"

    def __init__(self):
        super().__init__()
        self.buffers, self.calls = {}, 0

    def owned(self, arrays):
        self.calls += 1
        lead = [(self.calls % 2, number) for number in range(len(arrays))]
        keys = [(*own, a.shape, a.dtype) for own, a in zip(lead, arrays, strict=True)]
        copies = [self.buffers.setdefault(k, a.copy()) for k, a in zip(keys, arrays, strict=True)]
        for copy, array in zip(copies, arrays, strict=True):
            copy[...] = array
        return tuple(copies)


class PlacesOneRowForAllOfABatch(Faulty):
    finds = "recurrent_cache_resumes_at_resume_points"

    def from_host_axes(self, array, axes):
        host = super().from_host_axes(array, axes)
        return np.repeat(host[:1], len(host), 0) if axes.startswith("b") else host


class RemembersTheRowsOfSlots(Faulty):
    """Slots are used again: the state that a sequence left is handed to the next one."""

    finds = "recurrent_pool_keeps_states_apart"

    def __init__(self):
        super().__init__()
        self.read = {}

    def read_rows(self, buffer, index, axis):
        rows = super().read_rows(buffer, index, axis)
        if axis:
            return rows
        # With the buffer, whose number another one would get.
        return self.read.setdefault((id(buffer), *index.tolist()), (rows, buffer))[0].copy()


class GathersRowsOfABatchInOrder(Faulty):
    finds = "rows_of_a_batch_are_selected"

    def read_rows(self, buffer, index, axis):
        return super().read_rows(buffer, np.sort(index) if axis == 0 else index, axis)


class JoinsRowsOfABatchBackwards(Faulty):
    finds = "rows_of_a_batch_are_split_and_joined"

    def concat(self, arrays, axis):
        return super().concat(arrays[::-1] if axis == 0 else arrays, axis)


class HasOneMaskForAllRows(Faulty):
    finds = "padding_of_rows_is_hidden"

    def from_host(self, array, dtype=None):
        host = super().from_host(array, dtype)
        return host if host.dtype != bool or host.ndim < 4 else np.repeat(host[:1], len(host), 0)


class NamespaceWithHoles(Faulty):
    finds = "namespace_has_the_standard_names"
    xp = math


class TakesHeadsInTurn(Faulty):
    finds = "attention_weighs_what_is_visible"

    def attention_block(self, q, keys, values, scoring, visible):
        heads = np.arange(len(q)).reshape(len(keys), -1).T.ravel()  # 0, 3, 1, 4, 2, 5
        out, total = super().attention_block(q[np.argsort(heads)], keys, values, scoring, visible)
        return out[heads], total if total is None else total[heads]


class SeesEverything(Faulty):
    finds = "attention_weighs_what_is_visible"

    def attention_block(self, q, keys, values, scoring, visible):
        return super().attention_block(q, keys, values, scoring, None)


class AlignsToTheFirstColumn(Faulty):
    finds = "attention_weighs_what_is_visible"

    def attention_block(self, q, keys, values, scoring, visible):
        if visible is not None:
            stop = visible.last - visible.last.min() + 1
            visible = VisibleColumns(np.minimum(visible.first, stop - 1), stop)
        return super().attention_block(q, keys, values, scoring, visible)


class HidesByASmallWeight(Faulty):
    finds = "attention_hides_large_numbers"

    def attention_block(self, q, keys, values, scoring, visible):
        out, total = super().attention_block(q, keys, values, scoring, visible)
        return out + out.dtype.type(1e-30) * values.sum(1).max().astype(out.dtype), total


class CapsBeforeItScales(Faulty):
    finds = "attention_bounds_scores_and_has_sinks"

    def attention_block(self, q, keys, values, scoring, visible):
        if scoring.softcap is not None:
            scoring = scoring._replace(softcap=scoring.softcap * scoring.scale)
        return super().attention_block(q, keys, values, scoring, visible)


class GivesSinksToOtherHeads(Faulty):
    finds = "attention_bounds_scores_and_has_sinks"

    def attention_block(self, q, keys, values, scoring, visible):
        if scoring.sinks is not None:
            scoring = scoring._replace(sinks=scoring.sinks[::-1])
        return super().attention_block(q, keys, values, scoring, visible)


class TakesTheMean(Faulty):
    finds = "attention_merges"

    def merge_attention(self, parts, sinks=None):
        return sum(out for out, _ in parts[:2]) / 2


class ForgetsSinksWhenItMerges(Faulty):
    finds = "attention_merges"

    def merge_attention(self, parts, sinks=None):
        return super().merge_attention(parts)


class CopiesToMemoryOfAnotherArray(Faulty):
    finds = "row_copiers_copy_one_read_after_the_other"

    def row_copier(self):
        memory = {}

        def copy(_, buffer, index, axis):
            rows = np.take(buffer, index, axis)
            return memory.setdefault(axis, rows)

        return copy


class ReadsOneColumnLess(Faulty):
    finds = "attention_of_runs_reads_each_run"

    def attention_of_runs(self, q, keys, values, scoring, runs):
        shorter = [(start, max(start + 1, stop - 1)) for start, stop in runs]
        return super().attention_of_runs(q, keys, values, scoring, shorter)


class TakesTheColumnsOfABlockForVisible(Faulty):
    finds = "attention_in_blocks_adds_up"

    def attention_in_blocks(self, q, buffers, likes, scoring, reads):
        blocks = tuple(own._replace(first=own.first * 0) for own in reads.blocks)
        whole = reads._replace(blocks=blocks)
        return super().attention_in_blocks(q, buffers, likes, scoring, whole)


FAULTS = Faulty.__subclasses__()


def fails(name, fault):
    """Whether the check of this name fails for some dtype; no other check is run."""
    backend = fault()
    checks = [check for check in all_checks() if check.name == name]
    try:
        for check in checks:
            if check.dtype in backend.dtypes:
                check.run(backend, check.dtype)
    except Exception:  # noqa: BLE001 - whatever a faulty backend raises
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_the_suite_finds(fault):
    assert fails(fault.finds, fault)


def test_it_finds_nothing_where_there_is_nothing():
    class Sound(Faulty):
        finds = ""

    assert {result.outcome for result in run_suite(Sound())} == {"passed", "missing"}


def test_a_backend_may_leave_the_hooks_for_several_arrays_to_their_defaults():
    class Plain(Faulty):
        finds = ""
        write_slices = Backend.write_slices
        write_row_sets = Backend.write_row_sets

    assert {result.outcome for result in run_suite(Plain())} == {"passed", "missing"}


@pytest.mark.slow
def test_every_check_finds_something():
    """A check that no fault makes fail might as well be missing."""
    checks = {check.name for check in all_checks()}
    found = {fault.finds for fault in FAULTS}
    assert found < checks
    # Those of whole caches find what others find as well.
    found |= {name for name in checks - found if any(fails(name, fault) for fault in FAULTS)}
    assert found == checks


def test_a_crash_is_a_failure_and_the_report_goes_on():
    class Crashes(Faulty):
        finds = ""

        def concat(self, arrays, axis):
            raise ZeroDivisionError("at the worst moment")

    results = {str(result.check): result for result in run_suite(Crashes())}
    assert results["concat_joins-int32"].outcome == "failed"
    assert results["concat_joins-int32"].reason == "ZeroDivisionError: at the worst moment"
    assert results["gather_reads_rows-int32"].outcome == "passed"


def test_an_incomplete_backend_cannot_be_made():
    class Half(Backend):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()
