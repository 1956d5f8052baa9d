"""Which KV blocks a sequence holds: found in the prefix cache, allocated, copied before a write, given back.

The pool counts references and the cache holds the numbers (kvcache.py); here both meet the sequence. Who must make room for whom is the
sampler's affair. A model with layers that keep a state of the whole sequence gives each sequence a slot for it too; a prefix can't be
found again there, because its blocks are only half of what is known of it.
"""

from __future__ import annotations

from everlearn.engine.kvcache import BlockPool, KVCache, StateCache
from everlearn.engine.sequence import Sequence


class Blocks:
    def __init__(self, pool: BlockPool, cache: KVCache, states: StateCache):
        self.pool, self.cache, self.states, self.size = pool, cache, states, pool.block_size
        self.forks: dict[Sequence, None] = {}  # that wait for their turn and hold their siblings' blocks meanwhile; the youngest is last

    def match(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Takes what the prefix cache holds for a sequence without blocks. False if the next block is in `coming`: it is being
        computed for a neighbour, and a step later it is free; or if no state is free."""
        self.forks.pop(sequence, None)
        if sequence.blocks:
            return True
        if self.states.num_slots:
            if sequence.state is None and not self.states.free:
                return False
            sequence.state = self.states.allocate() if sequence.state is None else sequence.state
            return True
        limit = sequence.num_tokens - 1
        if not sequence.request.scores.complete:
            limit = min(limit, sequence.request.scores.next_row)
        digests = sequence.block_digests(limit // self.size, self.size)
        num_known = 0
        while num_known < len(digests) and digests[num_known] in self.pool.block_of:
            num_known += 1
        if num_known < len(digests) and digests[num_known] in coming:
            return False
        sequence.blocks = self.pool.match(digests)
        sequence.computed = len(sequence.blocks) * self.size
        return True

    def missing(self, sequence: Sequence, stop: int) -> int:
        """Blocks to allocate before tokens up to `stop` can be written; a shared last block counts, it is copied."""
        return -(-stop // self.size) - len(sequence.blocks) + self._must_copy(sequence)

    def _must_copy(self, sequence: Sequence) -> bool:
        index = sequence.computed // self.size
        return index < len(sequence.blocks) and self.pool.references[sequence.blocks[index]] > 1

    def extend(self, sequence: Sequence, stop: int) -> None:
        """Gives the sequence the blocks it is missing; they must be free."""
        if self._must_copy(sequence):
            index = sequence.computed // self.size
            block = self.pool.allocate()
            self.cache.copy_blocks([(sequence.blocks[index], block)])
            self.pool.release(sequence.blocks[index])
            sequence.blocks[index] = block
        while len(sequence.blocks) * self.size < stop:
            sequence.blocks.append(self.pool.allocate())

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Another sample of the same computed prompt, which holds the same blocks; where no state is free it computes the prompt again."""
        if self.states.num_slots:
            if not self.states.free:
                again = sequence.fork(index)
                again.blocks, again.computed = [], 0
                return again
            state = self.states.allocate()
            assert sequence.state is not None
            self.states.copy(sequence.state, state)
        for block in sequence.blocks:
            self.pool.share(block)
        fork = sequence.fork(index)
        fork.state = state if self.states.num_slots else None
        self.forks[fork] = None
        return fork

    def coming(self, sequence: Sequence, stop: int) -> list[bytes]:
        """Digests of the full blocks of a prompt that computing up to `stop` fills."""
        if stop - sequence.computed <= 1 or self.states.num_slots:
            return []
        return sequence.block_digests(stop // self.size, self.size)[sequence.computed // self.size :]

    def computed(self, sequence: Sequence, stop: int) -> None:
        """Keys and values up to `stop` are in the cache: the full blocks among them can be found from now on."""
        first, full = sequence.computed // self.size, stop // self.size
        sequence.computed = stop
        if full > first and not self.states.num_slots:
            digests = sequence.block_digests(full, self.size)
            for index in range(first, full):
                self.pool.register(sequence.blocks[index], digests[index])

    def give_back(self, sequence: Sequence) -> None:
        """Releases blocks, last first: the beginning of a prefix is the likeliest to be wanted again."""
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks, sequence.computed = [], 0
        self.forks.pop(sequence, None)
        if sequence.state is not None:
            self.states.release(sequence.state)
            sequence.state = None
