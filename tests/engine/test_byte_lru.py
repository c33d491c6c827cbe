from __future__ import annotations

from engine.byte_lru import ByteLru


def test_the_least_recently_used_goes_first_and_what_is_too_large_does_not_come_in():
    lru: ByteLru[str, int] = ByteLru(10)
    lru.put("a", 1, 4)
    lru.put("b", 2, 4)
    assert lru.get("a") == 1
    lru.put("c", 3, 4)
    assert (lru.get("a"), lru.get("b"), lru.get("c"), lru.nbytes, len(lru)) == (1, None, 3, 8, 2)
    lru.put("a", 5, 6)
    assert (lru.get("a"), lru.nbytes) == (5, 10)
    lru.put("d", 6, 11)
    assert (lru.get("d"), lru.nbytes) == (None, 10)
    lru.put("a", 7, 11)
    assert (lru.get("a"), lru.nbytes) == (None, 4)
