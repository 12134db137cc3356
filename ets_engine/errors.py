"""Every error this package raises on purpose, so that callers can catch by meaning.

    ETSError
    ├── ConfigError            (also ValueError)    a setting is out of range or contradicts another
    ├── ModelLoadError                              a model, tokenizer or file cannot be loaded
    │   └── UnsupportedModelError                   it loads, but tree attention cannot honour its architecture
    ├── ReferenceDomainError   (also ValueError)    a problem outside what the shipped models were trained on
    ├── ContextLengthError     (also ValueError)    the prompt alone does not fit the model or the budget
    ├── PoolExhaustedError     (also MemoryError)   no free KV page is left
    └── ProtocolError                               a policy, verifier, embedder or selector broke its contract

Each message names the offending value and the way out.
"""


class ETSError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(ETSError, ValueError):
    """A setting is out of range or contradicts another setting."""


class ModelLoadError(ETSError):
    """A model, a tokenizer or one of their files cannot be loaded."""


class UnsupportedModelError(ModelLoadError):
    """A model loads, but its attention or state cannot be honoured by the tree KV cache."""


class ReferenceDomainError(ETSError, ValueError):
    """A problem is outside the two families that the shipped reference models know."""


class ContextLengthError(ETSError, ValueError):
    """A prompt alone does not fit the model's context or the KV budget."""


class PoolExhaustedError(ETSError, MemoryError):
    """The KV pool has no free page left for the tokens to be written."""


class ProtocolError(ETSError):
    """A policy, verifier, embedder or selector returned what its protocol does not allow."""
