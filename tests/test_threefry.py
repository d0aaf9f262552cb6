"""Our random numbers are JAX's, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxeco import threefry


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (40_001,), (0,)])
def test_uniform_is_that_of_jax(shape: tuple[int, ...]) -> None:
    for seed in (0, 1, 2**32 - 1):
        key = jax.random.fold_in(jax.random.key(seed), 5)
        found = jax.jit(threefry.uniform, static_argnums=1)(key, shape)
        assert found.dtype == jnp.float32 and found.shape == shape
        np.testing.assert_array_equal(found, jax.random.uniform(key, shape, jnp.float32))


def test_for_many_keys_at_once() -> None:
    keys = jax.random.split(jax.random.key(1), (3, 4))
    draw = jax.vmap(jax.vmap(lambda key: threefry.uniform(key, (9,))))
    theirs = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (9,))))
    np.testing.assert_array_equal(jax.jit(draw)(keys), theirs(keys))


def test_the_words_are_those_that_its_authors_publish() -> None:
    """Known answers of Random123's kat_vectors, for threefry2x32 with 20 rounds."""
    ones = 2**32 - 1
    pi = (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344)
    for counter, key, words in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
        (*pi, (0xC4923A9C, 0x483DF7A0)),
    ):
        found = threefry.threefry(*map(jnp.uint32, (*key, *counter)))
        assert tuple(map(int, found)) == words


def test_another_generator_is_left_to_jax() -> None:
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(threefry.uniform(key, (5,)), jax.random.uniform(key, (5,)))
