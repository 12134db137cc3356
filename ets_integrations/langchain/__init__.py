"""Tree search for LangChain: a chat model, a Runnable, a tool, and what connects verifiers and policies.

>>> from ets_integrations.langchain import ChatETS
>>> ChatETS(model="reference", width=4)._llm_type
'ets'
"""

from ets_integrations.langchain.chat import ChatETS
from ets_integrations.langchain.policy import LangChainPolicy
from ets_integrations.langchain.runnable import ETSRunnable, ets_tool
from ets_integrations.langchain.verifiers import RunnableVerifier, judge

__all__ = ["ChatETS", "ETSRunnable", "LangChainPolicy", "RunnableVerifier", "ets_tool", "judge"]
