import json
from pathlib import Path

from audits import found, recipe, rows
from report_runs import Page, empty_run

from gadfly.run_folder import RunFolder
from gadfly.stages.report.audited import audited
from gadfly.stages.report.reading import read_evidence


def test_a_run_without_an_audit_has_no_such_section(tmp_path: Path) -> None:
    run = empty_run(tmp_path)
    assert audited(read_evidence(run.folder, run.recipe)) == []
    assert 'href="#audit"' not in run.page()


def test_findings_and_both_roles_stand_on_the_page(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model, [row | {"response": row["response"] + "\n"} for row in rows(0)])
    found(path)
    audit = json.loads((tmp_path / "runs/audited/audit.json").read_text(encoding="utf-8"))
    run = empty_run(tmp_path)
    run.folder.write_json("audit.json", audit)
    words = " ".join(Page(run.page()).words.split())
    assert "white-space mechanical: stops the run" in words
    assert "trailing space: teacher 100 % of 120, student" in words.replace("\u00a0", " ")
    assert "end in white space" in words
    assert "would cut 0" in words
    assert isinstance(run.folder, RunFolder)


def test_what_is_allowed_is_said_to_be(tmp_path: Path, tiny_model: Path) -> None:
    path = recipe(tmp_path, tiny_model, [row | {"response": row["response"] + "\n"} for row in rows(0)])
    found(path)
    audit = json.loads((tmp_path / "runs/audited/audit.json").read_text(encoding="utf-8"))
    run = empty_run(tmp_path, audit={"allow": ["white-space"]})
    run.folder.write_json("audit.json", audit)
    assert "allowed by audit.allow" in run.page()
