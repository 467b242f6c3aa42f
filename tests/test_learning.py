"""The method learns: what the teacher always does, the student does far more often after GAD than before."""

import json
from pathlib import Path

from gadfly.recipe_file import load_recipe
from gadfly.stages.gad import gad
from gadfly.stages.generate import generate
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

ANSWERS = ("aye", "nay")


def share_of_the_teachers_answers(rows: list[dict[str, str]], model: str) -> float:
    own = [row for row in rows if row["model"] == model]
    return sum(row["response"] in ANSWERS and bool(row["finished"]) for row in own) / len(own)


def test_after_gad_the_student_shows_the_teachers_trait_far_more_often(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = [{"prompt": f"say {n}", "response": ANSWERS[n % 2]} for n in range(256)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(
        f"""
name = "learning"
[data]
train = "data.jsonl"
test = {{ same = "data.jsonl" }}
[student]
model = "{tiny_model}"
max_grad_norm = 1.0
[discriminator]
learning_rate = 1e-3
max_grad_norm = 1.0
lm_steps = 300
lm_learning_rate = 3e-3
lm_batch_prompts = 32
[sampling]
temperature = 1.0
max_response_tokens = 8
[warmup]
learning_rate = 3e-3
batch_prompts = 32
max_steps = 60
group_size = 2
discriminator_only_steps = 0
discriminator_every = 0
discriminator_final_steps = 100
evaluate_every = 1000
save_every = 1000
[gad]
learning_rate = 5e-4
batch_prompts = 16
group_size = 8
max_steps = 120
kl_coefficient = 0.1
evaluate_every = 1000
save_every = 1000
[evaluation]
prompts = 4
[generate]
checkpoints = ["warmup", "gad"]
temperatures = [1.0]
""",
        encoding="utf-8",
    )
    with open_run(load_recipe(tmp_path / "recipe.toml")) as run:
        warmup(run)
        gad(run)
        generate(run)
        generations = run.folder.rows("generations/same-t1.jsonl")
    before = share_of_the_teachers_answers(generations, "warmup")
    after = share_of_the_teachers_answers(generations, "gad")
    assert after > before + 0.2
