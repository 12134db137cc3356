"""The shipped test doubles keep their own contracts, every docstring example runs, and nothing heavy is imported."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ets_engine.search
from ets_engine.errors import ProtocolError
from ets_engine.protocols import Embedder, Policy, Verifier
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import Step, StopReason

MODULES = ["ets_engine.testing"] + [
    f"ets_engine.search.{module.name}" for module in pkgutil.iter_modules(ets_engine.search.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_names_are_sorted_and_there():
    assert ets_engine.search.__all__ == sorted(ets_engine.search.__all__)
    assert all(hasattr(ets_engine.search, name) for name in ets_engine.search.__all__)


def test_search_imports_nothing_heavy():
    code = (
        "import sys, ets_engine.search, ets_engine.testing; print({'torch', 'transformers', 'triton'} & {*sys.modules})"
    )
    root = Path(ets_engine.search.__path__[0]).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"


def test_fakes_are_what_they_stand_for():
    assert isinstance(FakePolicy(), Policy)
    assert isinstance(TableVerifier(), Verifier)
    assert isinstance(HashEmbedder(), Embedder)


def test_made_up_steps_depend_on_seed_and_node_only():
    first, second = FakePolicy(seed=7), FakePolicy(seed=7)
    first.start(), second.start()
    together = first.expand([0, 0], [1, 2])
    assert [*second.expand([0], [1]), *second.expand([0], [2])] == together
    other = FakePolicy(seed=8)
    other.start()
    assert other.expand([0, 0], [1, 2]) != together


def test_finish_chance():
    always, never = FakePolicy(finish_chance=1.0), FakePolicy(finish_chance=0.0)
    always.start(), never.start()
    assert always.expand([0], [1])[0].stop is StopReason.FINISHED
    assert never.expand([0], [1])[0].stop is StopReason.BOUNDARY


def test_the_policy_keeps_account_of_its_cache():
    policy = FakePolicy(prompt_tokens=5, script=[[Step("a", 2), Step("b", 3)], [Step("c", 4)]])
    policy.start()
    policy.retain([0])
    policy.expand([0, 0], [1, 2])
    policy.retain([1])
    assert policy.resident == {0: 5, 1: 2}
    policy.expand([1], [3])
    assert (policy.resident_tokens, policy.peak_tokens) == (11, 11)
    policy.retain([])
    assert policy.resident_tokens == 0


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda policy: policy.expand([9], [10]), "node 9 is not resident"),
        (lambda policy: policy.expand([0], [0]), "node 0 exists already"),
        (lambda policy: policy.retain([9]), "node 9 is not resident"),
        (lambda policy: policy.expand([0], [1]), "the script ends before expand call 1"),
    ],
)
def test_misuse_of_the_policy_is_refused(misuse, message):
    policy = FakePolicy(script=[])
    policy.start()
    with pytest.raises(ProtocolError, match=message):
        misuse(policy)


def test_verifier_defaults():
    assert TableVerifier({"a": 0.1}, default=lambda text: len(text) / 10).score([1, 2], [0, 0], ["a", "bbb"]) == [
        0.1,
        0.3,
    ]


def test_embedder_is_stable_and_handles_empty_text():
    vectors = HashEmbedder(dim=8).embed([1, 2, 3], ["x is 5", "", "x is 5"])
    assert vectors.shape == (3, 8)
    assert (vectors[0] == vectors[2]).all()
    assert not vectors[1].any()
    assert np.isfinite(vectors).all()
