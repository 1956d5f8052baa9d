"""Training a memory: episodes that begin at one window, a reward that can be taken apart, two kinds of tokens that don't touch each other."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest
import tinker

from everlearn.errors import Conflict, InvalidRequest
from everlearn.memory.credit import best_of, due, levelled, separated
from everlearn.memory.decide import Decided, decision
from everlearn.memory.demonstrations import Demonstrations
from everlearn.memory.environment import ANSWER, DECISION, REFILL, Judge, MemoryGroup, MemoryTasks, Pay
from everlearn.memory.generate import Generate
from everlearn.memory.mask import Masking
from everlearn.memory.methods import method
from everlearn.memory.moments import SQUEEZE, Moment, moments, pieces_of
from everlearn.memory.plan import planned
from everlearn.memory.scores import kept
from everlearn.memory.synthetic import synthetic
from everlearn.memory.train import MemoryLearner, Training, _step, credited, imitated, train
from everlearn.rewards.reward import Part, Reward
from everlearn.rl.datums import supervised
from everlearn.rl.policy import TinkerPolicy
from everlearn.rl.rollouts import play_now
from everlearn.rl.settings import Pace, Settings
from everlearn.rl.trajectory import Action, Trajectory, TrajectoryGroup, Transition
from tests.memory.spelling import encode

PAY = Pay(likelihood=1.0, correct=0.5, over_budget=0.1, rewrites=0.01, undecided=0.2)


def history(number: int):
    return synthetic(60, 5000 + number, 12)


@pytest.fixture(scope="module")
def tasks(chat, judge) -> MemoryTasks:
    masking = Masking(most=3, keep=0.25, slack=0.33)
    return MemoryTasks(
        history,
        chat,
        judge,
        budgets=(300,),
        pay=PAY,
        masking=masking,
        batches=4,
        groups_per_batch=2,
        group_size=3,
        per_history=2,
        most_questions=2,
    )


@pytest.fixture(scope="module")
def groups(tasks, judge) -> list[TrajectoryGroup]:
    found = play_now(tasks.get_batch(0), TinkerPolicy(judge.sampler, max_tokens=12), seed=3)
    assert all(trajectory.failure is None for group in found for trajectory in group.trajectories_G), found
    return found


# ---- moments ----


def test_moments_press_a_window_that_can_answer():
    case = synthetic(160, 7, 30)
    found = moments(case, encode, 256, 6, seed=1)
    assert len(found) == 6 and found == moments(case, encode, 256, 6, seed=1) != moments(case, encode, 256, 6, seed=2)
    for moment in found:
        assert moment.window.size <= 256 and {chunk.importance for chunk in moment.window.chunks} == {0.5}
        plan = planned(moment.window, moment.chunk, SQUEEZE)
        assert plan.masked and sum(plan.budgets) < sum(len(plan.chunks[place].tokens) for place in plan.masked)
        assert moment.questions and all(kept(question, pieces_of(plan.chunks)) for question in moment.questions)
    with pytest.raises(InvalidRequest, match="num is 0"):
        moments(case, encode, 256, 0)


def test_a_history_without_a_moment_gives_its_place_to_the_next(chat):
    """Wherever a run is taken up again, and whatever was asked for before."""

    def sometimes(number: int):
        return history(number)._replace(questions=[]) if number in (1, 2) else history(number)

    def dealt(numbers: range | list[int]) -> list[Moment]:
        tasks = MemoryTasks(sometimes, chat, None, budgets=(300, 350), per_history=2)
        return [tasks.moment(number) for number in numbers]

    found = dealt(range(8))
    assert [moment.case for moment in found] == [f"synthetic-60-{5000 + number}" for number in (0, 0, 3, 3, 3, 3, 3, 3)]
    assert [moment.window.budget for moment in found] == [300, 300, 350, 350, 300, 300, 350, 350]
    assert dealt([4, 2, 7]) == [found[4], found[2], found[7]]


# ---- episodes ----


def test_the_members_of_a_group_begin_at_one_window_and_go_their_own_ways(tasks):
    group = tasks.group(0)
    assert isinstance(group, MemoryGroup)
    envs = asyncio.run(group.make_envs())
    assert len(envs) == 3 and len({id(env.moment) for env in envs}) == 1
    prompts = [asyncio.run(env.initial_observation())[0].to_ints() for env in envs]
    assert prompts[0] == prompts[1] == prompts[2]
    words = ("keep", "drop", "compress 5")
    for env, word in zip(envs, words, strict=True):
        for _ in env.places:
            asyncio.run(env.step(env.chat.encode(word)))
        assert set(env.levels) == {{"keep": 1.0, "drop": 0.0, "compress 5": 0.5}[word]} and env.plan is not None
    assert all(env.moment.window == envs[0].moment.window for env in envs)  # nobody changed what the others begin at
    assert not envs[1].plan.holes and envs[1].window is not None  # all dropped: nothing to write
    assert tasks.group(0).moment == tasks.group(0).moment != tasks.group(1).moment


def test_an_episode_decides_then_writes_then_answers_and_its_reward_has_named_parts(groups, chat):
    for group in groups:
        firsts = [trajectory.transitions[0].observation.to_ints() for trajectory in group.trajectories_G]
        assert all(first == firsts[0] for first in firsts)
        for index, trajectory in enumerate(group.trajectories_G):
            kinds = [turn.logs["kind"] for turn in trajectory.transitions]
            assert kinds == sorted(kinds, key=[DECISION, REFILL, ANSWER].index) and {DECISION, ANSWER} <= set(kinds)
            values = group.reward(index).values
            assert set(values) == {"likelihood", "over_budget", "rewrites", "undecided", "correct"}
            assert 0 <= values["likelihood"] <= 1 and 0 <= values["correct"] <= 0.5
            assert values["rewrites"] == pytest.approx(-0.01 * kinds.count(REFILL)) and values["over_budget"] <= 0 >= values["undecided"]
            paid = {name for turn in trajectory.transitions if turn.logs["kind"] == ANSWER for name in turn.reward.values}
            assert paid == {"correct"}


def test_a_window_that_keeps_all_that_is_asked_for_earns_more_than_one_that_drops_it(chat, judge):
    """By the rule alone: likelihoods as a model that reads would find them."""

    class Reader(Judge):
        async def logprobs(self, chunks, questions):
            return [0.0 if kept(question, pieces_of(chunks)) else -5.0 for question in questions]

    reader = Reader(judge.sampler, chat)
    tasks = MemoryTasks(history, chat, reader, budgets=(400,), masking=Masking(most=16, keep=0.0, slack=0.3), group_size=2, weighed=True)
    envs = asyncio.run(tasks.group(0).make_envs())
    assert asyncio.run(MemoryTasks(history, chat, reader, budgets=(400,)).group(0).make_envs())[0].worths == []
    totals = []
    for env, keeps in zip(envs, (True, False), strict=True):
        evident = [any(kept(question, pieces_of([chunk])) for question in env.moment.questions) for chunk in env.chunks]
        done = None
        assert [worth > 0 for worth in env.worths] == [evident[place] for place in env.places], "no two chunks hold the same evidence"
        for place in env.places:
            done = asyncio.run(env.step(chat.encode("keep" if evident[place] == keeps else "drop")))
        while not done.episode_done:
            done = asyncio.run(env.step(chat.encode("nothing")))
        totals.append(done.reward.values["likelihood"])
    assert totals[0] > totals[1] + 0.3


def test_pay_refuses_what_pays_nothing():
    for wrong in ({"likelihood": 0.0}, {"scale": 0.0}, {"rewrites": -1.0}, {"correct": float("nan")}):
        with pytest.raises(InvalidRequest):
            Pay(**wrong)


# ---- credit ----


def turn(kind: str, value: float = 0.0, **logs: object) -> Transition:
    action = Action([5, 6], [-1.0, -2.0])
    part = "correct" if kind == ANSWER else "likelihood"
    return Transition(tinker.ModelInput.from_ints([1, 2, 3]), action, Reward((Part(part, value),)), logs={"kind": kind, **logs})


def made(rows: list[tuple[float, float, float]]) -> TrajectoryGroup:
    """Members by (what their memory earned, what their answer earned, whether their window held the evidence)."""
    members = [
        Trajectory([turn(DECISION, level=None), turn(REFILL, memory), turn(ANSWER, right, question=0, right=right, held=held)])
        for memory, right, held in rows
    ]
    return TrajectoryGroup(members, [Reward()] * len(members))


def test_answers_are_compared_where_the_window_held_the_evidence_and_never_move_memory_tokens():
    memory, answer = separated(made([(0.9, 1.0, 1.0), (0.5, 0.0, 1.0), (0.1, 0.0, 0.0)]), "group_mean")
    assert memory[0] == pytest.approx([1.0666667, 1.0666667, 0.0]) and memory[2] == pytest.approx([-0.7333333, -0.7333333, 0.0])
    assert answer == [[0.0, 0.0, 0.5], [0.0, 0.0, -0.5], [0.0, 0.0, 0.0]]
    with pytest.raises(InvalidRequest, match="estimator is 'gae'"):
        separated(made([]), "gae")


def test_saying_one_word_more_often_earns_nothing_by_itself():
    """A shift of a word that is the same for all chunks has no gradient; which chunks it is said of has."""
    rows = [(1.0, 0.9), (1.0, 0.5), (0.0, 0.1), (0.5, 0.3), (None, 0.0)]
    group = TrajectoryGroup([Trajectory([turn(DECISION, value, level=level)]) for level, value in rows], [Reward()] * len(rows))
    memory, _ = separated(group, "group_mean")
    assert memory[0][0] > memory[1][0] > 0 > memory[2][0]
    (found,) = levelled([group], [memory])
    assert [one for (one,) in found] == pytest.approx([0.29, -0.11, 0.09, 0.09, -0.36])  # on average 0.09 for each word, as before for all
    assert found[4] == memory[4]


def test_the_best_member_is_that_of_the_best_memory_not_of_the_luckiest_answer(chat):
    group = made([(0.2, 1.0, 1.0), (0.9, 0.0, 1.0), (0.1, 0.0, 1.0)])
    assert best_of(group) == 1 and best_of(made([(0.5, 1.0, 1.0), (0.5, 0.0, 1.0)])) is None
    data = imitated([group], chat)
    assert sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data) == 4.0  # a decision and a refill of two tokens


def weighed(rows: list[tuple[float, float | None, float | None]]) -> TrajectoryGroup:
    """Two chunks, worth 0.8 and 0.1. Of each member its reward, and its levels of both."""
    members = [Trajectory([turn(DECISION, 0.0, level=one, worth=0.8), turn(DECISION, own, level=two, worth=0.1)]) for own, one, two in rows]
    return TrajectoryGroup(members, [Reward()] * len(rows))


def test_of_a_chunk_that_was_weighed_what_is_due_is_taught_whoever_decided_so(chat):
    """The chunk that is worth more than its neighbour is to be kept, the other dropped, though nobody did."""
    group = weighed([(0.2, 0.0, 1.0), (0.9, 0.0, 1.0), (0.1, 0.5, None)])
    assert due(group) == {0: ("keep", pytest.approx(0.35)), 1: ("drop", pytest.approx(0.35))}, "both count the same"
    data = imitated([group], chat)
    pairs = [[datum.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights")] for datum in data]
    said = [tokens[weights > 0].tolist() for tokens, weights in pairs]
    assert said == [chat.encode("keep<|im_end|>"), chat.encode("drop<|im_end|>")]
    alike = TrajectoryGroup([Trajectory([turn(DECISION, 0.0, level=1.0, worth=worth)]) for worth in (0.5, 0.5)], [Reward()] * 2)
    assert due(alike) == due(made([(0.2, 1.0, 1.0)])) == {}


def test_a_decision_on_a_chunk_that_was_weighed_is_credited_by_itself():
    """Not by the window's reward, which is one number for both; and one that is none by that alone."""
    group = weighed([(0.9, 0.0, 0.0), (0.1, 1.0, 1.0), (0.2, 0.5, None)])
    memory, _ = separated(group, "group_mean")
    assert memory[0] == pytest.approx([-0.175, 0.175]) and memory[1] == pytest.approx([0.175, -0.175])
    assert memory[2] == pytest.approx([0.0, -0.2]) and levelled([group], [memory]) == [memory]


def test_the_gradient_of_memory_tokens_does_not_depend_on_answers(service, server, groups, tmp_path):
    """The same step with answers and without, on real datums: the losses of memory tokens, and what the weights become, are what they are."""
    settings = Settings(server.model, steps=1, rank=2, learning_rate=1e-2, estimator="group_mean_std")
    found = {}
    for name, weight in (("alone", 0.0), ("beside", 0.7)):
        learner = MemoryLearner(service, Training(settings, answer_weight=weight), tmp_path / name)
        pairs = [separated(group, "group_mean_std") for group in groups]
        memory = [datum for group, (own, _) in zip(groups, pairs, strict=True) for datum in credited(group, own, 1.0)]
        answers = [datum for group, (_, own) in zip(groups, pairs, strict=True) for datum in credited(group, own, weight)]
        assert memory and bool(answers) <= bool(weight)
        output = learner.client.forward_backward(memory, "importance_sampling").result()
        found[name] = [row["logprobs"].to_numpy() for row in output.loss_fn_outputs], output.metrics["loss:sum"]
        row = learner.reinforce(groups, 0)
        assert "memory/kl/k3" in row and (("answer/kl/k3" in row) == bool(answers))
    assert all((a == b).all() for a, b in zip(found["alone"][0], found["beside"][0], strict=True))
    assert found["alone"][1] == found["beside"][1]


# ---- runs ----


def test_what_was_imitated_is_drawn_from_again_and_cut_back_with_its_steps(tmp_path):
    data = [supervised([1, 2, number], [4, 5], 0.5) for number in range(6)]
    first = Demonstrations.open(tmp_path, 0)
    first.add(0, data[:4])
    first.add(1, data[4:])
    assert first.drawn(3, 0, 1) == first.drawn(3, 0, 1) != first.drawn(3, 0, 2) and len(first.drawn(9)) == 6
    again = Demonstrations.open(tmp_path, 2)
    assert [one.model_input for one in again.data] == [one.model_input for one in data]
    for name in ("target_tokens", "weights"):
        pairs = zip(again.data, data, strict=True)
        assert all((one.loss_fn_inputs[name].to_numpy() == other.loss_fn_inputs[name].to_numpy()).all() for one, other in pairs)
    with again.path.open("a") as file:
        file.write('{"step": 2, "da')  # killed while it wrote
    assert len(Demonstrations.open(tmp_path, 3).data) == 6
    assert len(Demonstrations.open(tmp_path, 1).data) == 4 and len(Demonstrations.open(tmp_path, 2).data) == 4
    again.path.unlink()
    with pytest.raises(Conflict, match="a run of 2 steps without its imitated.jsonl"):
        Demonstrations.open(tmp_path, 2)


def test_a_run_that_goes_on_has_what_it_imitated_before(service, server, tasks, tmp_path):
    run = Settings(server.model, steps=1, rank=2, max_tokens=8, save_every=1)
    training = Training(run, warm_steps=2, warm_epochs=3)
    train(service, training, tasks, tmp_path)
    longer = msgspec.structs.replace(training, run=msgspec.structs.replace(run, steps=2))
    learner = MemoryLearner(service, longer, tmp_path, told=tasks.told())
    before = len(learner.demonstrations.data)
    rows = learner.run(lambda step: _step(learner, tasks, step), lambda _: None)
    assert before == rows[0]["warm/datums"] and len(learner.demonstrations.data) == before + rows[1]["warm/datums"]
    (tmp_path / "imitated.jsonl").unlink()
    with pytest.raises(Conflict, match="without its imitated.jsonl"):
        train(service, longer, tasks, tmp_path)


def test_a_run_warms_up_goes_on_and_ends_in_an_adapter(service, server, tasks, chat, tmp_path):
    run = Settings(
        server.model,
        steps=2,
        rank=2,
        learning_rate=1e-3,
        loss="ppo",
        estimator="group_mean_std",
        max_tokens=12,
        save_every=1,
        kl_budget=1e9,
    )
    training = Training(run, warm_steps=1, answer_weight=0.5)
    first = train(service, training, tasks, tmp_path, decode=chat.decode)
    assert [row["step"] for row in first.rows] == [0, 1] and "warm/datums" in first.rows[0] and "memory/tokens/trained" in first.rows[1]
    assert {"reward/likelihood", "reward/correct", "env/kept", "env/undecided"} <= set(first.rows[1])
    assert all("kl/base" in row for row in first.rows)  # a budget binds in the warm steps too
    assert len(Demonstrations.open(tmp_path, 2).data) == first.rows[0]["warm/datums"]
    longer = msgspec.structs.replace(training, run=msgspec.structs.replace(run, steps=3))
    again = train(service, longer, tasks, tmp_path)
    assert [row["step"] for row in again.rows] == [0, 1, 2] and again.path != first.path
    with pytest.raises(Conflict, match="other settings .warm_steps 1 -> 2"):
        train(service, msgspec.structs.replace(longer, warm_steps=2), tasks, tmp_path)
    others = MemoryTasks(
        history, chat, tasks.judge, budgets=(200,), pay=PAY, masking=tasks.masking, groups_per_batch=2, group_size=3, most_questions=2
    )
    with pytest.raises(Conflict, match=r"budgets \[300\] -> \[200\]\)"):
        train(service, longer, others, tmp_path)
    (tmp_path / "training.json").write_bytes(b"{")
    with pytest.raises(InvalidRequest, match="training.json can't be read"):
        train(service, longer, tasks, tmp_path)
    sampler = service.create_sampling_client(model_path=again.path).result()
    policy = method("policy", chat.encode, 200, decided=Decided(sampler, chat, once=True), refill=Generate(sampler, chat))
    for role, text in history(1).turns[:12]:
        policy.read(role, text)
    assert sum(len(chat.encode(piece)) for piece in policy.pieces("")) <= 200


def test_a_run_that_never_came_to_a_state_binds_nobody(service, server, tmp_path):
    training = Training(Settings(server.model, steps=2, rank=2), warm_steps=1)
    MemoryLearner(service, training, tmp_path)
    assert not (tmp_path / "training.json").exists()
    (tmp_path / "training.json").write_bytes(b'{"warm_')  # of one that was killed before its state
    learner = MemoryLearner(service, msgspec.structs.replace(training, warm_steps=2), tmp_path)
    learner._save(0, "")
    with pytest.raises(Conflict, match="warm_steps 2 -> 1"):
        MemoryLearner(service, training, tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.5},
        {"substeps": 2},
        {"epochs": 2},
        {"mask_over_long": True},
        {"ptx_weight": 0.1},
        {"pace": Pace()},
        {"estimator": "per_turn"},
        {"estimator": "gae"},
        {"loss": "gspo"},
        {"loss": "mirror_descent"},
        {"loss": "stable_reinforce"},
        {"steps": 0},
    ],
    ids=str,
)
def test_settings_that_no_step_reads_are_refused_before_the_first(setting):
    with pytest.raises(InvalidRequest) as told:
        Training(Settings(**{"base_model": "any", "steps": 1, **setting}), warm_steps=8).check()
    assert told.value.param == next(iter(setting))


@pytest.mark.slow
def test_a_policy_learns_to_decide(service, server, chat, judge, tmp_path):
    """A model of random weights is shown the three words a few times, so that it says them now and then; what pays it for deciding makes
    it decide more often."""
    run = Settings(server.model, steps=20, rank=16, learning_rate=3e-3, estimator="group_mean", max_tokens=8)
    masking = Masking(most=2, keep=0.25, slack=0.33)
    pay = Pay(undecided=2.0, rewrites=0.0, over_budget=0.0)
    tasks = MemoryTasks(history, chat, judge, budgets=(300,), pay=pay, masking=masking, batches=1, groups_per_batch=2, group_size=8)
    learner = MemoryLearner(service, Training(run), tmp_path)
    shown = [(moment, place) for moment in (tasks.moment(0), tasks.moment(1)) for place in range(3)]
    prompts = [decision(chat, (*moment.window.chunks, moment.chunk), place).to_ints() for moment, place in shown]
    taught = [supervised(prompt, chat.encode(f"{word}<|im_end|>")) for prompt in prompts for word in ("keep", "drop", "compress 5")]
    for _ in range(15):
        learner.client.forward_backward(taught, "cross_entropy")
        learner.client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    rows = learner.run(lambda step: _step(learner, tasks, step), lambda row: None)
    first, last = (np.mean([row["env/undecided"] for row in part]) for part in (rows[:2], rows[-4:]))
    assert first > 0.1 and last < 0.7 * first, [row["env/undecided"] for row in rows]


def test_what_a_run_can_t_be_is_refused(service, server, chat, judge, tmp_path):
    run = Settings(server.model, steps=1)
    for training in (Training(run, warm_steps=-1), Training(run, memory_weight=0.0), Training(run, answer_weight=float("inf"))):
        with pytest.raises(InvalidRequest):
            training.check()
    tasks = MemoryTasks(history, chat, judge)
    with pytest.raises(InvalidRequest, match="nobody answers"):
        train(service, Training(run, answer_weight=1.0), tasks, tmp_path)
    with pytest.raises(InvalidRequest, match="budgets is 0"):
        MemoryTasks(history, chat, judge, budgets=())
    with pytest.raises(InvalidRequest, match="16 histories in a row, the last synthetic-60-5015, never press"):
        MemoryTasks(history, chat, judge, budgets=(100_000,)).moment(0)
