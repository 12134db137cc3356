"""Recipe: a searched model that falls back to a plain one where it cannot answer.

python cookbook/langchain_fallbacks.py

The shipped models know two kinds of problems and refuse the rest with a typed error; a stand-in plays the plain model.
"""

from __future__ import annotations

import argparse

from langchain_core.language_models import FakeListChatModel

from ets_engine import EngineError, NoUsableAnswerError, ReferenceDomainError
from ets_integrations.langchain import ChatETS

QUESTIONS = ("Use 1, 3, 7 and 17 to make 22.", "Who wrote Faust?")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    plain = FakeListChatModel(responses=["Goethe did."])
    search = ChatETS(model="reference", width=16, seed=0, output="answer", timeout=30)
    model = search.with_fallbacks(
        [plain], exceptions_to_handle=(ReferenceDomainError, NoUsableAnswerError, EngineError)
    )
    for question in QUESTIONS:
        message = model.invoke(question)
        by = "tree search" if "ets" in message.response_metadata else "plain model"
        print(f"{question:34}{message.text:20}{by}")


if __name__ == "__main__":
    main()
