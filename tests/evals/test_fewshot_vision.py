"""The few-shot study: its pure parts, its baselines, and the command against a real server of a tiny model."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from everlearn.cli.main import run as everlearn
from everlearn.errors import InvalidRequest, NotFound, Unsupported
from everlearn.evals import fewshot_vision as study
from everlearn.evals.fewshot_report import curves, points
from everlearn.evals.fewshot_study import Finished, Gallery, Run
from everlearn.evals.fewshot_vision import Photo
from everlearn.evals.prompts import VisionPrompt
from everlearn.models.catalog import read_info
from tests.tiny import make_tiny_model
from tests.tiny_lite import PAD, make_tiny_lite_model, make_tiny_tower

COLOURS = {"Red_fox": (220, 40, 30), "green.frog": (30, 200, 40), "blue-jay": (30, 60, 220)}


def make_photos(folder: Path, each: int, seed: int = 0) -> Path:
    """Folders of noisy pictures, a colour for each class."""
    rng = np.random.default_rng(seed)
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for number in range(each):
            noise = rng.integers(-30, 30, (40, 48, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / label / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder / "train", 4)
    make_photos(folder / "test", 3, seed=1)
    return folder


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lite_model(tmp_path_factory.mktemp("models"))


# --- pure parts ---


def test_names_and_answers():
    assert [study.name_of(label) for label in COLOURS] == ["red fox", "green frog", "blue jay"]
    assert study.judged("The subject in this photo is: Red Fox\n", "red fox") and study.judged(" red fox", "red fox")
    assert not study.judged(" red fox, a mammal", "red fox") and not study.judged("", "red fox")


def test_shots_are_nested_and_follow_from_the_seed(data: Path):
    train = study.read_split(data).train
    few, more = study.choose(train, 2, 5), study.choose(train, 4, 5)
    assert all(few[label] == more[label][:2] for label in train)
    assert study.choose(train, 2, 5) == few != study.choose(train, 2, 6)


@pytest.mark.parametrize("shots", [1, 2, 3, 4])
def test_every_number_of_shots_takes_as_many_steps(data: Path, shots: int):
    shown = study.lesson(study.choose(study.read_split(data).train, shots, 0), 8, 0)
    assert len(shown) == 8 * len(COLOURS)
    assert set(Counter(each.photo.label for each in shown).values()) == {8}
    times = Counter(each.photo for each in shown)
    assert len(times) == shots * len(COLOURS) and max(times.values()) - min(times.values()) <= 1
    assert {each.flip for each in shown} == {False, True}
    first_pass = shown[: shots * len(COLOURS)]
    assert len({each.photo for each in first_pass}) == len(first_pass), "each photo is seen before one is seen again"


def test_a_data_set_without_a_test_folder_is_split_once(tmp_path: Path):
    make_photos(tmp_path / "all", 10)
    split = study.read_split(tmp_path / "all", hold_out=["Red_fox"])
    assert list(split.train) == ["blue-jay", "green.frog"]
    for label in split.train:
        assert (len(split.train[label]), len(split.test[label])) == (7, 3)
        assert not set(split.train[label]) & set(split.test[label])
    assert split == study.read_split(tmp_path / "all", hold_out=["Red_fox"])
    assert study.tests_of(split, 4) == study.tests_of(split, 4) and len(study.tests_of(split, 99)) == 6


def test_intervals_are_students():
    centre, low, high = study.interval([0.5, 0.6, 0.7])
    assert centre == pytest.approx(0.6) and high - centre == pytest.approx(4.3026527 * 0.1 / math.sqrt(3)) == pytest.approx(centre - low)
    assert study.interval([0.0, 1.0])[1:] == (0.0, 1.0)
    assert study.interval([0.4]) == (0.4, None, None)
    assert study.interval([0.4, 0.6] * 6)[2] - 0.5 == pytest.approx(2.2009852 * np.std([0.4, 0.6] * 6, ddof=1) / math.sqrt(12))


@pytest.mark.parametrize(
    ("degrees", "factor"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (10, 2.2281),
        (11, 2.2010),
        (30, 2.0423),
        (31, 2.0395),
        (120, 1.9799),
        (5000, 1.9604),
    ],
)
def test_student_s_t_is_that_of_the_tables(degrees: int, factor: float):
    assert study.student(degrees) == pytest.approx(factor, abs=6e-5)


def test_a_photo_is_sent_turned_small_and_mirrored(tmp_path: Path):
    image = Image.new("RGB", (960, 480), "white")
    image.paste((255, 0, 0), (0, 0, 480, 480))
    exif = image.getexif()
    exif[0x0112] = 6  # lies on its side
    image.save(tmp_path / "a.jpg", exif=exif)
    photo = Photo(tmp_path / "a.jpg", "a")
    for flip in (False, True):
        (tmp_path / "sent.jpg").write_bytes(study.shown_bytes(photo, flip))
        with Image.open(tmp_path / "sent.jpg") as sent:
            assert (sent.format, sent.size) == ("JPEG", (240, 480))
            assert sent.getpixel((120, 60))[1] < 60 and sent.getpixel((120, 420))[1] > 200


def test_points_and_curves():
    runs = [Run(method, shots, seed, 3 + seed, 10, []) for method, shots, seed in itertools.product(("a <b>", "c"), (0, 2, 1), (0, 1))]
    found = points(runs)
    assert [(point.method, point.shots) for point in found] == [(m, k) for m in ("a <b>", "c") for k in (0, 1, 2)]
    assert found[0].accuracy == pytest.approx(0.35) and found[0].seeds == 2
    svg = curves(found, 5)
    assert svg.count("<circle") == 4 and "a &lt;b&gt;" in svg


def test_baselines_tell_clusters_apart():
    import torch

    from everlearn.evals.probes import KINDS

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)
    classes = torch.arange(4).repeat_interleave(3)
    shots, tests = (centres[classes] + 0.1 * torch.randn(12, 16, generator=generator) + 2 for _ in range(2))
    for name, fit in KINDS.items():
        assert torch.equal(fit(shots, classes, tests), classes), name


def test_any_tower_of_transformers_can_be_probed(tmp_path: Path):
    from transformers import Dinov2Config, Dinov2Model

    from everlearn.evals.probes import Tower

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(settings))
    photos = make_photos(tmp_path / "photos", 1)
    files = [study.shown_bytes(Photo(path, "")) for path in sorted(photos.rglob("*.png"))]
    assert Tower(tmp_path / "dino").features(files).shape == (3, 16)


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CUT = {"height": 28, "width": 28}


@pytest.mark.parametrize(
    ("kind", "settings", "size", "resample"),
    [
        ("CLIPVisionConfig", {"size": 28, "crop_size": 28, "feature_extractor_type": "CLIPFeatureExtractor"}, (44, 28), "BICUBIC"),
        ("CLIPVisionConfig", {"size": {"shortest_edge": 28}, "crop_size": CUT, "image_processor_type": "CLIPImageProcessor"}, (44, 28), "BICUBIC"),
        ("ViTConfig", {"size": 28}, (28, 28), "BILINEAR"),
        ("ViTConfig", {"size": CUT, "resample": 3, "image_processor_type": "ViTImageProcessor"}, (28, 28), "BICUBIC"),
        ("Dinov2Config", {"size": {"shortest_edge": 40}, "crop_size": CUT, "image_processor_type": "BitImageProcessor"}, (64, 40), "BICUBIC"),
        ("Dinov2Config", {"size": {"shortest_edge": 40}, "crop_size": CUT, "resample": 2}, (64, 40), "BILINEAR"),
        ("lite", {"size": CUT}, (28, 28), "BICUBIC"),
        ("lite", {"size": {"shortest_edge": 40}, "crop_size": 28}, (64, 40), "BICUBIC"),
        ("lite", {}, (51, 32), "BICUBIC"),
    ],
)  # fmt: skip
def test_a_tower_s_images_are_prepared_as_its_settings_say(
    tmp_path: Path, kind: str, settings: dict[str, Any], size: tuple[int, int], resample: str
):
    import transformers

    from everlearn.evals.probes import Tower

    folder = tmp_path / "tower"
    if kind == "lite":
        make_tiny_tower(folder)
        given = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**given, "image_size": 28}))
    else:
        config = getattr(transformers, kind)(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
        )
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    if settings:
        (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **HALF}))
    image, file = Image.effect_noise((320, 200), 80).convert("RGB"), BytesIO()
    image.save(file, "PNG")
    left, top = (size[0] - 28) // 2, (size[1] - 28) // 2
    wanted_hwc = np.asarray(image.resize(size, Image.Resampling[resample]).crop((left, top, left + 28, top + 28)), np.float32) / 127.5 - 1
    found = Tower(folder)._pixels(file.getvalue())
    assert found[0].permute(1, 2, 0).numpy() == pytest.approx(wanted_hwc, abs=1e-5)


# --- what is refused, before anything is trained ---


def refused(data: Path, *more: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert everlearn(["eval", "fewshot-vision", "--data", str(data), "--model", "nothing", *more]) in (2, 4)
    return capsys.readouterr().err


def test_bad_data_is_refused_by_name(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    assert "holds no photos" in refused(tmp_path / "empty", capsys=capsys)
    assert "there is no folder" in refused(tmp_path / "nowhere", capsys=capsys)
    assert "'Red_fox' has 4 photos to learn from and 16 shots" in refused(data, capsys=capsys)
    assert "no class 'cat'" in refused(data, "--classes", "cat,Red_fox", capsys=capsys)
    assert "no class 'cat' to hold out" in refused(data, "--hold-out", "cat", "--shots", "1", capsys=capsys)
    assert "1 classes" in refused(data, "--classes", "Red_fox", "--shots", "1", capsys=capsys)
    assert "shots are [1, 1]" in refused(data, "--shots", "1,1", capsys=capsys)
    assert "no list of numbers" in refused(data, "--shots", "one", capsys=capsys)


def test_models_that_read_text_alone_and_broken_photos_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = make_tiny_model(tmp_path / "text")
    for model in (str(text), "smollm2"):
        assert everlearn(["eval", "fewshot-vision", "--data", str(data), "--model", model, "--shots", "1", "--home", str(tmp_path)]) == 2
        assert "which reads text alone" in capsys.readouterr().err
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(study.shown_bytes(study.read_split(data).train["Red_fox"][0])[:300])
    with pytest.raises(InvalidRequest, match=r"broken\.jpg can't be read as a photo"):
        study.shown_bytes(Photo(broken, "a"))
    from everlearn.evals.probes import Probe, probes_of

    with pytest.raises(InvalidRequest, match="write KIND:FOLDER"):
        Probe("svm:x", {})
    with pytest.raises(InvalidRequest, match="both called 'linear-probe on tower'; name each once"):
        probes_of([f"linear-probe:{tmp_path}/a/tower", f"nearest-centroid:{tmp_path}/a/tower", f"linear-probe:{tmp_path}/b/tower"])
    with pytest.raises(NotFound, match=r"holds no config\.json"):
        Probe(f"linear-probe:{tmp_path}", {})
    with pytest.raises(Unsupported, match="reads no pixels"):
        Probe(f"linear-probe:{text}", {})
    tower = make_tiny_tower(tmp_path / "tower")
    for settings in ('{"image_processor_type": "NoSuchImageProcessor"}', "[]", "{"):
        (tower / "preprocessor_config.json").write_text(settings)
        with pytest.raises(Unsupported, match=r"preprocessor_config\.json: images can't be prepared as it says"):
            Probe(f"linear-probe:{tower}", {})


def test_the_prompt_is_the_models_own(lite: Path):
    prompt = VisionPrompt.load(read_info("lite", lite, []))
    tokens, length = prompt.teach(4, study.sentence("red fox"))
    assert tokens.count(PAD) == 4 and tokens[length : length + len(prompt.prefill)] == prompt.prefill
    said = prompt.read.decode(tokens[length:])
    assert said == "The subject in this photo is: red fox\n<|im_end|>"
    assert prompt.read.decode(tokens[:length]).startswith("<|im_start|>user\n<|vision_start|>")


# --- all of it ---


def test_the_command_teaches_asks_and_reports(data: Path, lite: Path, tmp_path: Path):
    """Three colours are easy enough for a random tower; a tiny language model learns their names by heart."""
    tower = make_tiny_tower(tmp_path / "tower")
    options = ["--shots", "2,4", "--seeds", "2", "--repeats", "25", "--rank", "8", "--lr", "1e-2", "--batch", "6"]
    baselines = [f"--baseline={kind}:{tower}" for kind in ("linear-probe", "nearest-centroid")]
    command = [sys.executable, "-m", "everlearn.cli.main", "-f", "json", "--home", str(tmp_path / "home"), "eval", "fewshot-vision"]
    done = subprocess.run(
        [*command, "--data", str(data), "--model", str(lite), *baselines, *options, "--out", str(tmp_path / "out")],
        env={**os.environ, "EVERLEARN_ENGINE__KV_TOKENS": "8192", "EVERLEARN_ENGINE__THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(point["method"], point["shots"]): point["accuracy"] for point in json.loads(done.stdout)["points"]}
    assert set(found) == {*itertools.product(("model", "linear-probe on tower", "nearest-centroid on tower"), (2, 4)), ("model", 0)}
    assert found["model", 0] == 0.0 and found["model", 4] > 0.6 and found["linear-probe on tower", 4] > 0.6
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(kept["runs"]) == 1 + 3 * 2 * 2 and {run["steps"] for run in kept["runs"] if run["shots"] and run["tokens"]} == {50}
    assert all(len(run["answers"]) == len(kept["asked"]) == 9 for run in kept["runs"])
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in report and "http" not in report.replace("http://www.w3.org/2000/svg", "")
    assert not (tmp_path / "home" / "server.json").exists(), "the server of the command has ended"


def test_an_interrupted_study_finds_what_is_finished(tmp_path: Path):
    path, run = tmp_path / "out" / "runs.jsonl", Run("m", 2, 1, 3, 4, ["a\nb", "c"], loss=0.5)
    assert Finished(path, {"shots": (2,)}).add(run) == run
    again = Finished(path, {"shots": (2,)})
    assert again.find("m", 2, 1) == run and again.find("m", 4, 1) is None
    path.write_bytes(path.read_bytes() + b'{"method": "m", "sho')  # killed while it wrote
    again = Finished(path, {"shots": (2,)})
    assert again.runs == [run] and path.read_bytes().count(b"\n") == 2
    assert Finished(path, {"shots": (4,)}).runs == []


def test_a_study_is_known_by_its_photos_too(tmp_path: Path):
    def digest(folder: Path) -> str:
        split = study.read_split(folder)
        return Gallery(split, (1, 2), range(2), study.tests_of(split, 6)).digest()

    known = digest(make_photos(tmp_path / "a" / "photos", 6))
    assert known == digest(make_photos(tmp_path / "b" / "photos", 6)), "the same photos in another place"
    assert known != digest(make_photos(tmp_path / "c" / "photos", 6, seed=1)), "others in a folder of the same name"
    path, run = tmp_path / "runs.jsonl", Run("m", 2, 1, 3, 4, ["a"])
    Finished(path, {"data": "photos"}).add(run)  # as it was written before photos were digested
    assert Finished(path, {"data": "photos", "photos": known}).runs == []
