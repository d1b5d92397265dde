"""JAX's own numbers for `spmd_cases`, on CPU devices: a program of its own.

It writes a pickle with, for each case and number of ranks, the results and gradients of all ranks;
with "quick" for some of them, and the examples.
"""

from __future__ import annotations

import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np

from spmd_cases import CASES, EXAMPLES, QUICK, QUICK_SEVERAL, SEVERAL, SHAPES, inputs

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"


def main(path: str, quick: bool) -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import AxisType, PartitionSpec

    jax.config.update("jax_enable_x64", True)
    names = ("psum", "pmean", "pmax", "pmin", "all_gather", "psum_scatter", "all_to_all")
    names += ("ppermute", "pshuffle", "pswapaxes", "axis_index", "axis_size")
    on = SimpleNamespace(
        **{name: getattr(lax, name) for name in names},
        **{name: getattr(jax, name) for name in ("grad", "vmap", "jvp", "jacrev", "jacfwd")},
        # Of JAX 0.10.2 it does not run on a CPU.
        pbroadcast=lambda x, axis, source: lax.all_gather(x, axis)[source],
        **{name: getattr(jax, name) for name in ("pmap", "value_and_grad")},
        **{name: getattr(jnp, name) for name in ("sin", "dot", "stack")},
        array=jnp.asarray,
    )
    found = {}
    sizes = (8,) if quick else (1, 2, 3, 6, 8)
    if quick:
        for name, example in EXAMPLES.items():
            found[name] = jax.tree.map(np.asarray, example(on))

    def put(key, case, mapped, x):
        if not case.differentiable:
            found[key] = jax.tree.map(np.asarray, mapped(x)), None
            return
        out, back = jax.vjp(mapped, x)
        seeds = jax.tree.map(lambda o: jnp.asarray(inputs(o.shape)), out)
        found[key] = jax.tree.map(np.asarray, out), np.asarray(back(seeds)[0])

    for name in QUICK if quick else CASES:
        case = CASES[name]
        for n in [n for n in case.sizes if n in sizes]:
            transform = jax.pmap if case.lowered else jax.vmap
            mapped = transform(case.write(on, n), axis_name="i")
            put((name, n), case, mapped, jnp.asarray(inputs((n, *case.shape(n)))))

    for shape in [s for s in SHAPES if s[0] * s[1] in sizes]:
        n = shape[0] * shape[1]
        types = (AxisType.Auto, AxisType.Auto)
        devices = np.array(jax.devices()[:n])
        mesh = jax.make_mesh(shape, ("i", "j"), axis_types=types, devices=devices)
        spec = PartitionSpec("i", "j")
        for name in QUICK_SEVERAL if quick else SEVERAL:
            case = SEVERAL[name]

            def of_block(x, case=case, n=n):
                return jax.tree.map(lambda o: o[None, None], case.write(on, n)(x[0, 0]))

            mapped = jax.shard_map(
                of_block, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
            )
            put((name, shape), case, mapped, jnp.asarray(inputs((*shape, *case.shape(n)))))

    with open(path, "wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "quick")
