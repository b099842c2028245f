"""The page of ``offramp serve`` in a browser: what it shows, says, asks for and never does.

The tests answer the page's requests themselves, so that every token and error is known.
"""

import pytest
from driven_page import ORIGIN, in_order, stream, token
from playwright.sync_api import expect


def test_tokens_have_the_colour_and_the_height_of_their_depth(seen, canned):
    canned.answer = (200, stream([token("The", 6)], [token(" quick", 2), token(" fox", 4)]))
    seen.run()
    tokens = seen.tokens()
    expect(tokens).to_have_count(3)
    backgrounds = tokens.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundImage)")
    assert len(set(backgrounds)) == 3
    legend = seen.page.locator("#legend .token")
    drawn = legend.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundImage)")
    assert [drawn[2], drawn[0], drawn[1]] == backgrounds
    assert seen.page.locator("#legend").inner_text().split("\n") == ["2", "4", "6 (full depth)"]
    expect(seen.figure("tokens")).to_have_text("3")
    expect(seen.figure("layers")).to_have_text("3.5 of 6")
    expect(seen.figure("flops")).to_have_text("61%")
    expect(seen.figure("speed")).to_have_text("44.0")
    expect(seen.page.locator("#status")).to_contain_text("Done: Exits: 3 tokens")
    in_order(seen)


def test_figures_are_live_before_the_end(seen, canned):
    canned.answer = (200, stream([token("a", 6), token("b", 2)], done=False))
    seen.run()
    expect(seen.figure("layers")).to_have_text("4.0 of 6")
    expect(seen.figure("flops")).to_have_text("70%")
    expect(seen.page.get_by_role("alert")).to_have_text(
        "The connection was lost before the text was complete."
    )
    in_order(seen)


def test_text_is_text(seen, canned):
    """Markup, line breaks, white space, parts of characters and marks that turn text."""
    wild = ["<b>", "<script>alert(1)</script>", "\n", " ", "\t", "", "é", "\u202e", "\x1b[2J", "\0"]
    canned.answer = (200, stream([token(text, 2) for text in wild]))
    seen.run('<img src="/x" onerror="alert(1)">\n')
    expect(seen.tokens()).to_have_count(len(wild))
    shown = seen.tokens().evaluate_all("all => all.map(t => t.textContent)")
    assert shown == [*wild[:7], "\\u202e", "\\u001b[2J", "\\u0000"]
    marks = seen.tokens().evaluate_all("all => all.map(t => t.dataset.mark ?? null)")
    assert marks == [None, None, "↵", None, "→", "·", None, None, None, None]
    widths = seen.tokens().evaluate_all("all => all.map(t => t.getBoundingClientRect().width)")
    assert min(widths) > 2
    assert seen.page.locator(".text b, .text script, .text img").count() == 0
    tops = seen.tokens().evaluate_all("all => all.map(t => t.getBoundingClientRect().bottom)")
    assert tops[3] > tops[1]
    in_order(seen)


def test_depth_is_a_number_on_hover_and_focus(seen, canned):
    canned.answer = (200, stream([token("The", 6, 1.0), token(" fox", 2, 0.25), token("", 6)]))
    seen.run()
    line = seen.page.locator("#token")
    seen.tokens().nth(1).hover()
    expect(line).to_have_text('" fox": layer 2 of 6, confidence 0.250')
    badge = "t => getComputedStyle(t, '::after').content"
    assert seen.tokens().nth(1).evaluate(badge) == '"layer 2"'
    seen.page.mouse.move(0, 0)
    seen.tokens().nth(0).focus()
    expect(line).to_have_text('"The": layer 6 of 6, confidence 1.000')
    seen.page.keyboard.press("ArrowRight")
    expect(line).to_contain_text("layer 2 of 6")
    assert seen.tokens().nth(1).evaluate(badge) == '"layer 2"'
    seen.page.keyboard.press("End")
    expect(line).to_contain_text("without text of its own: layer 6 of 6")
    seen.page.keyboard.press("Home")
    expect(line).to_contain_text('"The"')
    in_order(seen)


def test_the_slider_asks_again(seen, canned):
    seen.run()
    expect(seen.tokens()).to_have_count(1)
    slider = seen.page.get_by_role("slider")
    slider.focus()
    with seen.page.expect_request("**/v1/completions"):
        seen.page.keyboard.press("ArrowLeft")
        seen.page.keyboard.press("ArrowLeft")
    first, second = seen.bodies
    assert (first["threshold"], second["threshold"]) == (0.9, 0.88)
    assert first["prompt"] == "The "
    assert "confidence" not in first  # the server's own
    assert first["stream"] is True
    expect(seen.page.locator("#threshold-value")).to_have_text("0.88")
    with seen.page.expect_request("**/v1/completions"):
        seen.page.get_by_label("Confidence").select_option("max_prob")
    seen.page.wait_for_function("document.querySelector('#status').textContent.startsWith('Done')")
    in_order(seen)


def test_side_by_side_runs_one_prompt_three_ways(seen, canned):
    canned.answer = (200, stream([token("fox", 2)], acceptance_rate=0.5))
    seen.page.get_by_label("Side by side").check()
    seen.run("The ")
    for method in ("full", "exit", "speculative"):
        expect(seen.tokens(method)).to_have_count(1)
    expect(seen.page.locator("#status")).to_contain_text("Done")
    full, exits, speculative = seen.bodies
    assert {body["prompt"] for body in seen.bodies} == {"The "}
    assert "threshold" not in full
    assert "speculative" not in full
    assert exits["threshold"] == 0.9
    assert speculative["speculative"] is True
    assert "threshold" not in speculative
    expect(seen.figure("accepted", "speculative")).to_have_text("50%")
    expect(seen.page.get_by_text("Rejected drafts count, too.")).to_be_visible()
    tops = "all => all.map(t => t.getBoundingClientRect().top)"
    assert len(set(seen.page.locator(".column").evaluate_all(tops))) == 1
    seen.page.set_viewport_size({"width": 400, "height": 900})
    assert len(set(seen.page.locator(".column").evaluate_all(tops))) == 3
    width, shown = seen.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= shown
    in_order(seen)


def test_the_chat_template_is_the_servers(seen, canned):
    seen.page.get_by_text("More options").click()
    seen.page.get_by_label("chat template").check()
    seen.run("Hello")
    expect(seen.tokens()).to_have_count(1)
    assert seen.asked[-1][0] == f"{ORIGIN}/v1/chat/completions"
    assert seen.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    in_order(seen)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((429, "{}"), "The server is busy: as many requests wait as may. Try again in a moment."),
        ((400, '{"error": {"message": "threshold: expected a number"}}'), "expected a number"),
        ((413, "<html>"), "The request is larger than the server takes."),
        ((500, ""), "The server refused the request (500)."),
        (None, "The server does not answer. Is it still running?"),
        ((200, "data: "), "The connection was lost before the text was complete."),
        ((200, 'data: {"error": {"message": "logits"}}\n\n'), "The server stopped: logits"),
        ((200, "data: {\n\n"), "The page failed: "),
    ],
)
def test_errors_are_said_in_words(seen, canned, answer, said):
    canned.answer = answer
    seen.run()
    expect(seen.page.get_by_role("alert")).to_contain_text(said)
    expect(seen.page.get_by_role("button", name="Stop")).to_have_attribute("aria-disabled", "true")
    canned.answer = (200, stream([token("fox", 2)]))
    seen.run()
    expect(seen.tokens()).to_have_count(1)
    expect(seen.page.get_by_role("alert")).to_have_text("")


def test_a_key_is_asked_for_where_the_server_needs_one(seen, canned):
    assert not seen.page.get_by_label("API key").is_visible()
    canned.needs = "secret"
    seen.page.goto(ORIGIN)
    expect(seen.page.get_by_label("API key")).to_be_focused()
    expect(seen.page.get_by_role("alert")).to_contain_text("needs an API key")
    seen.page.keyboard.type("wrong")
    seen.page.get_by_role("button", name="Use this key").click()
    expect(seen.page.get_by_role("alert")).to_contain_text("needs an API key")
    seen.page.get_by_label("API key").fill("secret")
    seen.page.keyboard.press("Enter")
    expect(seen.page.get_by_label("API key")).to_be_hidden()
    expect(seen.page.locator("#model")).to_contain_text("tiny: 6 layers, exits 2, 4")
    expect(seen.page.get_by_role("alert")).to_have_text("")
    assert seen.bodies == []
    seen.run()
    expect(seen.tokens()).to_have_count(1)


def test_a_certificate_bounds_the_slider(seen, canned):
    canned.model["certificate"] = {
        "thresholds": [0.4, "inf"],
        "confidence": "margin",
        "missing_kv": "recompute",
    }
    seen.page.goto(ORIGIN)
    slider = seen.page.get_by_role("slider")
    expect(slider).to_have_attribute("min", "0.4")
    seen.run()
    expect(seen.tokens()).to_have_count(1)
    slider.fill("0.5")
    expect(seen.page.locator("#status")).to_contain_text("Done")
    seen.run()
    expect(seen.page.locator("#status")).to_contain_text("Done")
    first, *_, last = seen.bodies
    assert (first["threshold"], last["threshold"]) == ([0.4, "inf"], [0.5, "inf"])
    assert (first["confidence"], first["missing_kv"]) == ("margin", "recompute")
    seen.page.get_by_label("Full depth").check()
    seen.run()
    expect(seen.tokens("full")).to_have_count(1)
    assert seen.bodies[-1]["threshold"] == "inf"
    in_order(seen)


@pytest.mark.parametrize("trained", [False, True])
def test_untrained_exits_are_said(seen, canned, trained):
    canned.model["exits_trained"] = trained
    seen.page.goto(ORIGIN)
    expect(seen.page.locator("#model")).to_contain_text("tiny")
    expect(seen.page.get_by_text("exits of this model were never trained")).to_be_visible(
        visible=not trained
    )


def test_a_model_without_exits_runs_at_full_depth(seen, canned):
    canned.model |= {"exit_layers": [6], "confidences": [], "default_confidence": None}
    canned.answer = (200, stream([token("fox", 6)]))
    seen.page.goto(ORIGIN)
    expect(seen.page.locator("#model")).to_contain_text("no exits")
    expect(seen.page.get_by_role("slider")).to_be_disabled()
    seen.run()
    expect(seen.tokens("full")).to_have_count(1)
    assert "threshold" not in seen.bodies[-1]
    in_order(seen)


def test_keys_alone_are_enough(seen, canned):
    page = seen.page
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("The ")
    page.keyboard.press("Control+Enter")
    expect(seen.tokens()).to_have_count(1)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if reached[-1] == "token":
            break
    assert {"threshold", "confidence", "run", "stop", "token"} <= set(reached)
    in_order(seen)


def test_every_control_has_a_name(seen):
    names = seen.page.locator("input, select, textarea, button").evaluate_all(
        "all => all.map(e => (e.labels?.[0] ?? e).textContent.trim())"
    )
    assert all(names), names
