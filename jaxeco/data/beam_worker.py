"""What a worker of Apache Beam imports before anything else (Beam's option `beam_plugin`).

Where TensorFlow is not installed, tfds's builders then find the stand-in for it, as in the process
that started them.
"""

import importlib.util

from tensorflow_datasets.core.utils import lazy_imports_utils

from jaxeco.data.prepare import stand_in

if importlib.util.find_spec("tensorflow") is None:
    vars(lazy_imports_utils.tensorflow)["_module"] = stand_in()
