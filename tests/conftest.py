"""Tests run on eight fake CPU devices, without network, and leave nothing outside their folder."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAXECO_CACHE"] = tempfile.mkdtemp(prefix="jaxeco-tests-")
os.environ["MPLBACKEND"] = "agg"

from jaxeco import runtime

runtime.configure(fake_devices=8)
