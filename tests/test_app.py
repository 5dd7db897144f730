"""The page in a browser: app.py runs as a process, headless Chromium looks at it."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from retrieval_world import tiny_config, tiny_processor, write_stories
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from transformers_testa import TestaForRetrieval, TestaForVideoQA
from transformers_testa.budgets import plan_merges
from transformers_testa.flops import count_video_gflops


APP = Path(__file__).parents[1] / "app.py"
SECONDS = 60
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="There is no browser: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos and a file that is none."""
    folder = write_stories(tmp_path_factory.mktemp("world") / "stories", num_test=3) / "videos"
    (folder / "broken.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models with random weights that are large enough to tell videos apart, saved."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for model_class in (TestaForRetrieval, TestaForVideoQA):
        model = model_class(tiny_config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4)
        model.save_pretrained(folder / model_class.__name__)
        tiny_processor().save_pretrained(folder / model_class.__name__)
    return folder


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
    """The address where the app is served, by a process that ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--model", "TestaForRetrieval", "--qa_model", "TestaForVideoQA"]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "app.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=models, env=environment, stdout=output, stderr=output)
    try:
        yield wait_for_page(f"http://127.0.0.1:{port}/", process, log)
    finally:
        process.terminate()
        process.wait()


def wait_for_page(address: str, process: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + 2 * SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return address
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"The app did not start:\n{log.read_text()}")


class Browser:
    """What a person does on the page, and sees."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def text(self, part: str) -> str:
        return self.driver.find_element(By.ID, part).text

    def wait_for(self, part: str, words: str) -> str:
        """Wait until a part of the page says these words, and return all it says."""
        WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: words in self.text(part), f"{part}: {words}")
        return self.text(part)

    def pictures(self, part: str) -> list[str]:
        """Wait for pictures in a part of the page, and return their sources; all of them can be shown."""
        script = (
            f"return Array.from(document.querySelectorAll('#{part} img'), i => [i.complete && i.naturalWidth, i.src])"
        )

        def all_shown(driver):
            found = driver.execute_script(script)
            return found if found and all(width for width, _ in found) else None

        return [source for _, source in WebDriverWait(self.driver, SECONDS, 0.05).until(all_shown)]

    def write(self, part: str, text: str, field: str = "textarea, input"):
        field = next(
            f for f in self.driver.find_elements(By.CSS_SELECTOR, f"#{part} :is({field})") if f.is_displayed()
        )
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, text)

    def press(self, button: str):
        self.driver.find_element(By.ID, button).click()

    def open_tab(self, name: str):
        next(t for t in self.driver.find_elements(By.CSS_SELECTOR, "[role=tab]") if t.text == name).click()

    def keep(self, slider: str, percent: int):
        self.write(slider, f"{percent}{Keys.TAB}", "input[type=number]")


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1200,1000"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, address):
    """The page as a newcomer finds it."""
    driver.get(address)
    browser = Browser(driver)
    browser.wait_for("index-notice", "No folder is indexed yet.")
    return browser


@pytest.fixture
def indexed(browser, videos):
    browser.write("folder", str(videos))
    browser.press("index")
    browser.wait_for("index-notice", "3 videos are ready")
    return browser


def test_a_folder_is_indexed_and_a_paragraph_finds_its_videos(indexed, videos):
    assert f"Left out: {videos / 'broken.mp4'} cannot be read as a video" in indexed.text("index-notice")
    indexed.write("text", "First red, then green, finally blue.")
    indexed.press("search")
    found = indexed.wait_for("results", "3. ")
    assert [f"test-{number}.mp4" in found for number in range(3)] == [True] * 3
    assert found.count("score") == found.count("similarity") == found.count("match") == 3
    assert 3 <= len(indexed.pictures("results")) <= 9
    assert "The best 3 of 3 videos" in indexed.text("search-notice")


def test_a_question_is_answered_with_probabilities(indexed):
    indexed.open_tab("Look into a video")
    indexed.write("question", "What comes first?")
    indexed.press("ask")
    indexed.wait_for("ask-notice", "In the model's own words.")
    assert "%" in indexed.text("answers")
    indexed.write("candidates", "red, green, blue then white")
    indexed.press("ask")
    indexed.wait_for("ask-notice", "among these answers")
    answers = indexed.wait_for("answers", "blue then white")
    assert "red" in answers and "green" in answers and answers.count("%") == 3


def test_the_slider_changes_the_gflops_shown(browser):
    config = tiny_config().video_config
    assert f"{count_video_gflops(config):.3g} GFLOPs" in browser.text("index-cost")
    assert "how the model was trained" in browser.text("index-cost")
    for percent in (90, 100):
        frames, patches = plan_merges(config, keep_ratio=percent / 100)
        merging = tiny_config(merged_frames_per_layer=frames, merged_patches_per_layer=patches).video_config
        browser.keep("index-percent", percent)
        cost = browser.wait_for("index-cost", f"{count_video_gflops(merging):.3g} GFLOPs")
        assert "how the model was trained" not in cost
    assert "100% of what it costs without merging" in cost


def test_a_percentage_is_typed_digit_by_digit(browser):
    shown = browser.text("index-cost")
    browser.write("index-percent", "9", "input[type=number]")  # less than this model can cost
    time.sleep(1)
    assert browser.text("index-cost") == shown
    browser.driver.switch_to.active_element.send_keys("0")
    browser.wait_for("index-cost", "89% of what it costs without merging")
    assert browser.driver.find_elements(By.CSS_SELECTOR, ".toast-body") == []


def test_the_merge_map_is_drawn_and_follows_its_slider(indexed):
    indexed.open_tab("Look into a video")
    indexed.press("draw")
    indexed.wait_for("draw-notice", "24 patches became 8 tokens")
    pictures = indexed.pictures("merges")
    assert len(pictures) == 6
    indexed.keep("draw-percent", 100)
    indexed.press("draw")
    indexed.wait_for("draw-notice", "24 patches became 24 tokens")
    assert indexed.pictures("merges") != pictures


def test_mistakes_are_told_in_a_sentence_and_the_page_stays_usable(browser, videos, tmp_path):
    for tab, button, sentence in (
        ("Search", "search", "Write what happens"),
        ("Look into a video", "ask", "index a folder of videos first"),
        ("Look into a video", "draw", "index a folder of videos first"),
    ):
        browser.open_tab(tab)
        browser.press(button)
        browser.wait_for(f"{button}-notice", sentence)
    browser.open_tab("Search")
    browser.write("text", "First red.")
    browser.press("search")
    browser.wait_for("search-notice", "There is nothing to search yet")

    (tmp_path / "empty").mkdir()
    (tmp_path / "unreadable").mkdir()
    shutil.copy(videos / "broken.mp4", tmp_path / "unreadable")
    for folder, sentence in (
        (" ", "Give the path of a folder"),
        (tmp_path / "nowhere", f"{tmp_path / 'nowhere'} is no folder"),
        (tmp_path / "empty", f"{tmp_path / 'empty'} holds no video"),
        (tmp_path / "unreadable", f"No video in {tmp_path / 'unreadable'} can be read"),
        (videos, "3 videos are ready"),
    ):
        browser.write("folder", str(folder))
        browser.press("index")
        browser.wait_for("index-notice", sentence)

    browser.write("text", "red " * 50)
    browser.press("search")
    browser.wait_for("search-notice", "it has 52 tokens, and the model reads 32")
    browser.write("text", "First <b>red</b>.")
    browser.press("search")
    browser.wait_for("results", "3. ")


def test_a_video_that_went_away_is_told_among_the_others_that_were_found(browser, videos, tmp_path):
    folder = shutil.copytree(videos, tmp_path / "videos")
    browser.write("folder", str(folder))
    browser.press("index")
    browser.wait_for("index-notice", "3 videos are ready")
    (folder / "test-1.mp4").unlink()
    browser.write("text", "First red.")
    browser.press("search")
    assert f"{folder / 'test-1.mp4'} cannot be read" in browser.wait_for("results", "3. ")
    assert browser.pictures("results")


def test_the_page_fetches_nothing_from_elsewhere(driver, browser, address):
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(address) for url in urls)
    assert [url for url in urls if not url.startswith((address, "data:", "blob:", "chrome"))] == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("TestaForVideoQA", "TestaForVideoQA is no TestaForRetrieval: it has no weights for matching_head.bias and 6"),
        ("nowhere", "nowhere is no folder of a model, and no Hub repository that can be read."),
    ],
    ids=["of another task", "not there"],
)
def test_a_wrong_model_is_told_before_the_page_opens(name, sentence, models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", [str(APP), "--model", name])
    with pytest.raises(SystemExit):
        runpy.run_path(str(APP), run_name="__main__")
    assert sentence in capsys.readouterr().err
