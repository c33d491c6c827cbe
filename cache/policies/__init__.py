"""Replacement policies: one policy, one file, one line in the table."""

from cache.policies.least_stale import LeastStalePolicy
from cache.policies.lfu import LfuPolicy
from cache.policies.lru import LruPolicy
from cache.policies.policy import Policy
from cache.policies.segment import SegmentPolicy
from cache.policies.slru import SlruPolicy

POLICIES: dict[str, type[Policy]] = {
    "least_stale": LeastStalePolicy,
    "lfu": LfuPolicy,
    "lru": LruPolicy,
    "segment": SegmentPolicy,
    "slru": SlruPolicy,
}
