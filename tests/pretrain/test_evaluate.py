"""`forethought evaluate`: lm-eval's own scores without thoughts, the training side's with them, and intervals."""

from __future__ import annotations

import json
import math
from itertools import combinations

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval, of the extra `eval`, is not installed")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints.families import FAMILIES
from checkpoints.hugging_face import export, load_thinking_model
from checkpoints.references import LAB
from data_pipelines import Tokenizer
from models.philox import Rng
from models.thinking import TrainedThinking
from models.thoughts import Text
from objectives import QuietStar, QuietStarConfig
from pretrain.cli import main
from pretrain.evaluation.evaluate import TASKS, Plan, Settings, _evaluate_plan, _manager, rlp_suite
from pretrain.evaluation.lm import ForethoughtLM
from pretrain.evaluation.metrics import final_answer, majority_is_correct, pass_at_k, sampled_metrics, wilson
from pretrain.evaluation.tasks.scoring import spelled
from tests.helpers import relative_error, tiny_model

TOKENIZER = Tokenizer.from_directory(LAB)
OPEN, CLOSE = TOKENIZER.token_id("<think>"), TOKENIZER.token_id("</think>")
LENGTH = 4
ERROR = 1e-5
PROBLEMS = [{"question": f"{a}+{b}=", "answer": str((a + b) % 10)} for a in range(4) for b in range(5)]
GENERATION = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: [":"], do_sample: false, max_gen_toks: 6}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Exports of one model that thinks at every token, and of one that does before an answer, with a task and texts."""
    directory = tmp_path_factory.mktemp("evaluate")
    for think, ids in (("every-token", ()), ("before-answer", (OPEN, CLOSE))):
        model = tiny_model(torch.float32, vocab_size=64)
        model.ban(TOKENIZER.size, TOKENIZER.control_ids)
        if think == "before-answer":
            model.delimiters = model.mixing_head = None
        trained = TrainedThinking(think, LENGTH, ids[:1], ids[1:])
        export(model, directory / think, LAB, trained=trained)
        export(model, directory / f"{think}-thinking", LAB, trained=trained, thinking=True)
    (directory / "sums.yaml").write_text(GENERATION)
    (directory / "sums.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    (directory / "a.txt").write_text("3+5=8 0:1 7+7=4")
    (directory / "b.txt").write_text("2*3=6" * 9)
    return directory


def evaluated(directory, model, *arguments):
    """summary.json and lm-eval's own results of a command, by run, and its samples, by task and run."""
    out = directory / f"out-{len(list(directory.iterdir()))}"
    command = ["evaluate", str(directory / model), "--data-dir", str(directory), "--out", str(out), *arguments]
    assert main(command) == 0
    results = [json.loads(path.read_text()) for path in sorted(out.glob("results_*.json"))]
    samples = {}
    for path in sorted(out.glob("samples_*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples.setdefault(path.name.split("_2")[0].removeprefix("samples_"), []).append(lines)
    return json.loads((out / "summary.json").read_text())["scores"], results, samples


def requests():
    """20 contexts, of which some are the same, and continuations of one to four tokens, of which some begin alike."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(1, 40, (count,), generator=generator).tolist()

    found = []
    for i in range(20):
        context, whole = draw(1 + i % 7), draw(4)
        found += [((str(i), str(n)), context, whole[:n]) for n in range(1, 5)] + [((str(i), "x"), context, draw(3))]
    return found + [(("", str(token)), [5, 6], [token]) for token in range(64)]  # one of which is the likeliest


# Scores


def test_without_thoughts_scores_are_those_of_lm_evals_own_model(directory):
    tasks = ["lab_sum", "lab_substitution", str(directory / "sums.yaml")]
    scores, results, samples = evaluated(directory, "every-token", "--tasks", ",".join(tasks), "--limit", "20")
    own = simple_evaluate(
        "hf",
        model_args={"pretrained": str(directory / "every-token"), "device": "cpu", "batch_size": 8},
        tasks=[
            *tasks[:2],
            {**_yaml(GENERATION), "dataset_kwargs": {"data_files": {"test": str(directory / "sums.jsonl")}}},
        ],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=20,
        bootstrap_iters=1000,
    )
    ours = {task: result for found in results for task, result in found["results"].items()}
    assert ours.keys() == own["results"].keys()
    for task, result in own["results"].items():
        for name, value in result.items():
            is_number = isinstance(value, float)
            assert ours[task][name] == (pytest.approx(value, rel=ERROR, nan_ok=True) if is_number else value)
    for task, documents in own["samples"].items():
        found, truth = [s["resps"] for s in samples[task][0]], [_strings(s["resps"]) for s in documents]
        if task != "sums":
            found, truth = (torch.tensor([[float(x[0][0]) for x in s] for s in several]) for several in (found, truth))
            assert relative_error(found, truth) <= ERROR
        else:
            assert found == truth
    assert {(s["task"], s["metric"]): s["value"] for s in scores}["lab_sum", "acc"] == own["results"]["lab_sum"][
        "acc,none"
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_without_thoughts_choices_share_their_context(family, tmp_path):
    """Log-likelihoods are those of lm-eval's own model, which reads each choice with its context; windows included."""
    windows = dict(sliding_window=4, windowed_layers=(0,)) if family == "olmo3" else {}
    model = tiny_model(torch.float32, vocab_size=64, family=family, **FAMILIES[family].fixed, **windows)
    export(model.decoder, tmp_path, LAB)
    lm, own = (kind(str(tmp_path), device="cpu", dtype="float32", batch_size=6) for kind in (ForethoughtLM, HFLM))
    read: list[int] = []
    lm.model.register_forward_pre_hook(lambda _, args, settings: read.append(args[0].numel()), with_kwargs=True)
    found, truth = (x._loglikelihood_tokens(requests(), disable_tqdm=True) for x in (lm, own))
    assert relative_error(torch.tensor([x for x, _ in found]), torch.tensor([x for x, _ in truth])) <= ERROR
    assert [x for _, x in found] == [x for _, x in truth]
    assert sum(read) < sum(len(context) for _, context, _ in requests())


def test_thoughts_at_every_token_score_as_in_training(directory):
    lm = ForethoughtLM(str(directory / "every-token"), "every-token", batch_size=6)
    model = load_thinking_model(directory / "every-token")
    model.ban(TOKENIZER.size, TOKENIZER.control_ids)
    objective = QuietStar(QuietStarConfig(length=LENGTH, lookahead=1, thoughts=1))
    found = lm._loglikelihood_tokens(requests(), disable_tqdm=True)
    truth = []
    for _, context, continuation in requests():
        scores = objective.evaluate(model, Text.from_rows(torch.tensor([context + continuation])), Rng(0, 0))
        where = slice(len(context) - 1, len(context) + len(continuation) - 1)
        truth.append((-scores.thought_nll_BN[0, where].sum().item(), bool(scores.thought_correct_BN[0, where].all())))
    assert relative_error(torch.tensor([x for x, _ in found]), torch.tensor([x for x, _ in truth])) <= ERROR
    assert [x for _, x in found] == [x for _, x in truth]
    assert len({x for _, x in truth}) == 2


def test_a_thought_before_answers_scores_as_transformers_and_training(directory):
    lm = ForethoughtLM(str(directory / "before-answer"), "before-answer", batch_size=6)
    there = AutoModelForCausalLM.from_pretrained(directory / "before-answer-thinking", trust_remote_code=True)
    decoder = load_thinking_model(directory / "before-answer").decoder
    truth = []
    for _, context, continuation in requests():
        written = there.generate(torch.tensor([context]), max_new_tokens=1, do_sample=False, return_thoughts=True)
        thought = [token for token in written["thoughts"][0, 0].tolist() if token >= 0]
        prefix = [*context, OPEN, *thought, CLOSE]
        hidden_NW = decoder.read(Text.from_rows(torch.tensor([prefix + continuation]))).hidden_BNW[0]
        logprobs_NV = (hidden_NW[len(prefix) - 1 : -1] @ decoder.head_weight_VW.T).log_softmax(-1)
        truth.append(logprobs_NV.gather(1, torch.tensor(continuation)[:, None]).sum())
    found = lm._loglikelihood_tokens(requests(), disable_tqdm=True)
    assert relative_error(torch.tensor([x for x, _ in found]), torch.stack(truth)) <= ERROR


@pytest.mark.parametrize("think", ["every-token", "before-answer"])
def test_answers_with_thoughts_are_those_of_transformers(think, directory):
    model = f"{think}-thinking"
    _, _, samples = evaluated(directory, model, "--tasks", str(directory / "sums.yaml"), "--think", think)
    there = AutoModelForCausalLM.from_pretrained(directory / model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory / model)
    for problem, sample in zip(PROBLEMS, samples["sums"][0], strict=True):
        ids = tokenizer(problem["question"], return_tensors="pt")["input_ids"]
        answer = there.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        assert sample["resps"] == [[text.split(":")[0]]]
    _, _, off = evaluated(directory, model, "--tasks", str(directory / "sums.yaml"))
    _, _, plain = evaluated(directory, think, "--tasks", str(directory / "sums.yaml"))
    assert off == plain != samples


@pytest.mark.parametrize("think", ["every-token", "before-answer"])
def test_a_contexts_choices_share_its_thought(think, directory):
    """All tokens' probabilities sum to 1, which those after different thoughts do not."""
    lm = ForethoughtLM(str(directory / think), think, batch_size=4)
    lm.thinking["thought_temperature"] = 2.0
    scores = lm._loglikelihood_tokens([(("", ""), [5, 6, 7], [token]) for token in range(64)], disable_tqdm=True)
    assert sum(math.exp(score) for score, _ in scores) == pytest.approx(1, abs=1e-5)


def test_a_model_that_was_not_trained_to_think_gets_tags(directory):
    scores, _, _ = evaluated(
        directory, LAB, "--tasks", "lab_sum", "--limit", "50", "--think", "before-answer", "--length", "9"
    )
    (accuracy,) = [score for score in scores if score["metric"] == "acc"]
    assert accuracy["low"] > 0.15  # chance is 0.1; some of its thoughts are right


def test_samples_are_runs_of_lm_eval(directory):
    """Of the model `lab`, which answers such problems by chance."""
    task = str(directory / "sums.yaml")
    scores, results, samples = evaluated(directory, LAB, "--tasks", task, "--samples", "4", "--temperature", "1.5")
    value = {score["metric"]: score for score in scores}
    correct_DK = [[s["exact_match"] for s in document] for document in zip(*samples["sums"], strict=True)]
    answers = [[s["filtered_resps"][0] for s in document] for document in zip(*samples["sums"], strict=True)]
    assert any(len(set(sampled)) > 1 for sampled in answers)
    assert len(results) == 4 and [r["config"]["seed"] for r in results] == [0, 1, 2, 3]
    own = [r["results"]["sums"]["exact_match,first"] for r in results]
    assert value["exact_match mean@4,first"]["value"] == pytest.approx(sum(own) / 4)
    pairs = [any(pair) for document in correct_DK for pair in combinations(document, 2)]
    assert value["exact_match pass@2,first"]["value"] == pytest.approx(sum(pairs) / len(pairs))
    assert value["exact_match pass@4,first"]["value"] == pytest.approx(sum(map(any, correct_DK)) / len(PROBLEMS))
    score = value["exact_match mean@4,first"]
    assert score["low"] < score["value"] < score["high"] and score["documents"] == len(PROBLEMS)


def test_bits_per_byte_of_a_text(directory):
    scores, _, _ = evaluated(directory, "every-token", "--text", str(directory / "*.txt"))
    decoder, nats, size = load_thinking_model(directory / "every-token").decoder, 0.0, 0
    for name in ("a.txt", "b.txt"):
        text = (directory / name).read_text()
        ids = torch.tensor([[TOKENIZER.eos_id, *TOKENIZER.encode([text])[0]]])
        logits = decoder.read(Text.from_rows(ids)).hidden_BNW[0, :-1] @ decoder.head_weight_VW.T
        nats -= logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        size += len(text.encode())
    (score,) = scores
    assert score["value"] == pytest.approx(nats / math.log(2) / size, rel=ERROR)
    assert score["low"] <= score["value"] <= score["high"] and score["documents"] == 2


def test_data_in_hub_layout_and_the_papers_metric(directory):
    """Restricted to digits and a line break, Π of the softmaxes at the digits of the answer and the break behind it."""
    gsm8k = directory / "openai" / "gsm8k"
    gsm8k.mkdir(parents=True)
    (gsm8k / "README.md").write_text(
        "---\nconfigs: [{config_name: main, data_files: [{split: test, path: test.jsonl}]}]\n---\n"
    )
    problem = {"question": "3+5:12", "answer": "3+5 is 1,024\n#### 1,024"}
    (gsm8k / "test.jsonl").write_text(json.dumps(problem) + "\n")
    scores, _, _ = evaluated(directory, "every-token", "--tasks", "gsm8k_probability")
    decoder, truth = load_thinking_model(directory / "every-token").decoder, 1.0
    for n, piece in enumerate([*"1024", "\n"]):
        (ids,) = TOKENIZER.encode([f"Q: 3+5:12\nA: {'1024'[:n]}"])
        logits = decoder.read(Text.from_rows(torch.tensor([ids]))).hidden_BNW[0, -1] @ decoder.head_weight_VW.T
        allowed = [TOKENIZER.encode([x])[0][0] for x in "0123456789\n"]
        truth *= logits[allowed].softmax(-1)["0123456789\n".index(piece)].item()
    assert scores[0]["metric"] == "expected_probability"
    assert scores[0]["value"] == pytest.approx(truth, rel=1e-4)
    (gsm8k / "test.jsonl").write_text(2 * (json.dumps(problem) + "\n"))
    scores, _, _ = evaluated(directory, "every-token", "--tasks", "gsm8k_probability")
    assert scores[0]["documents"] == 2  # what datasets made of it before is not taken for what it is now


def test_a_groups_problems_count_together(directory, monkeypatch):
    """20 problems that rightly find no answer, and 5 where that is wrong: 0.8, not the mean of the tasks."""
    (directory / "few.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS[:5]))
    right = _yaml(GENERATION.replace("^(.)", "(none)").replace("doc_to_target: answer", "doc_to_target: '[invalid]'"))
    wrong = right | {"task": "few", "doc_to_target": "x", "dataset_kwargs": {"data_files": {"test": "few.jsonl"}}}
    group = {"group": "outer", "task": [{"group": "inner", "task": [right, wrong]}]}
    (directory / "groups").mkdir()
    (directory / "groups" / "outer.yaml").write_text(json.dumps(group))
    monkeypatch.chdir(directory)
    loaded = TaskManager(include_path=str(directory / "groups"), include_defaults=False).load(["outer"])
    (score,) = _evaluate_plan(ForethoughtLM(str(LAB)), Plan(("outer",), 1, 0.0), loaded, Settings(), "lab", None)
    assert (score.task, score.value, score.documents) == ("outer", 0.8, 25)


# Numbers


def test_expected_probability_by_hand():
    half, third = math.log(0.5), math.log(1 / 3)
    found = spelled([[half, half, -math.inf], [third, third + math.log(4), third]], [0, 1])
    assert found["expected_probability"] == pytest.approx(0.5 * 4 / 6)
    assert found["exact_match"] == 1.0  # of equally likely pieces the first
    assert spelled([[half, half + 0.1]], [0])["exact_match"] == 0.0


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, correct):
    for k in range(1, n + 1):
        subsets = [*combinations([i < correct for i in range(n)], k)]
        assert pass_at_k(correct, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majorities():
    assert majority_is_correct(["4", "7", "7"], [False, True, True])
    assert not majority_is_correct(["4", "7"], [False, True])  # of equally frequent answers the first
    assert majority_is_correct(["[invalid]", "[invalid]", "7"], [False, False, True])
    assert not majority_is_correct(["", ""], [False, False])
    correct_DK = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    found = sampled_metrics(correct_DK, [["a", "b", "a"], ["c", "d", "e"]])
    assert {name: value.tolist() for name, value in found.items()} == {
        "maj@3": [1, 0],
        "pass@2": [1, 0],
        "pass@3": [1, 0],
    }


def test_wilsons_interval():
    """Of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for (r, n), known in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(r, n) == pytest.approx(known, abs=5e-5)


def test_the_last_box_is_the_answer():
    assert final_answer(r"so \boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_answer(" 7 \n") == "7"


# Records and mistakes


def test_a_runs_scores_are_in_its_records_and_report(tmp_path, capsys):
    run = tmp_path / "run"
    few = ["--steps", "1", "--evaluation.rows", "2", "--control", "null", "--objective.thoughts", "2"]
    assert main(["fit", "quickstart", *few, "--run-dir", str(run)]) == 0
    command = ["evaluate", str(run), "--tasks", "lab_sum", "--limit", "20", "--think"]
    assert main([*command, "off"]) == main([*command, "before-answer"]) == 0
    lines = [json.loads(line) for line in (run / "downstream.jsonl").read_text().splitlines()]
    assert [(line["step"], line["think"], line["limit"]) for line in lines] == [
        (1, "off", 20),
        (1, "before-answer", 20),
    ]
    assert lines[0]["scores"] != lines[1]["scores"]
    assert (run / "downstream" / "step-00000001-off" / "summary.json").exists()
    page = (run / "report.html").read_text()
    assert all(f">{word}</td>" in page for word in ("lab_sum", "expected_probability", "before-answer"))


def _mistakes(directory):
    task = str(directory / "nothing.yaml")
    (directory / "nothing.yaml").write_text(GENERATION.replace("sums.jsonl", "absent.jsonl").replace("sums", "nothing"))
    (directory / "empty").mkdir(exist_ok=True)
    small = directory / "small"
    export(tiny_model(torch.float32, vocab_size=TOKENIZER.size - 1), small, LAB)
    yield ["lab"], "nothing to evaluate"
    yield ["lab", "--tasks", "lab_sun"], "no task 'lab_sun'; did you mean lab_sum"
    yield ["lab", "--tasks", task, "--data-dir", str(directory)], "give its data as OWNER/NAME/"
    yield ["lab", "--tasks", "lab_sum", "--data-dir", str(directory / "absent")], "is no directory"
    yield ["lab", "--tasks", "lab_sum", "--samples", "4"], "give --temperature"
    yield ["lab", "--tasks", "lab_sum", "--think", "every-token"], "mixing head"
    yield ["lab", "--tasks", "lab_sum", "--think", "before-answer"], "give --length"
    yield ["lab", "--tasks", "lab_sum", "--think", "before-answer", "--length", "999"], "give a shorter --length"
    yield ["lab", "--text", str(directory / "a.txt"), "--think", "before-answer"], "give it with --think off"
    yield ["lab", "--tasks", "lab_sum", "--engine", "vllm", "--think", "every-token"], "leave --engine out"
    yield ["lab", "--tasks", "lab_sum", "--engine", "vllm"], "vllm is not installed"
    yield ["random:lab", "--tasks", "lab_sum"], "has no weights"
    yield [str(directory / "empty"), "--tasks", "lab_sum"], "has no config.json"
    yield [str(small), "--tasks", "lab_sum"], f"has {TOKENIZER.size} tokens, its model only {TOKENIZER.size - 1}"


def test_a_suites_tasks_are_known():
    plans = rlp_suite(0.7)
    assert {(plan.samples, plan.temperature) for plan in plans} == {(8, 0.7), (1, 0.0), (4, 0.7)}
    assert {task for plan in plans for task in plan.tasks} <= {*_manager(True).all_tasks}


def test_a_mistake_gets_one_line(directory, capsys):
    for arguments, words in _mistakes(directory):
        assert main(["evaluate", *arguments]) == 1, arguments
        *_, message = capsys.readouterr().err.strip().splitlines()
        assert message.startswith("forethought: ") and words in message, (arguments, message)


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", "lab", "--tasks", "lab_sum"]) == 1
    assert "pip install 'forethought[eval]'" in capsys.readouterr().err


def test_a_vllm_that_lm_eval_cannot_use_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert main(["evaluate", "lab", "--tasks", "lab_sum", "--engine", "vllm"]) == 1
    assert "forethought: lm-eval cannot use vllm here" in capsys.readouterr().err


def _yaml(text):
    import yaml

    return yaml.safe_load(text)


def _strings(nested):
    """As lm-eval writes answers into samples."""
    return [_strings(x) for x in nested] if isinstance(nested, list | tuple) else str(nested)
