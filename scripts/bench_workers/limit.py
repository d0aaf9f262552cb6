"""What the hardware gives: products of large float32 matrices, and a += b of long vectors."""

import sys

import numpy as np
from serve import WORKLOAD, serve

SIZE, LENGTH = 2048, 2**25  # of a matrix's side, of a vector


def with_numpy():
    rng = np.random.default_rng(0)
    if WORKLOAD == "bandwidth":
        a, b = (rng.random(LENGTH, np.float32) for _ in range(2))
        return lambda: np.add(a, b, out=a), {"numpy": np.__version__}
    a, b, c = (rng.random((SIZE, SIZE), np.float32) for _ in range(3))
    return lambda: np.matmul(b, c, out=a), {"numpy": np.__version__}


def with_xla():
    from jaxeco import runtime

    runtime.configure()
    import jax

    keys = jax.random.split(jax.random.key(0))
    if WORKLOAD == "bandwidth":
        a, b = (jax.random.uniform(key, LENGTH) for key in keys)
        add = jax.jit(jax.numpy.add, donate_argnums=0)

        def work():
            nonlocal a
            a = add(a, b).block_until_ready()
    else:
        b, c = (jax.random.normal(key, (SIZE, SIZE)) for key in keys)
        multiply = jax.jit(jax.numpy.matmul)

        def work():
            multiply(b, c).block_until_ready()

    return work, {"JAX": jax.__version__, "device": jax.devices()[0].device_kind}


def with_pytorch():
    import torch

    if WORKLOAD == "bandwidth":
        a, b = (torch.rand(LENGTH) for _ in range(2))
        return lambda: a.add_(b), {"PyTorch": torch.__version__}
    a, b, c = (torch.rand(SIZE, SIZE) for _ in range(3))
    return lambda: torch.mm(b, c, out=a), {"PyTorch": torch.__version__}


def main() -> None:
    work, versions = {"numpy": with_numpy, "xla": with_xla, "pytorch": with_pytorch}[sys.argv[3]]()
    done = 3 * 4 * LENGTH if WORKLOAD == "bandwidth" else 2 * SIZE**3  # bytes or FLOPs

    def counted() -> float:
        work()
        return done / 1e9

    serve(counted, **versions)


if __name__ == "__main__":
    main()
