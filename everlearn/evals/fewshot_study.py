"""The study of fewshot_vision.py through the Tinker API: an adapter for each seed and number of shots, then every test photo is asked
about. It knows a server's address and a folder for the tokenizer; which model answers there is not its affair."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tinker
from PIL import Image

from everlearn.evals.fewshot_vision import Photo, Shown, Split, choose, judged, lesson, name_of, sentence, shown_bytes
from everlearn.evals.prompts import VisionPrompt
from everlearn.render.patches import grid_of

SPARE_TOKENS = 6  # an answer may be that much longer than the longest right one


class Recipe(msgspec.Struct, frozen=True):
    """How an adapter is trained. Every class is shown `examples_per_class` times whatever the number of shots."""

    rank: int = 32
    learning_rate: float = 5e-4
    batch: int = 8
    examples_per_class: int = 48


class Run(msgspec.Struct, frozen=True):
    """One method with one seed and one number of shots. `answers` are what was said of each test photo, in their order; a classifier says
    a class. `loss` is that of the last step's tokens, `seconds` all of it took."""

    method: str
    shots: int
    seed: int
    correct: int
    asked: int
    answers: list[str]
    steps: int = 0
    tokens: int = 0
    loss: float | None = None
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked


class Finished:
    """Runs that are over, in a file: its first line says what is studied, each further one is a run. A study that was interrupted finds
    there what it needn't do again; a file of another study is replaced."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.runs = path, list[Run]()
        head = msgspec.json.encode(settings, enc_hook=str, order="sorted")
        first, *others = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        if first == head:
            self.runs = [msgspec.json.decode(line, type=Run) for line in others[:-1]]  # behind the last line's end there is nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(line + b"\n" for line in (head, *map(msgspec.json.encode, self.runs))))

    def find(self, method: str, shots: int, seed: int) -> Run | None:
        return next((run for run in self.runs if (run.method, run.shots, run.seed) == (method, shots, seed)), None)

    def add(self, run: Run) -> Run:
        self.runs.append(run)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(run) + b"\n")
        return run


class Gallery:
    """Photos as they are sent, each made once. Making them all first shows which can't be read before anything is trained."""

    def __init__(self, split: Split, shots: Sequence[int], seeds: Sequence[int], tests: Sequence[Photo]):
        taught = {p: None for seed in seeds for of_class in choose(split.train, max(shots), seed).values() for p in of_class}
        self.files = {(photo, False): shown_bytes(photo) for photo in [*taught, *tests]}
        self.files |= {(photo, True): shown_bytes(photo, True) for photo in taught}

    def file(self, photo: Photo, flip: bool = False) -> bytes:
        return self.files[photo, flip]

    def digest(self) -> str:
        """Sixteen hex digits over the photos as they are sent, in their order, with class and file name: a photo that was changed makes
        another study, a folder that was moved doesn't."""
        digest = hashlib.sha256()
        for (photo, flip), file in self.files.items():
            digest.update(repr((photo.label, photo.path.name, flip, len(file))).encode() + file)
        return digest.hexdigest()[:16]


class Study:
    """`model` as the server calls it; `split` was checked."""

    def __init__(self, service: Any, model: str, prompt: VisionPrompt, split: Split, tests: Sequence[Photo], gallery: Gallery):
        self.service, self.model, self.prompt = service, model, prompt
        self.split, self.tests, self.gallery = split, tests, gallery
        longest = max(len(prompt.answer(sentence(name_of(label)))) for label in split.train)
        self.max_tokens = longest - len(prompt.prefill) + SPARE_TOKENS

    def untaught(self) -> Run:
        """What the base model says: zero shots."""
        started = time.monotonic()
        answers = self._ask(self.service.create_sampling_client(base_model=self.model).result())
        return self._graded(answers, 0, 0, seconds=time.monotonic() - started)

    def run(self, shots: int, seed: int, recipe: Recipe, on_step: Callable[[int, int], None]) -> Run:
        """Trains an adapter and asks it. `on_step`: steps done, of so many."""
        started = time.monotonic()
        trainer = self.service.create_lora_training_client(base_model=self.model, rank=recipe.rank, seed=seed, train_unembed=False).result()
        shown = lesson(choose(self.split.train, shots, seed), recipe.examples_per_class, seed)
        batches = [shown[first : first + recipe.batch] for first in range(0, len(shown), recipe.batch)]
        waiting: list[tuple[Any, Any]] = []
        tokens, loss = 0, float("nan")
        for number, batch in enumerate(batches):
            data = [self.datum(each) for each in batch]
            tokens += sum(datum.model_input.length for datum in data)
            output = trainer.forward_backward(data, "cross_entropy")
            waiting.append((output, trainer.optim_step(tinker.AdamParams(learning_rate=recipe.learning_rate))))
            if len(waiting) > 1 or number == len(batches) - 1:  # a step is sent before the last one is answered
                while len(waiting) > (number < len(batches) - 1):
                    done, stepped = waiting.pop(0)
                    stepped.result()
                    loss = done.result().metrics["loss:sum"]
            on_step(number + 1, len(batches))
        taught = sum(len(self.prompt.answer(sentence(name_of(each.photo.label)))) for each in batches[-1])
        path = trainer.save_weights_for_sampler(name=f"fewshot-{shots}-{seed}").result().path
        answers = self._ask(self.service.create_sampling_client(model_path=path).result())
        seconds = time.monotonic() - started
        return self._graded(answers, shots, seed, steps=len(batches), tokens=tokens, loss=loss / taught, seconds=seconds)

    def datum(self, shown: Shown) -> tinker.Datum:
        """Question and reply; the reply's tokens have weight."""
        asked = self._asked(self.gallery.file(shown.photo, shown.flip))
        said = self.prompt.answer(sentence(name_of(shown.photo.label)))
        whole = tinker.ModelInput(chunks=[*asked, tinker.EncodedTextChunk(tokens=said[:-1])])
        lead = whole.length - len(said) + 1
        targets = np.array([0] * (lead - 1) + said, dtype=np.int64)
        weights = np.array([0.0] * (lead - 1) + [1.0] * len(said), dtype=np.float32)
        inputs = {"target_tokens": tinker.TensorData.from_numpy(targets), "weights": tinker.TensorData.from_numpy(weights)}
        return tinker.Datum(model_input=whole, loss_fn_inputs=inputs)

    def _asked(self, file: bytes) -> list[Any]:
        with Image.open(BytesIO(file)) as image:
            rows, columns = grid_of(*image.size, self.prompt.vision, "a photo")
        photo = tinker.types.ImageChunk(data=file, format="jpeg", expected_tokens=rows * columns)
        return [tinker.EncodedTextChunk(tokens=self.prompt.before), photo, tinker.EncodedTextChunk(tokens=self.prompt.after)]

    def _ask(self, sampler: Any) -> list[str]:
        params = tinker.SamplingParams(max_tokens=self.max_tokens, temperature=0.0, stop=[self.prompt.end])
        prefill = tinker.EncodedTextChunk(tokens=self.prompt.prefill)
        prompts = [tinker.ModelInput(chunks=[*self._asked(self.gallery.file(photo)), prefill]) for photo in self.tests]
        futures = [sampler.sample(prompt, 1, params) for prompt in prompts]
        return [self.prompt.read.decode(list(future.result().sequences[0].tokens), skip_special=True) for future in futures]

    def _graded(self, answers: list[str], shots: int, seed: int, **figures: Any) -> Run:
        correct = sum(judged(answer, name_of(photo.label)) for answer, photo in zip(answers, self.tests, strict=True))
        return Run(self.model, shots, seed, correct, len(answers), [answer.strip() for answer in answers], **figures)
