"""Anthropic's Messages API on the same models, adapters, limits and records as the other dialects."""
