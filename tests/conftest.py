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
# What is compiled here runs for milliseconds: to optimise it takes a third of the tests' time. A
# value of your own in XLA_FLAGS wins.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from jaxeco import runtime

runtime.configure(fake_devices=8)
