"""A pretrained student and real answers of a closed model.

Rows are read from JSONL files beside the checkout (`prompt`, `response`) and are no part of it; the student
is a folder, by default where `scripts/fetch-smollm2` puts SmolLM2-135M-Instruct.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from experiments.experiment import FOLDER
from experiments.ranking import measure_ranking
from experiments.training import summarise_training
from gadfly.analysis.tell import MIN_PROMPTS, tell_accuracy
from gadfly.analysis.tell_model import open_embedder
from gadfly.errors import ConfigError
from gadfly.groups import Branch
from gadfly.models import load_language_model
from gadfly.records import Message, Row, generations_file
from gadfly.stages.judge.answer_sheets import TEACHER, answer_sheets
from gadfly.stages.judge.tell_figures import pairs_with_teacher
from gadfly.stages.named_models import named_models
from gadfly.stages.run import Run
from gadfly.statistics import mean
from gadfly.text_metrics import rouge_l

# Of another set, to see what was forgotten: so many human answers of at most so many tokens.
_HUMAN_ROWS, _HUMAN_TOKENS = 100, 128
# Samples of so many prompts are ranked.
_RANKED_PROMPTS = 64
# The test set of the student's own domain.
_OWN = "own"


def prepare(folder: Path, seed: int, settings: Mapping[str, Any]) -> None:
    """Write rows, and a link to the model.

    Settings: `data`, a folder; `train`, `valid` and `tests` (names with spaces between), files in it;
    `human`, a file with human answers; `tokens`, what an answer to train on may have; `model`, a folder.
    Half of `valid` is a test set `own`. `rows` keeps only so many of each.

    Raises:
        ConfigError: if a file or the model is not there.
    """
    del seed  # The data are what they are; a seed decides heads, batches and samples.
    data, model = _folder(settings, "data"), _folder(settings, "model")
    most = int(settings.get("rows", 10**9))
    tokenizer = AutoTokenizer.from_pretrained(model)

    def fits(row: dict[str, Any]) -> bool:
        return len(tokenizer(row["response"])["input_ids"]) < int(settings["tokens"])

    valid = [row for row in _rows(data, settings["valid"]) if fits(row)]
    sets = {
        "train": [row for row in _rows(data, settings["train"]) if fits(row)],
        "valid": valid[::2],
        _OWN: valid[1::2],
        **{Path(name).name.partition(".")[0]: _rows(data, name) for name in str(settings["tests"]).split()},
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        kept = [{key: row[key] for key in ("id", "prompt", "response")} for row in rows[:most]]
        lines = [json.dumps(row) + "\n" for row in kept]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "models").mkdir(exist_ok=True)
    link = folder / "models" / "student"
    if not link.is_symlink():
        link.symlink_to(model)


def measure(run: Run, settings: Mapping[str, Any]) -> None:
    """Of every model: what was forgotten, and how often a second classifier tells its answers; of gad also
    means of its last steps, and how the discriminators rank samples by ROUGE-L, for want of an oracle.
    """
    summarise_training(run)
    measure_ranking(run, _OWN, _RANKED_PROMPTS, _overlap)
    _measure_forgetting(run, settings)
    # The judge's classifier counts n-grams; this one reads hidden states of the student before any training.
    embed = open_embedder(str(_folder(settings, "model")))
    own = {generations_file(_OWN, temperature) for temperature in run.recipe.generate.temperatures}
    for sheet in answer_sheets(run):
        if sheet.name in own:
            for model in sheet.judged:
                pairs = pairs_with_teacher(sheet, model)
                if model != TEACHER and len(pairs) >= MIN_PROMPTS:
                    record = {"tell_accuracy_hidden": tell_accuracy(pairs, embed).as_record()}
                    run.folder.update_summary("evaluation", {model: {sheet.name: record}})


def _overlap(row: Row, branch: Branch) -> float:
    return rouge_l(branch.text, [teacher.text for teacher in row.responses])


@torch.no_grad()
def _measure_forgetting(run: Run, settings: Mapping[str, Any]) -> None:
    """Nats a token of human answers to prompts of another set."""
    most = min(_HUMAN_ROWS, int(settings.get("rows", 10**9)))
    rows = _rows(_folder(settings, "data"), settings["human"])[:most]
    for named in named_models(run):
        model, renderer = load_language_model(named.source, "float32")
        surprise = []
        for row in rows:
            prompt = renderer.prompt_tokens((Message("user", row["prompt"]),))
            response = renderer.response_tokens(row["response"], True)[:_HUMAN_TOKENS]
            ids = torch.tensor([[*prompt[-1024:], *response]])
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1]
            logprobs = logits.log_softmax(-1)
            surprise.append(float(-logprobs.gather(-1, ids[0, -len(response) :, None]).mean()))
        record = {"nats_per_token": mean(surprise).as_record()}
        run.folder.update_summary("evaluation", {named.name: {"human": record}})


def _folder(settings: Mapping[str, Any], key: str) -> Path:
    folder = (FOLDER.parent / str(settings[key])).resolve()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: not there; this experiment needs it (see its README)")
    return folder


def _rows(data: Path, name: Any) -> list[dict[str, Any]]:
    file = data / str(name)
    if not file.is_file():
        raise ConfigError(f"{file}: not there; this experiment needs it (see its README)")
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]
