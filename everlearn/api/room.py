"""A bounded room that tenants share: once it is full, it refuses whoever holds a fair part of it already, and nobody else.

With t tenants inside, a fair part is the limit over t. Who holds nothing is always let in, so that no tenant waits for another to
leave; the room therefore overfills, with t tenants by at most limit * (1/2 + ... + 1/t) and one request of each.
"""

from __future__ import annotations

from collections import Counter


class Room:
    """Counts what each tenant holds of `limit` (sequences, bytes). One thread's."""

    def __init__(self, limit: int):
        self.limit, self.total = limit, 0
        self.held: Counter[str] = Counter()

    def has(self, tenant: str, size: int) -> bool:
        """Whether `size` more of this tenant may come in."""
        own = self.held[tenant]
        return not own or self.total + size <= self.limit or own + size <= self.share(tenant)

    def share(self, tenant: str) -> int:
        """This tenant's fair part of the whole, beside those that are inside."""
        return self.limit // len(self.held.keys() | {tenant})

    def take(self, tenant: str, size: int) -> None:
        self.held[tenant] += size
        self.total += size
        if not self.held[tenant]:
            del self.held[tenant]

    def give(self, tenant: str, size: int) -> None:
        self.take(tenant, -size)
