"""The lean start of an engine: the compiler stays out until it is asked for, and everything else works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from everlearn.models.imports import import_lean
import_lean()
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
optimizer.step()
assert "torch._dynamo.symbolic_convert" not in sys.modules, "the compiler was imported"
assert "torch.distributed.tensor" not in sys.modules
from transformers.utils import is_torch_distributed_available
assert is_torch_distributed_available() == torch.distributed.is_available()  # only the import was lean

assert torch._dynamo.config.cache_size_limit > 0  # more than a mark: the real one comes
assert "torch._dynamo.symbolic_convert" in sys.modules
assert torch.compiler.disable(abs)(-1) == 1
"""


def test_the_compiler_comes_only_when_it_is_asked_for(tiny_model: Path, root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tiny_model)], cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


PARTS = """
import sys
from everlearn.models.imports import import_lean
import_lean()
from torch._dynamo.utils import counters  # as torchvision and others begin
import torch
assert sys.modules["torch._dynamo.utils"] is torch._dynamo.utils and counters is torch._dynamo.utils.counters
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""


def test_a_part_of_the_compiler_can_be_imported_first(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PARTS], cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
