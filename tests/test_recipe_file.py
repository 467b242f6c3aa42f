"""A recipe is read whole or refused with every mistake in it, each on a line that says what to do."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gadfly.config import Recipe
from gadfly.errors import ConfigError
from gadfly.recipe_file import fields, load_recipe, section_of

REPOSITORY = Path(__file__).resolve().parents[1]
LEAST = 'name = "pirate"\n[student]\nmodel = "some/model"\n'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe and gives its path."""

    def write_recipe(text: str) -> Path:
        path = tmp_path / "pirate.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_recipe


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        load_recipe(path, overrides)
    assert refusal.value.exit_code == 2
    return str(refusal.value).splitlines()


def test_all_mistakes_are_told_at_once(write: Callable[[str], Path]) -> None:
    recipe = """
name = "pirate ship"
group_sise = 4
[dta]
train = "train.jsonl"
[student]
modle = "some/model"
[sampling]
temperatur = 1.0
[seqkd]
epochs = "three"
[gad]
learning_rate = 0
group_size = 1
clip_range = 0.2
[checkpoints]
keep_last = 1.5
"""
    assert sorted(mistakes(write(recipe), "gad.kl_coefficient=-1", "epochs", "warmup.batch_promts=4")) == [
        "'epochs': write key=value, as in gad.group_size=4",
        "command line: gad.kl_coefficient = -1: input should be greater than or equal to 0",
        "command line: warmup.batch_promts: unknown key; did you mean 'batch_prompts'?",
        "pirate.toml: checkpoints.keep_last = 1.5: input should be a valid integer",
        "pirate.toml: dta: unknown key; did you mean 'data'?",
        "pirate.toml: gad.group_size = 1: input should be greater than or equal to 2",
        "pirate.toml: gad.learning_rate = 0: input should be greater than 0",
        "pirate.toml: group_sise: unknown key; did you mean 'warmup.group_size' or 'gad.group_size'?",
        "pirate.toml: name = 'pirate ship': "
        "use letters, digits, '.', '_' and '-', beginning with a letter or a digit",
        "pirate.toml: sampling.temperatur: unknown key; did you mean 'temperature'?",
        "pirate.toml: seqkd.epochs = 'three': input should be a valid number",
        "pirate.toml: student.model: must be given (A Hugging Face name or a folder)",
        "pirate.toml: student.modle: unknown key; did you mean 'model'?",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "[student]\ntemperature = 1",
            "student.temperature: unknown key; did you mean 'teacher.temperature' or "
            "'sampling.temperature' or 'judge.temperature'?",
        ),
        ("[seqkd]\nlm_steps = 1", "seqkd.lm_steps: unknown key; did you mean 'discriminator.lm_steps'?"),
        ("[gad]\nseed = 1", "gad.seed: unknown key; did you mean 'seed'?"),
        (
            "[sampling]\ngroup_size = 4",
            "sampling.group_size: unknown key; did you mean 'warmup.group_size' or 'gad.group_size'?",
        ),
        ("[gad.sampling]\ntemperature = 1", "gad.sampling: unknown key; did you mean 'sampling'?"),
        (
            "[gad]\nmax_respons_tokens = 1",
            "gad.max_respons_tokens: unknown key; did you mean 'teacher.max_response_tokens' or "
            "'sampling.max_response_tokens' or 'generate.max_response_tokens' or "
            "'judge.max_response_tokens'?",
        ),
        ("[gad]\nxyzzy = 1", "gad.xyzzy: unknown key"),
        ("[GAD]\ngroup_size = 4", "GAD: unknown key; did you mean 'gad'?"),
        ("[gad]\nGroup_Size = 4", "gad.Group_Size: unknown key; did you mean 'group_size'?"),
    ],
)
def test_an_unknown_key_is_told_where_it_belongs(
    write: Callable[[str], Path], line: str, message: str
) -> None:
    student = "" if "[student]" in line else "[student]\n"
    recipe = write(f'name = "pirate"\n{line}\n{student}model = "some/model"\n')
    assert mistakes(recipe) == [f"pirate.toml: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[data]\ntrain = 5", "data.train = 5: input should be a valid string or a valid list"),
        ('[data]\ntrain = ["a.jsonl", 5]', "data.train.1 = 5: input should be a valid string"),
        ("[data]\ntest = 5", "data.test = 5: must be a table, as in [data.test]"),
        (
            '[data]\ntest = { "a b" = "a.jsonl" }',
            "data.test.a b = 'a b': "
            "use letters, digits, '.', '_' and '-', beginning with a letter or a digit",
        ),
        (
            '[data]\ntest = { valid = "a" }',
            "data.test = {'valid': 'a'}: files named 'valid' hold the held-out prompts; rename the test set",
        ),
        (
            '[data]\ntest = { answers = "a" }',
            "data.test = {'answers': 'a'}: "
            "files named 'answers' hold what a judge was paid for; rename the test set",
        ),
        (
            "[gad]\nstart_from = -1",
            "gad.start_from = -1: input should be 'latest' or greater than or equal to 0 or a valid string",
        ),
        ("[discriminator]\nadam_betas = [0.9]", "discriminator.adam_betas.1: must be given"),
        (
            '[discriminator]\nloss = "hinge"',
            "discriminator.loss = 'hinge': input should be 'bradley_terry' or 'cross_entropy'",
        ),
        ("[gad]\nlearning_rate = nan", "gad.learning_rate = nan: input should be a finite number"),
        (
            '[discriminator]\nreads = "tokens"\nmodel = "another/model"',
            'discriminator.reads = "tokens": they are the student\'s, so discriminator.model must be too',
        ),
    ],
)
def test_a_wrong_value_is_one_line(write: Callable[[str], Path], line: str, message: str) -> None:
    assert mistakes(write(LEAST + line)) == [f"pirate.toml: {message}"]


def is_a_number(field: FieldInfo) -> bool:
    kinds = [field.annotation, *get_args(field.annotation)]
    kinds += [inner for kind in kinds for inner in get_args(kind)]
    return (int in kinds or float in kinds) and section_of(field) is None


NUMBERS = [key for key, field in fields() if is_a_number(field)]


@pytest.mark.parametrize("value", ["true", '"4"', "[true]", '["4", "4"]', "{ a = true }"])
def test_no_number_may_be_a_truth_value_or_text(write: Callable[[str], Path], value: str) -> None:
    assert {"seed", "gad.group_size", "discriminator.adam_betas", "data.teachers"} < set(NUMBERS)
    # There, text is a path.
    numbers = [key for key in NUMBERS if not (key == "gad.start_from" and value == '"4"')]
    messages = mistakes(write(LEAST), *(f"{key}={value}" for key in numbers))
    missing = [key for key in numbers if not any(f"command line: {key}" in line for line in messages)]
    assert missing == []


def test_a_whole_number_may_stand_where_any_number_may(write: Callable[[str], Path]) -> None:
    recipe = load_recipe(write(LEAST + "[gad]\nepochs = 3\n"), ["discriminator.adam_betas=[0, 0]"])
    assert (recipe.gad.epochs, recipe.discriminator.adam_betas) == (3.0, (0.0, 0.0))


def test_an_alpha_without_an_adapter_is_a_mistake(write: Callable[[str], Path]) -> None:
    assert mistakes(write(LEAST + "lora_alpha = 16\n")) == [
        "pirate.toml: student.lora_alpha = 16: with student.lora_rank = 0 every weight is trained and there "
        "is no adapter; leave it out, or give student.lora_rank"
    ]
    assert load_recipe(write(LEAST + "lora_alpha = 16\nlora_rank = 8\n")).student.lora_alpha == 16


def test_autocast_over_weights_in_double_precision_is_a_mistake(write: Callable[[str], Path]) -> None:
    assert mistakes(write(LEAST + 'dtype = "float64"\n[engine]\nprecision = "auto"\n')) == [
        'pirate.toml: engine.precision = "auto": autocast cannot round weights of student.dtype = "float64"; '
        'set engine.precision = "float32", which leaves them as they are'
    ]


def test_a_section_that_is_no_table_is_one_line(write: Callable[[str], Path]) -> None:
    assert mistakes(write("gad = 3\n" + LEAST)) == ["pirate.toml: gad = 3: must be a table, as in [gad]"]


def test_an_empty_recipe_says_all_that_must_be_given(write: Callable[[str], Path]) -> None:
    assert mistakes(write("")) == [
        "pirate.toml: name: must be given (Names the run folder: `runs/NAME` beside the recipe)",
        "pirate.toml: student.model: must be given (A Hugging Face name or a folder)",
    ]


def test_values_on_the_command_line_are_toml_or_bare_words(write: Callable[[str], Path]) -> None:
    recipe = load_recipe(
        write(LEAST + "[gad]\ngroup_size = 8\nbatch_prompts = 7\n"),
        [
            "gad.group_size=4",
            "gad.learning_rate=3e-5",
            "checkpoints.keep_best=false",
            "student.model=other/model",
            'discriminator.model="third/model"',
            "discriminator.adam_betas=[0.9, 0.95]",
            "data.test={ a = 'a=b.jsonl' }",
            "data.test.b = b.jsonl",
            "seed = 5",
            "gad.start_from=400",
        ],
    )
    assert (recipe.gad.group_size, recipe.gad.batch_prompts, recipe.gad.learning_rate) == (4, 7, 3e-5)
    assert recipe.checkpoints.keep_best is False
    assert (recipe.student.model, recipe.discriminator.model) == ("other/model", "third/model")
    assert recipe.discriminator.adam_betas == (0.9, 0.95)
    assert recipe.data.test == {"a": str(Path("a=b.jsonl").absolute()), "b": str(Path("b.jsonl").absolute())}
    assert (recipe.seed, recipe.gad.start_from) == (5, 400)


def test_the_last_of_two_values_counts(write: Callable[[str], Path]) -> None:
    assert load_recipe(write(LEAST), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["gad.group_size", "=4", "gad.=4", ".seed=4", "", "gad..seed=4"])
def test_what_is_no_assignment_is_refused(write: Callable[[str], Path], override: str) -> None:
    assert mistakes(write(LEAST), override) == [f"{override!r}: write key=value, as in gad.group_size=4"]


def test_a_list_without_quotes_is_refused_with_the_right_way_to_write_it(
    write: Callable[[str], Path],
) -> None:
    messages = mistakes(write(LEAST), "generate.checkpoints=[base, gad]")
    assert len(messages) == 1
    assert messages[0].startswith("'generate.checkpoints=[base, gad]': not valid TOML: ")
    assert messages[0].endswith("""quotes of the shell: 'generate.checkpoints=["base"]'""")


def test_a_number_where_text_is_wanted_is_told_how_to_be_text(write: Callable[[str], Path]) -> None:
    assert mistakes(write(LEAST), "name=7") == [
        "command line: name = 7: input should be a valid string; text is 'name=\"…\"'"
    ]
    assert load_recipe(write(LEAST), ['name="7"']).name == "7"


def test_a_line_break_smuggles_in_no_second_key(write: Callable[[str], Path]) -> None:
    assert mistakes(write(LEAST), 'seed=1\nname = "x"') == [
        "command line: seed = '1\\nname = \"x\"': input should be a valid integer"
    ]


def test_relative_paths_count_from_where_they_are_written(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path, tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (here, elsewhere):
        for file in ("train.jsonl", "valid.jsonl", "test.jsonl"):
            (folder / file).touch()
        for model in ("student", "discriminator", "other"):
            (folder / model).mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(
        write(
            """
name = "pirate"
[data]
train = ["train.jsonl", "../{}/train.jsonl", "hub/name"]
valid = "valid.jsonl"
test = { near = "test.jsonl" }
[student]
model = "student"
[generate]
checkpoints = ["base", "other", "gad/step-000400"]
""".replace("{}", tmp_path.name)
        ),
        ["data.test.far=test.jsonl", "discriminator.model=discriminator", "gad.start_from=w"],
    )
    assert recipe.data.train == [str(here / "train.jsonl"), str(here / "train.jsonl"), "hub/name"]
    assert recipe.data.valid == str(here / "valid.jsonl")
    assert recipe.data.test == {"near": str(here / "test.jsonl"), "far": str(elsewhere / "test.jsonl")}
    assert recipe.student.model == str(here / "student")
    assert recipe.discriminator.model == str(elsewhere / "discriminator")
    assert recipe.gad.start_from == str(elsewhere / "w")
    assert recipe.generate.checkpoints == ["base", str(here / "other"), "gad/step-000400"]
    assert recipe.run_folder == str(here / "runs" / "pirate")


def test_a_folder_called_like_a_stage_is_not_what_the_stage_means(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("latest", "base", "gad/step-000400"):
        (tmp_path / name).mkdir(parents=True)
    names = '["base", "gad", "gad/step-000400"]'
    recipe = load_recipe(write(LEAST + f'[gad]\nstart_from = "latest"\n[generate]\ncheckpoints = {names}\n'))
    assert recipe.gad.start_from == "latest"
    assert recipe.generate.checkpoints == ["base", "gad", "gad/step-000400"]


def test_the_run_folder_lies_beside_the_recipe_unless_given(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(LEAST)
    assert load_recipe(path).run_folder == str(tmp_path / "runs" / "pirate")
    assert load_recipe("../pirate.toml").run_folder == str(tmp_path / "runs" / "pirate")
    assert load_recipe(path, ["name=b"]).run_folder == str(tmp_path / "runs" / "b")
    assert load_recipe(path, ["run_folder=c"]).run_folder == str(elsewhere / "c")
    given = write('run_folder = "../d"\n' + LEAST)
    assert load_recipe(given).run_folder == str(tmp_path.parent / "d")


def test_a_home_folder_is_found(write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ahab")
    assert load_recipe(write(LEAST), ["run_folder=~/runs"]).run_folder == "/home/ahab/runs"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    broken, latin = tmp_path / "broken.toml", tmp_path / "latin.toml"
    broken.write_text("name = \n", encoding="utf-8")
    latin.write_bytes(b'name = "caf\xe9"\n')
    assert mistakes(tmp_path / "none.toml") == [f"{tmp_path / 'none.toml'}: no such recipe"]
    assert mistakes(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]
    assert mistakes(broken / "x.toml") == [f"{broken / 'x.toml'}: cannot be read: Not a directory"]
    assert mistakes(broken) == [f"{broken}: not valid TOML: Invalid value (at line 1, column 8)"]
    assert mistakes(latin) == [f"{latin}: byte 11 is not UTF-8; save the file as UTF-8"]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.replace("\n", "\r\n").encode())
    assert load_recipe(path).name == "pirate"


def test_a_recipe_is_frozen(write: Callable[[str], Path]) -> None:
    recipe = load_recipe(write(LEAST))
    with pytest.raises(ValidationError):
        recipe.gad.group_size = 2


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Every key of a recipe with what is written under it; of a section, what its class says."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is None:
            yield prefix + name, field.description
        else:
            yield prefix + name, inner.__doc__
            yield from fields(inner, f"{prefix}{name}.")


def test_true_is_no_number(write: Callable[[str], Path]) -> None:
    recipe = write('name = "pirate"\n[student]\nmodel = "some/model"\n[gad]\nbatch_prompts = true\n')
    assert mistakes(recipe) == ["pirate.toml: gad.batch_prompts = True: input should be a valid integer"]


def test_a_key_in_the_place_of_its_name_is_refused_and_not_repeated(write: Callable[[str], Path]) -> None:
    recipe = write('name = "a"\n[student]\nmodel = "m"\n[teacher]\napi_key_env = "sk-abc123"\n')
    (message,) = mistakes(recipe)
    assert message.startswith("pirate.toml: teacher.api_key_env: give the NAME of an environment variable")
    assert "sk-abc123" not in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'base_url = "http://host/v1?key=secret"',
            "teacher.base_url: must end with the path, as in http://localhost:8000/v1, without ? or #",
        ),
        (
            'extra_body = { stream = true, model = "b", seed = 1 }',
            "teacher.extra_body = {'stream': True, 'model': 'b', 'seed': 1}: "
            "model, stream: not here; the request has its own from other settings",
        ),
    ],
)
def test_what_would_change_the_request_behind_the_settings_is_refused(
    write: Callable[[str], Path], line: str, message: str
) -> None:
    recipe = write(f'name = "a"\n[student]\nmodel = "m"\n[teacher]\n{line}\n')
    assert mistakes(recipe) == [f"pirate.toml: {message}"]


def test_an_address_with_a_password_is_refused_and_not_repeated(write: Callable[[str], Path]) -> None:
    recipe = write('name = "a"\n[student]\nmodel = "m"\n[judge]\nbase_url = "http://me:secret@host/v1"\n')
    (message,) = mistakes(recipe)
    assert message.startswith("pirate.toml: judge.base_url: must hold no user name or password")
    assert "secret" not in message


def test_every_setting_is_documented() -> None:
    undocumented = [key for key, text in fields(Recipe) if not (text or "").strip().endswith((".", "`"))]
    assert undocumented == []


def test_the_settings_others_rely_on_exist() -> None:
    training = "learning_rate learning_rate_schedule epochs batch_prompts max_steps save_every evaluate_every"
    promised = {
        "": "name seed run_folder",
        "data": "train valid test valid_share",
        "student": "model dtype adam_betas max_grad_norm weight_decay",
        "discriminator": "model reads loss learning_rate max_grad_norm lm_steps adam_betas",
        "sampling": "temperature max_prompt_tokens max_response_tokens",
        "seqkd": training,
        "warmup": f"{training} group_size discriminator_only_steps discriminator_final_steps",
        "gad": f"{training} group_size kl_coefficient clip_range start_from",
        "generate": "checkpoints",
    }
    keys = {f"{section}.{key}".lstrip(".") for section, names in promised.items() for key in names.split()}
    assert keys <= {key for key, _ in fields(Recipe)}


def test_the_defaults_are_the_papers(write: Callable[[str], Path]) -> None:
    recipe = load_recipe(write(LEAST))
    assert (recipe.gad.batch_prompts, recipe.gad.group_size, recipe.sampling.temperature) == (256, 8, 0.8)
    assert (recipe.sampling.max_prompt_tokens, recipe.sampling.max_response_tokens) == (2048, 1536)
    assert recipe.gad.learning_rate == recipe.discriminator.learning_rate == 1e-6
    assert (recipe.student.weight_decay, recipe.student.max_grad_norm) == (0.01, 0.2)
    assert (recipe.warmup.epochs, recipe.gad.epochs, recipe.warmup.discriminator_only_steps) == (1, 2, 10)
    assert (recipe.gad.save_every, recipe.gad.evaluate_every) == (50, 50)
    assert (recipe.gad.kl_coefficient, recipe.gad.clip_range, recipe.seqkd.learning_rate) == (
        0.001,
        0.2,
        5e-6,
    )
    assert (recipe.discriminator.lm_steps, recipe.warmup.discriminator_final_steps) == (0, 0)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("recipes/*.toml")), ids=lambda path: path.name)
def test_every_recipe_of_ours_is_valid(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    assert load_recipe(copy).name


def test_a_data_file_that_is_missing_is_not_taken_from_the_current_folder(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "corpus").mkdir(parents=True)
    (tmp_path / "corpus").mkdir()
    for name in ("train.jsonl", "prompt.txt"):
        (elsewhere / name).touch()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(
        write(
            'name = "a"\n[data]\ntrain = "train.jsonl"\nvalid = "corpus:held-out"\n[student]\nmodel = "m"\n'
            '[judge]\nscore_prompt = "prompt.txt"\n'
        )
    )
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.data.valid == str(tmp_path / "corpus:held-out")
    assert recipe.judge.score_prompt == str(tmp_path / "prompt.txt")
