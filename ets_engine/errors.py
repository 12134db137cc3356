"""Every error this package raises on purpose, so that callers can catch by meaning.

    ETSError
    ├── ConfigError            (also ValueError)    a setting is out of range or contradicts another
    ├── ModelLoadError                              a model, tokenizer or file cannot be loaded
    │   └── UnsupportedModelError                   it loads, but tree attention cannot honour its architecture
    ├── ReferenceDomainError   (also ValueError)    a problem outside what the shipped models were trained on
    ├── ContextLengthError     (also ValueError)    the prompt alone does not fit the model or the budget
    ├── PoolExhaustedError     (also MemoryError)   no free KV page is left
    ├── ProtocolError                               a policy, verifier, embedder or selector broke its contract
    ├── NoUsableAnswerError                         no branch ended in what the request demands
    └── EngineError                                 the engine cannot take or finish a search
        ├── EngineClosedError                       it was closed, or lives in another process
        └── QueueFullError                          too many searches wait already

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


class NoUsableAnswerError(ETSError):
    """No branch ended in an answer that the request allows, a tool call that it demands, say."""


class EngineError(ETSError):
    """An engine cannot take a search, or could not finish it through no fault of the caller's."""


class EngineClosedError(EngineError):
    """The engine was closed, or this process is a fork of the one that it lives in."""


class QueueFullError(EngineError):
    """As many searches wait as `EngineConfig.max_queued_searches` allows; try again later."""
