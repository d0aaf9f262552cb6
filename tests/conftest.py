"""Tests run on eight fake CPU devices, without network, and leave nothing behind."""

import atexit
import os
import shutil
import tempfile

CACHE = tempfile.mkdtemp(prefix="jaxeco-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAXECO_CACHE"] = CACHE
os.environ["MPLBACKEND"] = "agg"

from jaxeco import runtime

runtime.configure(fake_devices=8)
