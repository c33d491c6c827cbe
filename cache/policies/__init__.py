"""Replacement policies: one policy, one file, one line in the table."""

from cache.policies.lru import LruPolicy
from cache.policies.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "lru": LruPolicy,
}
