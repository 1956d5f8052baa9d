"""What the API process and the engine process say to each other: msgpack over one ZeroMQ socket pair.

The API binds a ROUTER-free PAIR socket (`ipc://`), the engine connects. Every command that has a `request_id` is answered by
exactly one `Completed` or `Failed`. Commands of one model must arrive in seq order: the API orders and logs them first, the
engine applies them as they come. The engine keeps nothing that the log and the snapshots can't rebuild.
"""

from __future__ import annotations

import msgspec

from everlearn.types import AdamParams, Array, BaseModelInfo, Datum, ImageSpan, LoraSpec, Result, SamplingParams

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Command(msgspec.Struct, frozen=True, tag_field="op"):
    pass


class Create(Command, tag="create"):
    """A fresh adapter for training run `model_id` on base model `base` (answers DoneResult)."""

    request_id: str
    model_id: str
    tenant: str
    base: str
    lora: LoraSpec


class Restore(Command, tag="restore"):
    """After a restart: adapter `model_id` as snapshot folder `folder` holds it (weights, moments, gradient accumulator, step).
    Requests after the snapshot's seq follow as ordinary commands. Not a client's request: answers no request_id."""

    model_id: str
    tenant: str
    base: str
    lora: LoraSpec
    folder: str


class Replay(Command, tag="replay"):
    """Before `model_id` is made again (`Restore`, `Create`, or `Load` with `create`): its requests `seqs` succeeded before and come once
    more, in this order. Where one of them fails or is missing, the adapter isn't what the log says: the engine reports `RestoreFailed`,
    and nothing of the run that comes after it is run, answered or becomes a snapshot until it is made anew. Answers no request_id."""

    model_id: str
    seqs: list[int]


class ForwardBackward(Command, tag="forward_backward"):
    """Loss and gradient (added to the accumulator unless `forward_only`)."""

    request_id: str
    model_id: str
    seq: int
    data: list[Datum]
    loss_fn: str
    config: dict[str, float | str]
    forward_only: bool = False


class OptimStep(Command, tag="optim_step"):
    request_id: str
    model_id: str
    seq: int
    adam: AdamParams


class Save(Command, tag="save"):
    """Write the adapter's present state into `folder` (store/checkpoints.py layout), with moments if `optimizer`."""

    request_id: str
    model_id: str
    seq: int
    folder: str
    optimizer: bool
    metadata: dict[str, str] = {}


class Publish(Command, tag="publish"):
    """Freeze the present weights as sampler version `version` (live at once) and write them into `folder`."""

    request_id: str
    model_id: str
    seq: int
    version: str
    folder: str
    metadata: dict[str, str] = {}


class Load(Command, tag="load"):
    """Replace the adapter's weights by those of a checkpoint folder; moments too if `optimizer`, else they start anew.
    `create` makes the adapter first (create-via-load)."""

    request_id: str
    model_id: str
    seq: int
    tenant: str
    base: str
    lora: LoraSpec
    folder: str
    optimizer: bool
    create: bool = False


class Unload(Command, tag="unload"):
    """Forget an adapter that trains no more (its snapshot, if any, is the API's to keep or delete)."""

    model_id: str


class Sample(Command, tag="sample"):
    """Draw `num_samples` sequences. `version` "" is the base model; otherwise weights are those of `folder`, cached by version.
    `cache_salt` separates prefix caches (tenant) and takes turns with other salts in the queue. `stream` asks for a `Tokens` event of
    every step. `deadline` seconds after its arrival (0: never) the request ends with what it has. target_prompt_logprobs: int64
    [P - 1, K], -1 asks for nothing. `pooling` asks for one vector of the prompt's final hidden states: their "mean", or the "last"."""

    request_id: str
    base: str
    version: str
    folder: str
    cache_salt: str
    prompt: Array  # int32 [P]; the model's image token wherever one of `images` stands
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Array | None = None
    prompt_alt_tokens_k: int = 0
    pooling: str = ""
    stream: bool = False
    deadline: float = 0.0
    images: list[ImageSpan] = []


class Cancel(Command, tag="cancel"):
    request_id: str


class TakeSnapshot(Command, tag="take_snapshot"):
    """Ask for a snapshot of `model_id` now (the engine also decides by itself); answered by `Snapshotted`."""

    model_id: str


class Shutdown(Command, tag="shutdown"):
    """Finish what runs, then exit 0."""


Lifecycle = Create | Restore | Replay | Unload | TakeSnapshot
AnyCommand = Lifecycle | ForwardBackward | OptimStep | Save | Publish | Load | Sample | Cancel | Shutdown


class Event(msgspec.Struct, frozen=True, tag_field="event"):
    pass


class Ready(Event, tag="ready"):
    """The engine has loaded its default base model and takes commands."""

    pid: int
    device: str
    dtype: str
    kv_tokens: int
    models: list[BaseModelInfo]
    load_seconds: float
    kv_token_bytes: int = 0  # what one of `kv_tokens` takes: keys and values of every layer, or its latents


class Loaded(Event, tag="loaded"):
    """The engine has loaded a base model, whose cache holds `kv_tokens`; it comes before all that is answered with that model."""

    base: str
    kv_tokens: int


class TokenPart(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of sample `index` and their log-probabilities; `top_ids` and `top_logprobs` hold a row for each of them where
    topk_sample_logprobs asks for it, else nothing. `stop_reason` is set with the sample's last part, which may have no tokens."""

    index: int
    tokens: list[int]
    logprobs: list[float]
    top_ids: list[list[int]] = []
    top_logprobs: list[list[float]] = []
    stop_reason: str = ""


class Tokens(Event, tag="tokens"):
    """What one step drew for a request with `stream`. `cached` counts prompt tokens that the prefix cache held. The request still ends
    with one `Completed`, which holds all tokens, or `Failed`."""

    request_id: str
    parts: list[TokenPart]
    cached: int = 0


class Times(msgspec.Struct, frozen=True, array_like=True):
    """Seconds of a sample in the engine: until its turn came, from then to its first token, from its first token to its last. What didn't
    happen took 0."""

    queue: float
    prefill: float
    decode: float


class Completed(Event, tag="completed"):
    """`times`: of samples."""

    request_id: str
    result: Result
    times: Times | None = None


class Failed(Event, tag="failed"):
    """`code` is that of an error class in everlearn/errors.py; the adapter's state is as before the request."""

    request_id: str
    code: str
    message: str
    param: str | None = None


class Snapshotted(Event, tag="snapshotted"):
    """Snapshot folder `folder` of `model_id` is complete on disk and contains the effect of every request up to `seq`."""

    model_id: str
    seq: int
    folder: str
    bytes: int


class RestoreFailed(Event, tag="restore_failed"):
    """`Restore` of `model_id` failed: the engine does not hold the run, and commands for it fail. Or what `Replay` announced did."""

    model_id: str
    message: str


class Heartbeat(Event, tag="heartbeat"):
    """Sent at least once a second, also while a batch runs (from a thread that owns nothing). `step_sizes` counts the sampling steps by
    their tokens: those of at most STEP_TOKENS[0], ..., and those of more than the last. `step_tokens` is the tokens of all of them.
    The engine holds `device_bytes` of the `device_total_bytes` of a GPU's memory; both are 0 on a CPU."""

    unix_time: float
    training_queued: int
    sampling_running: int
    sampling_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    trained_tokens: int
    sampled_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    optimizer_steps: int
    activity: str
    last_progress: float
    rss_bytes: int
    preemptions: int = 0
    grammar_compiles: int = 0
    sampling_compiling: int = 0
    deadlines_passed: int = 0
    step_tokens: int = 0
    step_sizes: list[int] = []
    device_bytes: int = 0
    device_total_bytes: int = 0


AnyEvent = Ready | Loaded | Tokens | Completed | Failed | Snapshotted | RestoreFailed | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(AnyCommand).decode
decode_event = msgspec.msgpack.Decoder(AnyEvent).decode
