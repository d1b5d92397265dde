"""Arguments are taken for what they are, or refused before anything is submitted."""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import taskgrad as tg
from conftest import keys_of
from helpers import assert_same

NAN = float("nan")
X = torch.ones(1, 2)


def linear():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def thunk():
    return tg.spawn(torch.neg, X)


@pytest.fixture
def nothing_submitted(client, request):
    if "chain" in request.fixturenames:
        request.getfixturevalue("chain")
    before = keys_of(client, "")
    yield
    assert keys_of(client, "") == before


@pytest.fixture
def chain(client):
    return tg.GraphChain(linear(), client=client)


def draw(seed=0, step=0, microbatch=0, layer="a"):
    with tg.random_stream(seed, step, microbatch, layer):
        return torch.rand(2)


class Box:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = "value"

    def __init__(self, value):
        self.value = value


@dataclasses.dataclass
class Fields:
    value: object


@pytest.mark.usefixtures("nothing_submitted")
class TestRefusedBeforeAnythingIsSubmitted:
    @pytest.mark.parametrize("n", [-1, 1.5, "2", True, [2], NAN])
    @pytest.mark.parametrize("name", ["n_workers", "threads_per_worker"])
    def test_numbers_of_workers(self, name, n):
        with pytest.raises((TypeError, ValueError), match=f"{name} is (a whole number|at least)"):
            tg.local_cluster(**{name: n})

    def test_names_that_a_cluster_does_not_have(self):
        with pytest.raises(TypeError, match="local_cluster has no argument 'n_worker'"):
            tg.local_cluster(n_worker=2)
        with pytest.raises(TypeError, match="no argument 'address'"):
            tg.local_cluster(address="tcp://127.0.0.1:1")

    @pytest.mark.parametrize("placement", [0, 1.5, {0, 1}, {0: 0, 1: 1}, b"01", Box(0), NAN])
    def test_placements(self, client, placement):
        with pytest.raises(tg.PlacementError, match="placement is None.*in their order; got"):
            tg.GraphChain(linear(), client=client, placement=placement)

    @pytest.mark.parametrize("worker", [True, 1.5, 1.0, [0], b"0", NAN, np.array([0]), Box(0)])
    def test_workers(self, client, worker):
        with pytest.raises(tg.PlacementError, match="a worker is an index, a name or an address"):
            tg.GraphChain(linear(), client=client, placement=[worker, worker])
        with pytest.raises(tg.PlacementError, match="a worker is an index, a name or an address"):
            tg.spawn(torch.neg, X, worker=worker)

    @pytest.mark.parametrize("seed", ["a", "1", None, NAN, 1.5, 1.0, True, [1], b"x", Box(1)])
    def test_seeds(self, client, seed):
        with pytest.raises(TypeError, match="seed is a whole number; got"):
            tg.GraphChain(linear, client=client, seed=seed)
        with pytest.raises(TypeError, match="seed is a whole number; got"):
            draw(seed)
        if seed is not None:  # means none
            with pytest.raises(TypeError, match="seed is a whole number; got"):
                tg.map(abs, [1], seed=seed, client=client)

    def test_streams(self):
        with pytest.raises(TypeError, match="step is a whole number"):
            draw(step=1.0)
        with pytest.raises(TypeError, match="microbatch is a whole number"):
            draw(microbatch="0")
        with pytest.raises(TypeError, match="layer is a layer's name"):
            draw(layer=0)

    @pytest.mark.parametrize("device", ["meta", torch.device("meta"), "nonsense", "", 0, 1.5])
    def test_devices(self, client, device):
        with pytest.raises((TypeError, ValueError), match="^device is"):
            tg.GraphChain(linear(), client=client, device=device)

    @pytest.mark.parametrize("path", [0, 1.5, b"x", [], True])
    def test_paths_of_weights(self, client, path):
        with pytest.raises(TypeError, match="a path is a string"):
            tg.load_state_dict(path)
        with pytest.raises(TypeError, match="a path is a string"):
            tg.GraphChain(linear(), client=client, weights=path)

    @pytest.mark.parametrize(
        ("state", "says"),
        [
            (None, "a state is a dict of tensors"),
            ("state.pt", "a state is a dict of tensors"),
            ([("0.bias", X)], "a state is a dict of tensors"),
            (linear(), r"pass its state_dict\(\)"),
            ({0: X}, "got the key 0"),
            ({"0.bias": None}, "'0.bias' is no tensor; got None"),
            ({"0.bias": np.ones(2)}, "'0.bias' is no tensor.*torch.as_tensor"),
            ({"0.bias": [1.0, 2.0]}, "'0.bias' is no tensor"),
            ({"0.bias": torch.ones(2, device="meta")}, "'0.bias' is on the meta device"),
            ({"0.bias": torch.ones(2).to_sparse()}, "'0.bias' is not dense"),
            ({"0.bias": torch.ones(2, dtype=torch.complex64)}, "'0.bias' is complex"),
        ],
    )
    def test_states(self, chain, state, says):
        with pytest.raises(TypeError, match=says):
            chain.load_state_dict(state, strict=False)

    @pytest.mark.parametrize("flag", ["no", None, 1, 0.0, []])
    def test_yes_or_no(self, client, chain, flag):
        for use in (
            lambda: chain.train(flag),
            lambda: chain.load_state_dict({}, strict=flag),
            lambda: chain(X).backward(X, retain_graph=flag),
            lambda: tg.vjp(chain, X)[1](X, retain_graph=flag),
            lambda: tg.imap(abs, [1], unordered=flag, client=client),
            lambda: tg.imap(abs, [1], progress=flag, client=client),
            lambda: tg.starmap(abs, [(1,)], unordered=flag, client=client),
        ):
            with pytest.raises(TypeError, match=" is True or False; got"):
                use()

    @pytest.mark.parametrize("fn", [None, 3, "relu", X, nn.Linear, [abs]])
    def test_what_is_no_function(self, client, fn):
        for use in (
            lambda: tg.spawn(fn, X),
            lambda: tg.vjp(fn, X),
            lambda: tg.Parallel(fn, nn.Identity()),
            lambda: tg.map(fn, [X], client=client) if fn is not nn.Linear else tg.map(3, [X]),
            lambda: tg.imap(fn, [X], client=client) if fn is not nn.Linear else tg.imap(3, [X]),
            lambda: tg.pmap(fn) if fn is not nn.Linear else tg.pmap(3),
        ):
            with pytest.raises(TypeError, match=r"function|callable|class"):
                use()

    @pytest.mark.parametrize("items", [3, None, 1.5])
    def test_what_is_no_iterable(self, client, items):
        for use in (tg.map, tg.imap, tg.starmap):
            with pytest.raises(TypeError, match="which is not iterable"):
                use(abs, items, client=client)

    def test_a_thunk_or_chain_is_no_function(self, client, chain):
        with pytest.raises(TypeError, match="spawn takes a function"):
            tg.spawn(thunk(), X)
        with pytest.raises(TypeError, match="vjp takes a GraphChain"):
            tg.vjp(thunk(), X)
        with pytest.raises(TypeError, match="runs on its own workers"):
            tg.imap(chain, [X], client=client)

    @pytest.mark.parametrize("axes", ["0", 1.5, True, ({"a": "0"},), [False], {0}])
    def test_axes(self, axes):
        with pytest.raises(TypeError, match="in_axes"):
            tg.pmap(torch.neg, in_axes=axes)
        with pytest.raises(TypeError, match="out_axes holds ints, None and containers"):
            tg.pmap(torch.neg, out_axes=axes)

    def test_names_of_axes(self):
        with pytest.raises(TypeError, match="axis_name can be hashed"):
            tg.pmap(torch.neg, axis_name={})

    @pytest.mark.parametrize("count", [0, -1, 1.5, "2", True, NAN])
    def test_sizes_of_chunks(self, client, count):
        with pytest.raises((TypeError, ValueError), match="chunksize is"):
            tg.map(abs, [1], chunksize=count, client=client)
        with pytest.raises(ValueError, match="chunksize is a number of items"):
            tg.imap(abs, [1], chunksize=count, client=client)
        with pytest.raises(ValueError, match="buffersize is a number of items"):
            tg.imap(abs, [1], buffersize=count, client=client)

    @pytest.mark.parametrize(
        "write",
        [
            lambda x: x.add_(thunk()),
            lambda x: x.copy_(thunk()),
            lambda x: x.masked_fill_(thunk() > 0, 1.0),
            lambda x: x.index_put_((thunk(),), x),
            lambda x: torch.Tensor.sub_(x, thunk()),
            lambda x: x.__setitem__(0, thunk()),
            lambda x: torch.add(x, thunk(), out=x),
            lambda x: torch.cat([thunk(), x], out=x),
            lambda x: torch.relu_(thunk()),
            lambda x: nn.init.normal_(thunk()),
            lambda x: F.batch_norm(thunk(), x[0], x[0], training=True),
            lambda x: F.embedding(thunk(), x, max_norm=1.0),
            lambda x: torch.autograd.grad(thunk(), x),
            lambda x: torch.autograd.backward(thunk()),
            lambda x: thunk().__setitem__(0, x),
            lambda x: setattr(thunk(), "data", x),
        ],
    )
    def test_writing_to_a_tensor_or_a_thunk(self, write):
        x = torch.zeros(1, 2)
        with pytest.raises(TypeError, match="writes? to|written to|takes no thunks"):
            write(x)
        assert_same(x, torch.zeros(1, 2))

    @pytest.mark.parametrize(
        "use",
        [
            *(bool, float, int, complex, round, range, list, max),
            *(np.asarray, np.array, np.sum, torch.tensor, torch.as_tensor),
            lambda t: f"{t:.2f}",
            lambda t: [1, 2][t],
            lambda t: np.ones(2) / np.add(t, 1),
            lambda t: (*t,),
        ],
    )
    def test_a_thunk_is_no_value(self, use):
        with pytest.raises(TypeError, match="(?s)Thunk"):
            use(thunk())

    @pytest.mark.parametrize(
        "hide",
        [
            lambda t: {t},
            lambda t: frozenset([t]),
            lambda t: {t: 1},
            lambda t: [{"a": {t: 1}}],
            lambda t: (t for _ in range(2)),
            lambda t: iter([t]),
            lambda t: {1: t}.values(),
            lambda t: [1, Box(t)],
            lambda t: Box([1, {"a": t}]),
            lambda t: Slotted(t),
            lambda t: Fields({t}),
            lambda t: functools.partial(print, t),
        ],
    )
    def test_thunks_where_collect_does_not_find_them(self, hide):
        with pytest.raises(TypeError, match="thunk"):
            tg.collect(hide(thunk()))


def test_collect_finds_thunks_in_every_container_of_its_own(client):
    found = tg.collect((Fields(thunk()), collections.deque([thunk()]), {"a": [thunk()]}))
    assert_same(found[0].value, -X)
    assert_same(found[1][0], -X)
    assert_same(found[2]["a"][0], -X)
    kept = {1, 2}
    assert tg.collect([kept, None, "x", nn.Identity])[0] is kept


def test_numbers_of_numpy_are_numbers(client):
    one, two = np.int64(1), np.int8(2)
    chain = tg.GraphChain(linear(), client=client, placement=np.array([0, 1]), seed=one)
    assert len(set(chain.placement.column("worker"))) == 2
    assert_same(tg.collect(tg.spawn(torch.neg, X, worker=one)), -X)
    assert_same(draw(one, np.uint8(0)), draw(1))
    rows = [torch.ones(2), torch.zeros(2)]
    drawn = [tg.map(lambda x: torch.rand(1), rows, seed=s, over="threads") for s in (two, 2)]
    assert drawn[0] == drawn[1]
    assert tg.map(abs, [-1, -2], chunksize=one, client=client) == [1, 2]
    assert list(tg.imap(abs, [-1, -2], chunksize=one, buffersize=two, client=client)) == [1, 2]
    added = tg.pmap(torch.neg, in_axes=np.int64(1), out_axes=np.int64(1), client=client)
    assert_same(added(torch.ones(3, 2)), -torch.ones(3, 2))
    assert chain.train(np.True_) is chain


def test_placements_of_every_ordered_kind(client):
    for placement in (range(2), ("0", 1), iter([0, 1]), torch.tensor([0, 1])):
        chain = tg.GraphChain(linear(), client=client, placement=placement)
        assert len(set(chain.placement.column("worker"))) == 2


@pytest.mark.parametrize(
    "dtype",
    [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool],
)
def test_tensors_of_every_dtype_go_and_come(client, dtype):
    x = torch.ones(3).to(dtype)
    assert_same(tg.collect(tg.spawn(lambda v: v, x)), x)
    assert_same(tg.map(lambda v: v, [x], client=client)[0], x)
    assert_same(next(tg.imap(lambda v: v, [x], client=client)), x)
    assert_same(tg.collect(tg.spawn(lambda: x)), x)


def test_x_plus_equals_thunk_is_a_thunk_and_leaves_the_tensor(client):
    x = before = torch.ones(1, 2)
    x += thunk()
    assert_same(tg.collect(x), torch.zeros(1, 2))
    assert_same(before, torch.ones(1, 2))
