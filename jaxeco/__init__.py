"""jaxeco: a JAX/Flax research codebase in which a run is a pure function of (experiment, seed)."""

__version__ = "0.1.0"
