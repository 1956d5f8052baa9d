"""The block pool against a plain model of it."""

from __future__ import annotations

import random

import torch

from everlearn.engine.kvcache import NULL_BLOCK, BlockPool, KVCache, next_digest, num_blocks_for, root_digest
from everlearn.models.attention import CacheForm


def test_digests_name_tenant_model_version_and_every_token() -> None:
    roots = {root_digest(*names) for names in [("a", "b", "c"), ("ab", "", "c"), ("a", "bc", ""), ("", "a", "bc")]}
    assert len(roots) == 4
    root = root_digest("t", "m", "v")
    assert next_digest(next_digest(root, b"1"), b"2") != next_digest(next_digest(root, b"2"), b"1")


def test_a_registered_block_is_found_until_it_is_evicted() -> None:
    pool = BlockPool(4, 16)
    blocks = [pool.allocate() for _ in range(3)]
    assert NULL_BLOCK not in blocks and pool.num_free == 0
    for block, digest in zip(blocks, (b"x", b"y", b"z"), strict=True):
        pool.register(block, digest)
        pool.release(block)
    assert pool.num_used == 0
    assert pool.match([b"x", b"y", b"missing", b"z"]) == blocks[:2]
    assert pool.allocate() == blocks[2]  # the only one that nobody holds; its content is forgotten
    assert pool.match([b"z"]) == []
    pool.release(blocks[1])
    pool.release(blocks[0])
    assert pool.allocate() == blocks[1]  # least recently released


def test_the_first_of_two_equal_blocks_is_the_one_that_is_found() -> None:
    pool = BlockPool(3, 16)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"x")
    pool.register(second, b"x")
    pool.release(first)
    pool.release(second)
    assert pool.match([b"x"]) == [first]
    assert pool.allocate() == second


def test_random_use_loses_no_block_and_hands_none_out_twice() -> None:
    rng = random.Random(0)
    pool, held, num_digests = BlockPool(12, 4), [], 0
    for _ in range(4000):
        choice = rng.random()
        if choice < 0.4 and pool.num_free:
            block = pool.allocate()
            assert block not in held
            held.append(block)
        elif choice < 0.5 and held:
            num_digests += 1
            pool.register(rng.choice(held), b"%d" % num_digests)
        elif choice < 0.65 and num_digests:
            held += pool.match([b"%d" % rng.randint(1, num_digests)])
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        assert pool.num_used == len(set(held))
        assert all(pool.references[b] == held.count(b) for b in set(held))
        assert set(pool.block_of.values()) == set(pool.digest_of)


def test_slots_are_written_read_and_copied_in_every_layer() -> None:
    form = CacheForm(layers=(0, 1), entries=((2, 3), (2, 3)))
    cache = KVCache(form, 5, 4, torch.device("cpu"), torch.float32)
    slots = torch.tensor([5, 6])
    for layer in range(2):
        cache.write(layer, slots, torch.full((2, 2, 3), 1.0 + layer), torch.full((2, 2, 3), 10.0 + layer))
    cache.copy_blocks([(1, 3)])
    for layer in range(2):
        keys, values = cache.read(layer, torch.tensor([13, 14, 0]))
        assert keys[:2].eq(1.0 + layer).all() and values[:2].eq(10.0 + layer).all()
        assert keys[2].eq(0).all() and values[2].eq(0).all()


def test_the_number_of_blocks() -> None:
    cpu = torch.device("cpu")
    assert num_blocks_for(0, 16, 1, cpu, 10**6) == 2048 + 1
    assert num_blocks_for(33, 16, 1, cpu, 10**6) == 3 + 1
