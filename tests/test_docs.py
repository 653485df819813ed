"""What the documents show works, and what they name exists."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from recbole_holo import losses
from recbole_holo.bridge import registry, resources
from recbole_holo.bridge.config import Config
from recbole_holo.quick_start import load_data_and_model, run

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FILES = (ROOT / "README.md", *DOCS.rglob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in FILES}
MODELS = tuple(registry.MODELS)


@cache
def pages() -> ModuleType:
    """The code that makes the site's pages."""
    spec = importlib.util.spec_from_file_location("pages", DOCS / "hooks" / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> dict[str, list[str]]:
    """Of the tables of a page: the cells behind the key that stands in the first one."""
    lines = (re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("| `"))
    return {first.strip(" `"): [cell.strip() for cell in rest] for first, *rest in lines}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


# ---------------------------------------------------------------------- settings
def test_the_page_of_settings_has_every_key_with_its_default_type_and_meaning() -> None:
    defined = yaml.safe_load(resources.properties("overall.yaml").read_text("utf-8"))
    shown = rows(pages().with_tables(PAGES["docs/settings.md"]))
    assert shown.keys() == defined.keys()
    for key, (default, kind, meaning) in shown.items():
        assert yaml.safe_load(default.strip("`")) == defined[key], key
        assert re.match(r"(str|int|float|bool|list)\b", kind), key
        assert len(meaning) > 10, key


@pytest.mark.parametrize("model", MODELS)
def test_the_page_of_a_model_has_every_key_of_both_presets(model: str) -> None:
    ours, paper = (
        yaml.safe_load(resources.properties("model", f"{model}{suffix}.yaml").read_text("utf-8"))
        for suffix in ("", "_paper")
    )
    page = pages().with_tables(PAGES[f"docs/models/{model}.md"])
    shown = rows(page)
    assert shown.keys() == ours.keys() | paper.keys()
    for key, (default, published, _) in shown.items():
        for cell, defined in ((default, ours), (published, paper)):
            assert (yaml.safe_load(cell.strip("`")) == defined[key]) if cell else (key not in defined), key


def test_settings_are_read_as_yaml_and_their_comments_are(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(
        "# It.\na: 1   # (int) one,\n       # and more.\n\n# Next. And\n# more.\nb: {c: x}\nd: ~  # no type.\n"
    )
    assert pages().read_settings(path) == {
        "": [],
        "It.": [("a", 1, "int", "one, and more.")],
        "Next. And more.": [("b", {"c": "x"}, "", ""), ("d", None, "", "no type.")],
    }


def test_settings_and_presets_that_are_named_exist() -> None:
    known = set().union(*(Config(model, "ml-100k").known_keys() for model in (*MODELS, "SASRec")))
    inside = {"group_by"}  # of eval_args
    flags = {"model", "config_files", "search_space", "search_algo", "max_evals", "profile", "nproc"}
    for name, page in PAGES.items():
        shell = "\n".join(re.findall(r"run_recbole_holo\.py(?:.*\\\n)*.*", page))
        named = set(re.findall(r"--(\w+)=", shell)) | set(re.findall(r"`([a-z]+_[a-z_]+): ", page))
        for text in blocks(name, "yaml"):
            content = yaml.safe_load(text)
            if not content.keys() & {"choice", "uniform"}:  # a search space has settings one level below
                named |= content.keys()
        assert named <= known | flags | inside, name
        for preset in re.findall(r"`(\w+_paper)`|config_files=\"?(\w+_\w+)", page):
            assert "".join(preset) in resources.presets(), name


# ---------------------------------------------------------------------- pages and links
def test_links_lead_to_files() -> None:
    """In the repository, as they are read there; the site's build checks them once more, with anchors."""
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", page, flags=re.S)):
            path = (ROOT / name).parent / target
            assert path.exists(), (name, target)


def test_links_are_the_sites_own_there() -> None:
    moved = pages().with_links
    assert (
        moved("[a](docs/data.md#x)[b](results/epoch-cpu.md)", "README.md") == "[a](data.md#x)[b](results/epoch-cpu.md)"
    )
    assert moved("![a](../../results/epoch-cpu.md)", "docs/models/Hydra.md") == "![a](../results/epoch-cpu.md)"
    assert moved("[a](../README.md)", "docs/data.md") == "[a](index.md)"
    assert moved("[a](https://recbole.io) x[0](y)", "README.md") == "[a](https://recbole.io) x[0](y)"


def test_the_site_has_the_results_that_are_linked() -> None:
    linked = pages().linked_results()
    assert {"results/epoch-cpu.md", "results/lifelong-cpu.png"} <= set(linked)
    assert all((ROOT / name).is_file() for name in linked)


def test_what_a_page_would_fetch_is_found() -> None:
    fetched = pages().FETCHED.search
    assert fetched('<script src="https://unpkg.com/a"></script>')
    assert fetched('<link rel="stylesheet" href=//fonts.googleapis.com/css>')
    assert not fetched('<a href="https://recbole.io">RecBole</a><script src="assets/a.js"></script>')


def test_a_notebook_is_a_page_with_what_it_printed(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
    ]
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert pages().notebook_page(path).startswith("# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```")


# ---------------------------------------------------------------------- pages that run
def test_the_table_of_ones_own() -> None:
    """The page's code makes the file that its command reads."""
    (code,) = blocks("docs/data.md", "python")
    exec(code, {})
    lines = Path("dataset/shop/shop.inter").read_text("utf-8").splitlines()
    assert lines[0] == "customer:token\tarticle:token\tbought_at:float"
    assert len(lines) == 9
    (words,) = re.findall(r"run_recbole_holo\.py (--dataset=shop .*)", PAGES["docs/data.md"])
    few = {"epochs": 1, "show_progress": False, "state": "ERROR", "topk": [2], "valid_metric": "NDCG@2"}
    report = run("HoloMambaRec", "shop", config_dict=few, argv=words.split()[1:])["report"]
    assert report["test"].keys() >= {"ndcg@2", "ndcg@2 (unseen)"}


@pytest.mark.parametrize("loss_type", ["CE", "BCE", "SampledCE"])
def test_the_model_of_ones_own(
    cyclic_dataset: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    """Whatever the loss: its item table is its own, and only CE could do with that."""
    page = "docs/contribute/model.md"
    (code,) = (block for block in blocks(page, "python") if "class AverageRec" in block)
    (tmp_path / "averagerec.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    monkeypatch.setattr(registry, "PROPERTIES", {})
    (defaults,) = blocks(page, "yaml")
    (tmp_path / "averagerec.yaml").write_text(defaults)
    registry.register_model("AverageRec", "averagerec", properties="averagerec.yaml")
    del tiny["hidden_size"]
    report = run("AverageRec", cyclic_dataset, config_dict={**tiny, "loss_type": loss_type})["report"]
    assert report["parameters"] == 21 * 64
    names = {"hit@3", "hit@5", "ndcg@3", "ndcg@5", "mrr@3", "mrr@5"}
    assert report["test"].keys() == names | {f"{name} (unseen)" for name in names}
    assert load_data_and_model(report["checkpoint"])[1].__class__.__name__ == "AverageRec"


def test_the_loss_of_ones_own(
    cyclic_dataset: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = blocks("docs/contribute/loss.md", "python")[0]
    (tmp_path / "hinge.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    losses.register_loss("Hinge", "hinge")
    settings = {**tiny, "loss_type": "Hinge", "item_bias": True, "seen_items": "excluded"}
    report = run("RecMamba", cyclic_dataset, config_dict=settings)["report"]
    assert load_data_and_model(report["checkpoint"])[1].criterion.__class__.__name__ == "Hinge"


@pytest.mark.parametrize("page", ["loss", "operation", "kernel", "model"])
def test_recipes_name_files_that_exist(page: str) -> None:
    """But for those that the recipe has one write."""
    text = re.sub(r"```.*?```", "", PAGES[f"docs/contribute/{page}.md"], flags=re.S)
    written = ("averagerec", "AverageRec", "hinge", "leaky_sum", "<")
    package = ROOT / "recbole_holo"
    places = [ROOT, package, *(package / name for name in ("losses", "ops", "ops/native")), ROOT / "tests" / "model"]
    for name in re.findall(r"`([\w/.]+\.(?:py|cpp|h|yaml))`", text):
        if not any(word in name for word in written):
            assert any((place / name).exists() for place in places), name
