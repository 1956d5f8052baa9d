"""Features of answers, from a server's `/v1/embeddings`: what a reward model looks at.

They are mean-pooled final hidden states, taken of the frozen base model, so that they stay the same while adapters move; not of length 1,
since how long a state is may matter and whitening takes care of scale. Texts are given as token ids, as records keep them: prompt and
answer.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import httpx
import numpy as np

from everlearn.errors import Unavailable

BATCH = 64  # inputs of one request


def fetch(
    url: str, key: str, model: str, inputs: Sequence[Sequence[int]], pooling: str = "mean", client: httpx.Client | None = None
) -> np.ndarray:
    """float64 [N, D] of N lists of token ids. `url` is the server's ("http://127.0.0.1:8000"). Raises Unavailable with what it said."""
    opened = client or httpx.Client(timeout=600)
    rows: list[np.ndarray] = []
    try:
        for first in range(0, len(inputs), BATCH):
            asked = {"model": model, "input": [list(map(int, ids)) for ids in inputs[first : first + BATCH]], "pooling": pooling}
            asked |= {"normalize": False, "encoding_format": "base64"}
            answer = opened.post(f"{url.rstrip('/')}/v1/embeddings", json=asked, headers={"authorization": f"Bearer {key}"})
            if answer.status_code != 200:
                raise Unavailable(f"no features from {url}: {answer.status_code} {answer.text[:300]}")
            rows += [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer.json()["data"]]
    except httpx.HTTPError as error:
        raise Unavailable(f"no features from {url}: {error or type(error).__name__}; is the server running?") from error
    finally:
        if client is None:
            opened.close()
    return np.array(rows, dtype=np.float64)
