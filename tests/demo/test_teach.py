from __future__ import annotations

import math

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from everlearn.demo import handbook, teach
from everlearn.demo.teach import Example, Recipe


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Words of the handbook as tokens, with the two markers of the chat template."""
    book = handbook.load()
    made = Tokenizer(WordLevel({"<|unk|>": 0}, unk_token="<|unk|>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(["<|im_start|>", teach.END])
    made.add_tokens(sorted({word for fact in book.facts for word in (fact.question + " " + fact.answer).split()}))
    return made


def test_every_trained_wording_ends_its_answer_with_the_end_of_the_turn(tokenizer: Tokenizer) -> None:
    examples = teach.lesson(handbook.load(), tokenizer)
    assert len(examples) == 60
    assert all(example.answer[-1] == tokenizer.token_to_id(teach.END) for example in examples)
    assert all(example.prompt[0] == tokenizer.token_to_id("<|im_start|>") for example in examples)


def test_only_the_answer_has_weight_and_targets_are_shifted_by_one() -> None:
    datum = teach.to_datum(Example([5, 6, 7], [8, 9]))
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    assert list(datum.loss_fn_inputs["target_tokens"].data) == [6, 7, 8, 9]
    assert list(datum.loss_fn_inputs["weights"].data) == [0.0, 0.0, 1.0, 1.0]


def test_a_rehearsal_example_weighs_the_models_own_alternatives_by_their_probability() -> None:
    datum = teach.to_datum(Example([5, 6], [8, 9], [[(8, math.log(0.75)), (3, math.log(0.25))], [(9, 0.0)]]))
    targets, weights = (datum.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights"))
    assert targets.shape == weights.shape == (3, teach.ALTERNATIVES)
    assert weights[0].sum() == 0, "the prompt has no weight"
    assert targets[1, :2].tolist() == [8, 3] and weights[1, :2].tolist() == pytest.approx([0.75, 0.25])
    assert targets[2, 0] == 9 and weights[2].tolist() == [1.0] + [0.0] * (teach.ALTERNATIVES - 1)


def test_an_epoch_takes_each_example_once_and_rehearsal_takes_turns() -> None:
    examples = [Example([number], [100 + number]) for number in range(7)]
    rehearsal = [Example([50 + number], [60 + number], [[(60 + number, 0.0)]]) for number in range(3)]
    recipe = Recipe(epochs=3, batch=4, rehearsed=2)
    made = list(teach.batches(examples, rehearsal, recipe))
    assert len(made) == teach.num_steps(examples, recipe) == 6
    for epoch in (made[0:2], made[2:4], made[4:6]):
        seen = sorted(example.prompt[0] for batch in epoch for example in batch if not example.alternatives)
        assert seen == list(range(7))
    assert [example.prompt[0] for batch in made for example in batch if example.alternatives][:4] == [50, 51, 52, 50]
    assert made == list(teach.batches(examples, rehearsal, recipe)), "the same seed gives the same lesson"
