"""The paged KV cache: which block holds what, and the tensors behind the blocks.

`BlockPool` is bookkeeping without torch: reference counts, prefix lookup, least-recently-used eviction. `KVCache` is the tensors and
knows nothing of sequences; what it keeps of a token (keys and values, or a latent) the model says (`CacheForm`). `StateCache` holds what
layers without keys keep of a whole sequence. A full block is found again by the digest of every token up to its end, chained from a root
that names tenant, base model and adapter version, so a prefix can be served neither to another tenant nor by other weights. A partly
filled block has no digest; it is shared only between samples of one prompt, and copied before one of them writes into it.

Axes: L layers, S slots (one token each), T tokens of the packed row, G key/value heads, D head size, N slots for sequences.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from hashlib import blake2b

import torch

from everlearn.models.attention import CacheForm

# Padding reads block 0, which stays zero: what a freed block last held (NaN, from a diverged adapter) must never meet a zero weight.
NULL_BLOCK = 0


def root_digest(*names: str) -> bytes:
    """Where the chain of a (tenant, base model, adapter version) begins."""
    return blake2b("\0".join(f"{len(name)}:{name}" for name in names).encode(), digest_size=16).digest()


def next_digest(parent: bytes, tokens: bytes) -> bytes:
    """The digest of a full block, given its parent's and its own tokens."""
    return blake2b(parent + tokens, digest_size=16).digest()


class BlockPool:
    """Blocks 1 .. num_blocks - 1. Every block is referenced, idle (its content may be found again), or blank."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.references = [0] * num_blocks
        self.digest_of: dict[int, bytes] = {}
        self.block_of: dict[bytes, int] = {}
        # Last in, first out: memory that was never touched is touched last, so a small load keeps a small resident size.
        self.blank = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    @property
    def num_tokens(self) -> int:
        """Tokens that fit into all blocks together."""
        return (self.num_blocks - 1) * self.block_size

    def allocate(self) -> int:
        """A block for one writer. The caller has checked `num_free`."""
        if self.blank:
            block = self.blank.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            del self.block_of[self.digest_of.pop(block)]
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reader."""
        if not self.references[block]:
            del self.idle[block]
        self.references[block] += 1

    def release(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block]:
            return
        if block in self.digest_of:
            self.idle[block] = None
        else:
            self.blank.append(block)

    def match(self, digests: list[bytes]) -> list[int]:
        """The blocks of the longest known prefix; takes a reference on each."""
        blocks: list[int] = []
        for digest in digests:
            block = self.block_of.get(digest)
            if block is None:
                break
            self.share(block)
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """`block` is full and computed. Where the same content is known already, the first block stays the one that is found."""
        if digest not in self.block_of and block not in self.digest_of:
            self.block_of[digest] = block
            self.digest_of[block] = digest


class KVCache:
    """A tensor [L, S, G, D] for each entry of the form; slot = block * block_size + offset. `spare_slot` takes writes that nobody reads."""

    def __init__(self, form: CacheForm, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype):
        self.form = form
        self.num_blocks, self.block_size = num_blocks + 1, block_size
        self.spare_slot = num_blocks * block_size
        self.place = {layer: place for place, layer in enumerate(form.layers)}
        self.tensors = []
        for entry in form.entries:
            tensor = torch.empty((len(form.layers), self.num_blocks * block_size, *entry), device=device, dtype=dtype)
            tensor[:, :block_size] = 0
            self.tensors.append(tensor)
        self.slot_bytes = sum(tensor[0, 0].nbytes for tensor in self.tensors)  # of one token in one layer

    def write(self, layer: int, slots_T: torch.Tensor, *entries: torch.Tensor) -> None:
        """One tensor [T, G, D] for each entry of the form."""
        place = self.place[layer]
        for tensor, entry in zip(self.tensors, entries, strict=True):
            tensor[place].index_copy_(0, slots_T, entry)

    def read(self, layer: int, slots_S: torch.Tensor) -> list[torch.Tensor]:
        """Copies of each entry [len(slots), G, D]."""
        place = self.place[layer]
        return [tensor[place].index_select(0, slots_S) for tensor in self.tensors]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """(from, to) for every layer; what a writer does before it changes a shared block."""
        for tensor in self.tensors:
            blocks = tensor.unflatten(1, (self.num_blocks, self.block_size))
            for source, target in pairs:
                blocks[:, target] = blocks[:, source]


class StateCache:
    """What layers with a state keep of each sequence: [N, ...] for each of them. The last slot takes writes that nobody reads."""

    def __init__(self, form: CacheForm, num_slots: int, device: torch.device, dtype: torch.dtype):
        self.num_slots = num_slots if form.state_layers else 0
        self.free = list(range(self.num_slots - 1, -1, -1))
        # A state is a sum over the whole sequence: it is kept in float32, the inputs of the convolution as they came.
        kinds = (dtype, torch.float32)
        self.of_layer = {
            layer: [
                torch.empty((self.num_slots + 1, *shape), device=device, dtype=kind)
                for shape, kind in zip(form.state_shapes, kinds, strict=True)
            ]
            for layer in form.state_layers
        }

    def allocate(self) -> int:
        """A slot of zeros. The caller has looked at `free`."""
        slot = self.free.pop()
        for tensors in self.of_layer.values():
            for tensor in tensors:
                tensor[slot] = 0
        return slot

    def copy(self, source: int, target: int) -> None:
        for tensors in self.of_layer.values():
            for tensor in tensors:
                tensor[target] = tensor[source]

    def release(self, slot: int) -> None:
        self.free.append(slot)


def num_states_for(form: CacheForm, max_batch: int, item_bytes: int, device: torch.device) -> int:
    """How many sequences may have a state: as many as run together; on GPU a tenth of what is free, because keys want their part."""
    if not form.state_layers or device.type != "cuda":
        return max_batch
    conv, matrix = (math.prod(shape) for shape in form.state_shapes)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(1, min(max_batch, int(0.1 * free_bytes) // (len(form.state_layers) * (conv * item_bytes + 4 * matrix))))


def num_blocks_for(kv_tokens: int, block_size: int, token_bytes: int, device: torch.device, max_tokens: int) -> int:
    """How many blocks `engine.kv_tokens` means (0: 32,768 tokens on CPU; on GPU 30 % of what is free, because training needs the
    rest, and never more than `max_tokens`). The null block comes on top."""
    if not kv_tokens:
        kv_tokens = 32768
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            kv_tokens = max(block_size, min(max_tokens, int(0.3 * free_bytes) // token_bytes))
    return -(-kv_tokens // block_size) + 1
