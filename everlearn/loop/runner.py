"""The work of a deployment: collect, dataset, update, gate, shadow, canary, and then live or rejected.

    collect --trigger--> dataset --> update --> gate --> shadow --> canary --> champion
       ^                    |           |         |         |          |
       +--------------------+-----------+---------+---------+----------+   ended or rejected

A client of the server like any other, with an ordinary key. All that it knows is kept by the server: the deployment's state, and the
cycle's notes. So whatever ends it, even in the middle of training, the next one reads where things stand and goes on; and if two run at
once, the server takes the step of the one that was first, and the other looks again. What a candidate has shown is judged by
everlearn/loop/gate.py; nothing here decides, but that time or tokens are used up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import tinker

from everlearn.errors import Conflict, InternalError, InvalidRequest, NotFound, Overloaded, Unavailable
from everlearn.faultpoints import around
from everlearn.loop import description as descriptions
from everlearn.loop import edits, measure, outcomes, refusals, rule, update
from everlearn.loop.continuous import MOVES, Mover
from everlearn.loop.description import Description
from everlearn.loop.evidence import Evidence, digest
from everlearn.loop.gate import Verdict, decide
from everlearn.loop.rule import Rule
from everlearn.loop.service import Api, Deployed, Notes, deployed, pages, read, route, source_cap
from everlearn.loop.watch import Watch

REST = "collect"
FORMS = {"sft": "sft", "dpo": "preference", "kto": "kto", "grpo": "prompts"}  # of a dataset, by method
KINDS = {  # of the labels that it learns from
    "sft": ["demonstration"],
    "dpo": ["preference", "demonstration"],
    "kto": ["boolean", "float"],
    "grpo": ["boolean", "float", "preference", "demonstration"],
}
ASKED = ("update", "gate")  # states in which models are trained, or asked
WAITING = ("asks", "verdict", "rule")  # what a cycle has while a person's word is missing
RETRIES = 5  # when somebody else was faster, again and again


class Runner:
    """Does what is due. `service` is a tinker.ServiceClient of the same server; `say` gets a line for whatever is worth one."""

    def __init__(self, api: Api, service: Any, name: str, say: Callable[[str], None] = print, clock: Callable[[], float] = time.time):
        self.api, self.service, self.name, self.say, self.clock = api, service, name, say, clock
        self.mover = Mover(self)
        self.known: dict[str, dict[str, float]] = {}  # what was read of answers' texts, so that each is read once
        self.guard = Watch(api, name, say, clock)
        self._guarded = False
        self._tries = (-1, 0)  # at which revision, and how often the server failed there

    # -- how it is driven --------------------------------------------------------------------------------------------------

    def run(self) -> Deployed:
        """As far as it goes now; the deployment then."""
        lost = 0
        while True:
            try:
                if not self.step():
                    return read(self.api, self.name)
                lost = 0
            except Conflict as error:
                lost += 1
                if lost > RETRIES:
                    raise
                self.say(f"somebody was faster: {error.message}")

    def watch(self, poll: float, over: threading.Event | None = None) -> None:
        """Until `over` is set: what is due now, then another look after `poll` seconds. A server that is away is waited for. The version
        that serves is watched by a thread of its own: an update takes minutes, and a rollback shouldn't wait for it."""
        over = over or threading.Event()
        guard = threading.Thread(target=self.guard.watch, args=(poll, over), name=f"watch {self.name}", daemon=True)
        self._guarded = True
        guard.start()
        while guard.is_alive() and not over.is_set():
            try:
                self.run()
            except Unavailable as error:
                self.say(f"waiting: {error.message}")
            over.wait(poll)
        guard.join()
        self._guarded = False
        if not over.is_set():
            raise InternalError(f"nobody watches what {self.name} answers any more; the error is above, and a new start goes on")

    def step(self) -> bool:
        """The work of the present state; whether there may be more to do at once. Does nothing while the deployment is paused."""
        now = read(self.api, self.name)
        if now.paused:
            return False
        if not self._guarded and self.guard.look(now):
            return True
        if now.state == REST:
            self.known.clear()  # the canary that it was read for is over
        described, moved = descriptions.of(now.description), None
        try:
            with around("cycle.act"):
                if described.triggers.continuous and now.state in MOVES:
                    moved = self.mover.move(now, described)
            with around("cycle.act"):
                return WORK[now.state](self, moved or now, described) or moved is not None
        except refusals.REFUSED as error:
            return self._refused(now.state, error)

    def begin(self, why: str) -> Deployed:
        """A cycle now, whatever the triggers say; one that is under way goes on."""
        now = read(self.api, self.name)
        return self._begin(now, descriptions.of(now.description), why) if now.state == REST else now

    def enter(self, candidate: int) -> Deployed:
        """Takes a version that was trained elsewhere to the gate."""
        now = read(self.api, self.name)
        cycle = self._cycle(now, "by hand", 0)
        return self._advance(now, "gate", f"{now.name}@{candidate} is to be tried", candidate=candidate, cycle=cycle)

    # -- states ------------------------------------------------------------------------------------------------------------

    def collect(self, now: Deployed, described: Description) -> bool:
        if described.triggers.continuous:
            return self.mover.due(now, described) and self.mover.candidate(now, described)
        why = self.due(now, described)
        if why:
            self._begin(now, described, why)
        return bool(why)

    def dataset(self, now: Deployed, described: Description) -> bool:
        made = self._dataset(now, described, FORMS[described.update.method])
        if made is None:
            self._end(now, "ended", "nothing was said that could be learned from", {})
            return False
        figures = {name: made[name] for name in ("id", "content_hash", "items", "left_out")}
        if not made["items"]["train"]:
            self._end(now, "ended", "all that was said is held out, and nothing is left to learn from", {"dataset": figures})
            return False
        reason = f"{made['items']['train']} items to learn from, {made['items']['heldout']} held out"
        self._advance(now, "update", reason, {"dataset": figures}, cycle={**now.cycle, "dataset": made["id"]})
        return True

    def update(self, now: Deployed, described: Description) -> bool:
        notes = Notes(self._note, now)
        try:
            items = self._items(str(now.cycle["dataset"]), "train", "train")
        except (Conflict, NotFound) as error:
            return self._rebuilt(now, error.message)
        items, edited = self._edited(now, described, items, notes)
        now = notes.now
        if not items:
            self._end(now, "ended", f"nothing is left for the weights: {edited} corrections were answered in memories", edits.remedied(now))
            return False
        try:
            made = update.make(self.api, self.service, now, described, items, notes, self.say, self.clock)
        except Overloaded as error:
            if error.code != "budget":
                raise
            self._end(notes.now, "rejected", error.message, {"saved": notes.now.cycle.get("saved", {})})
            return False
        except Conflict as error:
            if error.code not in (update.UNEARNED, update.TOO_LONG):
                raise
            self._end(notes.now, "ended", error.message, {})
            return False
        body = {"name": self.name, "path": made.path, "note": f"cycle {now.cycle['id']}"}
        number = int(self.api.post("/v1/adapters", body)["number"])
        parent = now.champion if described.update.start == "champion" and not now.champion.endswith("@0") else None
        told = {"version": f"{self.name}@{number}", "parent": parent}
        self.api.post(f"/v1/datasets/{now.cycle['dataset']}/versions", told)
        known = made.first_loss is not None and made.last_loss is not None
        loss = f"{made.first_loss:.3f} to {made.last_loss:.3f}" if known else "unknown"
        reason = f"{self.name}@{number}: {made.steps} steps on {made.examples} examples, loss {loss}"
        if edited:
            reason += f"; {edited} corrections were answered in memories instead"
        reason += "".join(f"; {count} left out, {why}" for why, count in made.left_out.items())
        self._advance(notes.now, "gate", reason, {"update": msgspec.to_builtins(made), **edits.remedied(notes.now)}, candidate=number)
        return True

    def _edited(self, now: Deployed, described: Description, items: list[dict[str, Any]], notes: Notes) -> tuple[list[dict[str, Any]], int]:
        """What is left for the weights when all that belongs into memories is there, and how much that was; held-out corrections as well:
        an edit teaches no weights anything."""
        if described.update.memory == "off" or described.update.method != "sft":
            return items, 0
        held_out = self._items(str(now.cycle["dataset"]), "heldout", "evaluate")
        done = edits.carried_out(self.api, [*items, *held_out], now.cycle.get("remedies", {}), notes)
        if done != now.cycle.get("remedies", {}):
            notes({"remedies": done})
        count = sum(found["place"] == "memory" for found in done.values())
        if count:
            self.say(f"{count} corrections are answered in memories, not by weights")
        return edits.left(items, done), count

    def _rebuilt(self, now: Deployed, why: str) -> bool:
        """Begins the update anew with what is left of its dataset, something of which was deleted; whether anything is.

        What was trained so far learned from what is gone, and goes with it.
        """
        self.say(f"beginning the update anew: {why}")
        try:
            made = self.api.post(f"/v1/datasets/{now.cycle['dataset']}/rebuild")
        except (InvalidRequest, NotFound) as error:
            if isinstance(error, InvalidRequest) and error.param != "filters":
                raise
            made = None
        if made is None or not made["items"]["train"]:
            self._end(now, "ended", "all that was to be learned was deleted", {})
            return False
        kept = {key: value for key, value in now.cycle.items() if key not in ("saved", "wordings")}
        self._note(now, {**kept, "dataset": made["id"]})
        return True

    def gate(self, now: Deployed, described: Description) -> bool:
        wanted, candidate = rule.rule_of(described.gate), _candidate(now)
        if now.cycle.get("asks"):
            # All is shown, and a person's word is missing: under the same rule, asking it all again would show the same.
            if now.cycle["verdict"]["rule_sha256"] == digest(wanted):
                return False
            self.say("the rule has changed: deciding anew")
            now = self._note(now, {key: value for key, value in now.cycle.items() if key not in WAITING})
        asked = now.cycle.get("asked", now.cycle.get("dataset") if described.update.method == "sft" else None)
        if asked is None:  # all are asked what users corrected, also one that learned from thumbs, or that was trained elsewhere
            made = self._dataset(now, described, "sft")
            asked = made["id"] if made else ""
            now = self._note(now, {**now.cycle, "asked": asked})
        self.say(f"asking {candidate} and {now.champion} the same questions")
        found = (self._items(asked, split, "evaluate") if asked else [] for split in ("train", "heldout"))
        trained, held_out = (edits.left(items, now.cycle.get("remedies", {})) for items in found)
        shown = measure.offline(self.api, self.service, now, candidate, trained, held_out, wanted)
        return self._conclude(now, described, wanted, shown)

    def shadow(self, now: Deployed, described: Description) -> bool:
        since = float(now.cycle["shadow_began"])
        traffic = outcomes.Traffic(self.api, now, since, described.settle, self.clock(), self.known)
        if now.shadow and len(traffic.shadows) >= described.shadow.answers:
            reason = f"{len(traffic.shadows)} answers in the shadow are enough"
            now = self._advance(now, "shadow", reason, shadow=0.0)
        asked = rule.rule_of(described.gate)
        # What only shown answers can tell (their feedback's rate, how long they took) is asked in the canary, where people see them.
        asked = msgspec.structs.replace(asked, guardrails={k: v for k, v in asked.guardrails.items() if k in descriptions.IN_SHADOW})
        found = msgspec.structs.replace(
            msgspec.convert(now.cycle["offline"], Evidence),
            stage="shadow",
            hours=self._hours(since),
            guardrails=traffic.unseen(list(asked.guardrails)),
        )
        return self._conclude(now, described, asked, found)

    def canary(self, now: Deployed, described: Description) -> bool:
        since, asked = float(now.cycle["canary_began"]), rule.rule_of(described.gate)
        cap = source_cap(self.api)
        traffic = outcomes.Traffic(self.api, now, since, described.settle, self.clock(), self.known, cap=cap)
        return self._conclude(now, described, asked, outcomes.of_canary(traffic, asked))

    def why_not(self, revision: int, error: Exception) -> str:
        """Why the server refuses the work that was begun at a revision. Raises Unavailable for what is to be tried again."""
        self._tries = (revision, self._tries[1] + 1 if self._tries[0] == revision else 1)
        return refusals.reason_of(error, self._tries[1])

    def _refused(self, state: str, error: Exception) -> bool:
        """Ends the cycle whose work in `state` the server refused: it would again, at each start."""
        if state not in ASKED and not isinstance(error, tinker.TinkerError):
            raise error
        now = read(self.api, self.name)
        reason = f"{state}: {self.why_not(now.revision, error)}"
        if state not in ASKED:
            raise Unavailable(reason) from error
        if now.state == state:
            self._end(now, "rejected", reason, {})
        return now.state != state

    # -- what follows ------------------------------------------------------------------------------------------------------

    def due(self, now: Deployed, described: Description) -> str:
        """Why a cycle is to begin now; "" if none is. No trigger fires without a new label."""
        triggers = described.triggers
        if not (triggers.labels or triggers.at):
            return ""
        began = float(now.cycle.get("began", now.created_at))
        labels = self._labels(now, described)
        if triggers.labels and labels >= triggers.labels:
            return f"{labels} new labels, {triggers.labels} asked"
        if triggers.at and labels and began < descriptions.latest(triggers.at, self.clock()):
            return f"it is past {triggers.at}, and there are {labels} new labels"
        return ""

    def _conclude(self, now: Deployed, described: Description, asked: Rule, found: Evidence) -> bool:
        """Does what the verdict says; whether there may be more to do at once. Evidence and rule are kept with it: it can be replayed."""
        verdict = decide(asked, found)
        told = {"verdict": msgspec.to_builtins(verdict), "rule": msgspec.to_builtins(asked), "evidence": msgspec.to_builtins(found)}
        self.say(f"{found.stage}: {verdict.decision}: {verdict.reason}")
        if verdict.decision == "promote":
            self._post(now, "promote", {"rule": True, "reason": verdict.reason, "evidence": told, "expected": now.revision})
            return True
        if verdict.decision == "reject" or (verdict.decision == "hold" and not _asks(verdict)):
            self._end(now, "rejected", verdict.reason, told)
            return False
        if verdict.decision == "hold":
            known = now.cycle.get("verdict", {}).get("rule_sha256")
            if (now.cycle.get("asks"), known) != (verdict.reason, verdict.rule_sha256):
                self._note(now, {**now.cycle, "asks": verdict.reason, "verdict": told["verdict"], "rule": told["rule"]})
            return False
        return self._continue(now, described, asked, found, verdict, told)

    def _continue(
        self, now: Deployed, described: Description, asked: Rule, found: Evidence, verdict: Verdict, told: dict[str, Any]
    ) -> bool:
        if found.stage == "offline" and asked.shadow is not None:
            cycle = {**now.cycle, "offline": msgspec.to_builtins(found), "shadow_began": self.clock()}
            self._advance(now, "shadow", verdict.reason, told, shadow=described.shadow.share, cycle=cycle)
            return True
        if found.stage == "canary":
            if verdict.step == found.step:
                return False
            self._advance(now, "canary", verdict.reason, told, share=verdict.share, cycle={**now.cycle, "step": verdict.step})
            return True
        if not verdict.share:
            return False
        offline = now.cycle.get("offline") or msgspec.to_builtins(found)
        cycle = {**now.cycle, "offline": offline, "canary_began": self.clock(), "step": verdict.step}
        self._advance(now, "canary", verdict.reason, told, share=verdict.share, cycle=cycle)
        return True

    # -- the server --------------------------------------------------------------------------------------------------------

    def _begin(self, now: Deployed, described: Description, why: str) -> Deployed:
        return self._advance(now, "dataset", why, cycle=self._cycle(now, why, self._labels(now, described)))

    def _cycle(self, now: Deployed, why: str, labels: int) -> dict[str, Any]:
        stays = ("moving", "remedies") if "moving" in now.cycle else ()
        kept: dict[str, Any] = {str(name): now.cycle[name] for name in stays if name in now.cycle}
        return {"id": f"{now.name}-{now.revision}", "began": self.clock(), "why": why, "labels": labels, **kept}

    def _labels(self, now: Deployed, described: Description) -> int:
        """Labels that came since the last cycle began."""
        since = float(now.cycle.get("began", 0.0))
        return sum(len(pages(self.api, "/v1/feedback", since, kind=kind, counts=True)) for kind in KINDS[described.update.method])

    def _dataset(self, now: Deployed, described: Description, form: str, name: str = "") -> dict[str, Any] | None:
        """None: nothing was said that counts."""
        body: dict[str, Any] = {"name": name or str(now.cycle["id"]), "form": form, "filters": {"model": now.name, **described.filters}}
        if form == "prompts":
            body["reward_version"] = update.reward_version(self.api, now.name)
        try:
            made: dict[str, Any] = self.api.post("/v1/datasets", body)
        except InvalidRequest as error:
            if error.param != "filters":
                raise
            return None
        return made

    def _items(self, dataset: str, split: str, purpose: str) -> list[dict[str, Any]]:
        return self.api.lines(f"/v1/datasets/{dataset}/export", split=split, purpose=purpose, tokens=True)

    def _advance(self, now: Deployed, to: str, reason: str, evidence: dict[str, Any] | None = None, **more: Any) -> Deployed:
        return self._post(now, "advance", {"to": to, "expected": now.revision, "reason": reason, "evidence": evidence or {}, **more})

    def _end(self, now: Deployed, kind: str, reason: str, evidence: dict[str, Any]) -> None:
        self.say(f"{kind}: {reason}")
        self._advance(now, REST, reason, evidence, kind=kind)

    def _note(self, now: Deployed, cycle: dict[str, Any], reason: str = "", evidence: dict[str, Any] | None = None) -> Deployed:
        """With a reason it is a line of the history."""
        told = {"reason": reason, "evidence": evidence or {}} if reason else {}
        return deployed(self.api.patch(route(now.name), {"cycle": cycle, "expected": now.revision, **told}))

    def _post(self, now: Deployed, act: str, body: dict[str, Any]) -> Deployed:
        after = deployed(self.api.post(f"{route(now.name)}/{act}", body))
        self.say(f"{after.state}: {body['reason']}")
        return after

    def _hours(self, since: float) -> float:
        return max(0.0, self.clock() - since) / outcomes.HOUR


WORK: dict[str, Callable[[Runner, Deployed, Description], bool]] = {
    REST: Runner.collect,
    "dataset": Runner.dataset,
    "update": Runner.update,
    "gate": Runner.gate,
    "shadow": Runner.shadow,
    "canary": Runner.canary,
}


def _asks(verdict: Verdict) -> bool:
    """Whether all is shown, only a person's word is missing, and there is time for it."""
    last = verdict.parts[-1]
    return last.name == "owner" and last.result == "wait" and verdict.reason == last.reason


def _candidate(now: Deployed) -> str:
    if now.candidate is None:
        raise InternalError(f"deployment {now.name} is in {now.state!r} without a candidate")
    return now.candidate
