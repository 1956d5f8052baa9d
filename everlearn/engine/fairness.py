"""Turns between tenants: whoever was served least is next.

Each tenant has a lane, first come, first served within it. What a tenant was given (tokens computed, seconds of a thread) is charged
to it, and the lane with the smallest account goes first: virtual token counters, Sheng et al. 2023, "Fairness in Serving Large
Language Models". A tenant that comes back starts level with those who wait: idleness saves up nothing. So a thousand requests of one
tenant delay another's first one by a single turn. The queue knows neither sequences nor grammars.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Generic, TypeVar

T = TypeVar("T")
# Accounts that are remembered of tenants with nothing waiting.
MANY_ACCOUNTS = 1024


class FairQueue(Generic[T]):
    def __init__(self) -> None:
        self.lanes: dict[str, deque[T]] = {}
        self.served: dict[str, float] = {}
        self.level = 0.0  # the account of the lane that was served last
        self.num = 0

    def __len__(self) -> int:
        return self.num

    def append(self, tenant: str, item: T) -> None:
        self._lane(tenant).append(item)
        self.num += 1

    def put_back(self, tenant: str, item: T) -> None:
        """An item that was popped too early: it is the tenant's next one."""
        self._lane(tenant).appendleft(item)
        self.num += 1

    def pop(self) -> tuple[str, T]:
        """The next item and its tenant; there must be one."""
        found = self.pop_of_others(())
        assert found is not None
        return found

    def pop_of_others(self, tenants: Collection[str]) -> tuple[str, T] | None:
        """The next item of a tenant that isn't among `tenants`."""
        eligible = [tenant for tenant in self.lanes if tenant not in tenants]
        if not eligible:
            return None
        tenant = min(eligible, key=self.served.__getitem__)
        self.level = max(self.level, self.served[tenant])
        lane = self.lanes[tenant]
        item = lane.popleft()
        self._drop_if_empty(tenant)
        return tenant, item

    def remove(self, tenant: str, item: T) -> bool:
        """Takes an item out of the queue; False if it isn't there."""
        lane = self.lanes.get(tenant, ())
        if item not in lane:
            return False
        self.lanes[tenant].remove(item)
        self._drop_if_empty(tenant)
        return True

    def charge(self, tenant: str, amount: float) -> None:
        self.served[tenant] = self.served.get(tenant, self.level) + amount

    def _lane(self, tenant: str) -> deque[T]:
        if tenant not in self.lanes:
            if len(self.served) > MANY_ACCOUNTS:
                self._forget_half()
            self.lanes[tenant] = deque()
            self.served[tenant] = max(self.served.get(tenant, 0.0), self.level)
        return self.lanes[tenant]

    def _forget_half(self) -> None:
        """Tenants below the median that wait for nothing would start from the new level anyway."""
        self.level = max(self.level, sorted(self.served.values())[len(self.served) // 2])
        self.served = {t: s for t, s in self.served.items() if s > self.level or t in self.lanes}

    def _drop_if_empty(self, tenant: str) -> None:
        self.num -= 1
        if not self.lanes[tenant]:
            del self.lanes[tenant]
