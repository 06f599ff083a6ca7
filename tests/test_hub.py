"""Models handed on: what is pushed is what is loaded, and what fails ends in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prelar
from prelar import push
from prelar.config import Demos, read_yaml
from prelar.demos.sources import open_source
from prelar.utils import hub as client
from prelar.utils.errors import UserError
from tests import hub as standin
from tests.conftest import ROOT
from tests.fake_results import make_results
from tests.test_api import save_finetuned, save_pretrained

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Hub]:
    """A hub of one's own, which the client asks in place of the real one, and a project beside it."""
    with standin.serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_may")
        project = tmp_path / "project"
        project.mkdir()
        monkeypatch.chdir(project)
        (project / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        yield served


def pushed(name: str = "org/arm", **options: Any) -> Any:
    """A pre-trained model that was evaluated, at the hub; returns what is here."""
    made = save_pretrained(Path("data/pretrain"))
    make_results(Path())
    push.run(name, Path("data/pretrain"), **{"private": False, "pictures": False, **options})
    return made


def test_what_is_pushed_is_what_is_loaded(hub: standin.Hub) -> None:
    made = pushed()
    loaded = prelar.load("org/arm")
    assert loaded.revision == standin.digest(hub.commits["models/org/arm"][-1])
    for part, weights in made.state().items():
        assert all((loaded.model.state()[part][key] == value).all() for key, value in weights.items())
    held = hub.commits["models/org/arm"][-1]
    assert {Path(name).suffix for name in held} == {".safetensors", ".json", ".md", ".png"}
    assert json.loads(held["config.json"])["stage"] == "pretrain"


def test_a_checkpoint_has_its_figures_however_its_folder_is_spelled(hub: standin.Hub) -> None:
    pushed()
    card = hub.commits["models/org/arm"][-1]["README.md"]
    push.run("org/arm", Path("data/pretrain").absolute(), private=False, pictures=False)
    assert hub.commits["models/org/arm"][-1]["README.md"] == card


def test_a_revision_stays_what_it_was(hub: standin.Hub) -> None:
    pushed()
    first = prelar.load("org/arm")
    save_pretrained(Path("data/pretrain"), beta=0.5)
    push.run("org/arm", Path("data/pretrain"), private=False, pictures=False)
    assert prelar.load("org/arm").spec.beta == 0.5
    assert prelar.load("org/arm", revision=first.revision).spec.beta == 1.0
    with pytest.raises(UserError, match=r"org/arm@v9: the repository has no such revision"):
        prelar.load("org/arm", revision="v9")


def test_the_card_has_each_figure_beside_its_control(hub: standin.Hub) -> None:
    pushed()
    card = hub.commits["models/org/arm"][-1]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: prelar\n")
    assert "| open-loop error, held-out clips | 0.00412 | copying the last frame: 0.0061 |" in card
    assert "| controllability, dB | 1.25 | lower end of its 95% interval: 0.75" in card
    assert "untrained encoder" in card and '| `scale` | `"smoke"` |' in card
    assert 'prelar.load("org/arm")' in card and "![" in card


def test_frames_of_data_that_is_not_the_projects_own_stay_here(hub: standin.Hub) -> None:
    params = Path("params.yaml")
    text = params.read_text(encoding="utf-8").replace("source: data/sample", "source: /home/me/secret/videos")
    params.write_text(text, encoding="utf-8")
    pushed()
    held = hub.commits["models/org/arm"][-1]
    assert not any(name.endswith(".png") for name in held) and b"secret" not in b"".join(held.values())
    push.run("org/arm", Path("data/pretrain"), private=False, pictures=True)
    assert "open_loop_poster.png" in hub.commits["models/org/arm"][-1]


def test_a_checkpoint_from_elsewhere_goes_without_figures(
    hub: standin.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_finetuned(Path("given"), "prelar")
    push.run("org/given", Path("given"), private=True, pictures=False)
    assert "No evaluation" in hub.commits["models/org/given"][-1]["README.md"].decode()
    monkeypatch.setenv("HF_TOKEN", "hf_may_not")
    with pytest.raises(UserError, match=r"org/given: .*HF_TOKEN"):
        prelar.load("org/given")
    monkeypatch.setenv("HF_TOKEN", "hf_may")
    assert prelar.load("org/given").stage == "finetune"


def test_what_was_fetched_stays_at_hand_without_a_network(
    hub: standin.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed()
    revision = prelar.load("org/arm").revision
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert prelar.load("org/arm").revision == revision
    with pytest.raises(UserError, match="org/other: not fetched before, and the hub is not asked"):
        prelar.load("org/other")
    assert hub.asked == []


def test_what_cannot_be_had_or_given_ends_in_one_line(
    hub: standin.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="org/none: no folder here, and no repository that the hub shows"):
        prelar.load("org/none")
    with pytest.raises(UserError, match="data/pretrain: no checkpoint"):
        Path("data").mkdir()
        prelar.load("data/pretrain")
    with pytest.raises(UserError, match="revision = v1: data/pretrain is a folder"):
        prelar.load("data/pretrain", revision="v1")
    assert all("data/pretrain" not in asked for asked in hub.asked)
    with pytest.raises(UserError, match="arm: not a repository name; give org/name"):
        push.run("arm", Path("data/pretrain"), private=False, pictures=False)
    hub.tokens.clear()
    save_finetuned(Path("given"), "prelar")
    with pytest.raises(UserError, match=r"org/arm: .*HF_TOKEN"):
        push.run("org/arm", Path("given"), private=False, pictures=False)
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.asked)
    with pytest.raises(UserError, match="org/arm: no token to upload with"):
        push.run("org/arm", Path("given"), private=False, pictures=False)
    assert len(hub.asked) == asked


def test_without_the_client_one_line_says_what_to_install(
    hub: standin.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed; run"):
        prelar.load("org/arm")


def test_data_sets_are_named_with_a_revision(hub: standin.Hub) -> None:
    info = {"codebase_version": "v9"}
    hub.commits["datasets/org/set"] = [{"meta/info.json": json.dumps(info).encode()}]
    revision = standin.digest(hub.commits["datasets/org/set"][0])
    assert (client.data_set(f"hub:org/set@{revision}") / "meta/info.json").is_file()
    assert client.data_set("/a/folder") == Path("/a/folder")
    for name in ("hub:org/set", "hub:set@main", "hub:@main"):
        with pytest.raises(UserError, match="give hub:org/name@revision"):
            client.data_set(name)
    settings = read_yaml(ROOT / "params.yaml")["demos"] | {
        "source": "lerobot",
        "path": f"hub:org/set@{revision}",
    }
    with pytest.raises(UserError, match="v9"):
        open_source(Demos.model_validate(settings))
