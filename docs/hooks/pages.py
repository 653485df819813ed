"""What the site has beside the files of docs/: the README as its first page, the changelog, the pages of results/ that
are linked, the notebooks, and the tables of settings, which are made from properties/*.yaml."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
PROPERTIES = ROOT / "properties"
NAMES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # of files outside of docs/ on the site
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//|<link[^>]+href=["']?(?:https?:)?//"""
)
TABLE = re.compile(r"^<!-- settings: (\w+) -->$", re.M)


class Setting(NamedTuple):
    """One key of a yaml file."""

    key: str
    default: Any
    kind: str  # as the comment has it: str, int, "bool or auto"; empty where there is none
    meaning: str


def read_settings(path: Path) -> dict[str, list[Setting]]:
    """The keys of a yaml file with what the comments beside them say, by the comment above them ("" = none)."""
    text = path.read_text(encoding="utf-8")
    comments: dict[str, list[str]] = {}
    sections: list[tuple[list[str], list[str]]] = [([], [])]  # lines of the comment above, keys
    key, previous = "", ""
    for line in text.splitlines():
        if found := re.match(r"(\w+):(.*?)(?:\s#\s(.*))?$", line):
            key = found[1]
            comments[key] = [found[3]] if found[3] else []
            sections[-1][1].append(key)
        elif (found := re.match(r"\s+#\s(.*)", line)) and key:
            comments[key].append(found[1])
        elif line.startswith("# "):
            if not previous:
                sections.append(([], []))
            sections[-1][0].append(line[2:])
        previous = line
    values = yaml.safe_load(text)
    return {" ".join(above): [_setting(key, values, comments[key]) for key in keys] for above, keys in sections}


def _setting(key: str, values: dict[str, Any], comment: list[str]) -> Setting:
    found = re.match(r"(?:\(([^)]*)\) )?(.*)", " ".join(comment))
    assert found
    return Setting(key, values[key], found[1] or "", found[2])


def show(value: Any) -> str:
    """A value as it is written in a yaml file."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return {"null": "~", "true": "True", "false": "False"}.get(text, text)


def overall_tables() -> str:
    """All keys of properties/overall.yaml, a table a section."""
    parts = []
    for heading, settings in read_settings(PROPERTIES / "overall.yaml").items():
        if settings:
            rows = [[f"`{s.key}`", f"`{show(s.default)}`", s.kind, _escaped(s.meaning)] for s in settings]
            title, _, note = heading.partition(". ")
            parts += [f"## {title}", _escaped(note), _table(["key", "default", "type", "meaning"], rows)]
    return "\n\n".join(part for part in parts if part)


def model_table(model: str) -> str:
    """All keys of a model's defaults and of its paper's setting, side by side."""
    ours, paper = (
        {s.key: s for part in read_settings(PROPERTIES / "model" / f"{name}.yaml").values() for s in part}
        for name in (model, f"{model}_paper")
    )
    known = {s.key: s for part in read_settings(PROPERTIES / "overall.yaml").values() for s in part}
    rows = []
    for key in {**ours, **paper}:
        defaults, published = (f"`{show(own[key].default)}`" if key in own else "" for own in (ours, paper))
        said = [own[key].meaning for own in (ours, known) if key in own and own[key].meaning][:1]
        said += [f"Paper: {paper[key].meaning}"] if key in paper and paper[key].meaning else []
        rows.append([f"`{key}`", defaults, published, _escaped(" ".join(said))])
    return _table(["key", f"`{model}`", f"`{model}_paper`", "meaning"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _escaped(text: str) -> str:
    return re.sub(r"([|*\[\]])", r"\\\1", text.replace("<", "&lt;"))


def with_tables(markdown: str) -> str:
    """A page with the tables that its comments ``<!-- settings: overall -->`` or ``…: <Model> -->`` ask for."""
    return TABLE.sub(lambda m: overall_tables() if m[1] == "overall" else model_table(m[1]), markdown)


def notebook_page(path: Path) -> str:
    """A notebook as a page: its text, its code, and what the code printed when it was stored."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
            parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f'The notebook itself: <a href="{path.name}">{path.name}</a>')
    return "\n\n".join(parts)


def linked_results() -> list[str]:
    """The files of results/ that a page links to, and the plots."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    linked = {name for page in pages for name in re.findall(r"\(\S*?(results/[\w.-]+)", page)}
    plots = {f"results/{path.name}" for path in (ROOT / "results").glob("*.png")}
    return sorted(name for name in linked | plots if (ROOT / name).is_file())


def site_path(source: str) -> str | None:
    """Where a file of the repository is on the site, a notebook as its page; None: nowhere."""
    if source.endswith(".ipynb"):
        source = source.removesuffix(".ipynb") + ".md"
    if source in NAMES or source.startswith("results/"):
        return NAMES.get(source, source)
    return source.removeprefix("docs/") if source.startswith("docs/") else None


def with_links(markdown: str, source: str) -> str:
    """The page made from the file ``source`` of the repository, its links to other files turned into the site's."""
    own = site_path(source)
    assert own

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        new = site_path(target)
        if new is None or not (ROOT / target).exists():
            return found[0]
        return "".join([found[1], posixpath.relpath(new, posixpath.dirname(own) or "."), found[3] or "", found[4]])

    return LINK.sub(moved, markdown)


# ---------------------------------------------------------------------- called by MkDocs
def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source in [*NAMES, *linked_results()]:
        path = ROOT / source
        files.append(File.generated(config, site_path(source), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    sources = {new: old for old, new in NAMES.items()}
    uri = page.file.src_uri
    source = sources.get(uri) or (uri if uri.startswith("results/") else f"docs/{uri}")
    return with_tables(with_links(markdown, source))


def on_post_page(output: str, page: Any, config: Any) -> str:
    if found := FETCHED.search(output):
        from mkdocs.exceptions import PluginError

        raise PluginError(f"{page.file.src_uri} would fetch something from elsewhere: {output[found.start() :][:120]}")
    return output
