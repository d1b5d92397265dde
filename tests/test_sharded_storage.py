"""Sharded tensors in files, and to and from Dask's collections."""

from __future__ import annotations

import json

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import taskgrad as tg
from conftest import total_held, wait_until
from helpers import long
from taskgrad.cluster.wire import message_leases

DTYPES = [torch.float32, *long(torch.bfloat16, torch.int64, torch.complex64, torch.bool)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, *long(1, None)])
def test_what_is_saved_is_loaded_on_other_workers(four, tmp_path, axis, dtype):
    t = torch.randn(7, 3).to(dtype)
    tg.shard(t, axis, workers=[0, 1, 3], client=four).save(tmp_path / "x")
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(files) == (1 if axis is None else 3)
    stored = [load_file(file)["part"] for file in files]
    assert torch.equal(stored[0] if axis is None else torch.cat(stored, axis), t)
    for workers in (None, [2], [3, 0]):
        x = tg.load_sharded(tmp_path / "x", workers=workers, client=four)
        assert x.layout == tg.Sharded(axis)
        assert x.dtype is dtype
        assert torch.equal(x.gather(), t)


def test_a_tensor_in_a_folder_is_replaced(client, tmp_path):
    x = tg.shard(torch.zeros(4), client=client)
    x.save(tmp_path)
    (x + 1)[:1].save(tmp_path)
    assert tg.load_sharded(tmp_path, client=client).gather().tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2
    tg.shard(torch.zeros(0, 2), client=client).save(tmp_path)
    assert tg.load_sharded(tmp_path, client=client).shape == (0, 2)


def test_files_that_are_damaged(client, tmp_path):
    def refused(text):
        with pytest.raises(tg.CheckpointError, match=text):
            tg.load_sharded(tmp_path, client=client)

    refused("no sharded tensor in")
    x = tg.shard(torch.arange(4.0), client=client)
    x.save(tmp_path)
    index = tmp_path / "sharded.json"
    good = index.read_text()
    index.write_text(good.replace("float32", "float64", 1))
    refused("its checksum differs")
    index.write_text("{")
    refused("cannot be read")
    x.save(tmp_path / "over")
    (tmp_path / "over" / "sharded.json").write_text("{")
    (x + 1).save(tmp_path / "over")
    assert torch.equal(tg.load_sharded(tmp_path / "over", client=client).gather(), x.gather() + 1)
    index.write_text(json.dumps({"format": "other"}))
    refused("is not the index")
    index.write_text(json.dumps({**json.loads(good), "version": 9}))
    refused("format version 9")
    index.write_text(good)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused("is damaged: its checksum differs")
    file.write_bytes(data[:-1])
    refused("cut short")
    file.unlink()
    refused("worker 1.*does not see")
    (tmp_path / "file").write_text("")
    with pytest.raises(tg.CheckpointError, match="cannot be made"):
        x.save(tmp_path / "file" / "x")
    with pytest.raises(TypeError, match="a path is"):
        x.save(3)
    assert wait_until(lambda: total_held(client)["parts"] == len(x.parts))


@pytest.mark.parametrize("axis", [0, *long(1, None)])
def test_dask_arrays(four, axis):
    n = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    with four.as_current():
        array = da.from_array(n, chunks=(3, 2)) * 2
        x = tg.ShardedTensor.from_dask(array, axis, client=four)
        assert x.layout == tg.Sharded(axis)
        assert torch.equal(x.gather(), torch.from_numpy(n * 2))
        again = (x + 1).to_dask()
        assert again.shape == (7, 5)
        assert again.dtype == np.float32
        if axis is not None:
            assert [sum(c) for c in again.chunks] == [7, 5]
            assert len(again.chunks[axis]) == 4
        np.testing.assert_array_equal((again * 2).compute(), (n * 2 + 1) * 2)
        np.testing.assert_array_equal(again.compute(), n * 2 + 1)
        number = tg.ShardedTensor.from_dask(array.sum(), None, client=four)
        assert float(number) == pytest.approx(float(n.sum() * 2), rel=1e-5)
        assert (x[0, 0] if axis is None else x[0:1, 0:1]).to_dask().compute().item() == n[0, 0] * 2


def test_dask_arrays_do_not_pass_through_the_driver(client):
    """Eight megabytes, of which the driver reads nothing."""
    before = message_leases.bytes_read()
    array = da.ones((8, 1 << 18), chunks=(3, 1 << 16), dtype=np.float32)
    x = tg.ShardedTensor.from_dask(array, client=client)
    y = tg.ShardedTensor.from_dask(x.to_dask() * 2, client=client)
    assert message_leases.bytes_read() - before < 100_000
    assert torch.equal(y.gather(), torch.full((8, 1 << 18), 2.0))


class Partition:
    """A part of a dataframe, as far as we ask it."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


def test_delayed_values_and_partitions(four):
    parts = [np.arange(2.0 * i).reshape(i, 2) for i in (1, 4, 0, 2, 3)]
    whole = torch.from_numpy(np.concatenate(parts))
    for wrap in (np.asarray, torch.from_numpy, Partition):
        x = tg.ShardedTensor.from_delayed(
            [dask.delayed(wrap)(part) for part in parts], workers=[0, 1, 2], client=four
        )
        assert torch.equal(x.gather(), whole)
        assert x.layout == tg.Sharded(0)
        assert [(p.worker.name, p.start, p.stop) for p in x.parts] == [
            (0, 0, 5),
            (1, 5, 7),
            (2, 7, 10),
        ]
    # Parts of other lengths than `shard` makes are as good.
    assert torch.equal((x * 2)[1:8].gather(), whole[1:8] * 2)
    found = tg.pmap(lambda row: row.sum(), client=four)(x)
    assert torch.equal(found, whole.sum(1))
    assert torch.equal(x.reshard().gather(), whole)
    columns = [dask.delayed(np.ones)((2, n)) for n in (1, 2)]
    assert tg.ShardedTensor.from_delayed(columns, 1, client=four).shape == (2, 3)


def test_collections_that_do_not_fit(client):
    from_dask, from_delayed = tg.ShardedTensor.from_dask, tg.ShardedTensor.from_delayed

    def refused(kind, text, function, *args):
        with pytest.raises(kind, match=text):
            function(*args, client=client)

    array = da.ones((4, 2), chunks=2)
    refused(TypeError, "takes a dask.array.Array", from_dask, np.ones(3))
    refused(ValueError, "no axis 2 to cut", from_dask, array, 2)
    refused(ValueError, "compute_chunk_sizes", from_dask, array[array[:, 0] > 0])
    refused(TypeError, "numpy.str_|can't convert", from_dask, da.from_array(np.array(["a", "b"])))
    ones = dask.delayed(np.ones)
    refused(TypeError, "list of delayed", from_delayed, [])
    refused(TypeError, "list of delayed", from_delayed, "ab")
    refused(TypeError, "dask.delayed values; got 3", from_delayed, [ones(2), 3])
    refused(ValueError, "give axis=0", from_delayed, [ones(2)], None)
    refused(ValueError, "differ in dtype or", from_delayed, [ones((1, 2)), ones((1, 3))])
    refused(ValueError, "differ in dtype or", from_delayed, [ones(2), dask.delayed(np.arange)(2)])
    refused(ValueError, "no axis 1", from_delayed, [ones(2)], 1)
    with pytest.raises(TypeError, match="BFloat16|bfloat16"):
        tg.shard(torch.ones(2).bfloat16(), client=client).to_dask()
    with pytest.raises(ZeroDivisionError):
        from_delayed([dask.delayed(lambda: 1 / 0)()], client=client)
    assert wait_until(lambda: total_held(client)["parts"] == 0)
