#!/usr/bin/env python3
"""Tests the chat page in headless Chromium and takes its screenshots: page.py URL CHROMIUM OUT_DIR

The server must have the bundled model. Needs `pip install playwright`; CHROMIUM is the browser's program.
"""
import pathlib
import sys

from playwright.sync_api import expect, sync_playwright

url, chromium, out = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1100, "height": 700})
    problems, outside = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith(url) else None)
    page.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("fable")
    expect(page.locator("#ranks")).to_contain_text("layers 0 to 7")
    expect(page.locator("#ranks")).to_contain_text("cache in use")
    page.fill("#temperature", "0")

    def ask(text):
        n_answers = page.locator(".assistant").count()
        page.fill("#input", text)
        page.press("#input", "Enter")
        # The answer may be complete before the browser is asked.
        expect(page.locator(".assistant")).to_have_count(n_answers + 1)
        expect(page.locator("#send")).to_be_visible()
        return page.locator(".assistant").last

    # A story, streamed; then reasoning, folded.
    story = ask("Tell me a story about a brave fox named Lily.")
    expect(story).to_contain_text("A gift from the heart is the best gift.")
    expect(story.locator(".rate")).to_contain_text("generated")
    page.check("#thinking")
    answer = ask("What is 47 + 38?")
    expect(answer).to_contain_text("47 + 38 = 85.")
    expect(answer.locator("details")).to_be_visible()
    expect(answer.locator("details div")).to_be_hidden()
    answer.locator("summary").click()
    expect(answer.locator("details div")).to_contain_text("carry 1")
    page.screenshot(path=out / "chat-page.png")

    # What a model writes stays text; code and lists are drawn.
    text = "# Title\n\n- one\n- `two`\n\n```html\n<b>code</b>\n```\n\n<img src=x onerror=alert(1)> **bold**"
    page.evaluate("text => { const turn = show('assistant'); turn.append(markdown(text)); }", text)
    drawn = page.locator(".assistant").last
    assert drawn.locator("img").count() == 0 and drawn.locator("b").count() == 0
    assert (drawn.locator("h3").inner_text(), drawn.locator("li").count()) == ("Title", 2)
    assert drawn.locator("pre").inner_text().strip() == "<b>code</b>" and drawn.locator("strong").inner_text() == "bold"

    # Stop in the middle, and start again.
    page.click("#new")
    assert page.locator(".turn").count() == 0
    page.uncheck("#thinking")
    page.fill("#temperature", "1.8")
    page.fill("#max_tokens", "1500")
    page.fill("#input", "Tell me a story about a brave fox named Lily. " * 8)
    # The click comes from within, as soon as there are words: from here it may be too late.
    page.evaluate("""() => new MutationObserver((_, observer) => {
        if (/\\w+ \\w+ \\w+/.test(document.querySelector(".assistant")?.textContent ?? "")) {
            observer.disconnect();
            document.getElementById("stop").click();
        }
    }).observe(document.getElementById("talk"), {childList: true, subtree: true, characterData: true})""")
    page.press("#input", "Enter")
    expect(page.locator(".assistant .rate")).to_contain_text("(stopped)")
    expect(page.locator("#send")).to_be_visible()
    for _ in range(100):
        info = page.evaluate("() => fetch('/info').then((response) => response.json())")
        if info["requests"]["running"] == 0 and info["cache"]["used"] == 0:
            break
        page.wait_for_timeout(100)
    assert info["cache"]["used"] == 0, info

    # Dark, as the system asks for it.
    page.emulate_media(color_scheme="dark")
    page.click("#new")
    page.fill("#temperature", "0")
    expect(ask("Explain volcanoes in simple words.").locator(".rate")).to_contain_text("generated")
    page.screenshot(path=out / "chat-page-dark.png")
    browser.close()
    assert not problems, problems
    assert not outside, outside
print("the page works; screenshots are in", out)
