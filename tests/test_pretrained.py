"""Parameters to start from, by name, from runs and files; GPT-2 against Hugging Face's logits."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxeco import config, folder, trees, weights
from jaxeco.checkpoint import Checkpoints
from jaxeco.errors import UserError
from jaxeco.models.gpt2 import convert
from jaxeco.models.transformer import LanguageModel, Transformer
from jaxeco.pretrained import Pretrained, Report

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "gpt2_tiny.safetensors"
NEW = -1.0  # what the model's parameters begin with

MODEL = {
    "trunk": {
        "token_embed": {"embedding": np.full((5, 2), NEW, np.float32)},
        "block_0": {"up": {"kernel": np.full((2, 3), NEW, np.float32)}},
    },
    "head": {"kernel": np.full((2, 4), NEW, np.float32), "bias": np.full(4, NEW, np.float32)},
}
EMBEDDING = np.arange(10, dtype=np.float32).reshape(5, 2)
UP = np.array([[1, 2, 3], [4, 5, 6]], np.float16)


@pytest.fixture
def file(tmp_path):
    """The trunk's weights, and one that the model has no place for."""
    path = tmp_path / "trunk.safetensors"
    arrays = {
        "trunk/token_embed/embedding": EMBEDDING,
        "trunk/block_0/up/kernel": UP,
        "trunk/block_1/up/kernel": UP,
    }
    trees.write(path, arrays, {"tokenizer": "abc", "step": "7"})
    return str(path)


def test_what_names_share_is_taken_over_and_the_rest_is_said(file):
    params, report = Pretrained(file).load(MODEL)
    np.testing.assert_array_equal(params["trunk"]["token_embed"]["embedding"], EMBEDDING)
    np.testing.assert_array_equal(params["trunk"]["block_0"]["up"]["kernel"], UP)
    assert params["head"] == MODEL["head"]  # the very arrays
    assert jax.tree.structure(params) == jax.tree.structure(MODEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert set(report.loaded) == {"trunk/token_embed/embedding", "trunk/block_0/up/kernel"}
    assert report.rows() == [
        ("starts from", f"2 of 4 arrays of {file}"),
        ("  new", "head/bias, head/kernel"),
        ("  unused", "trunk/block_1/up/kernel"),
    ]


def test_long_lists_are_cut():
    report = Report("x", ("a",), tuple(f"layer_{i}" for i in range(9)), ())
    assert report.rows()[1] == ("  new", "layer_0, layer_1, layer_2, layer_3 and 5 more")


def test_another_shape_is_an_error_or_begins_anew(file):
    model = {"trunk": {**MODEL["trunk"], "block_0": {"up": {"kernel": np.zeros((2, 7))}}}}
    with pytest.raises(UserError, match=r"block_0/up/kernel is \[2, 3\] there, \[2, 7\] here"):
        Pretrained(file).load(model)
    params, report = Pretrained(file, mismatch="fresh").load(model)
    assert params["trunk"]["block_0"]["up"]["kernel"].shape == (2, 7)
    assert "trunk/block_0/up/kernel" in report.fresh
    assert report.rows()[-1][1] == "trunk/block_0/up/kernel is [2, 3] there, [2, 7] here"
    assert report.loaded == ("trunk/token_embed/embedding",)


def test_renaming_and_what_is_to_stay_new(file):
    rename = (("^trunk/", "encoder/"), ("up", "down"))
    encoder = {"encoder": {"block_1": {"down": {"kernel": np.zeros((2, 3))}}}}
    params, _ = Pretrained(file, rename=rename).load(encoder)
    np.testing.assert_array_equal(params["encoder"]["block_1"]["down"]["kernel"], UP)
    params, report = Pretrained(file, fresh=(".*embed.*",)).load(MODEL)
    assert (params["trunk"]["token_embed"]["embedding"] == NEW).all()
    assert report.loaded == ("trunk/block_0/up/kernel",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rename": (("^body/", "trunk/"),)}, r"'\^body/' is in no name"),
        ({"rename": (("block_.", "block"),)}, "makes two parameters 'trunk/block/up/kernel'"),
        ({"fresh": ("embed",)}, "'embed' matches no parameter of the model"),
        ({"rename": (("^", "x/"),)}, "has nothing for this model: it has x/trunk"),
        ({"checkpoint": "best"}, "only a run's folder has a checkpoint"),
        ({"path": "runs/none"}, "there is no run in runs/none.*--workdir runs/none"),
        ({"path": str(ROOT)}, "there is no run in"),
        ({"path": __file__}, "is not a safetensors file"),
    ],
)
def test_what_does_not_fit_is_one_line(file, change, says):
    with pytest.raises(UserError, match=says) as error:
        Pretrained(**{"path": file, **change}).load(MODEL)
    assert "\n" not in str(error.value)


def test_a_bad_field_fails_where_it_is_written():
    for field, says in (
        ({"rename": ("a", "b")}, "expected .pattern, replacement"),
        ({"fresh": ("(",)}, "not a regular expression"),
        ({"mismatch": "ignore"}, "expected error or fresh"),
        ({"checkpoint": "first"}, "expected best, newest, a step or None"),
    ):
        with pytest.raises(ValueError, match=says):
            Pretrained("x", **field)


def test_tokens_must_stand_for_the_same_text(file):
    Pretrained(file).load(MODEL, "abc")
    Pretrained(file).load(MODEL, None)
    with pytest.raises(UserError, match=r"tokenizer \(abc\) than this run's data has \(xyz\)"):
        Pretrained(file).load(MODEL, "xyz")
    Pretrained(file, fresh=(".*token_embed.*",)).load(MODEL, "xyz")  # what depends on it is new


def save(run, step, metrics=None, params=None, **description):
    params = params or {"head": {"kernel": jnp.full((2, 4), step, jnp.float32)}}
    with Checkpoints(
        run / "checkpoints", description=description, keep=9, best="test/accuracy"
    ) as checkpoints:
        checkpoints.save({"params": params, "opt_state": jnp.zeros(3)}, metrics, step=step)


def test_a_runs_best_checkpoint_or_newest_or_any(tmp_path):
    def loaded(checkpoint=None):
        params, report = Pretrained(str(tmp_path), checkpoint).load(MODEL)
        return params["head"]["kernel"][0, 0], report.origin

    save(tmp_path, 1000, tokenizer="abc")
    assert loaded() == (1000, f"{tmp_path} step 1,000")  # none is the best
    save(tmp_path, 2000, {"test/accuracy": 0.9}, tokenizer="abc")
    save(tmp_path, 3000, {"test/accuracy": 0.8}, tokenizer="abc")
    assert [loaded(c)[0] for c in (None, "best", "newest", 1000)] == [2000, 2000, 3000, 1000]
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        loaded(5)
    embeds = {"token_embed": {"embedding": jnp.ones((5, 2))}}
    save(tmp_path, 4000, params={"trunk": embeds}, tokenizer="abc")
    with pytest.raises(UserError, match="step 4,000 was trained with another tokenizer"):
        Pretrained(str(tmp_path), "newest").load(MODEL, "xyz")


def test_a_lora_model_takes_the_source_as_its_base(file, tmp_path):
    model = {"base": MODEL, "lora": {"head": {"kernel": {"a": np.ones((2, 1))}}}}
    params, report = Pretrained(file).load(model)
    np.testing.assert_array_equal(params["base"]["trunk"]["block_0"]["up"]["kernel"], UP)
    assert "lora/head/kernel/a" in report.fresh
    both = tmp_path / "both.safetensors"
    trees.write(both, trees.named(params), {})
    _, report = Pretrained(str(both)).load(model)
    assert not report.fresh and not report.unused
    with pytest.raises(UserError, match="--merge-lora"):
        Pretrained(str(both)).load(MODEL)


# The files themselves


def test_a_file_holds_every_dtype_and_any_layout(tmp_path):
    arrays = {
        "half": np.array([1.5, -2], ml_dtypes.bfloat16),
        "jax": jnp.array([0.5], jnp.bfloat16),
        "number": np.array(3, np.int32),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "empty": np.zeros((0, 2), np.float32),
    }
    trees.write(tmp_path / "x.safetensors", arrays, {"experiment": "ü"})
    read, metadata = trees.read(tmp_path / "x.safetensors")
    assert metadata == {"experiment": "ü"} and read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], np.asarray(array))


def test_a_file_that_is_not_whole_is_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    trees.write(path, {"w": np.ones(100)}, {})
    whole = path.read_bytes()
    for part in (whole[:-1], whole[:20], whole[:3], b"", b"<html>not found</html>"):
        path.write_bytes(part)
        with pytest.raises(UserError, match="not a safetensors file, or is cut off") as error:
            trees.read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        trees.read(tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"cannot write .*: No such file"):
        trees.write(tmp_path / "no" / "x.safetensors", {}, {})


# GPT-2


def logits_agree(path):
    arrays, _ = trees.read(path)
    tokens_BxT, expected_BxTxV = arrays["golden.tokens"], arrays["golden.logits"]
    model = LanguageModel(Transformer(vocab_size=61, context=32, layers=2, heads=3, width=24))
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens_BxT, train=False))
    params, report = Pretrained(str(path)).load(fresh["params"])
    assert not report.fresh and set(report.unused) == {"golden.tokens", "golden.logits"}
    got_BxTxV = jax.jit(lambda p: model.apply({"params": p}, tokens_BxT, train=False))(params)
    np.testing.assert_allclose(got_BxTxV, expected_BxTxV, atol=1e-4)


def test_gpt2_gives_hugging_faces_logits():
    logits_agree(GOLDEN)


def test_gpt2_gives_hugging_faces_logits_now(tmp_path):
    for peer in ("torch", "transformers"):
        if importlib.util.find_spec(peer) is None:
            pytest.skip(f"{peer} is not installed: pip install 'jaxeco[peers]'")
    script = ROOT / "scripts" / "gpt2_golden.py"
    path = tmp_path / "gpt2.safetensors"
    subprocess.run([sys.executable, script, path, "--seed", "1"], check=True)
    logits_agree(path)


def test_older_files_of_gpt2():
    """Without "transformer." before the names; with the causal masks, and a head of its own."""
    attention = np.arange(3 * 4).reshape(1, 12)
    got = convert(
        {
            "h.11.attn.c_attn.weight": attention,
            "h.11.attn.bias": np.tril(np.ones((1, 1, 8, 8))),
            "h.11.attn.masked_bias": np.array(-1e4),
            "h.11.ln_2.weight": np.ones(4),
            "lm_head.weight": np.zeros((7, 4)),
        }
    )
    assert list(got) == [
        *(f"trunk/block_11/{part}/kernel" for part in ("query", "key", "value")),
        "trunk/block_11/norm2/scale",
        "head/kernel",
    ]
    assert got["trunk/block_11/key/kernel"].tolist() == [[4, 5, 6, 7]]
    assert got["head/kernel"].shape == (4, 7)


# The command

EXPERIMENT = """
from jaxeco import data, losses, models, optim
from jaxeco.experiment import Experiment, Steps
from jaxeco.models.lora import Lora

def experiment(rank=1):
    return Experiment(
        name="tiny", train=data.Digits("train"), evals={}, loss=losses.SoftmaxCrossEntropy(),
        model=Lora(models.MLP((3,)), rank=rank, alpha=2.0, targets="Dense_0/kernel"),
        optimizer=optim.SGD(0.1), batch=8, length=Steps(1),
    )
"""


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint, of a model that adapts one kernel."""
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    loaded = config.load(tmp_path / "tiny.py")
    path = tmp_path / "run"
    path.mkdir()
    folder.record(path, loaded, first_step=0)
    base = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    a, b = jnp.array([[1.0], [10.0]]), jnp.array([[1.0, 2.0, 3.0]])
    params = {"base": base, "lora": {"Dense_0": {"kernel": {"a": a, "b": b}}}}
    save(path, 40, params=params, tokenizer="abc")
    return path


def test_the_command_writes_a_runs_weights(run, tmp_path, capsys):
    out = tmp_path / "w.safetensors"

    def export(*words):
        assert weights.main([str(run), "-o", str(out), *words]) == 0
        return trees.read(out)

    arrays, metadata = export()
    names = ["base/Dense_0/bias", "base/Dense_0/kernel"]
    adaptation = ["lora/Dense_0/kernel/a", "lora/Dense_0/kernel/b"]
    assert sorted(arrays) == names + adaptation
    assert metadata == {
        "experiment": "tiny", "step": "40", "tokenizer": "abc", "lora_alpha": "2.0"
    }  # fmt: skip
    assert "14 numbers in 4 arrays" in capsys.readouterr().out
    assert sorted(export("--only", "lora", "--checkpoint", "40")[0]) == adaptation
    merged, _ = export("--merge-lora", "--checkpoint", "newest")
    assert sorted(merged) == ["Dense_0/bias", "Dense_0/kernel"]
    np.testing.assert_allclose(merged["Dense_0/kernel"], [[3, 5, 7], [21, 41, 61]])  # 1 + 2/1·A·B


def test_the_commands_mistakes_are_one_line(run, tmp_path):
    for words, says in (
        ([str(run), "-o", "x.safetensors", "--only", "head"], "no such part; it has base, lora"),
        ([str(run), "-o", "x.safetensors", "--only", "lora", "--merge-lora"], "leave out --only"),
        (
            [str(run), "-o", "x.safetensors", "--checkpoint", "last"],
            "expected best, newest",
        ),
        ([str(run), "-o", "x.safetensors", "--checkpoint", "best"], "decides which is best"),
        ([str(tmp_path), "-o", "x.safetensors"], "is not the folder of a run"),
        ([str(run)], "required: -o/--output"),
    ):
        with pytest.raises(UserError, match=says) as error:
            weights.main(words)
        assert "\n" not in str(error.value)
