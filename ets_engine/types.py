"""Frozen values that travel through a search; they know no model, no device and no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict


class StopReason(StrEnum):
    """Why a step ended; only `BOUNDARY` leaves its node open for further steps."""

    BOUNDARY = "boundary"  # a step boundary: the path goes on
    FINISHED = "finished"  # end of the solution: the path is a trajectory with an answer
    LENGTH = "length"  # out of tokens or context: consumes width, never votes
    ERROR = "error"  # the policy or verifier failed on this branch: consumes width, never votes


@dataclass(frozen=True, slots=True)
class Step:
    """What a policy proposes for one child: the text between two step boundaries.

    Attributes:
        text: Decoded text of the step, its boundary included.
        num_tokens: KV tokens the step adds to its path, >= 0.
        stop: Why the step ended.
        error: One line saying what failed, only with `StopReason.ERROR`.
    """

    text: str
    num_tokens: int
    stop: StopReason = StopReason.BOUNDARY
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """One step in the search tree; the root holds the prompt.

    Attributes:
        id: Position in the tree, root 0, parents before children.
        parent: Id of the parent, -1 for the root.
        depth: Steps below the root, root 0.
        step: Text, token count and stop reason.
        step_score: Verifier's score in [0, 1]; the root's is 1.0.
    """

    id: int
    parent: int
    depth: int
    step: Step
    step_score: float


class Value(BaseModel):
    """Base of the public result types: frozen, strict about unknown fields, JSON in and out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScoredStep(Value):
    """One step of a trajectory and its score in [0, 1]."""

    text: str
    score: float
    num_tokens: int


class Candidate(Value):
    """One distinct answer and what speaks for it.

    Attributes:
        answer: The answer as its best trajectory wrote it.
        votes: Trajectories that gave it (count).
        weight: Sum of their trajectory scores.
        score: Best trajectory score among them, in [0, 1].
        steps: That best trajectory.
    """

    answer: str
    votes: int
    weight: float
    score: float
    steps: tuple[ScoredStep, ...]


class KVStats(Value):
    """KV-cache figures of one search for one model; tokens are distinct tree tokens.

    Attributes:
        peak_tokens: Most tokens resident at any decode step.
        mean_tokens: Mean of resident tokens over decode steps.
        bytes_per_token: Layers x 2 x KV heads x head dim x itemsize.
        unique_tokens: Distinct tokens over all nodes ever created: what steps share, as equal ones do, counts once.
        path_tokens: Sum over all leaves ever created of their whole path.
        published_tokens: The published cumulative metric: tokens on the union of root-to-candidate
            paths, before pruning, summed over selections; None for a verifier, the metric counts the policy's.
    """

    peak_tokens: int
    mean_tokens: float
    bytes_per_token: int
    unique_tokens: int
    path_tokens: int
    published_tokens: int | None

    @property
    def sharing_ratio(self) -> float:
        """`path_tokens / unique_tokens`, >= 1; 1.0 means that nothing is shared."""
        return self.path_tokens / self.unique_tokens if self.unique_tokens else 1.0

    @property
    def peak_bytes(self) -> int:
        """Most bytes resident at any decode step."""
        return self.peak_tokens * self.bytes_per_token

    @property
    def mean_bytes(self) -> float:
        """Mean bytes resident over decode steps."""
        return self.mean_tokens * self.bytes_per_token


class Timing(Value):
    """Where the wall time went (seconds) and what had to move through memory (bytes).

    Attributes:
        wall_s: From the call to the result.
        policy_s: In forward passes of the policy, sampling included.
        verifier_s: In forward passes of the verifier.
        select_s: In the selector (allocation, clustering, integer program).
        bytes_moved: Weights plus distinct KV read, summed over all forward passes of both models.
        decode_steps: Forward passes of the policy that extend live branches by a token.
        read_tokens: Tokens that the policy's passes computed: one that several branches share once.
    """

    wall_s: float
    policy_s: float
    verifier_s: float
    select_s: float
    bytes_moved: int
    decode_steps: int
    read_tokens: int = 0

    @property
    def bandwidth_gb_s(self) -> float:
        """Achieved memory bandwidth: `bytes_moved` over the seconds spent in forward passes, in GB/s."""
        busy_s = self.policy_s + self.verifier_s
        return self.bytes_moved / busy_s / 1e9 if busy_s > 0 else 0.0


class LeafVerdict(Value):
    """Why a selector kept or pruned one leaf.

    Attributes:
        node: Id of the leaf.
        share: Children granted, 0 = pruned.
        reward: Its normalised reward term (ETS's O_i; the softmax share elsewhere), in [0, 1].
        node_cost: Price of the KV that only this leaf holds, already times lambda_b; 0 where unpriced.
        cluster: Semantic cluster, -1 where the selector does not cluster.
        path_cost: Price of what its path holds beside the paths of the other kept leaves, already times lambda_b; None
            where unpriced.
        coverage: Worth of its cluster where no other kept leaf is in it, else 0, already times lambda_d; None where
            coverage does not count.
        starved: Whether the objective keeps it and the split of the width gives it no child all the same.
    """

    node: int
    share: int
    reward: float = 0.0
    node_cost: float = 0.0
    cluster: int = -1
    path_cost: float | None = None
    coverage: float | None = None
    starved: bool = False

    @property
    def gain(self) -> float:
        """What the objective gains by keeping this leaf beside the other kept ones.

        Where nothing else limits the choice, no kept leaf loses (a single one excepted), and no pruned one gains.
        """
        return self.reward + (self.coverage or 0.0) - (self.path_cost or 0.0)


class TraceNode(Value):
    """One node of the finished tree, for drawing and replay."""

    id: int
    parent: int
    depth: int
    text: str
    num_tokens: int
    step_score: float
    stop: StopReason
    verdict: LeafVerdict | None = None


FinishReason = Literal["stop", "no_answer", "length", "cancelled", "deadline", "error"]


class SearchResult(Value):
    """What a search returns; plain JSON in and out.

    Attributes:
        problem: The problem as asked.
        text: Text of the winning trajectory; of the best path so far when none finished.
        answer: Extracted answer, None when no trajectory gave one.
        score: Trajectory score of the winner in [0, 1], 0.0 when none finished.
        steps: The winning trajectory, step by step.
        candidates: Distinct answers, best first, at most `n_candidates`.
        finish_reason: "stop" with an answer, "no_answer" when solutions finished and none gives a legible answer,
            "length" when every branch ran out, "cancelled" when the caller stopped it and "deadline" when its time was
            up (the best so far is returned), "error" when every branch failed.
        prompt_tokens, generated_tokens, verifier_tokens: Tokens (count); generated over the whole tree.
        cached_prompt_tokens: Of the prompt's, those whose KV an earlier prompt had left (count).
        path_tokens: Tokens of the winning trajectory.
        trajectories: Finished trajectories with or without an answer (count).
        num_errors: Branches that failed (count).
        kv, verifier_kv: KV figures of the policy and of the verifier (None without KV, e.g. a callable).
        timing: Wall time and memory traffic.
        trace: The whole tree with the selector's verdicts, only when asked for.
        seed: Seed that gives this result again.
    """

    problem: str
    text: str
    answer: str | None
    score: float
    steps: tuple[ScoredStep, ...]
    candidates: tuple[Candidate, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_prompt_tokens: int = 0
    generated_tokens: int
    verifier_tokens: int
    path_tokens: int
    trajectories: int
    num_errors: int
    kv: KVStats | None
    verifier_kv: KVStats | None
    timing: Timing
    strategy: str
    width: int
    seed: int
    trace: tuple[TraceNode, ...] | None = None


class EngineStats(Value):
    """What an engine has done since it was made, and what it is doing.

    Attributes:
        policy_tokens, verifier_tokens: Tokens read by each model (count).
        policy_forwards, verifier_forwards: Forward passes (count).
        policy_s, verifier_s: Seconds in forward passes and heads.
        prefix_tokens: Tokens of earlier prompts that are remembered, both models' (count).
        kv_tokens: Tokens resident now, those included (count).
        live, waiting: Searches with KV, and without (count).
        preemptions: Times that a search gave up its KV for the others (count).
    """

    policy_tokens: int
    verifier_tokens: int
    policy_forwards: int
    verifier_forwards: int
    policy_s: float
    verifier_s: float
    prefix_tokens: int
    kv_tokens: int
    live: int
    waiting: int
    preemptions: int


class ModelDescription(Value):
    """What was found in a checkpoint, and what it takes.

    Attributes:
        name: As it was asked for.
        architecture: Of the transformers class.
        format: Preset of a policy; format of a PRM.
        details: What the format means here: prompt, step boundaries, the place of a score.
        attention: How attention runs, and over what.
        dtype: Of weights and KV.
        device: Where it runs.
        parameters: Count.
        weight_bytes: Of all parameters.
        context_tokens: Longest path.
        kv_bytes_per_token: Over all layers.
        kv_pool_tokens: Most KV tokens at once, None = nobody knows what memory is free.
    """

    name: str
    architecture: str
    format: str
    details: dict[str, str]
    attention: str
    dtype: str
    device: str
    parameters: int
    weight_bytes: int
    context_tokens: int
    kv_bytes_per_token: int
    kv_pool_tokens: int | None

    def width_that_fits(self, path_tokens: int) -> int | None:
        """Paths of so many tokens, prompt included, that the KV pool holds even where nothing is shared (count).

        None = there is no limit that anybody knows.
        """
        return None if self.kv_pool_tokens is None else self.kv_pool_tokens // path_tokens


class EngineDescription(Value):
    """An engine's models.

    Attributes:
        policy: It proposes steps.
        verifier: The PRM that scores them, None = the search brings one, or the policy's own figures are used.
        verifier_name: What scores steps, None = nothing but what a search brings.
        embedder: What says how differently steps reason.
    """

    policy: ModelDescription
    verifier: ModelDescription | None
    verifier_name: str | None
    embedder: str


class SearchEvent(Value):
    """Progress of a running search, one per depth (kind "step") and one at each end.

    Attributes:
        kind: "start", "step", "end".
        depth: Depth just finished.
        frontier: Open leaves after scoring (count).
        kept: Leaves that got children (count).
        pruned: Leaves that got none (count).
        finished: Finished trajectories so far (count).
        best_score: Best step score on the frontier, of finished trajectories once nothing is open.
        kv_unique_tokens: Tokens of all steps on the kept paths; what equal or alike steps share is not taken off.
        kv_path_tokens: The same without sharing.
        generated_tokens: Tokens generated so far.
        common_text: Text shared by every surviving branch; it can no longer be pruned.
    """

    kind: Literal["start", "step", "end"]
    depth: int
    frontier: int
    kept: int
    pruned: int
    finished: int
    best_score: float
    kv_unique_tokens: int
    kv_path_tokens: int
    generated_tokens: int
    common_text: str = ""
