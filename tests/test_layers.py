"""The shape of the code: who may import whom, who may speak, and how long a file is."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "gadfly"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top: a module imports from its own layer or one below.
LAYERS = (
    ("cli", "__main__"),
    ("stages", "demo"),
    ("engine", "samplers"),
    (
        "groups",
        "packing",
        "losses",
        "objectives",
        "models",
        "hub",
        "logprobs",
        "lora",
        "attention",
        "shared_prompt",
        "discriminator",
        "chat_template",
        "control_tokens",
        "checkpoint",
        "replay",
        "tensor_files",
        "disk_refusals",
        "late_files",
        "distributed",
        "sizing",
        "analysis/tell_model",
    ),
    (
        "config",
        "recipe_file",
        "api",
        "data",
        "analysis",
        "alarms",
        "distributed/__init__",
        "distributed/processes",
        "records",
        "reward_functions",
        "run_folder",
        "run_files",
        "stage_settings",
        "stored_json",
        "shared_run_folder",
        "manifest",
        "model_identity",
        "metrics",
        "statistics",
        "text_metrics",
        "visible_text",
        "trackers",
        "console",
        "errors",
        "__init__",
    ),
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
KNOWS_TEXT = len(LAYERS) - 1


def room(path: Path) -> str:
    """What of the layers a file belongs to: itself, or the package directly under gadfly that it is in."""
    own = path.relative_to(PACKAGE).with_suffix("").as_posix()
    return own if own in DEPTH else own.split("/")[0]


def depth_of(imported: str) -> int:
    """The layer of a full name under gadfly."""
    _, first, *rest = imported.split(".")
    return DEPTH.get("/".join([first, *rest[:1]]), DEPTH.get(first, KNOWS_TEXT))


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Full names of what is imported; those inside functions only if `lazy`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(node, lazy=lazy)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def packages(path: Path, *, lazy: bool = True) -> set[str]:
    """The packages a file imports from."""
    return {name.split(".")[0] for name in imports(parsed(path), lazy=lazy)}


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_module_has_a_layer() -> None:
    assert {room(path) for path in FILES} == set(DEPTH)


def test_imports_go_down() -> None:
    up = [
        f"{name(path)} imports {imported}"
        for path in FILES
        # `gadfly/__init__.py` registers the demo's model type, lazily.
        for imported in imports(parsed(path), lazy=room(path) != "__init__")
        if imported.startswith("gadfly.") and depth_of(imported) < DEPTH[room(path)]
    ]
    assert up == []


def test_what_knows_only_text_leaves_torch_alone() -> None:
    speakers = ("cli", "__main__")
    torches = {"torch", "transformers", "tokenizers", "safetensors"}
    knowing = [
        name(path)
        for path in FILES
        if DEPTH[room(path)] == KNOWS_TEXT or room(path) in speakers
        # A TensorBoard sink is torch's, and is imported when asked for.
        if packages(path, lazy=room(path) != "trackers") & torches
    ]
    assert knowing == []


def test_the_report_needs_no_torch() -> None:
    files = [*(PACKAGE / "stages" / "report").glob("*.py"), PACKAGE / "stages" / "run.py"]
    assert [name(path) for path in files if packages(path) & {"torch", "transformers"}] == []


def test_only_the_command_line_knows_it_is_one() -> None:
    libraries = {"typer", "click", "argparse", "rich"}
    assert {room(path) for path in FILES if packages(path) & libraries} == {"cli"}


def test_gad_reads_like_the_papers_algorithm() -> None:
    path = PACKAGE / "stages" / "gad.py"
    assert not packages(path) & {"torch", "transformers", "numpy"}
    (gad,) = (node for node in parsed(path).body if isinstance(node, ast.FunctionDef) and node.name == "gad")
    (loop,) = (node for node in ast.walk(gad) if isinstance(node, ast.With))
    assert gad.end_lineno is not None
    assert loop.end_lineno is not None
    assert gad.end_lineno - gad.lineno < 75, "the stage fits a screen"
    assert loop.end_lineno - loop.lineno < 60, "the loop fits half of it"


def test_no_file_is_long() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > 300} == {}


def test_no_file_is_a_box_for_anything() -> None:
    boxes = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert [name(path) for path in FILES if boxes & set(path.stem.split("_"))] == []


def test_only_the_command_line_prints_or_exits() -> None:
    speaking = ("print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write")
    speakers = {
        room(path)
        for path in FILES
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Call) and ast.unparse(node.func) in speaking)
        or (isinstance(node, ast.Raise) and node.exc and "SystemExit" in ast.unparse(node.exc))
    }
    assert speakers == {"cli"}
