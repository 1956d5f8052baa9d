"""POST /embeddings: texts or token ids, each as one vector: the final hidden states of a base model or an adapter, pooled.

A language model's states are not those of a model made to embed: they tell more of what comes next than of what a text is about. They are
what a small model on top can be fitted to (a reward model, a probe), which is why `pooling` and `normalize` can be chosen. A request runs
beside others in the sampler, as one that scores a prompt does; its record has figures alone, and is in no episode.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from everlearn.api import auth, bounds
from everlearn.api.calls import Asked, Call, Exchange
from everlearn.api.openai import checks, shapes, types
from everlearn.api.services import services
from everlearn.api.target import resolve
from everlearn.api.turns import Draw, Opened, open_text
from everlearn.errors import InvalidRequest, Unavailable, Unsupported
from everlearn.store.records import EMBEDDINGS

router = APIRouter(tags=["openai: embeddings"])


@router.post("/embeddings", dependencies=[auth.scope("sample")])
async def create_embeddings(request: Request) -> Response:
    svc, caller = services(request), auth.caller(request)
    form = await types.read(request, types.EmbeddingForm)
    draw = Draw(max_tokens=0, deadline=checks.deadline(form.deadline))
    inputs = inputs_of(form.input)
    target = await resolve(svc, caller, form.model)
    opened = [await open_text(svc, caller.tenant, target, one, draw, grammar=None, stream=False) for one in inputs]
    asked = Asked(route=EMBEDDINGS, messages=None, params=dict, user=checks.label(form.user, "user"), store=False)
    call = Call(svc, caller, target, asked)
    await call.start(request, [pooled(one, form.pooling or "mean") for one in opened])
    call.episode_id = None  # whatever the header says: nobody goes on with a vector
    await call.whole()
    vectors = [vector_of(exchange, form.normalize is not False) for exchange in call.exchanges]
    check_dimensions(form.dimensions, len(vectors[0]))
    tokens = sum(exchange.prompt_tokens for exchange in call.exchanges)
    told = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(vector, form.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": target.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(shapes.encode(told), media_type="application/json", headers=call.headers)


def inputs_of(given: str | list[Any]) -> list[str | list[int]]:
    """Texts and lists of token ids. Raises InvalidRequest for an empty one, for a mixture, and for too many."""
    if isinstance(given, str) or (given and all(isinstance(one, int) for one in given)):
        inputs: list[Any] = [given]
    elif any(isinstance(one, int) for one in given):
        raise InvalidRequest("input mixes token ids with texts or lists; send one text, token ids, or a list of either", param="input")
    else:
        inputs = list(given)
    if not 1 <= len(inputs) <= bounds.MAX_PROMPTS:
        raise InvalidRequest(f"input holds {len(inputs)} inputs; 1 to {bounds.MAX_PROMPTS} are taken", param="input")
    if any(not one for one in inputs):
        raise InvalidRequest(f"input {next(k for k, one in enumerate(inputs) if not one)} is empty; send at least one token", param="input")
    return inputs


def pooled(opened: Opened, pooling: str) -> Opened:
    return msgspec.structs.replace(opened, spec=msgspec.structs.replace(opened.spec, pooling=pooling))


def vector_of(exchange: Exchange, normalize: bool) -> np.ndarray:
    """float32 [D]."""
    result = exchange.generation.value
    if result is None or result.pooled is None:
        raise Unavailable("its time was over before its input was read; try again later, or raise deadline", param="deadline")
    vector_D = result.pooled.numpy()
    return vector_D / max(float(np.linalg.norm(vector_D)), 1e-12) if normalize else vector_D


def written(vector_D: np.ndarray, format: str | None) -> list[float] | str:
    """As numbers, or as OpenAI's base64: little-endian float32."""
    if format == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.tolist()


def check_dimensions(wanted: int | None, size: int) -> None:
    if wanted is not None and wanted != size:
        rule = f"this model's vectors have {size} and can't be cut; leave dimensions out"
        raise Unsupported(f"dimensions {wanted}: {rule}", param="dimensions")
