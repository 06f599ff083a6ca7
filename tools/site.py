"""The pages that the site of `make docs` has besides docs/: README and the like, the API, the simulator."""

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
    "prelar.api": "Models in your own program",
    "prelar.dream": "The model as an environment",
    "prelar.store.store": "Stores",
    "prelar.store.writer": "Writing stores",
    "prelar.demos.episodes": "Sources of demonstrations",
    "prelar.model.spec": "Specification of a model",
    "prelar.model.world_model": "The world model",
    "prelar.methods": "The methods",
    "prelar.config": "Parameters",
    "prelar.train.loop": "The training loop",
    "prelar.train.checkpoint": "Checkpoints",
}
"""The modules meant for import by other programs, and the titles of their pages."""
PLAY = "play.html"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    pages = {target: (ROOT / name).read_text(encoding="utf-8") for name, target in TOP.items()}
    pages |= {f"api/{name}.md": f"# {title}\n\n::: {name}\n" for name, title in API.items()}
    listed = sorted(path.name for path in (ROOT / "docs/decisions").glob("*.md"))
    pages["decisions/index.md"] = "# Decisions\n\n" + "".join(f"- [{name[:-3]}]({name})\n" for name in listed)
    links = "".join(f"- [{title}]({name}.md)\n" for name, title in API.items())
    pages["api/index.md"] = (
        "# API\n\nThe modules to import in your own program. [Compatibility](../compatibility.md) says which "
        f"parts later versions keep.\n\n{links}"
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
        markdown += f"\n[Play with the small model that the package ships]({PLAY})\n"
    return re.sub(rf"\]\(\.\./({'|'.join(map(re.escape, TOP))})", lambda m: f"]({TOP[m[1]]}", markdown)
