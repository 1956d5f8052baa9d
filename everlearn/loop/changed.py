"""What became of feedback that moving weights have taken already: edits, words that count again or no longer, deletions.

The server numbers what happens to feedback (`GET /v1/feedback/changes`). A look reads one page of what came since the last one, and AT_ONCE
pieces of feedback at most, each as it is now. Of one that wasn't taken yet nothing has to be known: it is taken as it is then. Of one that
was read when later changes were there already (`heard`) those are passed over: no edit is learned twice, whoever was killed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from everlearn.errors import NotFound
from everlearn.loop.moving import Moving
from everlearn.loop.service import Api

CHANGES = 1000  # read at a look
AT_ONCE = 32  # pieces of feedback that a look reads anew
CHANGING = ("edited", "restored", "superseded", "deleted")  # what makes a difference; of what expired nothing is unlearned


class Changed(msgspec.Struct, frozen=True):
    """`upto` and `heard` as of Moving, behind this look. `again`: what was edited, or counts again, as it is now, each with the `split` of
    its episode; `acts`: which of the two, by id. `deleted`: ids. `stale`: what is known of older corrections has to be read anew."""

    upto: int
    heard: dict[str, int]
    again: list[dict[str, Any]] = []
    acts: dict[str, str] = {}
    deleted: frozenset[str] = frozenset()
    stale: bool = False


def newest(api: Api) -> int:
    """The last change so far."""
    return int(api.get("/v1/feedback/changes", limit=1)["newest"])


def since(api: Api, name: str, moving: Moving, upto: int, teaches: Callable[[dict[str, Any]], bool]) -> Changed:
    """What happened behind the change `upto` to feedback that `moving` has taken, about answers of the deployment `name`. `teaches`:
    whether a piece of feedback is of a kind that is learned from."""
    page = api.get("/v1/feedback/changes", after=upto, limit=CHANGES)["data"]
    last: dict[str, str] = {}
    edited: set[str] = set()
    for change in page:
        which, act = change["feedback_id"], change["act"]
        if act in CHANGING and which <= moving.behind and change["id"] > moving.heard.get(which, 0):
            if which not in last and len(last) == AT_ONCE:
                break
            last[which] = act
            edited |= {which} if act == "edited" else set()
        upto = change["id"]
    heard = {which: known for which, known in moving.heard.items() if known > upto}
    again, acts, stale = [], {}, False
    for which in [which for which, act in last.items() if act != "deleted"]:
        try:
            found = api.get(f"/v1/feedback/{which}")
        except NotFound:
            continue  # its deletion is among the next
        if not teaches(found) or not _of(api, name, found):
            continue
        stale = True
        if (known := max(change["id"] for change in found["history"])) > upto:
            heard[which] = known
        if found["counts"]:
            again.append({**found, "split": split_of(api, found["target"]["episode_id"])})
            acts[which] = "edited" if which in edited else "restored"
    return Changed(upto, heard, again, acts, frozenset(which for which, act in last.items() if act == "deleted"), stale)


def anew(api: Api, said: Sequence[dict[str, Any]], upto: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What is taken now; of what was edited before, as it is now, and up to which change that is known where it is behind `upto`."""
    rows: list[dict[str, Any]] = []
    heard: dict[str, int] = {}
    for one in said:
        if one["revision"] > 1:
            try:
                one = {**api.get(f"/v1/feedback/{one['id']}"), "split": one["split"]}
            except NotFound:
                pass  # its deletion is among the next changes
            else:
                known = max(change["id"] for change in one["history"])
                heard |= {one["id"]: known} if known > upto else {}
        rows.append(one)
    return rows, heard


def split_of(api: Api, episode: str) -> str:
    """ "" where the episode is gone."""
    try:
        return str(api.get(f"/v1/episodes/{episode}", limit=1)["split"])
    except NotFound:
        return ""


def told(acts: dict[str, str], learned: Sequence[str]) -> str:
    """The line of the log. `learned`: what the weights learn once more; what is held out, or answered in a memory, isn't."""
    parts = []
    for act, words in (("edited", "edited"), ("restored", "counting again")):
        if which := [one for one, known in acts.items() if known == act]:
            parts.append(f"{len(which)} {words}, {len(set(which) & set(learned))} of them learned once more")
    return f"of feedback that was taken already: {'; '.join(parts)}"


def _of(api: Api, name: str, said: dict[str, Any]) -> bool:
    """Whether it is about an answer of the deployment."""
    record = said["target"]["record_id"]
    try:
        return record is not None and str(api.get(f"/v1/records/{record}")["model"]).partition("@")[0] == name
    except NotFound:
        return False
