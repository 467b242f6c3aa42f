"""`import gadfly` is quick, and still lets transformers open a forgetful folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from gadfly.demo.models import save_models


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_models(folder, seed=0)
    return folder / "student"


def run(program: str, *arguments: str) -> None:
    """Run a program in a fresh process, where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_gadfly_imports_neither_torch_nor_transformers() -> None:
    run("import sys, gadfly\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")


@pytest.mark.parametrize(
    "imports",
    [
        "import gadfly\nimport transformers",
        "from transformers import AutoModelForCausalLM\nimport gadfly",
        # Importing Llama loads the auto classes half-way through.
        "import gadfly\nfrom transformers import LlamaForCausalLM",
        "import gadfly.demo.forgetful",
    ],
)
def test_a_forgetful_folder_opens_in_whatever_order_the_imports_come(imports: str, student: Path) -> None:
    program = (
        "import sys\n"
        f"{imports}\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "for auto in (AutoModelForCausalLM, AutoModel):\n"
        "    assert auto.from_pretrained(sys.argv[1]).config.model_type == 'forgetful'\n"
    )
    run(program, str(student))


def test_the_configuration_alone_opens(student: Path) -> None:
    program = (
        "import sys, gadfly\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.from_pretrained(sys.argv[1]).record_tokens == 13\n"
    )
    run(program, str(student))


def test_a_configuration_can_be_made_from_the_name() -> None:
    program = (
        "import gadfly\n"
        "from transformers import AutoConfig\n"
        "assert AutoConfig.for_model('forgetful', record_tokens=7).record_tokens == 7\n"
    )
    run(program)


def test_the_tokenizer_opens_first(student: Path) -> None:
    program = (
        "import sys, gadfly\n"
        "from transformers import AutoTokenizer\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1]).eos_token == '<end>'\n"
    )
    run(program, str(student))
