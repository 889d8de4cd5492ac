"""The demo page shows what the model computes, in a real browser and in a Hub Space without this package."""

import html
import itertools
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.publishing import page
from hf_minigpt.recipes import demo
from hf_minigpt.tokenization import train_tokenizer
from tests.tiny import tiny_model


SAMPLING = {"temperature": 0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    texts = ["Once upon a time there was a mill, and nobody knew why."] * 20
    tokenizer = train_tokenizer(texts, 320, model_max_length=64, show_progress=False)
    ids = {"vocab_size": len(tokenizer), "unpadded_vocab_size": None}
    ids |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    tiny_model("modern", **ids).save_pretrained(folder / "model")
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    classifier = tiny_model(model_class=MiniGPTForSequenceClassification, **ids, **labels)
    classifier.save_pretrained(folder / "classifier")
    for name in ("model", "classifier"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def loaded(folders):
    return page.load_page(str(folders / "model"), str(folders / "classifier"))


def read_bars(text: str) -> list[tuple[str, float]]:
    names = map(html.unescape, re.findall(r'class="name" title="(.*?)"', text, re.DOTALL))
    shares = re.findall(r'class="share">([\d.]+)%', text)
    widths = re.findall(r"width:([\d.]+)%", text)
    assert [f"{float(width):.1f}" for width in widths] == shares
    return list(zip(names, map(float, shares), strict=True))


@torch.no_grad()
def test_panels_show_the_outputs_of_the_model(loaded, folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folders / "model")
    text = "Once upon a mill"
    ids = torch.tensor([tokenizer(text).input_ids])
    assert ids[0, 0] == tokenizer.bos_token_id
    output = model(ids, output_attentions=True)

    probabilities = output.logits[0, -1].softmax(-1)
    best = probabilities.topk(10)
    shown = read_bars(loaded.next_tokens(text))
    assert [share for _, share in shown] == [round(100 * p, 1) for p in best.values.tolist()]
    assert [name for name, _ in shown] == loaded.token_names(best.indices.tolist())
    assert loaded.token_names(tokenizer(" mill\n", add_special_tokens=False).input_ids) == ["␣mill", "⏎"]

    svg = loaded.attention(text, 2, 3)
    cells = [float(cell) for cell in re.findall(r'class="cell".*?fill-opacity="([\d.]+)"', svg)]
    weights = output.attentions[1][0, 2]
    expected = weights[torch.tril(torch.ones_like(weights)).bool()]
    torch.testing.assert_close(torch.tensor(cells), expected, atol=6e-4, rtol=0)

    longer = tokenizer(text * 3).input_ids
    weights = model(torch.tensor([longer]), output_attentions=True).attentions[0][0, 0, -16:, -16:]
    cells = re.findall(r'class="cell".*?fill-opacity="([\d.]+)"', loaded.attention(text * 3, 1, 1))
    expected = weights[torch.tril(torch.ones_like(weights)).bool()]
    torch.testing.assert_close(torch.tensor([*map(float, cells)]), expected, atol=6e-4, rtol=0)

    sentiment = dict(read_bars(loaded.sentiment(text)))
    assert set(sentiment) == {"bad", "good"} and sum(sentiment.values()) == pytest.approx(100, abs=0.2)
    assert loaded.sentiment(" ") == ""

    written = list(loaded.generate(text, 8, **SAMPLING))
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert written[-1] == text + tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(written))


def test_sampling_settings_take_effect(loaded):
    set_seed(1)
    hot = list(loaded.generate("Once", 20, **SAMPLING | {"temperature": 2.0}))[-1]
    set_seed(1)
    assert list(loaded.generate("Once", 20, **SAMPLING | {"temperature": 2.0}))[-1] == hot
    greedy = list(loaded.generate("Once", 20, **SAMPLING))[-1]
    assert list(loaded.generate("Once", 20, **SAMPLING | {"temperature": 2.0, "top_k": 1}))[-1] == greedy != hot


def test_text_longer_than_the_context_is_continued(loaded):
    text = "Once upon a time there was a mill. " * 20
    assert list(loaded.generate(text, 5, **SAMPLING))[-1].startswith(text)
    assert loaded.next_tokens(text) and loaded.attention(text, 1, 1)


def test_closing_the_stream_stops_generation(loaded):
    writing = loaded.generate("Once", 10_000, **SAMPLING | {"temperature": 1.0})
    next(writing)
    started = loaded.model.generate
    writing.close()
    # A second generation starts at once, with its own text.
    assert loaded.model.generate == started and next(loaded.generate("Upon", 4, **SAMPLING)).startswith("Upon")


def test_error_during_generation_is_raised(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model, "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(loaded.generate("Once", 4, **SAMPLING))


def test_token_names_are_escaped():
    assert "<b>" not in page.bar_chart(["<b>"], [1.0]) and "<b>" not in page.heatmap(["<b>"], [[1.0]])


@pytest.mark.slow
def test_space_runs_without_this_package(folders, tmp_path):
    space = tmp_path / "space"
    demo.main([str(folders / "model"), "--classifier", str(folders / "classifier"), "--space", str(space)])
    metadata = metadata_load(space / "README.md")
    assert (metadata["sdk"], metadata["app_file"], metadata["title"]) == ("gradio", "app.py", "model")
    assert "models" not in metadata and re.fullmatch(r"\d+\.\d+\.\d+", metadata["sdk_version"])
    assert "transformers==" in (space / "requirements.txt").read_text()
    script = (
        "import sys; sys.modules['hf_minigpt'] = None; sys.path.insert(0, '.'); import json, app\n"
        "names = [getattr(f.fn, '__name__', '') for f in app.app.fns.values()]\n"
        "import page; loaded = page.load_page('model', 'classifier', trust_remote_code=True)\n"
        "print(json.dumps([names, type(loaded.model).__name__, loaded.sentiment('A mill')]))"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=space, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    names, model_class, sentiment = json.loads(result.stdout.splitlines()[-1])
    assert {"generate", "next_tokens", "attention", "sentiment"} <= set(names)
    assert model_class == "MiniGPTForCausalLM" and set(dict(read_bars(sentiment))) == {"bad", "good"}

    demo.write_space(tmp_path / "named", "you/your-minigpt", None, 'A "quoted" title', "Once")
    metadata = metadata_load(tmp_path / "named" / "README.md")
    assert (metadata["models"], metadata["title"]) == (["you/your-minigpt"], 'A "quoted" title')
    compile((tmp_path / "named" / "app.py").read_text(), "app.py", "exec")
    with pytest.raises(ValueError, match="not empty"):
        demo.write_space(space, "you/your-minigpt", None, "title", "Once")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs Chromium and its driver")
def test_page_works_in_a_browser(loaded):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    app = page.build(loaded, "a tiny model", "Once upon")
    _, url, _ = page.launch(app, prevent_thread_lock=True, quiet=True)
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def wait(condition):
        return WebDriverWait(browser, 120).until(lambda _: condition())

    def panel(name):
        return browser.execute_script(f"return document.querySelector('#{name}')?.innerHTML ?? ''")

    def shows(name, expected):
        # HTML as serialized by the browser
        markup = "const t = document.createElement('div'); t.innerHTML = arguments[0]; return t.innerHTML"
        return browser.execute_script(markup, expected) in panel(name)

    def open_tab(name):
        tabs = browser.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        next(tab for tab in tabs if tab.text == name).click()

    try:
        for width, height, mobile in ((390, 844, True), (1280, 800, False)):
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(url)
            wait(lambda: "bar" in panel("next"))
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width

            find("#text textarea").send_keys(" a time")
            wait(lambda: shows("next", loaded.next_tokens("Once upon a time")))
            open_tab("Attention")
            wait(lambda: shows("attention", loaded.attention("Once upon a time", 1, 1)))
            head = find("#head input")
            head.send_keys("\b3\t")
            wait(lambda: shows("attention", loaded.attention("Once upon a time", 1, 3)))
            assert find("#attention svg").size["width"] > 0.7 * min(width, 640)
            open_tab("Sentiment")
            wait(lambda: shows("sentiment", loaded.sentiment("Once upon a time")))

            find("#generate").click()
            wait(lambda: len(find("#text textarea").get_attribute("value")) > len("Once upon a time") + 10)
            find("#stop").click()
            time.sleep(2)
            text = find("#text textarea").get_attribute("value")
            assert text.startswith("Once upon a time")
            find("#clear").click()
            wait(lambda: find("#text textarea").get_attribute("value") == "")
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requested = {
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        }
        assert not [address for address in requested if not address.startswith((url, "data:", "chrome"))]
    finally:
        browser.quit()
        app.close()
