#!/usr/bin/env python3
"""Scores the bundled model with lm-evaluation-harness through /v1/completions, and with `tandem eval tasks`: they must agree.

    lm_eval_tasks.py target/release/tandem      (pip install 'lm-eval[api]' transformers)

Questions are made from tests/golden/fable-30m/tasks.jsonl: multiple choice by log-likelihood, which the harness reads from
`echo` with `logprobs`, and greedy answers. The model's own tokenizer makes the harness's tokens.
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request

PORT = 8138
ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/fable-30m-MXFP4-Q8"
CHOICE = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWER = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: expect
target_delimiter: ""
generation_kwargs: {{until: ["<|user|>"], max_gen_toks: 256, do_sample: false, temperature: 0}}
filter_list: [{{name: none, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
"""


def questions():
    """Tasks in the form of `tandem eval tasks`, by kind."""
    kinds = {}
    for line in (ROOT / "tests/golden/fable-30m/tasks.jsonl").read_text().splitlines():
        task = json.loads(line)
        kind, prompt, expect = task["kind"].replace(" ", "_"), task["prompt"], task["expect"]
        if kind == "tool_call":
            # Their answers are special tokens, which completions leave out.
            continue
        if kind != "arithmetic":
            kinds.setdefault(f"{kind}_answer", []).append({**task, "kind": f"{kind}_answer"})
        # The last word is chosen.
        begin, _, right = expect.rpartition(" ")
        if kind == "arithmetic":
            right_number = int(right.rstrip("."))
            choices = [right] + [f"{right_number + n}." for n in (1, -1, 10, -10)]
        elif kind.startswith("recall"):
            others = re.findall(r"(?: is|'s number is) (\w+)\.", prompt)
            choices = [right] + [f"{other}." for other in dict.fromkeys(others) if f"{other}." != right][:5]
        else:
            continue
        question = prompt.removesuffix("<think>").removesuffix("</think>") + "</think>" + begin
        name = f"{kind}_choice"
        kinds.setdefault(name, []).append({"kind": name, "question": question, "choices": [f" {c}" for c in choices], "answer": 0})
    # Choices of unequal lengths.
    for task in kinds["recall_short_choice"][:]:
        choices = [f"{choice} Thank you" if i % 2 else choice for i, choice in enumerate(task["choices"])]
        kinds.setdefault("uneven_choice", []).append({**task, "kind": "uneven_choice", "choices": choices})
    return kinds


def tandem_scores(binary, folder, kinds):
    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for tasks in kinds.values() for task in tasks))
    command = [binary, "eval", "tasks", "--model", str(MODEL), "--tasks", str(file), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["kinds"]


def harness_scores(folder, kinds):
    os.environ.update(HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="x")
    import lm_eval
    from lm_eval.tasks import TaskManager
    for kind, tasks in kinds.items():
        file = folder / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        form = CHOICE if "choices" in tasks[0] else ANSWER
        (folder / f"{kind}.yaml").write_text(form.format(task=kind, file=file))
    model = {"base_url": f"http://127.0.0.1:{PORT}/v1/completions", "model": "fable", "tokenizer": str(MODEL),
             "tokenizer_backend": "huggingface", "num_concurrent": 4, "max_length": 4096}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model="local-completions", model_args=model, tasks=list(kinds), task_manager=manager, bootstrap_iters=0)
    return found["results"], lm_eval


def wait():
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models")
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not load")


def main():
    binary = sys.argv[1]
    kinds = questions()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        expected = tandem_scores(binary, folder, kinds)
        server = subprocess.Popen([binary, "serve", "--model", str(MODEL), "--port", str(PORT), "--served-model-name", "fable"], stderr=subprocess.DEVNULL)
        try:
            wait()
            found, lm_eval = harness_scores(folder, kinds)
        finally:
            server.terminate()
            server.wait()
    differs = False
    print(f"lm-eval {getattr(lm_eval, '__version__', '')}")
    for kind, tasks in kinds.items():
        n, scores, own = len(tasks), found[kind], expected[kind]
        if "choices" in tasks[0]:
            theirs, ours = [scores["acc,none"], scores["acc_norm,none"]], [own["right"], own["right_normalized"]]
        else:
            theirs, ours = [scores["exact_match,none"]], [own["right"]]
        theirs = [round(float(share) * n, 6) for share in theirs]
        differs |= theirs != ours
        print(f"{kind}: lm-eval {theirs} of {n}, tandem eval tasks {ours}{'' if theirs == ours else '  <-- differs'}")
    sys.exit(differs)


if __name__ == "__main__":
    main()
