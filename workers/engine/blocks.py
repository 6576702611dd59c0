"""Who owns which KV block.  Pure bookkeeping: the memory itself is in kvcache.py."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, handed out last-in first-out, so that equal calls on every rank
    give equal ids.

    Every block has one owner.  A prefix cache (issue 3) would turn `_owned` into reference counts and look a block up
    by the hash of its tokens before `take`; nothing else has to know.
    """

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: got {num_blocks} of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, now owned by the caller, who has checked `num_free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} KV blocks wanted, {len(self._free)} free: the scheduler did not check")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owned[block] = 1
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Free blocks that the caller owns; the last taken is the first to be taken again."""
        for block in reversed(blocks):
            if not self._owned[block]:
                raise RuntimeError(f"KV block {block} was freed twice")
            self._owned[block] = 0
            self._free.append(block)

    def check_all_free(self) -> None:
        """Called when nothing runs: a block that is still owned has leaked."""
        if self.num_free != self.num_blocks:
            leaked = [block for block, owned in enumerate(self._owned) if owned]
            raise RuntimeError(f"KV blocks leaked while idle: {leaked[:16]}{'...' if len(leaked) > 16 else ''}")
