"""Learning without nights: weights move with every finished episode, in small steps, and the gate is asked every so many of them.

    finished episodes --> a move: a few optimizer steps --> saved and noted --> ... --> every `gate_every` steps: gate --> shadow --> canary
                          new corrections, older ones, general text;                    the same road as any candidate's
                          once the reward model has earned it, answers in the states that users reached

The moving weights are ahead of the version that serves by `staleness` optimizer steps at most: what users say is about the answers of that
one. Where the gate lets none of them through they are given up, and what was corrected is learned anew from where updates start. The reward
model moves beside, in the server (everlearn/api/rewarding.py).

All that it knows is noted in the deployment's cycle under `moving`, in the same change as the feedback that it has taken: whoever is killed
in the middle of a move is continued by the next from the last note, and no piece of feedback is taken twice or left out. What is edited
after it was taken, or counts again, is learned once more as it is now; where something is deleted that the weights learned from, they begin
anew without it, from the base model (everlearn/loop/changed.py). Both are lines of the history. No words of users are in the note.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import tinker

from everlearn.errors import Conflict, NotFound
from everlearn.loop import changed, edits, grpo, lesson, paraphrase, refusals, reservoir, update
from everlearn.loop.description import Description
from everlearn.loop.lesson import Example, Recipe
from everlearn.loop.moving import Moving, moving_of, used_up
from everlearn.loop.service import Api, Deployed, Notes, Tokens, pages, path_of
from everlearn.loop.update import Correction

if TYPE_CHECKING:
    from everlearn.loop.runner import Runner

AT_ONCE = 32  # pieces of feedback of one move
KEPT_SECONDS = 86_400  # how long weights are there that nobody renews; what was moved on from needs no other end
PATIENCE = 20  # times `quiet`: feedback of this age is taken though its episode goes on, for all that was said since waits behind it
FRESH = 256  # pieces of feedback, until what was learned from is frozen though no candidate is due
GONE = "the weights that it had moved are gone"
DELETED = "something that it had learned from was deleted"
MOVES = ("collect", "gate", "shadow", "canary")  # the states in which weights move


class Mover:
    """Makes the moves of a runner's deployment. What it holds can be had again from the note."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.trainer: Any = None
        self.at = ("", 0)  # path and step of the note that the trainer agrees with
        self.waits = ""  # for which episode
        self.renews = 0.0  # when the noted weights get a new time to live; the first look of a process sees whether they are there
        self.reservoir: list[Correction] | None = None
        self.examples: dict[tuple[str, str], list[Example]] = {}  # of a correction, by its feedback and what that says
        self.rehearsal: list[Example] | None = None
        self.upto = ("", -1)  # behind which feedback, and up to which change nothing happened that matters; the note may be older

    # -- what a look does --------------------------------------------------------------------------------------------------

    def move(self, now: Deployed, described: Description) -> Deployed | None:
        """One move, if something was said or is owed; the deployment then, and None where nothing was to do."""
        asked = described.continuous
        moving = moving_of(now)
        if moving.serving != now.champion:  # noted at once: whatever else looks at the note must not meet weights that were rolled back
            return self._noted(now, self._served(moving, now))
        if moving.path and self.runner.clock() >= self.renews and not self._renewed(moving):
            return self._anew(now, described, moving, GONE, base=moving.base)
        if moving.dataset and self._deleted(moving):
            return self._anew(now, described, moving, DELETED, base=True)
        if moving.changes < 0:  # by this runner's first look, or by a version of it that looked at none
            moving = msgspec.structs.replace(moving, changes=changed.newest(self.runner.api))
            if moving.behind:
                return self._noted(now, moving)
        if (found := self._changed(described, moving)).deleted & moving.followed:
            return self._anew(now, described, moving, DELETED, base=True)
        if now.state == "collect" and moving.owed <= 0 and moving.tried > moving.steps.get(moving.serving, 0):
            moving = msgspec.structs.replace(moving, owed=asked.gate_every)  # the last candidate was rejected: it may need more of the same
        if used_up(moving, described, self.runner.clock()):
            return None
        said = self._finished(moving, asked.quiet)
        if not said and not found.again and moving.owed <= 0:
            return None
        if moving.ahead + asked.steps > asked.staleness:
            if not (said or found.again) or now.state != "collect":
                return None  # it waits for the gate, or for something to learn
            return self._anew(now, described, moving, f"{moving.ahead} steps, and no candidate of them serves", base=False)
        try:
            return self._learn(now, described, moving, said, found)
        except refusals.REFUSED as error:
            return self._passed_over(now, moving, said, found, error)

    def due(self, now: Deployed, described: Description) -> bool:
        """Whether the moving weights are to be shown to the gate."""
        moving = moving_of(now)
        made = moving.step - moving.tried
        return made > 0 and (made >= described.continuous.gate_every or used_up(moving, described, self.runner.clock()))

    def candidate(self, now: Deployed, described: Description) -> bool:
        """Takes the moving weights to the gate; whether there is more to do at once."""
        runner, api, moving = self.runner, self.runner.api, moving_of(now)
        frozen = self._frozen(now, described, moving)
        if frozen is None:
            return self._anew(now, described, moving, DELETED, base=True) is not None
        try:
            number = int(api.post("/v1/adapters", {"name": now.name, "path": moving.path, "note": f"step {moving.step}"})["number"])
        except NotFound:
            return self._anew(now, described, moving, GONE, base=moving.base) is not None
        version = f"{now.name}@{number}"
        if frozen.dataset:
            parent = None if moving.base or now.champion.endswith("@0") else now.champion
            api.post(f"/v1/datasets/{frozen.dataset}/versions", {"version": version, "parent": parent})
        moved = msgspec.structs.replace(frozen, tried=moving.step, spent=0, began=0.0, steps={**moving.steps, version: moving.step})
        learned = {"dataset": frozen.dataset} if frozen.dataset else {}
        cycle = {**runner._cycle(now, "continuous", 0), **learned, "moving": msgspec.to_builtins(moved)}
        reason = f"{version}: {moving.step - moving.tried} steps since the last, {moving.ahead} ahead of {now.champion}"
        runner._advance(now, "gate", reason, {"update": {"path": moving.path, "step": moving.step}}, candidate=number, cycle=cycle)
        return True

    # -- what it is made of ------------------------------------------------------------------------------------------------

    def _served(self, moving: Moving, now: Deployed) -> Moving:
        """Another version serves: one of these weights as they were (then they go on), or something else, which they begin with."""
        known = moving.steps.get(now.champion)
        if known is None or known < moving.steps.get(moving.serving, 0):  # also what was rolled back: what came since is unwanted
            self.trainer = None
            steps = {now.champion: moving.step}
            return msgspec.structs.replace(moving, path="", steps=steps, serving=now.champion, tried=moving.step, owed=0)
        return msgspec.structs.replace(moving, serving=now.champion, steps={now.champion: known})

    def _renewed(self, moving: Moving) -> bool:
        """Whether the noted weights are there, for KEPT_SECONDS more: a canary may take weeks, in which nothing is moved."""
        weights = tinker.RestClient(base_url=self.runner.api.url, api_key=self.runner.api.key)
        try:
            weights.set_checkpoint_ttl_from_tinker_path(moving.path, KEPT_SECONDS).result()
        except tinker.NotFoundError:
            return False
        except tinker.BadRequestError as error:
            # They are a version by now, which stays. (A conflict is a 400 here: the SDK sends a 409 again.)
            if not isinstance(error.body, dict) or error.body.get("error", {}).get("code") != Conflict.code:
                raise
        self.renews = self.runner.clock() + KEPT_SECONDS / 4
        return True

    def _deleted(self, moving: Moving) -> bool:
        try:
            return bool(self.runner.api.get(f"/v1/datasets/{moving.dataset}")["marks"])
        except NotFound:
            return True

    def _frozen(self, now: Deployed, described: Description, moving: Moving) -> Moving | None:
        """With all that it learned from in a dataset, which is marked when something of it is deleted, and what counts no longer in `past`;
        None where something was deleted before that."""
        made = self.runner._dataset(now, described, "sft", f"{now.name}-moving-{moving.step}")
        dataset = made["id"] if made else ""
        try:  # what one of them was made of is deleted: it is no longer to be trained on, or gone
            before, there = (self._sources(one) for one in (moving.dataset, dataset))
        except (Conflict, NotFound):
            return None
        if any(not _there(self.runner.api, f"/v1/feedback/{one}") for one in moving.fresh):
            return None
        past = [one for one in dict.fromkeys([*moving.past, *before, *moving.fresh]) if one not in there]
        return msgspec.structs.replace(moving, dataset=dataset, fresh=[], past=past)

    def _sources(self, dataset: str) -> dict[str, None]:
        """The feedback that a dataset's items to learn from were made of, in order."""
        items = self.runner._items(dataset, "train", "train") if dataset else []
        return dict.fromkeys(one for item in items for one in item["feedback_ids"])

    def _changed(self, described: Description, moving: Moving) -> changed.Changed:
        """What became of feedback that was taken."""
        kinds = ("demonstration", "boolean", "float") if described.filters.get("good") else ("demonstration",)
        known = self.upto[1] if self.upto[0] == moving.behind else -1  # behind which other things were taken than now they may matter
        upto = max(moving.changes, known)
        found = changed.since(self.runner.api, self.runner.name, moving, upto, lambda said: said["kind"] in kinds)
        if found.stale or found.deleted:
            self.reservoir = None
        if not found.again and not found.deleted & moving.followed:
            self.upto = (moving.behind, found.upto)
        return found

    def _anew(self, now: Deployed, described: Description, moving: Moving, why: str, base: bool) -> Deployed:
        """Gives the moving weights up; what is left of the corrections is learned from the beginning."""
        self.runner.say(f"beginning anew: {why}")
        self.trainer, self.reservoir = None, None
        steps, owed = {now.champion: moving.step}, described.continuous.gate_every
        again = msgspec.structs.replace(
            moving, path="", steps=steps, serving=now.champion, tried=moving.step, owed=owed, dataset="", fresh=[], base=base,
            past=[] if base else moving.past,  # what is begun with may come from it
        )  # fmt: skip
        return self._noted(now, again, f"beginning anew: {why}", {"dropped": {"step": moving.step, "dataset": moving.dataset}})

    def _noted(self, now: Deployed, moving: Moving, reason: str = "", evidence: dict[str, Any] | None = None) -> Deployed:
        return self.runner._note(now, {**now.cycle, "moving": msgspec.to_builtins(moving)}, reason, evidence)

    def _finished(self, moving: Moving, quiet: float) -> list[dict[str, Any]]:
        """The feedback behind the note, of finished episodes, in order, each with the `split` of its episode ("": that is gone)."""
        api, taken, splits = self.runner.api, [], {}
        rows = pages(api, "/v1/feedback", behind=moving.behind, counts=True)  # by ids: clocks may be set back
        for one in rows[:AT_ONCE]:
            episode = one["target"]["episode_id"]
            if episode not in splits:
                try:
                    found = api.get(f"/v1/episodes/{episode}", limit=1)
                except NotFound:
                    found = {"split": "", "updated_at": 0.0}
                newest = max([found["updated_at"], *(row["created_at"] for row in rows if row["target"]["episode_id"] == episode)])
                splits[episode] = (found["split"], self.runner.clock() - newest >= quiet)
            split, over = splits[episode]
            if not over and self.runner.clock() - one["created_at"] < PATIENCE * quiet:
                self._waits(episode, quiet)
                break
            taken.append({**one, "split": split})
        return taken

    def _waits(self, episode: str, quiet: float) -> None:
        if self.waits != episode:
            self.runner.say(f"waiting for episode {episode} to be finished, {quiet:g} s without a word, or {PATIENCE * quiet:g} s in all")
        self.waits = episode

    def _learn(
        self, now: Deployed, described: Description, moving: Moving, said: Sequence[dict[str, Any]], found: changed.Changed
    ) -> Deployed:
        runner, asked = self.runner, described.continuous
        tokens = Tokens(runner.api, now.base_model)
        self._remember(now, described, moving)
        taken, heard = changed.anew(runner.api, said, found.upto)
        given = reservoir.corrections(runner.api, now.name, described.filters, [one for one in taken if one["split"] == "train"])
        self.reservoir, again = reservoir.reworded(reservoir.with_new(self.reservoir or [], given), found.again)
        new = [*(one for one, corrects in given if corrects), *again]
        taught = [*(one.newest for one, _ in given), *(one.newest for one in self.reservoir if one.newest in found.acts)]
        now = self._edited(now, described, moving, [*found.again, *taken])
        new, self.reservoir = (edits.for_weights(now, corrections) for corrections in (new, self.reservoir))
        before = len(new)
        new, self.reservoir = ([one for one in known if self._of(tokens, one)] for known in (new, self.reservoir))
        left_out = {update.LONGER: before - len(new)} if before > len(new) else {}
        if not moving.path and not moving.dataset:  # they begin here, and nothing older is frozen: all that is older is learned now
            taught = [*(one.newest for one in self.reservoir), *taught]
        fresh = self._worded(tokens, now, described, new)
        if said:
            moving = msgspec.structs.replace(moving, behind=said[-1]["id"])
        if new:
            owed = max(moving.owed, asked.gate_every - (moving.step - moving.tried), asked.steps)
            moving = msgspec.structs.replace(moving, owed=owed)
        learned = list(dict.fromkeys([*moving.fresh, *taught]))
        moving = msgspec.structs.replace(moving, fresh=learned, changes=found.upto, heard={**found.heard, **heard})
        if len(learned) > FRESH:
            moving = self._frozen(now, described, moving) or moving  # where one was deleted, the next look sees that
        if self.reservoir and moving.owed > 0:
            moving = self._steps(tokens, now, described, moving, fresh)
        else:
            moving = msgspec.structs.replace(moving, owed=0)
        try:
            once_more = [one.newest for one in new if one.newest in found.acts]
            told = [changed.told(found.acts, once_more)] if found.acts else []
            told += [f"{count} of what was said left out, {why}" for why, count in left_out.items()]
            evidence = {"feedback": found.acts, "learned": once_more} if found.acts else {}
            return self._noted(now, moving, "; ".join(told), {**evidence, **({"left_out": left_out} if left_out else {})})
        except Conflict:
            self.trainer, self.reservoir = None, None  # somebody was faster: it goes on from their note
            raise

    def _passed_over(
        self, now: Deployed, moving: Moving, said: Sequence[dict[str, Any]], found: changed.Changed, error: Exception
    ) -> Deployed | None:
        """Goes on behind what the server refuses to learn; where nothing was said, the next word is waited for."""
        self.trainer, self.reservoir = None, None
        reason = f"nothing could be learned: {self.runner.why_not(now.revision, error)}"
        if not said and not found.again:
            self.runner.say(reason)
            return None
        if said:
            moving = msgspec.structs.replace(moving, behind=said[-1]["id"])
        passed = msgspec.structs.replace(moving, owed=0, changes=found.upto, heard=found.heard)
        return self._noted(now, passed, reason, {"passed over": [one["id"] for one in (*said, *found.again)]})

    def _steps(self, tokens: Tokens, now: Deployed, described: Description, moving: Moving, fresh: Sequence[Example]) -> Moving:
        """The optimizer steps of a move, saved."""
        recipe, asked = described.update, described.continuous
        trainer, self.trainer = self._opened(now, described, moving), None  # until it is saved: half a move must not be gone on from
        spent = 0
        for number in range(moving.step, moving.step + asked.steps):
            rng = random.Random(f"{recipe.seed}:{number}")
            batch = list(fresh[: recipe.batch])
            older = [example for one in self.reservoir or () for example in self._of(tokens, one)]
            batch += rng.sample(older, min(recipe.batch - len(batch), len(older)))
            beside = rng.sample(self.rehearsal or [], min(recipe.rehearsed, len(self.rehearsal or [])))
            done = trainer.forward_backward([lesson.to_datum(one) for one in batch + beside], "cross_entropy")
            spent += lesson.num_tokens(batch + beside)
            if asked.rewards and number == moving.step:
                spent += self._pull(trainer, tokens, now, described, number)
            trainer.optim_step(tinker.AdamParams(learning_rate=recipe.learning_rate)).result()
            done.result()
        step = moving.step + asked.steps
        path = str(trainer.save_state(f"{now.name}-moving-{step}", ttl_seconds=KEPT_SECONDS).result().path)
        self.trainer, self.at = trainer, (path, step)
        self.runner.say(f"moved to step {step}: {len(fresh)} new examples among {len(self.reservoir or ())} corrections")
        return msgspec.structs.replace(
            moving, path=path, step=step, owed=moving.owed - asked.steps, spent=moving.spent + spent, total=moving.total + spent,
            began=moving.began or self.runner.clock(),
        )  # fmt: skip

    def _pull(self, trainer: Any, tokens: Tokens, now: Deployed, described: Description, number: int) -> int:
        """The gradient of the reward model, where it has earned to be a reward; how many tokens that took."""
        try:
            score = update.reward_of(self.runner.api, now.name)
        except Conflict:
            return 0
        path = path_of(self.runner.api, now.champion)
        service = self.runner.service
        made = service.create_sampling_client(model_path=path) if path else service.create_sampling_client(base_model=now.base_model)
        pull = described.update.pull
        rng = random.Random(f"states:{described.update.seed}:{number}")
        known = [one.prompt for one in self.reservoir or () if update.has_room(tokens, pull, one.prompt)]
        states = rng.sample(known, min(pull.batch, len(known)))
        try:
            moved = grpo.step(trainer, made.result(), score, states, pull, [tokens.end], rng.randrange(2**31))
        except Conflict as error:  # raised before a gradient is sent
            if error.code != update.UNEARNED:
                raise
            return 0
        return moved.tokens

    def _opened(self, now: Deployed, described: Description, moving: Moving) -> Any:
        """The trainer where the note stands."""
        if self.trainer is not None and self.at == (moving.path, moving.step):
            return self.trainer
        recipe = Recipe(rank=described.update.rank, seed=described.update.seed)
        if moving.base:
            described = msgspec.structs.replace(described, update=msgspec.structs.replace(described.update, start="base"))
        return update.open_trainer(self.runner.api, self.runner.service, now, described, recipe, moving.path)

    def _remember(self, now: Deployed, described: Description, moving: Moving) -> None:
        """Fills what this process holds: corrections up to the note, and what is rehearsed."""
        tokens = Tokens(self.runner.api, now.base_model)
        if self.rehearsal is None:
            self.rehearsal = update.rehearsed(self.runner.service, now, tokens) if described.update.rehearsed else []
        if self.reservoir is None:
            made = self.runner._dataset(now, described, "sft", f"{now.name}-moving-{moving.step}") if moving.behind else None
            items = self.runner._items(made["id"], "train", "train") if made else []
            known = [item for item in items if max(item["feedback_ids"], default="") <= moving.behind]
            self.reservoir = update.corrections(known, len(known), described.update.replay)

    def _edited(self, now: Deployed, described: Description, moving: Moving, said: Sequence[dict[str, Any]]) -> Deployed:
        """Changes memories by corrections of their users' own facts, held-out ones as well (everlearn/loop/edits.py); the deployment then,
        whose cycle has what became of them under `remedies`."""
        api, runner, good = self.runner.api, self.runner, bool(described.filters.get("good"))
        if described.update.memory == "off" or not any(good or one["kind"] == "demonstration" for one in said):
            return now
        if not api.get("/v1/memories", limit=1)["data"]:
            return now
        made = runner._dataset(now, described, "sft", f"{now.name}-moving-{moving.step}")
        if made is None:
            return now
        items = [*runner._items(made["id"], "train", "train"), *runner._items(made["id"], "heldout", "evaluate")]
        there, known = {item["record_id"] for item in items}, now.cycle.get("remedies", {})
        notes = Notes(runner._note, now)
        done = edits.carried_out(api, items, {record: found for record, found in known.items() if record in there}, notes)
        if count := sum(found["place"] == "memory" and record not in known for record, found in done.items()):
            runner.say(f"{count} corrections are answered in memories, not by weights")
        if done != notes.now.cycle.get("remedies", {}):
            notes({"remedies": done})
        return notes.now

    def _worded(self, tokens: Tokens, now: Deployed, described: Description, new: Sequence[Correction]) -> list[Example]:
        """New corrections as examples, with other wordings that the base model gives."""
        if not new:
            return []
        untaught = self.runner.service.create_sampling_client(base_model=now.base_model).result()
        others = update.wordings(untaught, tokens, [one.question for one in new], described.update.paraphrases, described.update.seed)
        for one, texts in zip(new, others, strict=True):
            self.examples[one.newest, one.answer] = update.examples_of(tokens, [one], {one.record_id: texts})
        return [example for one in new for example in self.examples[one.newest, one.answer]]

    def _of(self, tokens: Tokens, one: Correction) -> list[Example]:
        """A correction's examples; of one that an earlier process had worded, with frames around its question."""
        key = (one.newest, one.answer)
        if key not in self.examples:
            framed = paraphrase.chosen(one.question, [], 1) if one.question else []
            self.examples[key] = update.examples_of(tokens, [one], {one.record_id: framed})
        return self.examples[key]


def _there(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except NotFound:
        return False
    return True
