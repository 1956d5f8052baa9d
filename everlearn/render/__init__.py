"""Between messages and tokens: chat templates, tool calls, reasoning, text of tokens, images. Pure: no torch, no HTTP."""
