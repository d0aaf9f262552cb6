"""The sampling command, on a run's folder as a run leaves it."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxeco import generate, sample
from jaxeco.checkpoint import Checkpoints
from jaxeco.data.tokenizers import Bytes, load_tokenizer
from jaxeco.errors import UserError
from jaxeco.models import LanguageModel, Transformer

EXPERIMENT = """
import numpy as np
from jaxeco import data, losses, models, optim
from jaxeco.experiment import Experiment, Steps

def experiment(width: int = 8, causal: bool = True, classify: bool = False):
    trunk = models.Transformer(vocab_size=VOCAB, context=32, layers=1, heads=2, width=width,
                               init_sd=0.5, causal=causal)
    tokens = data.Arrays(np.zeros((4, 8), np.int32), np.zeros((4, 8), np.int32))
    return Experiment(
        name="text", train=tokens, evals={}, loss=losses.SoftmaxCrossEntropy(),
        model=models.TextClassifier(trunk, 2) if classify else models.LanguageModel(trunk),
        optimizer=optim.Momentum(lr=0.1), batch=2, length=Steps(1),
    )
"""
LETTERS = "\n :EMORabcdefgh"  # the vocabulary of the run, sorted
MODEL = LanguageModel(
    Transformer(vocab_size=len(LETTERS), context=32, layers=1, heads=2, width=8, init_sd=0.5)
)
Params = dict[int, Any]  # of each checkpoint, by step


def write_record(folder: Path, *words: str) -> None:
    (folder / "run.json").write_text(json.dumps({"assignments": list(words)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params]:
    """A run whose checkpoint of step 1 is its best, and that of step 2 its newest."""
    folder = tmp_path_factory.mktemp("runs") / "text"
    folder.mkdir()
    (folder / "experiment.py").write_text(EXPERIMENT.replace("VOCAB", str(len(LETTERS))))
    write_record(folder)
    alphabet = {"jaxeco_tokenizer": "characters", "alphabet": LETTERS, "specials": False}
    (folder / "tokenizer.json").write_text(json.dumps(alphabet))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    init = jax.jit(lambda key: MODEL.init(key, np.zeros((1, 4), np.int32), train=False)["params"])
    params = {step: jax.device_get(init(jax.random.key(step))) for step in (1, 2)}
    description = {"tokenizer": tokenizer.fingerprint}
    with Checkpoints(folder / "checkpoints", description=description, best="loss",
                     best_mode="min") as checkpoints:  # fmt: skip
        for step, loss in ((1, 0.5), (2, 0.7)):
            checkpoints.save({"params": params[step]}, {"loss": loss}, step=step)
    return folder, params


@pytest.fixture
def run(whole: tuple[Path, Params], tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return Path(shutil.copytree(whole[0], tmp_path / "text"))


def expected(whole: tuple[Path, Params], step: int, prompts: list[str], **arguments: Any) -> list:
    folder, params = whole
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    return generate.generate(MODEL, params[step], tokenizer, prompts, **arguments)


def test_text_goes_to_standard_output_alone(
    whole: tuple[Path, Params], capsys: pytest.CaptureFixture[str]
) -> None:
    [text] = expected(whole, 1, ["ROME:"], tokens=70, seed=3)
    words = [str(whole[0]), "--prompt", "ROME:", "--tokens", "70", "--seed", "3"]
    assert sample.main(words) == 0
    out, err = capsys.readouterr()
    assert out == f"ROME:{text}\n"
    assert len(text) == 70
    assert err.startswith("70 tokens, ")
    assert err.endswith(f" tokens/s once compiled; {whole[0]} step 1\n")  # the best


def test_which_checkpoint(
    whole: tuple[Path, Params], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("ROME:")
    words = [str(whole[0]), "--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "70"]
    for which, step in (("newest", 2), ("2", 2), ("best", 1), ("1", 1)):
        assert sample.main([*words, "--checkpoint", which]) == 0
        [text] = expected(whole, step, ["ROME:"], tokens=70)
        assert capsys.readouterr().out == f"ROME:{text}\n"


def test_samples_stand_below_one_another_each_to_its_end(
    whole: tuple[Path, Params], capsys: pytest.CaptureFixture[str]
) -> None:
    [first, second] = expected(whole, 1, ["", ""], tokens=70)  # it begins with a line's end
    stop = first[40:42]
    assert sample.main([str(whole[0]), "--samples", "2", "--tokens", "70", "--stop", stop]) == 0
    first, second = first.split(stop)[0], second.split(stop)[0]
    assert capsys.readouterr().out == f"--- 1 of 2\n{first}\n--- 2 of 2\n{second}\n"


def test_a_prompt_longer_than_the_context_is_said_to_be_cut(
    whole: tuple[Path, Params], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main([str(whole[0]), "--prompt", "abcdefgh" * 5, "--tokens", "70"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("abcdefgh" * 5)
    assert "the prompt has 40 tokens, the context 32: only the last 16 are read\n" in err


def test_ctrl_c_leaves_the_text_so_far(
    whole: tuple[Path, Params],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [text] = expected(whole, 1, ["ROME:"], tokens=70)
    stream = generate.stream

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, pieces in enumerate(stream(*args, **kwargs)):
            if i == 1:
                signal.raise_signal(signal.SIGINT)
            yield pieces

    monkeypatch.setattr(generate, "stream", interrupted)
    assert sample.main([str(whole[0]), "--prompt", "ROME:", "--tokens", "100000"]) == 130
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert 32 < len(out) < 70
    assert f"ROME:{text}".startswith(out[:-1])
    assert "tokens" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens 0: expected at least 1"),
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--samples", "two"], "invalid int value"),
        (["--seed", "-1"], "--seed -1"),
        (["--stop", ""], "--stop '': expected a text"),
        (["--temperature", "-1"], "temperature=-1.0: expected"),
        (["--temperature", "0", "--top-k", "3"], "leave out top_k"),
        (["--top-k", "0"], "top_k=0"),
        (["--top-p", "1.5"], "top_p=1.5"),
        (["--min-p", "0"], "min_p=0"),
        (["--repetition-penalty", "0"], "repetition_penalty=0"),
        (["--prompt", "ROMEX"], r"character 'X' \(U\+0058\) at 4"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--checkpoint", "worst"], "'worst': expected best, newest or a step"),
        (["--checkpoint", "7"], r"no checkpoint of step 7 .* it has \[1, 2\]"),
        (["--top", "3"], "unrecognized arguments: --top"),
        (["width=3"], "unrecognized arguments: width=3"),
    ],
)
def test_bad_words(
    words: list[str], message: str, whole: tuple[Path, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused([str(whole[0]), *words], message, monkeypatch)


def check_refused(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for the user, before anything is compiled."""
    monkeypatch.setattr(generate, "stream", None)
    with pytest.raises(UserError, match=message) as error:
        sample.main(words)
    assert error.value.status == 2
    assert "\n" not in str(error.value)


def test_folders_that_will_not_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused([str(tmp_path)], "is not the folder of a run", monkeypatch)
    write_record(run, "classify=true")
    check_refused([str(run)], "a TextClassifier, expected a LanguageModel", monkeypatch)
    write_record(run, "causal=false")
    check_refused([str(run)], "an encoder, expected causal=True", monkeypatch)
    write_record(run, "width=16")
    check_refused([str(run)], "step 1 has other parameters than the model", monkeypatch)
    write_record(run)
    Bytes().open().save(run / "tokenizer.json")
    check_refused([str(run)], "was trained with tokenizer", monkeypatch)
    (run / "tokenizer.json").unlink()
    check_refused([str(run)], "tokenizer.json: No such file", monkeypatch)
    shutil.copy(Path(__file__), run / "tokenizer.json")
    check_refused([str(run)], "not a tokenizer", monkeypatch)


def test_a_prompt_file_that_is_not_text(whole: tuple[Path, Params], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "image").write_bytes(b"\xff\xd8")
    words = [str(whole[0]), "--prompt-file", str(tmp_path / "image")]
    check_refused(words, "not text in UTF-8", monkeypatch)
