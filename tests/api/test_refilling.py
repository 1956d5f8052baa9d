"""What a model's refill becomes: once for each cut, within the room there is, and never of what was forgotten meanwhile."""

from __future__ import annotations

import msgspec

from everlearn.api.refilling import MOST, Cut, Done, cuts_of, merged, weighed
from everlearn.memory.plan import Rewrite
from everlearn.memory.window import Chunk, Window


def chunk(number: int, size: int = 10, text: str = "as it stands", **more: object) -> Chunk:
    return Chunk("user", text, tuple(range(size)), (number,), number, **more)  # type: ignore[arg-type]


def test_a_turn_that_cuts_a_chunk_twice_leaves_one_cut():
    first, then, last = chunk(0, 20, "whole"), chunk(0, 12, "half"), chunk(0, 6, "little")
    other = chunk(1, 9)
    found = cuts_of([Rewrite(first, then, 12), Rewrite(other, None), Rewrite(then, last, 6)])
    assert found == (Cut(first, last, 6),)
    assert cuts_of([Rewrite(first, then, 12), Rewrite(then, None)]) == (), "what was forgotten in the end isn't written anew"


def test_a_text_takes_its_place_or_the_history_says_why_not():
    window = Window(40, (chunk(0, 10), chunk(1, 20)), 5, frame=4)
    cut = Cut(chunk(0, 30, "whole"), window.chunks[0], 12)
    after, (row,) = merged(window, Done(cut, "written", tuple(range(12))), "keeper@1")
    assert after.chunks[0].text == "written" and after.size == 32 and after.chunks[1] == window.chunks[1]
    assert (row.source, row.turn, row.before, row.after, row.refill) == (0, 5, "as it stands", "written", "generate (keeper@1)")
    for done, there, why in (
        (Done(cut, "written", tuple(range(17))), window, "the window has no room for it any more"),
        (Done(cut, failed="the queue is full"), window, "the queue is full"),
        (Done(cut, "x", (1,)), msgspec.structs.replace(window, chunks=(chunk(0, 9, "another"),)), "the chunk was changed meanwhile"),
        (Done(cut, "x", (1,)), msgspec.structs.replace(window, chunks=(chunk(0, 10, pinned=True),)), "the chunk was changed meanwhile"),
    ):
        after, (row,) = merged(there, done, "tiny")
        assert after == there and row.before == row.after and row.refill == f"generate failed (tiny): {why}"
    gone = msgspec.structs.replace(window, chunks=window.chunks[1:])
    assert merged(gone, Done(cut, "written", (1,)), "tiny") == (gone, []), "nothing of what was forgotten is written down again"


def test_a_turn_weighs_its_own_chunks_first_and_a_constant_number():
    window = Window(1000, (chunk(0, pinned=True), *(chunk(number) for number in range(1, 40))), 39)
    places = weighed(window, (38, 39))
    assert places[:2] == [38, 39] and len(places) == len(set(places)) == MOST and 0 not in places
    assert len(weighed(Window(1000), ())) == 0
