"""jaxlm: a laboratory for small language models, from raw text to a trained, resumable, sampled model."""

__version__ = "0.1.0"
