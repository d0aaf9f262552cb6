"""tfds's builders that use Apache Beam: refused by themselves, prepared when asked to, without
TensorFlow, by Beam's own runner in one process and in several."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from tensorflow_datasets.core.utils.lazy_imports_utils import apache_beam as lazy_beam

from jaxeco import prepare
from jaxeco.data.tfds import Tfds
from jaxeco.errors import UserError

try:
    import apache_beam
except ImportError:
    apache_beam = None

needs_beam = pytest.mark.skipif(apache_beam is None, reason="apache_beam is not installed")
MODES = [
    "direct_running_mode=in_memory",
    "direct_running_mode=multi_processing,direct_num_workers=2",
]


class JaxecoBeam(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        x, y = features.Image(shape=(4, 5, 3)), features.ClassLabel(num_classes=3)
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=features.FeaturesDict({"image": x, "label": y})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(60), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        return lazy_beam.Create(range(count)) | lazy_beam.Map(example)


def example(i):
    pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
    return i, {"image": pixels, "label": i % 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXECO_CACHE", str(tmp_path / "cache"))


def test_a_set_that_beam_prepares_is_not_begun_by_itself(tmp_path):
    message = r"uses Apache Beam.* `python -m jaxeco.prepare jaxeco_beam/1.0.0 --beam-pipeline"
    with pytest.raises(UserError, match=message) as caught:
        Tfds("jaxeco_beam", "train", data_dir=tmp_path).open()
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("jaxeco_beam/*"))


def test_prepare_is_for_sets_without_beam_as_well(tmp_path):
    with pytest.raises(UserError, match="no data set 'cifar11'; did you mean"):
        prepare.main(["cifar11", "--data-dir", str(tmp_path)])


@pytest.mark.skipif(apache_beam is not None, reason="apache_beam is installed")
def test_without_beam_its_options_are_a_mistake(tmp_path):
    words = ["jaxeco_beam", "--data-dir", str(tmp_path), "--beam-pipeline-options", "runner=x"]
    with pytest.raises(UserError, match="Apache Beam is not installed: `pip install apache-beam`"):
        prepare.main(words)


@needs_beam
@pytest.mark.parametrize("mode", MODES)
def test_beams_own_runner_prepares_without_tensorflow(tmp_path, mode):
    """In a process of its own, which Beam fills with threads and logs."""
    here = str(Path(__file__).parent)
    script = "import test_data_beam, sys; from jaxeco import prepare; prepare.main(sys.argv[1:]);"
    script += "assert 'tensorflow' not in sys.modules"
    words = ["jaxeco_beam", "--data-dir", str(tmp_path), "--beam-pipeline-options"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words, f"runner=DirectRunner,{mode}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"is at {tmp_path}/jaxeco_beam/1.0.0" in done.stderr
    for split, count in (("train", 60), ("test", 7)):
        dataset = Tfds("jaxeco_beam", split, data_dir=tmp_path).open()
        rows = np.arange(len(dataset))
        got = {x.tobytes(): y for x, y in zip(dataset.fields["x"][rows], dataset.fields["y"][rows])}
        expected = [example(i)[1] for i in range(count)]
        assert got == {one["image"].tobytes(): one["label"] for one in expected}
    assert "tensorflow" not in sys.modules
