"""A language model of 0.3 M parameters that walks through corridors without a plan: what rl_value.py begins with.

Trained in a minute to speak as the environment does and to choose every handle as often as any other. Of the right handles it knows
nothing: no reward stands in what it reads. It is a Qwen3 as transformers defines it, with a token for each word.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

BEGIN, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|unknown|>"
DOORS = 8
STEPS, BATCH, RATE = 250, 16, 3e-3
POOL = 400  # walks of each kind to draw batches from
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """White space is no token; decoding puts a space between words."""
    from everlearn.rl.envs.corridor import FLOOR, HANDLES, SIGNS

    words = ["user", "assistant", "Door", "shows", "coins", "lie", "on", "the", "floor", "Which", "handle", ":", ".", "?", *SIGNS, *HANDLES]
    words += map(str, range(max(DOORS, FLOOR) + 1))
    vocabulary = {word: place for place, word in enumerate([BEGIN, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(BEGIN, special=True), AddedToken(END, special=True)])
    return tokenizer


def walk(tokenizer: Tokenizer, luck: bool, rng: random.Random) -> list[int]:
    """The tokens of one walk whose handles are drawn."""
    from everlearn.rl.envs.corridor import FLOOR, HANDLES, SIGNS, CorridorEnv, house_of
    from everlearn.rl.prompts import ChatMl

    chat = ChatMl(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode)
    floor = [rng.randint(0, FLOOR) for _ in range(DOORS) if luck]
    env = CorridorEnv(rng.choices(SIGNS, k=DOORS), floor, house_of(0), chat, intro="")

    async def play() -> list[int]:
        await env.initial_observation()
        while True:
            seen, action = env.observation.to_ints(), chat.encode(rng.choice(HANDLES))
            if (await env.step(action)).episode_done:
                return [*seen, *action, *chat.encode(END)]

    return asyncio.run(play())


def new_model(size: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    )


def train(model: Any, tokenizer: Tokenizer) -> float:
    """The last step's mean loss of a token (nats)."""
    import torch

    rng = random.Random(0)
    walks = [[walk(tokenizer, luck, rng) for _ in range(POOL)] for luck in (False, True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(STEPS):
        ids = torch.tensor(rng.choices(walks[step % 2], k=BATCH))  # all walks of a kind are as long, so that nothing is padded
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / STEPS)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def ensure() -> Path:
    """The model's folder among the temporary files, made now if it isn't there. It appears whole or not at all."""
    folder = Path(tempfile.gettempdir()) / "everlearn-walker"
    if folder.exists():
        return folder
    tokenizer = make_tokenizer()
    model = new_model(tokenizer.get_vocab_size())
    train(model, tokenizer)
    return saved(model, tokenizer, folder)


def saved(model: Any, tokenizer: Tokenizer, folder: Path) -> Path:
    """The folder, with the model, its tokenizer and the chat template in it: all of them at once."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        made = Path(unfinished) / "model"
        model.save_pretrained(made)
        tokenizer.save(str(made / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "chat_template": TEMPLATE}
        (made / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        try:
            made.rename(folder)
        except OSError:  # another process was faster; its folder is as good
            if not folder.exists():
                raise
    return folder
