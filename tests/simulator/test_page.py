"""The page in a real browser, from a file and without a network: it imagines what torch does."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page

from prelar.simulator import page as simulator
from prelar.simulator import runtime
from prelar.simulator.page import Entry, render
from prelar.simulator.step import Step, gumbel_noise, load_step
from prelar.simulator.world import World
from prelar.utils.errors import UserError
from tests.browser import empty_page, launched, obstacles, picture
from tests.simulator.small import make_checkpoint, make_entry

ATTACK = "</script><script>document.title='hurt'</script><img src=x onerror=\"document.title='hurt'\">"
NEAR = 1e-4
TEXTS = """
  const bytes = array => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  const text = array => btoa(String.fromCharCode(...bytes(array)));
  return simulator.steps.slice(1).map(({stoch, deter, frame, reward, value, policy, record}) => {
    const judged = Float32Array.from([reward ?? 0, value ?? 0, ...policy ?? []]);
    return [stoch, deter, frame, judged, actionOf(simulator.world, record)].map(text);
  });
}"""
OWN = "async actions => { for (const record of actions) { await advance(record); }" + TEXTS
ROLL = (
    """async ([number, clip, frame, seed, actions]) => {
  await choose(number, {clip, frame, seed, chance: true});
  for (const record of actions) { await advance(record); }"""
    + TEXTS
)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Entry, Path]]:
    folder = tmp_path_factory.mktemp("models")
    return {
        stage: (make_entry(folder / stage, "prelar", stage, labels=("plain", ATTACK)), folder / stage)
        for stage in ("finetune", "pretrain")
    }


@pytest.fixture(scope="module")
def file(entries: dict[str, tuple[Entry, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = runtime.find()
    assert found is not None, f"no onnxruntime-web in this environment; run {runtime.COMMAND}"
    path = tmp_path_factory.mktemp("page") / "simulator.html"
    path.write_text(render([entry for entry, _ in entries.values()], found), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """With a camera that is none."""
    with launched("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as browser:
        yield browser


@contextmanager
def opened(
    browser: Browser, path: Path, fragment: str = "", script: str = ""
) -> Iterator[tuple[Page, list[str]]]:
    """The page, ready or not, without a network; and what it asked for beside itself."""
    with empty_page(browser) as (page, _):
        page.context.set_offline(True)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(path.as_uri() + fragment)
        page.locator("#stage:visible, #told.warn").first.wait_for()
        yield page, asked
        assert not [url for url in asked if not url.startswith((path.as_uri(), "blob:null/", "data:"))], asked


def follow(step: Step, world: World, clip: int, frame: int, seed: int, rolled: list[list[str]]) -> int:
    """Compare a rollout of the page with torch's; steps until noisy logits nearly tie, or to its end."""
    classes = step.spec.discrete
    stoch, deter = world.start(clip, frame, classes)
    for number, texts in enumerate(rolled, start=1):
        content = [base64.b64decode(text) for text in texts]
        classes_found = np.frombuffer(content[0], np.int32)
        frame_found = np.frombuffer(content[2], np.uint8).astype(int)
        deter_found, judged_found, action = (np.frombuffer(content[i], np.float32) for i in (1, 3, 4))
        noise = torch.from_numpy(gumbel_noise(seed, number, tuple(stoch.shape)))
        given = torch.from_numpy(action.copy())[None]
        with torch.no_grad():
            before = {"logit": noise, "stoch": stoch, "deter": deter}
            noisy = step.model.imagine_step(before, given, sample=False)["logit"] + noise
            stoch, deter, picture, *judged = step(stoch, deter, given, noise, *world.context(clip))
        best = noisy.topk(2, -1).values
        if float((best[..., 0] - best[..., 1]).min()) < NEAR:
            return number
        assert np.array_equal(stoch.argmax(-1)[0].numpy(), classes_found)
        np.testing.assert_allclose(deter[0].numpy(), deter_found, atol=1e-4)
        assert np.abs(picture.flatten().int().numpy() - frame_found).max() <= 2
        if judged:
            reward, value, policy = (tensor.numpy() for tensor in judged)
            np.testing.assert_allclose([*reward, *value, *policy[0]], judged_found, atol=1e-3)
    return len(rolled)


@pytest.mark.parametrize(
    ("stage", "seeds", "steps"),
    [
        ("finetune", 2, 60),
        ("pretrain", 2, 60),
        pytest.param("finetune", 10, 200, marks=pytest.mark.long),
        pytest.param("pretrain", 10, 200, marks=pytest.mark.long),
    ],
)
def test_it_imagines_what_torch_does(
    browser: Browser, file: Path, entries: dict[str, tuple[Entry, Path]], stage: str, seeds: int, steps: int
) -> None:
    number, (entry, folder) = list(entries).index(stage), entries[stage]
    step, random = load_step(folder), np.random.default_rng(1)
    assert entry.world is not None
    lasted = []
    with opened(browser, file) as (page, _):
        for seed in range(seeds):
            clip, frame = seed % 2, seed % 6
            records = random.integers(-127, 128, (steps, 4 if stage == "finetune" else 5))
            if stage == "pretrain":
                records[:, 0] = np.arange(steps) % 2
                borrowed = random.integers(0, [2, 6, 6], (steps, 3))
                records[:, 1:4] = np.where(records[:, :1] == 1, borrowed, records[:, 1:4])
            rolled = page.evaluate(ROLL, [number, clip, frame, seed, records.tolist()])
            lasted.append(follow(step, entry.world, clip, frame, seed, rolled))
    assert sorted(lasted)[seeds // 10] >= 50, lasted


def test_keys_buttons_and_a_gamepad_drive_it(browser: Browser, file: Path) -> None:
    pad = "window.pads = [null]; navigator.getGamepads = () => window.pads;"
    with opened(browser, file, script=pad) as (page, _):
        record = "() => simulator.steps.at(-1).record && [...simulator.steps.at(-1).record]"
        length = "() => simulator.steps.length"

        def moved(before: int) -> None:
            page.locator(f"#step:not(:text-is('{before - 1}'))").wait_for()

        for key, axis, sign in (("ArrowLeft", 0, -1), ("ArrowUp", 1, 1), ("KeyS", 2, -1)):
            before = page.evaluate(length)
            page.keyboard.down(key)
            moved(before)
            page.keyboard.up(key)
            assert page.evaluate(record)[axis] == sign * 127
        page.evaluate("document.activeElement.blur()")
        before = page.evaluate(length)
        page.keyboard.press("Space")
        moved(before)
        assert (
            page.evaluate(record)[3] == 127 and page.locator("#grip").get_attribute("aria-pressed") == "true"
        )
        before = page.evaluate(length)
        page.get_by_role("button", name="Right").focus()
        page.keyboard.press("Enter")
        moved(before)
        assert page.evaluate(record)[0] == 127
        before = page.evaluate(length)
        page.get_by_role("button", name="Up", exact=True).dispatch_event("pointerdown", {"pointerId": 1})
        moved(before)
        page.get_by_role("button", name="Up", exact=True).dispatch_event("pointerup", {"pointerId": 1})
        assert page.evaluate(record)[2] == 127
        before = page.evaluate(length)
        page.evaluate("window.pads = [{axes: [0.5, 0, 0, 0], buttons: [{pressed: false}]}]")
        moved(before)
        page.evaluate("window.pads = [null]")
        assert page.evaluate(record)[0] == 64


def test_a_rollout_is_rewound_followed_kept_and_shared(browser: Browser, file: Path) -> None:
    with opened(browser, file) as (page, _):
        page.get_by_label("the learnt policy").check()
        for _ in range(3):
            page.get_by_role("button", name="One step").click()
        page.locator("#step:text-is('3')").wait_for()
        policy = page.evaluate("[...simulator.steps[2].policy]")
        acted = page.evaluate("[...simulator.steps[3].record]")
        assert np.abs(np.array(acted) / 127 - policy).max() <= 0.5 / 127 + 1e-6
        page.get_by_role("button", name="One back").click()
        assert page.locator("#step").inner_text() == "2"
        kept = page.evaluate("[...simulator.steps[3].frame]")
        page.get_by_role("button", name="One step").click()
        page.locator("#step:text-is('3')").wait_for()
        assert page.evaluate("[...simulator.steps[3].frame]") == kept, "the same noise and action"
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as GIF").click()
        content = Path(download.value.path()).read_bytes()
        with Image.open(io.BytesIO(content)) as film:
            assert (film.n_frames, film.size) == (4, (256, 256))
            film.seek(3)
            shown = np.asarray(film.convert("RGB"))[2::4, 2::4].astype(int)
        assert np.abs(shown - np.array(kept).reshape(64, 64, 3)).mean() < 24
        page.get_by_role("button", name="Record a video").click()
        page.get_by_role("button", name="One step").click()
        page.locator("#step:text-is('4')").wait_for()
        page.wait_for_timeout(300)
        with page.expect_download() as download:
            page.get_by_role("button", name="Stop and save").click()
        assert Path(download.value.path()).stat().st_size > 100
        page.get_by_role("button", name="Copy a link").click()
        page.locator("#told:visible").wait_for()
        fragment = page.evaluate("location.hash")
        last = page.evaluate("[...simulator.steps[4].frame]")
    assert parse_qs(fragment[1:])["steps"] == ["4"]
    with opened(browser, file, fragment) as (page, _):
        page.get_by_text("Replayed the 4 steps").wait_for()
        assert page.evaluate("[...simulator.steps[4].frame]") == last


@pytest.mark.parametrize(("number", "frame"), [(0, 0), (0, 3), (1, 2), (1, 5)])
def test_the_recording_drives_as_far_as_it_goes(
    browser: Browser, file: Path, number: int, frame: int
) -> None:
    with opened(browser, file) as (page, _):
        page.evaluate("([number, frame]) => choose(number, {frame})", [number, frame])
        page.get_by_label("the recording’s actions").check()
        page.locator("#speed").select_option("1000")
        page.get_by_role("button", name="Run").click()
        page.get_by_text("The recording has no more actions").wait_for()
        assert page.evaluate("[running, simulator.position, simulator.steps.length]") == [
            False,
            5 - frame,
            6 - frame,
        ]


def test_a_replay_that_fails_says_so(browser: Browser, file: Path) -> None:
    fail = """async ([steps, link]) => {
      const {engine} = simulator, step = engine.step.bind(engine);
      engine.step = (...given) => steps-- ? step(...given) : Promise.reject(new Error("out of memory"));
      await replay(link);
      return [simulator.position, at("told").textContent];
    }"""
    with opened(browser, file) as (page, _):
        page.get_by_label("the learnt policy").check()
        for number in (1, 2, 3):
            page.get_by_role("button", name="One step").click()
            page.locator(f"#step:text-is('{number}')").wait_for()
        link = page.evaluate("link()")
        assert page.evaluate(fail, [1, link]) == [1, "The step failed: out of memory"]


def test_a_picture_of_ones_own_is_a_start(
    browser: Browser, file: Path, entries: dict[str, tuple[Entry, Path]], tmp_path: Path
) -> None:
    """An uncompressed one of a frame's size, so that the model sees its bytes, and one of another size."""
    entry, folder = entries["finetune"]
    assert entry.world is not None
    frame = entry.world.arrays["frames"][1, 0]
    Image.fromarray(frame).save(tmp_path / "own.png")
    Image.new("RGB", (300, 200), (200, 30, 10)).save(tmp_path / "wide.jpg")
    (tmp_path / "none.png").write_bytes(b"no picture")
    with opened(browser, file) as (page, _):
        page.locator("#file").set_input_files(tmp_path / "own.png")
        page.get_by_text("Your image, as the model sees it").wait_for()
        start = page.evaluate(
            "[[...simulator.steps[0].frame], [...simulator.steps[0].stoch], simulator.steps[0].value]"
        )
        assert start[0] == frame.flatten().tolist()
        assert start[1] == entry.world.arrays["stoch"][1, 0].tolist()
        assert start[2] == pytest.approx(entry.world.arrays["value"][1, 0], abs=1e-4)
        rolled = page.evaluate(OWN, [[100, -50, 20, 127]] * 3)
        assert follow(load_step(folder), entry.world, 1, 0, 1, rolled) == 3
        page.get_by_role("button", name="Copy a link").click()
        page.get_by_text("A link cannot contain").wait_for()
        page.locator("#file").set_input_files(tmp_path / "wide.jpg")
        page.locator("#step:text-is('0')").wait_for()
        red, green, blue = page.evaluate("[...simulator.steps[0].frame.slice(0, 3)]")
        assert red > 180 and green < 60 and blue < 60
        page.locator("#file").set_input_files(tmp_path / "none.png")
        page.get_by_text("none.png: no image").wait_for()


def test_the_camera_gives_a_start(browser: Browser, file: Path) -> None:
    with empty_page(browser) as (page, _):
        page.goto(file.as_uri())
        page.get_by_role("button", name="Use the camera").click()
        page.get_by_role("button", name="Take the image").click()
        page.locator("#clip option:text-is('your image')").wait_for(state="attached")
        page.locator("#preview").wait_for(state="hidden")
        assert len(set(page.evaluate("[...simulator.steps[0].frame]"))) > 2
        assert page.evaluate("document.getElementById('preview').srcObject") is None


@pytest.mark.parametrize(
    "fragment",
    [
        "#nonsense",
        "#model=0&clip=9&frame=0&seed=1&steps=0",
        "#model=1&clip=0&frame=0&seed=1&steps=1&actions=AQkJCQk",
    ],
)
def test_a_link_that_does_not_fit_says_so(browser: Browser, file: Path, fragment: str) -> None:
    with opened(browser, file, fragment) as (page, _):
        page.get_by_text("The link does not fit this page").wait_for()
        assert page.locator("#step").inner_text() == "0"


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 390), pytest.param("dark", 1280, marks=pytest.mark.long)]
)
def test_it_is_open_to_everybody(
    browser: Browser, file: Path, scheme: Literal["light", "dark"], width: int
) -> None:
    with empty_page(browser) as (page, _):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(file.as_uri())
        page.locator("#stage:visible").wait_for()
        for number in (0, 1):
            page.locator("#model").select_option(str(number))
            page.locator("#latent:visible" if number else "#robot:visible").wait_for()
            assert obstacles(page) == ""
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            picture(page, f"simulator-{number}-{scheme}-{width}", whole=True)
        page.locator("#clip").select_option("1")
        assert page.title() != "hurt" and page.locator("main img").count() == 0
        assert ATTACK in page.locator("#clip option").nth(1).inner_text()


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("delete window.DecompressionStream", "lacks DecompressionStream"),
        ("WebAssembly.validate = () => false", "lacks WebAssembly SIMD"),
    ],
)
def test_a_browser_that_lacks_something_says_so(browser: Browser, file: Path, script: str, told: str) -> None:
    with opened(browser, file, script=script) as (page, _):
        assert told in page.locator("#told").inner_text()


def test_a_damaged_page_says_so(browser: Browser, file: Path, tmp_path: Path) -> None:
    text, damaged = file.read_text(encoding="utf-8"), tmp_path / "damaged.html"
    block = re.search('id="block-model-0">([^<]+)<', text)
    assert block
    middle = (block.start(1) + block.end(1)) // 2
    for broken in (text[:middle] + "AAAAAAAA" + text[middle + 8 :], text[:middle]):
        damaged.write_text(broken, encoding="utf-8")
        with opened(browser, damaged) as (page, _):
            assert "This page is damaged" in page.locator("#told").inner_text()


def test_without_the_runtime_it_names_the_command(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bare.html"
    path.write_text(render([Entry("It", ["A model."], World({}, {}), b"graph")], None), encoding="utf-8")
    with opened(browser, path) as (page, _):
        told = page.locator("main").inner_text()
        assert runtime.COMMAND in told and "No model can be played here" in told
    assert path.stat().st_size < 200_000


def test_a_model_that_cannot_be_played_here_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "it", "apv", "pretrain")
    entry = simulator.make_entry(tmp_path / "it", lambda step: None, tmp_path)
    assert entry.world is None and "holds out no clip" in entry.notes[-1]
    monkeypatch.setattr(simulator, "LARGEST", 1000)
    entry = simulator.make_entry(tmp_path / "it", lambda step: pytest.fail("no start is needed"), tmp_path)
    assert entry.graph is None and f"python -m prelar play {tmp_path / 'it'}" in entry.notes[-1]


def test_another_package_than_the_pinned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="by its sha512"):
        runtime.unpack(base64.b64decode(runtime.SHA512), tmp_path / "it")
    assert not (tmp_path / "it").exists()
