"""The nouns that cross a process border or a layer: arrays, datums, sampling parameters, results.

Plain msgspec structs: no torch, no numpy, no HTTP. Arrays travel as little-endian bytes with a dtype and a shape, so that neither
end copies them element by element. numpy views are one call away (`Array.numpy`), imported only when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np

ITEM_BYTES = {"float32": 4, "int64": 8, "int32": 4}


class Array(msgspec.Struct, frozen=True, array_like=True):
    """A dense array: `dtype` (float32, int64, int32), `shape`, and `data` in C order, little endian."""

    dtype: str
    shape: list[int]
    data: bytes

    def numpy(self) -> np.ndarray:
        """A read-only view of the bytes, shaped."""
        import numpy as np

        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)

    @classmethod
    def of(cls, values: np.ndarray) -> Array:
        """Copies a numpy array of one of the three dtypes."""
        return cls(str(values.dtype), list(values.shape), values.tobytes())


class LoraSpec(msgspec.Struct, frozen=True):
    """What an adapter trains. The scale of the update is alpha / rank; A starts uniform in ±1/sqrt(d_in), B at zero. `expert_lora` is the
    layout of its matrices on experts (models/experts.py), which belong to the MLP; off: experts stay as they are."""

    rank: int
    alpha: float = 32.0
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    expert_lora: Literal["off", "per_expert", "shared_outer", "rank_split"] = "off"
    train_vision: bool = False


class ImageSpan(msgspec.Struct, frozen=True, array_like=True):
    """An image in a row of tokens: `rows` x `columns` tokens from `start` on stand for it, top left first. `data` is its file as the
    client sent it."""

    start: int
    rows: int
    columns: int
    data: bytes

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


class ProvenanceSpan(msgspec.Struct, frozen=True):
    """`length` tokens of a datum are tokens [offset, offset + length) of a sampled sequence (`kind` sampled) or of its prompt."""

    kind: str
    sequence_id: str
    offset: int
    length: int


class Datum(msgspec.Struct, frozen=True):
    """One training sequence: `tokens` int32 [T]; `inputs` by name, each [T] or [T, K], already shifted by the client
    (position i predicts token i + 1). Sparse inputs were made dense at the door. `tokens` holds the model's image token wherever
    one of `images` stands, in ascending order. `routing` int32 [T, layers, experts of a token] (the last two may be one axis) are the
    experts that the tokens are to meet (engine/routes.py)."""

    tokens: Array
    inputs: dict[str, Array]
    model_input_spans: list[ProvenanceSpan] | None = None
    loss_input_spans: list[ProvenanceSpan] | None = None
    images: list[ImageSpan] = []
    routing: Array | None = None


class AdamParams(msgspec.Struct, frozen=True):
    """One AdamW step: decoupled weight decay; `grad_clip_norm` 0 means no clipping (global norm over the adapter)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Grammar(msgspec.Struct, frozen=True):
    """What a sample's text must match. `source` is a JSON schema (ignored for json_object), a regular expression over the whole text,
    a grammar in llguidance's dialect of Lark, or one in GBNF ("ebnf"); the engine compiles it."""

    kind: Literal["json_schema", "json_object", "regex", "lark", "ebnf"]
    source: str = ""


class SamplingParams(msgspec.Struct, frozen=True):
    """How to draw tokens. `seed` is always set here: the API draws one when the client sent none, and logs it, so that a
    sample that is run again after a crash gives the same tokens. `top_k` -1 and `top_p` 1 mean off; temperature 0 is greedy.
    `stop_tokens` holds end-of-sequence ids too unless the client switched them off with an empty list.

    Penalties lower a token's logit: presence and frequency once and for each time that it was generated, repetition divides
    (multiplies, where it is negative) that of every token in prompt and continuation. `logit_bias` is added to the logits; -100 bans.
    Stop tokens are not drawn before `min_tokens`. All of it precedes temperature, then come top_k, top_p and min_p. None of it shows
    in reported log-probabilities. `routing` asks for the experts that each token met. With `lowers`, max_tokens is lowered where it would
    be refused: to what the model's cache and the bound of what is listed beside the tokens have room for."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_tokens: list[int] = []
    stop_strings: list[str] = []
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    grammar: Grammar | None = None
    routing: bool = False
    lowers: bool = False


class TopK(msgspec.Struct, frozen=True):
    """The k likeliest tokens at each of `length` positions: ids int32 [length, k] and logprobs float32 [length, k].
    Missing rows hold id 0 and logprob -99999.0."""

    token_ids: Array
    logprobs: Array


class SampledSequence(msgspec.Struct, frozen=True):
    """`tokens` int32 [N] as drawn (a stop token is included, a stop string's tokens are included), `logprobs` float32 [N] under the
    model at temperature 1 without truncation, which is what the trainer computes for the same tokens. `routing` int32
    [P + N - 1, layers, experts of a token]: of prompt and tokens but the last; -1 where the prefix cache held the position."""

    stop_reason: str  # "stop", "length" or "deadline"
    tokens: Array
    logprobs: Array
    topk: TopK | None = None
    routing: Array | None = None


class SampleResult(msgspec.Struct, frozen=True, tag="sample"):
    """`prompt_logprobs` float32 [P]: entry i scores prompt token i; NaN where there is none (position 0, or before the last n).
    `pooled` float32 [D]: the prompt's final hidden states, pooled as was asked."""

    sequences: list[SampledSequence]
    prompt_logprobs: Array | None = None
    topk_prompt_logprobs: TopK | None = None
    target_prompt_logprobs: Array | None = None
    prompt_alt_tokens: Array | None = None
    prompt_alt_logprobs: Array | None = None
    prompt_cache_hit_tokens: int = 0
    pooled: Array | None = None


class ForwardBackwardResult(msgspec.Struct, frozen=True, tag="forward_backward"):
    """`outputs[i][name]` is datum i's output array (always `logprobs`, shaped like its target_tokens); `metrics` keys are
    `name:reduction` and hold `loss:sum`."""

    outputs: list[dict[str, Array]]
    metrics: dict[str, float]


class OptimStepResult(msgspec.Struct, frozen=True, tag="optim_step"):
    metrics: dict[str, float]


class SavedResult(msgspec.Struct, frozen=True, tag="saved"):
    """A folder was written completely and renamed into place."""

    bytes: int
    sha256: str


class DoneResult(msgspec.Struct, frozen=True, tag="done"):
    """The operation has no output (create, load)."""


Result = SampleResult | ForwardBackwardResult | OptimStepResult | SavedResult | DoneResult


class VisionInfo(msgspec.Struct, frozen=True):
    """How a base model takes images. A square patch is `patch` pixels wide and `frames` deep, `merge` x `merge` patches make a token. An
    image is resized to between `min_pixels` and `max_pixels`, its channels less `mean` divided by `std`. Token ids: `image` stands for a
    part of an image, `start` and `end` enclose all of them.

    Where `grid` isn't 0, every image becomes one patch, whatever its shape, and `grid` x `grid` tokens stand for it. `position_axes`: an
    image's tokens have positions in three dimensions, or in one as text has."""

    patch: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int
    mean: list[float]
    std: list[float]
    image: int
    start: int
    end: int
    grid: int = 0
    position_axes: int = 3


class BaseModelInfo(msgspec.Struct, frozen=True):
    """What the API needs to know of a base model without loading it (read from its config.json). `vision` None: it reads text alone."""

    name: str
    path: str
    aliases: list[str]
    architecture: str
    vocab_size: int
    max_context: int
    eos_token_ids: list[int]
    num_parameters: int = 0
    vision: VisionInfo | None = None
    num_experts: int = 0

    def room(self, prompt_length: int) -> int:
        """How many tokens may be drawn after a prompt: the last one is never read, so it needs no place in the context."""
        return self.max_context - prompt_length + 1
