#!/usr/bin/env python3
"""Drives `tandem serve` with the official openai and anthropic SDKs: sdks.py URL MODEL

The server must have the bundled model (fable-30m): the answers are checked. Needs `pip install openai anthropic`.
"""
import json
import sys
import threading
import time
import urllib.request

import anthropic
import openai

URL, MODEL = sys.argv[1].rstrip("/"), sys.argv[2]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
claude = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
STORY = [{"role": "user", "content": "Tell me a story about a brave fox named Lily."}]
SUM = [{"role": "user", "content": "What is 47 + 38?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}}
CLAUDE_TOOL = {"name": "get_weather", "description": "Weather of a city", "input_schema": PARAMETERS}
RESULT = json.dumps({"temperature": 21, "sky": "sunny"})
SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string"}, "city": {"type": "string"}},
    "required": ["name", "city"], "additionalProperties": False,
}
NORA = [{"role": "user", "content": "As JSON with keys name and city: Nora lives in Oslo."}]
GREEDY = {"temperature": 0}
checks = []


def check(function):
    checks.append(function)
    return function


def metric(name):
    for line in urllib.request.urlopen(f"{URL}/metrics").read().decode().splitlines():
        if line.split(" ")[0] == name:
            return float(line.split(" ")[-1])
    raise AssertionError(f"no metric {name}")


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to this")


def message(messages, **more):
    return claude.messages.create(model=MODEL, messages=messages, **{"max_tokens": 200, **more}, extra_body=GREEDY)


def chat(messages, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **more)


@check
def models():
    assert MODEL in [m.id for m in client.models.list()]


@check
def chat_and_stream():
    whole = chat(STORY)
    assert whole.choices[0].message.content.startswith("Far away"), whole
    assert whole.usage.prompt_tokens == 17 and whole.choices[0].finish_reason == "stop"
    text, usage = "", None
    for chunk in chat(STORY, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        text += "".join(c.delta.content or "" for c in chunk.choices)
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens


@check
def reasoning():
    message = chat(SUM, reasoning_effort="medium").choices[0].message
    assert message.content == "47 + 38 = 85." and "carry" in message.reasoning_content, message


@check
def logprobs():
    choice = chat(SUM, logprobs=True, top_logprobs=3, max_completion_tokens=5).choices[0]
    assert len(choice.logprobs.content) == 5
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob


@check
def tools():
    asked = chat(WEATHER, tools=[TOOL])
    call = asked.choices[0].message.tool_calls[0]
    assert asked.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    turns = WEATHER + [asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    answer = chat(turns, tools=[TOOL]).choices[0].message.content
    assert "21" in answer and "Paris" in answer, answer


@check
def tools_streamed():
    with client.chat.completions.stream(model=MODEL, messages=WEATHER, tools=[TOOL], temperature=0) as stream:
        final = stream.get_final_completion()
    call = final.choices[0].message.tool_calls[0].function
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Paris"}


@check
def tools_required():
    call = chat(STORY, tools=[TOOL], tool_choice="required", max_tokens=100).choices[0].message.tool_calls[0]
    assert isinstance(json.loads(call.function.arguments)["city"], str)


@check
def structured_output():
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    answer = chat(NORA, response_format=schema, max_tokens=200)
    assert json.loads(answer.choices[0].message.content) == {"name": "Nora", "city": "Oslo"}, answer
    answer = chat(NORA, response_format=schema, reasoning_effort="high", max_tokens=400).choices[0].message
    assert set(json.loads(answer.content)) == {"name", "city"} and answer.reasoning_content, answer


@check
def completions():
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=1, n=2, seed=1)
    assert len(answer.choices) == 2 and answer.choices[0].text == answer.choices[1].text
    assert len(answer.choices[0].logprobs.tokens) == 8


@check
def responses():
    answer = client.responses.create(model=MODEL, input="What is 47 + 38?", temperature=0, reasoning={"effort": "low"})
    assert answer.output_text == "47 + 38 = 85." and answer.output[0].type == "reasoning", answer
    tool = {"type": "function", "name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS, "strict": False}
    asked = client.responses.create(model=MODEL, input=WEATHER, tools=[tool], temperature=0)
    call = asked.output[0]
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
    items = WEATHER + [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}]
    assert "21" in client.responses.create(model=MODEL, input=items, tools=[tool], temperature=0).output_text
    kinds, text = [], ""
    with client.responses.stream(model=MODEL, input="What is 47 + 38?", temperature=0) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        assert stream.get_final_response().output_text == text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds


@check
def anthropic_messages():
    answer = message(STORY)
    assert answer.content[0].text.startswith("Far away") and answer.stop_reason == "end_turn"
    thought = message(SUM, max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [b.type for b in thought.content] == ["thinking", "text"] and thought.content[1].text == "47 + 38 = 85."
    assert claude.messages.count_tokens(model=MODEL, messages=STORY).input_tokens == 17
    stopped = message(STORY, stop_sequences=["fox"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "fox")


@check
def anthropic_stream_and_tools():
    with claude.messages.stream(model=MODEL, max_tokens=200, messages=STORY, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        assert stream.get_final_message().content[0].text == text and text.startswith("Far away")
    with claude.messages.stream(model=MODEL, max_tokens=200, messages=WEATHER, tools=[CLAUDE_TOOL], extra_body=GREEDY) as stream:
        asked = stream.get_final_message()
    call = asked.content[-1]
    assert asked.stop_reason == "tool_use" and call.input == {"city": "Paris"}
    turns = WEATHER + [
        {"role": "assistant", "content": asked.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT}]},
    ]
    answer = message(turns, tools=[CLAUDE_TOOL])
    assert "21" in answer.content[0].text, answer


@check
def errors():
    def fails(kind, status, call, param=None):
        try:
            call()
        except kind as error:
            assert error.status_code == status, error
            assert param is None or error.body["param"] == param, error.body
            return
        raise AssertionError("no error")

    bad = openai.BadRequestError
    fails(openai.NotFoundError, 404, lambda: client.chat.completions.create(model="other", messages=STORY), "model")
    fails(bad, 400, lambda: client.chat.completions.create(model=MODEL, messages=[]), "messages")
    fails(bad, 400, lambda: client.chat.completions.create(model=MODEL, messages=STORY, top_p=7), "top_p")
    fails(bad, 400, lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a " * 9000}]), "messages")
    fails(anthropic.NotFoundError, 404, lambda: claude.messages.create(model="other", max_tokens=5, messages=STORY))
    fails(anthropic.BadRequestError, 400, lambda: claude.messages.create(model=MODEL, max_tokens=0, messages=STORY))


@check
def cancellation():
    streams = [chat(STORY, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
    wait_for(lambda: metric("tandem_cache_pages_used") > 0)
    for stream in streams:
        stream.close()
    wait_for(lambda: metric("tandem_cache_pages_used") == 0 and metric("tandem_requests_running") == 0)


@check
def many_threads():
    expected = chat(STORY).choices[0].message.content
    found = []
    threads = [threading.Thread(target=lambda: found.append(chat(STORY).choices[0].message.content)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


for function in checks:
    function()
    print("ok", function.__name__)
print(f"{len(checks)} checks passed: openai {openai.__version__}, anthropic {anthropic.__version__}")
