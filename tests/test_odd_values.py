"""Whatever public names are given: a value or a sentence, and a cluster that answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import taskgrad as tg
from conftest import total_held, wait_until
from taskgrad.cluster.tasks import mailboxes

ODD = [
    *(None, True, False, 0, 1, -1, 2**70, 0.0, 1.5, -1.0, math.nan, math.inf, 1j),
    *("", "0", "x", "sum", "cuda", b"x", [], [0], (), (0, 1), {}, {"a": 1}, {0}, range(2)),
    *(np.int64(1), np.float32(0.5), np.array([1, 2]), np.array([object()])),
    *(torch.ones(2), torch.ones(2, 2), torch.tensor(1), torch.ones(0, 2), torch.ones(2).long()),
    *(torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.uint16)),
    *(abs, torch.neg, nn.Linear, nn.Linear(2, 2), nn.Sequential(), lambda: 1, object()),
    *(torch.device("cpu"), torch.float16, Exception("x"), iter([1])),
]
ALLOWED = (tg.TaskgradError, TypeError, ValueError, NotImplementedError, NameError, RuntimeError)
INTERNAL = ("NoneType' object has no attribute", "object has no len()", "_node", "assert ")

Call = Callable[[Any, Any], Any]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def chain() -> tg.GraphChain:
    return tg.GraphChain(model())


def trainer(**odd: Any) -> Any:
    given = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "loss_fn": nn.MSELoss(), **odd}
    return tg.Trainer(chain(), **given)


def drawn(*stream: Any) -> torch.Tensor:
    with tg.random_stream(*stream):
        return torch.rand(1)


def inside(collective: Callable[..., Any], *odd: Any) -> Any:
    return tg.pmap(lambda x: collective(x, "i", *odd), axis_name="i")(torch.ones(2, 2))


def called(fn: Any, *odd: Any) -> Any:
    """What a vectorized function makes of odd values."""
    return fn(*odd)


# For each public name what is done with it, given two odd values.
USES: dict[str, list[Call]] = {
    "GraphChain": [
        lambda a, b: tg.GraphChain(a, seed=b),
        lambda a, b: tg.GraphChain(model(), placement=a),
        lambda a, b: tg.GraphChain(model(), client=a),
        lambda a, b: tg.GraphChain(model(), weights=a),
        lambda a, b: tg.GraphChain(model(), seed=a),
        lambda a, b: tg.collect(chain()(a)),
        lambda a, b: tg.collect(chain()(torch.ones(1, 2), a)),
        lambda a, b: chain().load_state_dict(a, b),
        lambda a, b: chain().load_state_dict({"0.weight": a}, strict=False),
        lambda a, b: chain().train(a),
    ],
    "Parallel": [lambda a, b: tg.Parallel(a, b)],
    "Thunk": [
        lambda a, b: tg.collect(tg.spawn(torch.ones, 2) + a),
        lambda a, b: tg.collect(tg.spawn(torch.ones, 2)[a]),
        lambda a, b: chain()(torch.ones(1, 2)).backward(a),
        lambda a, b: chain()(torch.ones(1, 2)).backward(torch.ones(1, 2), retain_graph=a),
        lambda a, b: setattr(tg.spawn(torch.ones, 2), "x", a),
    ],
    "spawn": [
        lambda a, b: tg.collect(tg.spawn(a, b)),
        lambda a, b: tg.collect(tg.spawn(torch.neg, a)),
        lambda a, b: tg.spawn(torch.neg, torch.ones(2), worker=a),
    ],
    "collect": [lambda a, b: tg.collect(a), lambda a, b: tg.collect([a, tg.spawn(torch.ones, 2)])],
    "vjp": [
        lambda a, b: tg.vjp(a, b),
        lambda a, b: tg.collect(tg.vjp(chain(), torch.ones(1, 2))[1](a)),
    ],
    "map": [
        lambda a, b: tg.map(a, b),
        lambda a, b: tg.map(torch.neg, [torch.ones(2)] * 2, over=a, reduce=b),
        lambda a, b: tg.map(torch.neg, [torch.ones(2)] * 2, chunksize=a, seed=b),
        lambda a, b: tg.map(lambda x: x, [a, b], over="threads"),
    ],
    "imap": [
        lambda a, b: list(tg.imap(a, b)),
        lambda a, b: list(tg.imap(abs, [1, 2], chunksize=a, buffersize=b)),
        lambda a, b: list(tg.imap(lambda x: x, [a, b])),
    ],
    "starmap": [lambda a, b: list(tg.starmap(a, b)), lambda a, b: list(tg.starmap(pow, [a, b]))],
    "pmap": [
        lambda a, b: tg.pmap(a, in_axes=b),
        lambda a, b: tg.pmap(torch.neg, out_axes=a)(torch.ones(2, 2)),
        lambda a, b: tg.pmap(torch.add)(a, b),
    ],
    "psum": [lambda a, b: tg.psum(a, b), lambda a, b: inside(lambda x, i: tg.psum(a, i))],
    "pmean": [lambda a, b: tg.pmean(a, b)],
    "pmax": [lambda a, b: tg.pmax(a, b)],
    "pmin": [lambda a, b: tg.pmin(a, b)],
    "all_gather": [lambda a, b: inside(lambda x, i: tg.all_gather(x, i, axis=a, tiled=b))],
    "all_to_all": [lambda a, b: inside(tg.all_to_all, a, b)],
    "axis_index": [lambda a, b: tg.axis_index(a)],
    "axis_size": [lambda a, b: tg.axis_size(a)],
    "ppermute": [lambda a, b: inside(tg.ppermute, a), lambda a, b: inside(tg.ppermute, [(a, b)])],
    "pbroadcast": [lambda a, b: inside(tg.pbroadcast, a)],
    "pshuffle": [lambda a, b: inside(tg.pshuffle, a)],
    "pswapaxes": [lambda a, b: inside(tg.pswapaxes, a)],
    "Sharded": [lambda a, b: tg.Sharded(a)],
    "ShardedTensor": [lambda a, b: tg.ShardedTensor.from_dask(a, b)],
    "shard": [lambda a, b: tg.shard(a, b)],
    "load_sharded": [lambda a, b: tg.load_sharded(a)],
    "psum_scatter": [lambda a, b: inside(lambda x, i: tg.psum_scatter(x, i, scatter_dimension=a))],
    "load_state_dict": [lambda a, b: tg.load_state_dict(a)],
    "local_cluster": [
        lambda a, b: tg.local_cluster(n_workers=-1, threads_per_worker=a),
        lambda a, b: tg.local_cluster(threads_per_worker=0, n_workers=a),
    ],
    "main": [lambda a, b: tg.main("a module", workers=a, threads=b), lambda a, b: tg.main(a) and 0],
    "rank": [lambda a, b: tg.rank()],
    "size": [lambda a, b: tg.size()],
    "random_stream": [lambda a, b: drawn(a, b, 0, "x"), lambda a, b: drawn(0, 0, a, b)],
    "Trainer": [lambda a, b: trainer(optimizer=a), lambda a, b: trainer(loss_fn=a)],
    "Optimizer": [lambda a, b: tg.Optimizer(chain(), a), lambda a, b: tg.Optimizer(a, b)],
    "Callback": [lambda a, b: tg.Callback(), lambda a, b: trainer(callbacks=a)],
    "EarlyStopping": [
        lambda a, b: tg.EarlyStopping(patience=a),
        lambda a, b: tg.EarlyStopping(a, b),
        lambda a, b: tg.EarlyStopping(min_delta=a),
    ],
    "ModelCheckpoint": [
        lambda a, b: tg.ModelCheckpoint("unused", every=a),
        lambda a, b: tg.ModelCheckpoint("unused", a, b),
    ],
    "CSVLogger": [lambda a, b: tg.CSVLogger(a)],
    "TensorBoardLogger": [lambda a, b: tg.TensorBoardLogger(a)],
    "LearningRateMonitor": [lambda a, b: tg.LearningRateMonitor()],
    "EMA": [lambda a, b: tg.EMA(a), lambda a, b: tg.EMA(validate=a)],
    "vectorize": [lambda a, b: tg.vectorize(a), lambda a, b: called(tg.vectorize(_add), a, b)],
    "fuse": [lambda a, b: tg.fuse(a)],
    "Elementwise": [lambda a, b: tg.Elementwise(a)],
}
ERRORS = {
    name
    for name in tg.__all__
    if isinstance(getattr(tg, name), type) and issubclass(getattr(tg, name), Exception)
}


def _add(x, y):
    return x + y


def error_of(use: Call, a: Any, b: Any) -> Exception | None:
    try:
        use(a, b)
    except Exception as error:
        return error
    return None


def test_every_public_name_is_fed():
    assert USES.keys() | ERRORS == set(tg.__all__)


@pytest.mark.parametrize("name", sorted(USES))
def test_odd_values_end_in_a_value_or_a_sentence(client, name):
    @settings(
        max_examples=8,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(USES[name]), st.sampled_from(ODD), st.sampled_from(ODD))
    def feed(use: Call, a: Any, b: Any) -> None:
        error = error_of(use, a, b)
        if error is not None and not getattr(error, "__notes__", ()):  # with one: an item's own
            assert isinstance(error, ALLOWED), repr(error)
            assert len(str(error)) > 10, repr(error)
            assert not any(text in str(error).partition("\n")[0] for text in INTERNAL), repr(error)

    feed()
    assert tg.collect(tg.spawn(torch.neg, torch.ones(2))).tolist() == [-1.0, -1.0]
    assert wait_until(lambda: not any(total_held(client).values()))
    assert all(not any(boxes.values()) for boxes in client.run(mailboxes).values())
