"""What a model still can: the comparison as a pure function, what is asked, and the command against a real server of a tiny model."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tinker

from everlearn.cli.main import run as everlearn
from everlearn.errors import Conflict, InvalidRequest, NotFound
from everlearn.evals.asked import Instructed, Piece, Question, pieces, read_suite
from everlearn.evals.asking import measure
from everlearn.evals.instructions import can_tell_languages
from everlearn.evals.retained import Change, Metric, Results, Unit, compare, fallen, table
from tests.live import KEY, LiveServer

# ---- the comparison ----


def results(model: str, values: list[float], kind: str = "share", weights: list[float] | None = None, suite: str = "s") -> Results:
    units = [Unit(str(i), value, weight) for i, (value, weight) in enumerate(zip(values, weights or [1.0] * len(values), strict=True))]
    return Results(model, suite, [Metric("m", kind, units)])


def only(before: Results, after: Results, **options: int) -> Change:
    (change,) = compare(before, after, **options)
    return change


def test_nothing_changes_between_a_model_and_itself():
    before = results("a", [1.0, 0.0] * 20)
    change = only(before, before)
    assert (change.change, change.low, change.high, change.verdict) == (0.0, 0.0, 0.0, "held") and fallen([change]) == []


def test_rounding_is_no_change():
    before = results("a", [4.1, 4.2, 4.3, 4.4, 4.5, 4.6], "perplexity")

    def worse(nats: float) -> Change:
        return only(before, results("b", [unit.value + nats for unit in before.metrics[0].units], "perplexity"))

    assert [worse(nats).verdict for nats in (1e-7, 5e-5, 2e-4, 1e-2, -1e-2)] == ["held", "held", "fell", "fell", "rose"]


def test_a_clear_fall_is_told_from_one_unlucky_unit():
    before = [1.0] * 30 + [0.0] * 10
    unlucky, worse = [0.0, *before[1:]], [0.0] * 15 + before[15:]
    assert only(results("a", before), results("b", unlucky)).verdict == "held"
    change = only(results("a", before), results("b", worse))
    assert change.verdict == "fell" and change.change == pytest.approx(-15 / 40) and fallen([change]) == ["m"]
    assert only(results("b", worse), results("a", before)).verdict == "rose"


def test_the_interval_is_that_of_paired_units():
    """By the normal approximation: 1.96 standard errors of the mean of differences. Unpaired it would be several times as wide."""
    rng = random.Random(3)
    before = [rng.random() for _ in range(200)]
    after = [value + rng.gauss(0.0, 0.02) for value in before]
    change = only(results("a", before), results("b", after), seed=1)
    gaps = np.array(after) - np.array(before)
    assert change.half_width == pytest.approx(1.96 * gaps.std(ddof=1) / math.sqrt(200), rel=0.1)
    assert change.low < change.change < change.high and change.half_width < 0.01


def test_weights_count_and_perplexity_is_better_when_it_falls():
    nats, weights = [1.0, 2.0, 3.0, 1.5, 2.5], [10.0, 20.0, 5.0, 7.0, 9.0]
    before, after = results("a", nats, "perplexity", weights), results("b", [x + 0.1 for x in nats], "perplexity", weights)
    change = only(before, after)
    mean = sum(x * w for x, w in zip(nats, weights, strict=True)) / sum(weights)
    assert change.before == pytest.approx(math.exp(mean)) and change.after == pytest.approx(math.exp(mean + 0.1))
    assert change.change > 0 and change.verdict == "fell", "every piece got worse, and the interval does not hold 0"
    assert only(after, before).verdict == "rose"


def test_intervals_follow_from_the_seed():
    before, after = results("a", [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), results("b", [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert compare(before, after, seed=4) == compare(before, after, seed=4)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """200 pairs of models whose true change is -0.1: the 95 % interval should miss it in about ten of them."""
    rng, missed = random.Random(7), 0
    for _ in range(200):
        before = [float(rng.random() < 0.7) for _ in range(80)]
        after = [value * (rng.random() < 6 / 7) for value in before]
        change = only(results("a", before), results("b", after), resamples=500)
        missed += not change.low <= -0.1 <= change.high
    assert missed <= 25


@pytest.mark.parametrize(
    ("after", "error"),
    [
        (results("b", [1.0] * 6, suite="other"), Conflict),
        (results("b", [1.0] * 6, kind="perplexity"), Conflict),
        (results("b", [1.0] * 7), Conflict),
        (results("b", [1.0] * 6, weights=[2.0] * 6), Conflict),
        (results("b", [1.0] * 5 + [math.nan]), InvalidRequest),
    ],
)
def test_what_cannot_be_compared_is_refused(after: Results, error: type[Exception]):
    with pytest.raises(error):
        compare(results("a", [1.0] * 6), after)
    with pytest.raises(InvalidRequest, match="at least 5"):
        compare(results("a", [1.0] * 4), results("b", [1.0] * 4))


def test_the_table_says_what_fell():
    text = table(compare(results("a", [1.0] * 40), results("b", [0.0] * 10 + [1.0] * 30)))
    assert "m, %" in text and "-25.0" in text and text.endswith("Fell by more than half their intervals' width: m.")


# ---- what is asked ----


def test_what_comes_with_everlearn():
    suite = read_suite()
    by_name = {one.name: one for one in suite.sets}
    assert set(by_name) == {"instructions", "questions", "prose"} and all(len(one.rows) >= 16 for one in suite.sets)
    assert all(len({row.id for row in one.rows}) == len(one.rows) for one in suite.sets)
    assert suite.digest == read_suite().digest != read_suite(instruction_tokens=9).digest
    assert all(row.right(f"It is {row.answers[0]}.") and not row.right("No idea") for row in by_name["questions"].rows)


def test_a_folder_of_one_s_own(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    maths = {"question": "How many?", "answer": "3 and 4 are 7.\n#### 1,007"}
    plain = {"key": "k", "question": "Where?", "answer": "at home"}
    (folder / "maths.jsonl").write_text("\n".join(map(json.dumps, [maths] * 2 + [plain])))
    told = {"prompt": "No commas, in German.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    german = {**told, "instruction_id_list": ["punctuation:no_comma", "language:response_language"], "kwargs": [{}, {"language": "de"}]}
    (folder / "ifeval.jsonl").write_text(json.dumps(told) + "\n" + json.dumps(german) + "\n")
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {n}. " + "word " * 60 for n in range(9)))
    suite = read_suite([folder], ours=False)
    ifeval, maths_set, text = suite.sets
    assert (ifeval.name, len(ifeval.rows) + ifeval.left_out) == ("mine/ifeval", 2) and ifeval.left_out == (not can_tell_languages())
    assert isinstance(ifeval.rows[0], Instructed) and ifeval.rows[0].followed("a, b") == [False]
    number, _, plain_row = maths_set.rows
    assert isinstance(number, Question) and number.right("So 1,000 + 7 = 1007") and not number.right("1007, or 8")
    assert plain_row.right("We are AT HOME now") and not plain_row.right("at homes")
    assert [type(row) for row in text.rows] == [Piece] * 9
    few = read_suite([folder], ours=False, limit=5).sets[2].rows
    assert len(few) == 5 and few == read_suite([folder], ours=False, limit=5).sets[2].rows and set(few) < set(text.rows)


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ("7", ["7", "It is 7.", "7, I think", "(7)", "$7", "6-7", "week 1: 7", "+7", "7.0", "$7.00"], ["3.7", "7.5", "-7", "\u22127", "7/8", "1/7", "1,7", "7.05", "77"]),
        ("7 km", ["some 7 km"], ["3.7 km", "-7 km"]),
        ("-7", ["It is -7.", "It is \u22127."], ["7", "6-7", "-7.5"]),
        ("1,000", ["1,000 days"], ["1,000.5", "21,000", "1,000,000"]),
        ("3.5", ["3.5.", "about 3.5 m"], ["3.55", "13.5", "-3.5"]),
        ("1969", ["in 1969.", "1969-07-20", "20.7.1969", "07/20/1969", "1969/07/20", "1968-1969"], ["1969.5", "1969/70", "68/1969"]),
        ("route 66", ["On Route 66, west"], ["route 66.5", "route 6"]),
        ("twenty-four", ["Twenty-four."], ["twenty-fourth"]),
    ],
)  # fmt: skip
def test_a_wanted_number_is_no_part_of_another(wanted: str, right: list[str], wrong: list[str]):
    question = Question("k", "How many?", [wanted])
    assert [text for text in right if not question.right(text)] == [text for text in wrong if question.right(text)] == []


@pytest.mark.parametrize("gold", ["$5", "5", "5%", "\u20ac 5", "5.00"])
def test_an_amount_behind_the_sign_of_gsm8k_is_its_number(tmp_path: Path, gold: str):
    (tmp_path / "maths.jsonl").write_text(json.dumps({"question": "How much?", "answer": f"2 and 3.\n#### {gold}"}))
    (question,) = read_suite([tmp_path], ours=False).sets[0].rows
    assert isinstance(question, Question) and question.right("She pays $5.") and not question.right("She pays $6.")


def test_pieces_lose_no_words():
    text = "One.\n\n\nTwo words.\n\n" + "long " * 3000 + "\n\nEnd."
    assert " ".join(pieces(text)).split() == text.split()
    assert pieces("x" * 398 + "\n\nEND") == ["x" * 398 + "\n\nEND"]  # one token alone can't be scored
    assert list(pieces("")) == [] and max(map(len, pieces("x" * 9000))) <= 4000


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "a"}',
        "not json",
        '{"prompt": "a", "instruction_id_list": ["no:such"], "kwargs": [{}]}',
        '{"question": 1, "answer": "a"}',
        '{"prompt": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}',
        '{"question": "a", "answer": "3 and 4.\\n#### seven"}',
    ],
)
def test_rows_that_are_none_are_named(tmp_path: Path, line: str):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl, line 2"):
        read_suite([tmp_path])


def test_a_folder_without_data_is_refused(tmp_path: Path):
    with pytest.raises(NotFound, match=r"neither \.jsonl nor \.txt"):
        read_suite([tmp_path])


# ---- a real server ----


@pytest.fixture(scope="module")
def spoiled(server: LiveServer) -> str:
    """An adapter of the tiny model after steps that make the suite's texts improbable: the path of its weights."""
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        client = service.create_lora_training_client(base_model=server.model, rank=8, seed=1).result()
        tokens = [7] * 40
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 39}
        )
        for _ in range(8):
            client.forward_backward([datum], "cross_entropy").result()
            client.optim_step(tinker.AdamParams(learning_rate=3e-2)).result()
        return client.save_weights_for_sampler("spoiled").result().path


@pytest.fixture(scope="module")
def base(server: LiveServer) -> Results:
    return measure(server.url, server.model, read_suite(limit=6, instruction_tokens=8), KEY)


def test_the_perplexity_is_the_trainer_s(server: LiveServer, base: Results):
    """The same text through the Tinker API: forward with cross entropy says the same nats."""
    suite = read_suite(limit=6, instruction_tokens=8)
    text = next(one for one in suite.sets if one.name == "prose").rows[0].text
    unit = next(metric for metric in base.metrics if metric.kind == "perplexity").units[0]
    with tinker.ServiceClient(base_url=server.url, api_key=KEY) as service:
        client = service.create_lora_training_client(base_model=server.model, rank=1).result()
        tokens = client.get_tokenizer().encode(text, add_special_tokens=False)
        datum = tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        logprobs = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    assert unit.weight == len(tokens) - 1 and unit.value == pytest.approx(-float(logprobs.mean()), rel=1e-4)


def test_the_same_model_gets_the_same_results(server: LiveServer, base: Results):
    suite = read_suite(limit=6, instruction_tokens=8)
    again = measure(server.url, server.model, suite, KEY)
    assert [(one.name, [unit.id for unit in one.units]) for one in again.metrics] == [
        (one.name, [unit.id for unit in one.units]) for one in base.metrics
    ]
    # What is computed together rounds differently, and a model of random weights often has two tokens that are all but equally likely.
    for one, other in zip(again.metrics, base.metrics, strict=True):
        if one.kind == "perplexity":
            assert [unit.value for unit in one.units] == pytest.approx([unit.value for unit in other.units], rel=1e-4)
    with pytest.raises(NotFound, match="nobody"):
        measure(server.url, "nobody", suite, KEY)


def test_the_command_says_what_fell_and_exits_so(server: LiveServer, spoiled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--limit", "6", "--max-tokens", "8", "--url", server.url]
    assert everlearn(["eval", "retained", "--before", server.model, "--after", spoiled, "--out", str(tmp_path / "out"), *options]) == 5
    shown = capsys.readouterr()
    assert "prose: perplexity" in shown.out and "fell" in shown.out and "Fell by more than" in shown.out
    told = json.loads((tmp_path / "out" / "changes.json").read_text())
    assert told["after"] == spoiled and "fell" in {change["verdict"] for change in told["changes"]}
    kept = msgspec.json.decode((tmp_path / "out" / "before.json").read_bytes(), type=Results)
    assert any(unit.answer for metric in kept.metrics for unit in metric.units), "answers are there to be read"
    before = str(tmp_path / "out" / "before.json")
    assert everlearn(["eval", "retained", "--before", before, "--after", server.model, "-f", "json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["fell"] == []
    assert everlearn(["eval", "retained", "--before", before, "--after", server.model, "--limit", "5", "--url", server.url]) == 1
    assert "another suite" in capsys.readouterr().err


def test_without_a_server_the_command_says_so(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "everlearn.cli.main",
        "eval",
        "retained",
        "--before",
        "a",
        "--after",
        "b",
        "--url",
        "http://127.0.0.1:9",
    ]
    ended = subprocess.run([*command, "--limit", "5"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 3 and "gave no answer" in ended.stderr
