"""The project's own promises: a light import, one list of versions, an environment file that wraps it."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib

import yaml

from rmlib.runs import ROOT


def test_importing_the_package_is_light():
    heavy = "transformers, datasets, trl, torch, pandas"
    code = f"import sys, rmlib; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_losses_and_params_import_nothing_of_ours():
    for room in ("losses", "params"):
        head = (ROOT / "rmlib" / f"{room}.py").read_text().split("if __name__")[0]
        assert not re.search(r"^(from|import) rmlib", head, re.M)


def test_arrows_run_downwards():
    """Each room imports only rooms below it in the order of the house."""
    house = [
        "figures",
        "claims",
        "dpo",
        "policies",
        "ppo",
        "denoising",
        "voting",
        "training",
        "contrastive",
        "metarm",
        "evaluation",
        "models",
        "sources",
        "data",
        "world",
        "records",
        "notebooks",
        "runs",
        "losses",
        "params",
    ]
    for level, room in enumerate(house):
        found = re.findall(
            r"^from rmlib(?:\.(\w+))? import ([\w, ]+)$", (ROOT / "rmlib" / f"{room}.py").read_text(), re.M
        )
        used = {name for module, names in found for name in ([module] if module else names.split(", "))}
        assert used <= set(house[level + 1 :]), f"{room} imports {used - set(house[level + 1 :])}"


def test_a_chapter_names_the_modules_that_it_imports():
    """So that the graph of notebooks runs it again when one of them has changed."""
    snakefile = (ROOT / "Snakefile").read_text()
    scope: dict = {}
    exec(re.search(r"^PLACE = .*?^CHAPTERS = \{.*?^\}$", snakefile, re.M | re.S)[0], scope)
    assert scope["CHAPTERS"]
    for stem, chapter in scope["CHAPTERS"].items():
        cells = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text())["cells"]
        code = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
        imported = {
            name for names in re.findall(r"^from rmlib import ([\w, ]+)$", code, re.M) for name in names.split(", ")
        }
        assert imported, stem
        assert imported <= set(chapter["modules"]), f"{stem} imports {imported - set(chapter['modules'])}"


def code_lines(source: str) -> set[int]:
    """Lines of a module that hold code: no blank line, comment or docstring."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(source).readline) if each.type not in layout]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.AST(body=[ast.Expr(ast.Constant(str())) as text, *_]):
                lines -= set(range(text.lineno, text.end_lineno + 1))
    return lines


def test_library_stays_thin():
    assert code_lines('"""A.\n\nB."""\n\nx = """1\n2"""  # three\n# four\n') == {5, 6}
    assert sum(len(code_lines(path.read_text())) for path in (ROOT / "rmlib").glob("*.py")) < 3200


def test_every_dependency_is_pinned_by_the_tested_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for name, items in project["optional-dependencies"].items() if name != "all" for item in items]
    wanted = {re.match(r"[\w-]+", item)[0].lower() for item in project["dependencies"] + extras}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert wanted <= pinned, wanted - pinned


def test_conda_environment_wraps_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[all]"]


def test_readme_shows_the_two_commands_that_make_knows():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("book", "test"):
        assert f"\nmake {target}" in readme and re.search(rf"^{target}:.*## ", makefile, re.M)
