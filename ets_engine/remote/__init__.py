"""Tree search over models behind OpenAI-compatible servers: vLLM, SGLang, `transformers serve` and others."""

from ets_engine.remote.address import Address
from ets_engine.remote.description import ServerDescription
from ets_engine.remote.engine import RemoteEngine, connect
from ets_engine.remote.metrics import ServerMetrics
from ets_engine.remote.policy import RemotePolicy
from ets_engine.remote.prompts import PromptWriter
from ets_engine.remote.replicas import Replicas
from ets_engine.remote.server import Server, ServerError
from ets_engine.remote.verifier import JudgeVerifier, PoolingVerifier

__all__ = [
    "Address",
    "JudgeVerifier",
    "PoolingVerifier",
    "PromptWriter",
    "RemoteEngine",
    "RemotePolicy",
    "Replicas",
    "Server",
    "ServerDescription",
    "ServerError",
    "ServerMetrics",
    "connect",
]
