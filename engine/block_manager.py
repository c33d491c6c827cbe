"""Who owns which KV block, and which hold a prefix that another request can reuse. Pure bookkeeping, no torch."""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from engine.request import Request

_HASH_NBYTES = 16


class BlockManager:
    """Blocks of `block_size` tokens, counted references, least recently freed first.

    A full block is known by a keyed hash over its tokens and the hash of the block before it, so equal hashes mean
    equal prefixes; the key is secret and of this process, so that no client can make blocks collide. A freed block
    keeps its content and may be found again until it is needed for something else.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # oldest first
        self._num_refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._secret = secrets.token_bytes(32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def reuse_prefix(self, request: Request) -> int:
        """Give a request without blocks the cached blocks of its prefix and return how many tokens they hold.

        The last token is never taken from the cache, since its logits are needed.
        """
        assert not request.block_ids
        self._extend_hashes(request, (request.num_tokens - 1) // self.block_size)
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            self._free.pop(block_id, None)
            self._num_refs[block_id] += 1
            request.block_ids.append(block_id)
        return len(request.block_ids) * self.block_size

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Let the request's blocks hold its first `num_tokens` tokens; False, and nothing changed, if none are left."""
        num_missing = -(-num_tokens // self.block_size) - len(request.block_ids)
        if num_missing > self.num_free:
            return False
        for _ in range(num_missing):
            block_id, _ = self._free.popitem(last=False)
            self._forget(block_id)
            self._num_refs[block_id] = 1
            request.block_ids.append(block_id)
        return True

    def commit(self, request: Request) -> None:
        """Offer the blocks that `num_computed_tokens` has filled to other requests."""
        num_full = request.num_computed_tokens // self.block_size
        self._extend_hashes(request, num_full)
        for block_id, block_hash in zip(request.block_ids[:num_full], request.block_hashes, strict=False):
            if self._hash_of[block_id] is None and block_hash not in self._block_of:
                self._hash_of[block_id] = block_hash
                self._block_of[block_hash] = block_id

    def free(self, request: Request) -> None:
        """Take back all blocks; the tail is given to others first."""
        for block_id in reversed(request.block_ids):
            self._num_refs[block_id] -= 1
            if self._num_refs[block_id] == 0:
                self._free[block_id] = None
        request.block_ids.clear()

    def reset_prefix_cache(self) -> None:
        """Forget the content of every block."""
        for block_id in range(self.num_blocks):
            self._forget(block_id)

    def check_integrity(self, requests: Sequence[Request] = ()) -> None:
        """Raise `AssertionError` unless the blocks of `requests` (all that have any) and the free ones add up."""
        num_refs = [0] * self.num_blocks
        for request in requests:
            for block_id in request.block_ids:
                num_refs[block_id] += 1
        problems = {
            "reference counts are off": num_refs != self._num_refs,
            "free blocks are not those without references": set(self._free)
            != {block_id for block_id, count in enumerate(num_refs) if count == 0},
            "hash tables disagree": {h: b for b, h in enumerate(self._hash_of) if h is not None} != self._block_of,
        }
        broken = [name for name, is_broken in problems.items() if is_broken]
        if broken:
            raise AssertionError("; ".join(broken))

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block_id] = None

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        hashes = request.block_hashes
        for i in range(len(hashes), num_blocks):
            tokens = request.token_ids[i * self.block_size : (i + 1) * self.block_size]
            parent = hashes[i - 1] if i else b""
            message = parent + array("I", tokens).tobytes()
            hashes.append(blake2b(message, digest_size=_HASH_NBYTES, key=self._secret).digest())
