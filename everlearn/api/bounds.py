"""How much one request to a model may ask for, and what a session may carry. Declared in GET /v1/capabilities, enforced before
anything is allocated or stored.

What depends on the model (context, vocabulary) or on a setting (queues, bodies, time) is not here.
"""

from __future__ import annotations

MAX_MESSAGES = 10_000
MAX_PARTS = 1_000  # parts of one message's content
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 128 * 1024  # a JSON schema or grammar as sent
MAX_STOPS = 4
MAX_STOP_CHARS = 512
MAX_STOP_TOKENS = 64
MAX_CHOICES = 128  # sequences of one request: prompts times n
MAX_PROMPTS = 128  # of one completion request
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_TOKENS = 2**20
MAX_PENALTY = 2.0
MAX_TEMPERATURE = 2.0
MAX_METADATA = 16
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512
MAX_USER_CHARS = 512
SEED_BITS = 63
# What a session carries: its texts are kept as long as it is, and read with every list.
MAX_TAGS, MAX_TAG_CHARS = 64, 256
MAX_SESSION_CHARS = 512  # project_id, display_name, sdk_version, an idempotency key
MAX_DETAIL_CHARS = 16 * 1024  # how a session ended: a trace of an error fits

# What capabilities tells: the names of the API's fields, and their bounds.
BOUNDS: dict[str, int | float] = {
    "messages": MAX_MESSAGES,
    "content_parts": MAX_PARTS,
    "tools": MAX_TOOLS,
    "schema_bytes": MAX_SCHEMA_BYTES,
    "stop": MAX_STOPS,
    "stop_chars": MAX_STOP_CHARS,
    "stop_token_ids": MAX_STOP_TOKENS,
    "n": MAX_CHOICES,
    "prompts": MAX_PROMPTS,
    "top_logprobs": MAX_TOP_LOGPROBS,
    "logit_bias": MAX_LOGIT_BIAS,
    "max_tokens": MAX_TOKENS,
    "temperature": MAX_TEMPERATURE,
    "penalty": MAX_PENALTY,
    "metadata": MAX_METADATA,
    "metadata_key_chars": MAX_METADATA_KEY,
    "metadata_value_chars": MAX_METADATA_VALUE,
    "user_chars": MAX_USER_CHARS,
    "tags": MAX_TAGS,
    "tag_chars": MAX_TAG_CHARS,
    "session_chars": MAX_SESSION_CHARS,
    "detail_chars": MAX_DETAIL_CHARS,
}
