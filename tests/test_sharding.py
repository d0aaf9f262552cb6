"""One run, however the devices of a mesh share it; on eight fake devices."""

from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxeco import axes, data, losses, metrics, models, optim, sharding
from jaxeco.errors import UserError
from jaxeco.experiment import Experiment, MeshShape, Steps
from jaxeco.plan import plan
from jaxeco.trees import named

RANDOM = np.random.default_rng(0)
IMAGES = data.Arrays(
    RANDOM.integers(0, 255, (160, 8, 8, 3)).astype(np.uint8),
    RANDOM.integers(0, 10, 160).astype(np.int32),
    classes=tuple("abcdefghij"),
)
TEXTS = data.Arrays(
    RANDOM.integers(0, 32, (160, 16)).astype(np.int32),
    RANDOM.integers(0, 32, (160, 16)).astype(np.int32),
)
TRUNK = models.Transformer(
    vocab_size=32, context=16, layers=2, heads=4, kv_heads=2, width=16, dropout=0.1
)


def experiment(kind: str, mesh: str) -> Experiment:
    source = TEXTS if kind.endswith("transformer") else IMAGES
    model = {
        "mlp": models.MLP((32, 16), dropout=0.2, batch_norm=True),
        "resnet": models.CifarResNet(depth=8, width=8),
        "transformer": models.LanguageModel(TRUNK),
        "scanned transformer": models.LanguageModel(TRUNK.clone(scan_layers=True)),
    }[kind]
    images = source is IMAGES
    return Experiment(
        name="tiny",
        train=source,
        evals={"test": source},
        preprocess=(data.Normalize((0.5,) * 3, (0.25,) * 3),) if images else (),
        augment=(data.Flip(),) if images else (),
        model=model,
        loss=losses.SoftmaxCrossEntropy(),
        metrics=(metrics.Accuracy(),),
        # at larger rates these random labels make chaos of rounding
        optimizer=optim.Momentum(1e-3) if images else optim.AdamW(1e-3, eps=1e-3),
        batch=16,
        length=Steps(20),
        eval_batch=64,
        mesh=MeshShape.parse(mesh),
    )


@cache
def trained(kind: str, mesh: str) -> tuple[list[float], dict[str, np.ndarray], float]:
    """Losses of 20 steps; the parameters after them; the loss of an evaluation."""
    p = plan(experiment(kind, mesh))
    call, feed, state, found = p.compiled(), p.feed(), p.start(), []
    for step in range(20):
        state, sums = call(state, feed.resident, feed.fed(step))
        loss = jax.device_get(sums["loss"])
        found.append(loss.total[0] / loss.weight[0])
    evaluated = p.evaluators()["test"](state.params, state.variables)
    assert evaluated is not None
    params = {name: np.asarray(a) for name, a in named(state.params).items()}
    return found, params, evaluated["loss"]


@pytest.mark.parametrize(
    "kind, mesh",
    [
        ("mlp", "data:2,fsdp:2,tensor:2"),
        ("resnet", "data:2,fsdp:2,tensor:2"),
        ("transformer", "data:2,fsdp:2,tensor:2"),
        ("scanned transformer", "fsdp:2,sequence:2,tensor:2"),
    ],
)
def test_a_mesh_changes_nothing(kind: str, mesh: str) -> None:
    losses_1, params_1, evaluated_1 = trained(kind, "data:1")
    losses_8, params_8, evaluated_8 = trained(kind, mesh)
    np.testing.assert_allclose(losses_8, losses_1, rtol=1e-5)
    np.testing.assert_allclose(evaluated_8, evaluated_1, rtol=1e-5)
    for name in params_1:
        np.testing.assert_allclose(params_8[name], params_1[name], atol=1e-5, err_msg=name)


def test_gradients_where_xla_left_alone_loses_a_sum() -> None:
    """openxla/xla#40034: kernels over fsdp and tensor, the batch over data and fsdp.

    If the first assertion fails, XLA has been mended, and `sharding.gathered` may be needless.
    """
    p = plan(experiment("mlp", "data:2,fsdp:2,tensor:2"))
    kernels = [
        RANDOM.standard_normal(s).astype(np.float32) for s in ((64, 128), (128, 64), (64, 10))
    ]
    x_BxI = RANDOM.standard_normal((64, 64)).astype(np.float32)

    def loss(kernels, x, gather):
        with jax.sharding.use_abstract_mesh(p.mesh.abstract_mesh):
            params = {str(i): {"kernel": k} for i, k in enumerate(kernels)}
            params = sharding.gathered(p.ex.model, params) if gather else params
            for i in "012":
                x = jnp.tanh(x @ params[i]["kernel"])
            return jnp.sum(x**2)

    x, expected = x_BxI, jax.grad(lambda k: loss(k, x_BxI, False))(kernels)
    over = lambda *spec: jax.sharding.NamedSharding(p.mesh, P(*spec))  # noqa: E731

    def worst(gather: bool) -> float:
        compiled = jax.jit(
            jax.grad(lambda kernels, x: loss(kernels, x, gather)),
            in_shardings=(over("fsdp", "tensor"), over(axes.BATCH)),
            out_shardings=over("fsdp", "tensor"),
        )
        found = compiled(kernels, x)
        return max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(found, expected, strict=True)
        )

    assert worst(gather=False) > 0.1
    assert worst(gather=True) < 1e-5


def test_a_state_lies_in_parts_from_the_beginning() -> None:
    ex = experiment("transformer", "fsdp:4,tensor:2")
    p = plan(replace(ex, model=models.LanguageModel(TRUNK.clone(width=128, vocab_size=512))))
    state = p.start()
    query = state.params["trunk"]["block_0"]["query"]["kernel"]
    assert query.sharding.spec == P("fsdp", "tensor")
    moments = [a for name, a in named(state.opt_state).items() if "mu/" in name]
    assert [a.sharding for a in moments] == [a.sharding for a in jax.tree.leaves(state.params)]
    whole = sum(a.nbytes for a in jax.tree.leaves((state.params, state.opt_state)))
    here = sum(
        shard.data.nbytes
        for a in jax.tree.leaves((state.params, state.opt_state))
        for shard in a.addressable_shards[:1]
    )
    assert here < whole / 7  # only biases and norms are whole on each device
    memory = jax.jit(p.init, out_shardings=p.shardings).lower().compile().memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < whole / 4


def test_a_kernel_of_one_axis_stays_whole() -> None:
    class Gain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            gain = self.param("kernel", nn.initializers.ones, (192,))
            return nn.Dense(10)(x.reshape(len(x), -1) * gain)

    p = plan(replace(experiment("mlp", "data:2,tensor:2"), model=Gain()))
    assert p.shardings.params["kernel"].spec == P()
    assert p.shardings.params["Dense_0"]["kernel"].spec == P(None, "tensor")


def test_table_adds_up() -> None:
    p = plan(experiment("transformer", "data:2,fsdp:2,tensor:2"))
    state = p.abstract_state()
    rows = sharding.table(state)
    params = sum(4 * a.size for a in jax.tree.leaves(state.params))
    assert sum(row[-1] for row in rows if row[0] != "optimizer and other state") == params
    query = next(row for row in rows if "query/kernel" in row[0])  # and out, of the same shape
    assert query[1:] == ("2 of 16x16", "fsdp x tensor", 2 * 4 * 64, 2 * 4 * 256)


@pytest.mark.parametrize(
    "kind, mesh, expected",
    [
        ("transformer", "tensor:8", "tensor:8 does not divide heads=4"),
        ("transformer", "data:2,tensor:4", "tensor:4 does not divide heads=2"),  # of keys
        ("transformer", "data:1,sequence:3", "sequence:3 does not divide sequence=16"),
        ("mlp", "data:1,tensor:7", "tensor:7 divides no parameter .* 10, 16, 32, 192"),
        ("mlp", "data:2,sequence:2", "MLP has no axis of that name"),
        ("mlp", "data:3", "batch=16 is not divisible by 3 devices; try batch=15 or 18"),
        ("mlp", "data:1,fsdp:3", "batch=16 is not divisible by 3 devices"),
        ("mlp", "data:2,fsdp:3", r"not divisible by 6 groups|6 devices"),
        ("mlp", "fsdp:3", "mesh=fsdp:3 shares 3 devices, there are 8"),
        ("mlp", "data:16", "mesh=data:16 needs 16 devices, there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit(kind: str, mesh: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        plan(experiment(kind, mesh))


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_only_jit_shares_a_model(how: str) -> None:
    with pytest.raises(UserError, match="tensor:2 needs parallel=jit"):
        plan(replace(experiment("mlp", "data:4,tensor:2"), parallel=how))


@pytest.mark.parametrize(
    "text", ["", "data", "data:0", "data:-1", "data:2,data:4", "model:2", "data:x"]
)
def test_meshes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|there are: data, fsdp|given twice"):
        MeshShape.parse(text)


def test_how_a_mesh_is_written() -> None:
    shape = MeshShape.parse("fsdp:2, tensor:4")
    assert shape == MeshShape(data=None, fsdp=2, tensor=4)
    assert str(shape) == "fsdp:2,tensor:4"
