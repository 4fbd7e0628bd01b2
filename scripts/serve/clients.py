#!/usr/bin/env python3
"""Drives the official Python SDKs through a tool conversation with a server whose answers are scripted.

    clients.py target/debug/examples/scripted DIR     (pip install openai anthropic)

Each client asks for the weather, gets a call, sends the result and gets an answer. What they send is written to DIR, one file
per request.
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

PORT = 8137
CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
ANSWERS = f"<think>I ask the tool.</think>{CALL}\n---\nIt is sunny in Paris.\n"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def chat(base):
    import openai
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="x")
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    with client.chat.completions.stream(model="gpt-4o", messages=messages, tools=tools) as stream:
        message = stream.get_final_completion().choices[0].message
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools)
    assert "sunny" in answer.choices[0].message.content


def responses(base):
    import openai
    client = openai.OpenAI(base_url=f"{base}/v1", api_key="x")
    tools = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}, {"type": "web_search"}]
    with client.responses.stream(model="gpt-5", input="What is the weather in Paris?", tools=tools) as stream:
        first = stream.get_final_response()
    call = next(item for item in first.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris"}
    output = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    answer = client.responses.create(model="gpt-5", input=output, previous_response_id=first.id, tools=tools)
    assert "sunny" in answer.output_text
    assert client.responses.retrieve(first.id).id == first.id


def messages(base):
    import anthropic
    client = anthropic.Anthropic(base_url=base, api_key="x")
    tools = [{"name": "get_weather", "input_schema": SCHEMA}]
    turns = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {"model": "claude-sonnet-4-5", "max_tokens": 2000, "tools": tools}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(messages=turns, thinking=thinking, **options) as stream:
        message = stream.get_final_message()
    call = next(block for block in message.content if block.type == "tool_use")
    assert call.input == {"city": "Paris"} and message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=turns, **options)
    assert "sunny" in answer.content[-1].text


def main():
    binary, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for client in [chat, responses, messages]:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as answers:
            answers.write(ANSWERS)
            answers.flush()
            server = subprocess.Popen([binary, str(PORT), answers.name], stdout=subprocess.PIPE, text=True)
            base = f"http://127.0.0.1:{PORT}"
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"{base}/health")
                    break
                except OSError:
                    time.sleep(0.1)
            try:
                client(base)
                print(f"{client.__name__}: ok")
            except Exception as error:
                failed = True
                print(f"{client.__name__}: {type(error).__name__}: {error}")
            server.terminate()
            for i, line in enumerate(line for line in server.stdout if line.startswith("POST")):
                (folder / f"{client.__name__}-{i}.txt").write_text(line)
    sys.exit(failed)


if __name__ == "__main__":
    main()
