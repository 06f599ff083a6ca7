"""What the site of `make docs` has beside docs/: the top's pages, the API's, and the page to play in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from prelar.simulator import demo, runtime
from prelar.simulator.page import make_entry, render
from prelar.simulator.world import WORLD, read_world

ROOT = Path(__file__).parents[1]
TOP = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
API = {
    "prelar.api": "Models in a program of your own",
    "prelar.dream": "The model as an environment",
    "prelar.store.store": "Stores",
    "prelar.store.writer": "Writing stores",
    "prelar.demos.episodes": "Sources of demonstrations",
    "prelar.model.spec": "What a model is",
    "prelar.model.world_model": "The world model",
    "prelar.methods": "The methods",
    "prelar.config": "Params",
    "prelar.train.loop": "The training loop",
    "prelar.train.checkpoint": "Checkpoints",
}
"""The modules that a program of one's own may import, and what their pages are called."""
PLAY = "play.html"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    pages = {target: (ROOT / name).read_text(encoding="utf-8") for name, target in TOP.items()}
    pages |= {f"api/{name}.md": f"# {title}\n\n::: {name}\n" for name, title in API.items()}
    listed = sorted(path.name for path in (ROOT / "docs/decisions").glob("*.md"))
    pages["decisions/index.md"] = "# Decisions\n\n" + "".join(f"- [{name[:-3]}]({name})\n" for name in listed)
    links = "".join(f"- [{title}]({name}.md)\n" for name, title in API.items())
    pages["api/index.md"] = (
        f"# API\n\nModules for a program of your own; see [what stays](../compatibility.md).\n\n{links}"
    )
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    files.append(File.generated(config, "LICENSE.txt", content=(ROOT / "LICENSE").read_bytes()))
    entry = make_entry(demo.DEMO, lambda step: read_world(demo.DEMO / WORLD), ROOT)
    files.append(File.generated(config, PLAY, content=render([entry], runtime.find())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between the project's top and docs/ into links within the site."""
    if page.file.src_uri in TOP.values():
        markdown = markdown.replace("](docs/decisions)", "](decisions/index.md)")
        markdown = markdown.replace("](LICENSE)", "](LICENSE.txt)")
        return re.sub(r"\]\(docs/", "](", markdown)
    if page.file.src_uri == "simulator.md":
        markdown += f"\n[The small model of the package, to play in here]({PLAY})\n"
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, TOP))})", lambda m: f"]({TOP[m[1]]}", markdown)
