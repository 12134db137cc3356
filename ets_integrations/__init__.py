"""Tree search as a drop-in for one plain LLM call, in LangChain and DSPy programs.

Each framework's adapters need its extra, and only that one:

    pip install "ets-integrations[langchain]"    # chat model, Runnable
    pip install "ets-integrations[agents]"       # agent middleware
    pip install "ets-integrations[dspy]"         # DSPy LM and module

Importing this package loads neither framework, nor any model library.
"""
