"""The routers of the OpenAI API, and where they are: at its usual path, and at the one that Tinker uses for it."""

from __future__ import annotations

from fastapi import APIRouter

from everlearn.api.openai import chat, completions, embeddings, models, responses

PREFIXES = ("/v1", "/oai/api/v1")
ROUTERS: list[APIRouter] = [chat.router, completions.router, embeddings.router, models.router, responses.router]
