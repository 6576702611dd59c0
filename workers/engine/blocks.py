"""Who owns which KV block, and which blocks hold a prefix that others may read.  Pure bookkeeping: the memory itself is
in kvcache.py.

A block may be referred to by several sequences.  A full one can be published under the hash of all tokens up to its
end; when its last reference goes it stays findable, and is taken again only when no other block is free, the least
recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

Prefix = bytes
"""Names a block by the tenant's salt and every token up to the block's end."""


def prefix_of(before: Prefix, tokens: bytes) -> Prefix:
    """The name of the block that holds `tokens` behind the blocks that `before` names."""
    return blake2b(tokens, key=before, digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each.  Deterministic: equal calls on every rank give equal ids."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # last in, first out
        self._unused: OrderedDict[int, None] = OrderedDict()  # published, no references; least recently used first
        self._found: dict[Prefix, int] = {}
        self._name: dict[int, Prefix] = {}  # the inverse

    @property
    def num_free(self) -> int:
        """Blocks that `take` could give out."""
        return len(self._blank) + len(self._unused)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, referred to by the caller alone, who has checked `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} KV blocks wanted, {self.num_free} free: the scheduler did not check")
        return [self._take() for _ in range(count)]

    def find(self, prefixes: Sequence[Prefix]) -> list[int]:
        """The blocks that hold the longest run of these prefixes, from the first; nothing is referred to yet."""
        blocks = []
        for prefix in prefixes:
            if (block := self._found.get(prefix)) is None:
                break
            blocks.append(block)
        return blocks

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of them `share` would make unavailable to `take`."""
        return sum(not self._refs[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Refer to blocks that `find` gave."""
        for block in blocks:
            self._unused.pop(block, None)
            self._refs[block] += 1

    def publish(self, block: int, prefix: Prefix) -> None:
        """Let `find` give this block, which is full; the first one published under a name keeps it."""
        if prefix not in self._found and block not in self._name:
            self._found[prefix] = block
            self._name[block] = prefix

    def retract(self, blocks: Iterable[int]) -> None:
        """What is in these blocks must not be read by others (any more)."""
        for block in blocks:
            self._forget_name(block)
            if block in self._unused:
                del self._unused[block]
                self._blank.append(block)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each; the last ones of a sequence are the first to be taken again."""
        for block in reversed(blocks):
            if not self._refs[block]:
                raise RuntimeError(f"KV block {block} was freed twice")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._name:
                self._unused[block] = None
            else:
                self._blank.append(block)

    def check_all_free(self) -> None:
        """Called when nothing runs: a block with a reference has leaked, and the books must agree."""
        leaked = [block for block, refs in enumerate(self._refs) if refs]
        if leaked:
            raise RuntimeError(f"KV blocks leaked while idle: {leaked[:16]}{'...' if len(leaked) > 16 else ''}")
        names = {block: prefix for prefix, block in self._found.items()}
        if names != self._name or self._name.keys() != self._unused.keys() or self.num_free != self.num_blocks:
            raise RuntimeError("the KV block pool's books disagree while idle")

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            self._forget_name(block)
        self._refs[block] = 1
        return block

    def _forget_name(self, block: int) -> None:
        if prefix := self._name.pop(block, None):
            del self._found[prefix]
