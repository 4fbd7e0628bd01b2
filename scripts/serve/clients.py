#!/usr/bin/env python3
"""Drives agents and SDKs through a tool conversation with a server whose answers are scripted.

    clients.py target/debug/examples/scripted DIR [--node NODE_MODULES] [CLIENT ...]

Each client is asked something, gets a call of one of its own tools, sends the result and gets an answer. Its requests become
DIR/CLIENT.json, with personal details replaced, long texts cut and tools left out whose schemas have nothing that others lack:
they are the fixtures of crates/tandem-serve/src/tests/clients. A client that is not installed is passed over unless it is named.
Its release (and Node's for those of npm) is what this Python and NODE_MODULES have.

    pip install openai anthropic openai-agents 'pydantic-ai-slim[openai,anthropic]' langchain-openai langchain-anthropic \\
        litellm instructor
    npm install @openai/codex @anthropic-ai/claude-code opencode-ai ai @ai-sdk/openai @ai-sdk/anthropic \\
        @ai-sdk/openai-compatible zod

Agents run with an empty environment and a temporary HOME, so that they neither read nor write anybody's configuration.
"""
import argparse
import asyncio
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

PORT = 8137
QUESTION = "What is the weather in Paris?"
ANSWER = "It is sunny in Paris."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# Texts of a request that are longer than this are cut in its fixture.
LONGEST = 120
LONGEST_DESCRIPTION = 30


def call(name, **arguments):
    """A call as the bundled model writes it."""
    pairs = (f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items())
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


WEATHER = f"<think>I ask the tool.</think>{call('get_weather', city='Paris')}\n---\n{ANSWER}\n"
CLIENTS = {}


class NotInstalled(Exception):
    pass


def client(package, answers=WEATHER):
    """Registers a client of an npm package (named `npm:`) or a Python one."""
    def register(function):
        CLIENTS[function.__name__] = (package, answers, function)
        return function
    return register


class Place:
    """Where a client runs: the server's address, an empty HOME, a folder with one file."""

    def __init__(self, base, node):
        self.base, self.node = base, node
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="client-"))
        self.home, self.work = self.root / "home", self.root / "work"
        self.home.mkdir()
        self.work.mkdir()
        (self.work / "note.txt").write_text("The word is marzipan.\n")

    def run(self, command, timeout=120, **environment):
        """Output of a program that sees nothing of this user's environment."""
        clean = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8", "NO_COLOR": "1", **environment}
        done = subprocess.run(command, cwd=self.work, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"exit {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
        return done.stdout + done.stderr


@client("openai")
def openai_chat(place):
    import openai
    client = openai.OpenAI(base_url=f"{place.base}/v1", api_key="x", max_retries=0)
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    messages = [{"role": "user", "content": QUESTION}]
    with client.chat.completions.stream(model="gpt-4o", messages=messages, tools=tools) as stream:
        message = stream.get_final_completion().choices[0].message
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(model="gpt-4o", messages=messages, tools=tools)
    assert answer.choices[0].message.content == ANSWER


@client("openai")
def openai_responses(place):
    import openai
    client = openai.OpenAI(base_url=f"{place.base}/v1", api_key="x", max_retries=0)
    tools = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}, {"type": "web_search"}]
    with client.responses.stream(model="gpt-5", input=QUESTION, tools=tools) as stream:
        first = stream.get_final_response()
    call = next(item for item in first.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris"}
    output = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    answer = client.responses.create(model="gpt-5", input=output, previous_response_id=first.id, tools=tools)
    assert answer.output_text == ANSWER
    assert client.responses.retrieve(first.id).id == first.id


@client("anthropic")
def anthropic_messages(place):
    import anthropic
    client = anthropic.Anthropic(base_url=place.base, api_key="x", max_retries=0)
    tools = [{"name": "get_weather", "input_schema": SCHEMA}]
    turns = [{"role": "user", "content": QUESTION}]
    options = {"model": "scripted", "max_tokens": 2000, "tools": tools}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with client.messages.stream(messages=turns, thinking=thinking, **options) as stream:
        message = stream.get_final_message()
    call = next(block for block in message.content if block.type == "tool_use")
    assert call.input == {"city": "Paris"} and message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(messages=turns, **options)
    assert answer.content[-1].text == ANSWER


def agents_sdk(place, model_class):
    import agents
    import openai
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{place.base}/v1", api_key="x", max_retries=0)
    asked = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        asked.append(city)
        return "sunny"

    agent = agents.Agent(name="Weather", instructions="Be brief.", tools=[get_weather], model=model_class(model="gpt-5", openai_client=client))

    async def run():
        result = agents.Runner.run_streamed(agent, QUESTION)
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(run()) == ANSWER and asked == ["Paris"], asked


@client("openai-agents")
def openai_agents_responses(place):
    import agents
    agents_sdk(place, agents.OpenAIResponsesModel)


@client("openai-agents")
def openai_agents_chat(place):
    import agents
    agents_sdk(place, agents.OpenAIChatCompletionsModel)


def pydantic(model):
    from pydantic_ai import Agent
    agent, asked = Agent(model, instructions="Be brief."), []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Weather of a city."""
        asked.append(city)
        return "sunny"

    assert agent.run_sync(QUESTION).output == ANSWER and asked == ["Paris"], asked


@client("pydantic-ai-slim")
def pydantic_ai_chat(place):
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    pydantic(OpenAIChatModel("gpt-4o", provider=OpenAIProvider(base_url=f"{place.base}/v1", api_key="x")))


@client("pydantic-ai-slim")
def pydantic_ai_responses(place):
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    pydantic(OpenAIResponsesModel("gpt-5", provider=OpenAIProvider(base_url=f"{place.base}/v1", api_key="x")))


@client("pydantic-ai-slim")
def pydantic_ai_anthropic(place):
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    pydantic(AnthropicModel("claude-sonnet-4-5", provider=AnthropicProvider(base_url=place.base, api_key="x")))


@client("pydantic-ai-slim", answers=call("final_result", city="Paris", days="[1, 2]") + "\n")
def pydantic_ai_output(place):
    """A typed answer, which it asks for as a forced call."""
    import pydantic
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Trip(pydantic.BaseModel):
        city: str
        days: list[int]

    model = OpenAIChatModel("gpt-4o", provider=OpenAIProvider(base_url=f"{place.base}/v1", api_key="x"))
    assert Agent(model, output_type=Trip).run_sync("Two days in Paris").output == Trip(city="Paris", days=[1, 2])


def langchain(model):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return "sunny"

    bound, turns = model.bind_tools([get_weather]), [HumanMessage(QUESTION)]
    message = None
    for chunk in bound.stream(turns):
        message = chunk if message is None else message + chunk
    call = message.tool_calls[0]
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"}), message
    turns += [message, ToolMessage("sunny", tool_call_id=call["id"])]
    assert bound.invoke(turns).text == ANSWER


@client("langchain-openai")
def langchain_openai(place):
    from langchain_openai import ChatOpenAI
    langchain(ChatOpenAI(model="gpt-4o", base_url=f"{place.base}/v1", api_key="x", max_retries=0))


@client("langchain-openai")
def langchain_openai_responses(place):
    from langchain_openai import ChatOpenAI
    langchain(ChatOpenAI(model="gpt-5", base_url=f"{place.base}/v1", api_key="x", max_retries=0, use_responses_api=True))


@client("langchain-anthropic")
def langchain_anthropic(place):
    from langchain_anthropic import ChatAnthropic
    langchain(ChatAnthropic(model="claude-sonnet-4-5", base_url=place.base, api_key="x", max_retries=0, max_tokens=2000))


def lite(model, **options):
    import litellm
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    messages = [{"role": "user", "content": QUESTION}]
    chunks = list(litellm.completion(model=model, messages=messages, tools=tools, stream=True, api_key="x", **options))
    message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    call = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}, message
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = litellm.completion(model=model, messages=messages, tools=tools, api_key="x", **options)
    assert answer.choices[0].message.content == ANSWER


@client("litellm")
def litellm_openai(place):
    lite("openai/gpt-4o", api_base=f"{place.base}/v1")


@client("litellm")
def litellm_anthropic(place):
    lite("anthropic/claude-sonnet-4-5", api_base=place.base)


@client("litellm")
def litellm_ollama(place):
    lite("ollama_chat/llama3", api_base=place.base)


def trip():
    import pydantic

    class Trip(pydantic.BaseModel):
        city: str
        days: list[int]
    return Trip


@client("instructor", answers=call("Trip", city="Paris", days="[1, 2]") + "\n")
def instructor_tools(place):
    import instructor
    import openai
    client = instructor.from_openai(openai.OpenAI(base_url=f"{place.base}/v1", api_key="x", max_retries=0))
    found = client.chat.completions.create(model="gpt-4o", response_model=trip(), messages=[{"role": "user", "content": "Two days in Paris"}])
    assert (found.city, found.days) == ("Paris", [1, 2])


@client("instructor", answers='{"city": "Paris", "days": [1, 2]}\n')
def instructor_schema(place):
    import instructor
    import openai
    client = instructor.from_openai(openai.OpenAI(base_url=f"{place.base}/v1", api_key="x", max_retries=0), mode=instructor.Mode.JSON_SCHEMA)
    found = client.chat.completions.create(model="gpt-4o", response_model=trip(), messages=[{"role": "user", "content": "Two days in Paris"}])
    assert (found.city, found.days) == ("Paris", [1, 2])


@client("instructor", answers=call("Trip", city="Paris", days="[1, 2]") + "\n")
def instructor_anthropic(place):
    import anthropic
    import instructor
    client = instructor.from_anthropic(anthropic.Anthropic(base_url=place.base, api_key="x", max_retries=0))
    found = client.messages.create(model="claude-sonnet-4-5", max_tokens=500, response_model=trip(), messages=[{"role": "user", "content": "Two days in Paris"}])
    assert (found.city, found.days) == ("Paris", [1, 2])


AI_SDK = """
import { generateText, streamText, tool, stepCountIs } from "ai";
import { z } from "zod";
const { make } = await import("./provider.mjs");
const asked = [];
const tools = { get_weather: tool({
  description: "Weather of a city", inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => { asked.push(city); return "sunny"; },
}) };
const result = streamText({ model: make(), tools, stopWhen: stepCountIs(3), prompt: QUESTION, maxRetries: 0,
  onError: ({ error }) => { console.error(error); process.exit(1); } });
let text = "";
for await (const part of result.textStream) text += part;
if (text !== ANSWER || asked.join() !== "Paris") { console.error({ text, asked }); process.exit(1); }
"""


def ai_sdk(place, provider):
    if place.node is None:
        raise NotInstalled("no --node")
    (place.work / "node_modules").symlink_to(place.node.resolve())
    (place.work / "provider.mjs").write_text(provider.replace("BASE", place.base))
    main = AI_SDK.replace("QUESTION", json.dumps(QUESTION)).replace("ANSWER", json.dumps(ANSWER))
    (place.work / "main.mjs").write_text(main)
    place.run(["node", "main.mjs"])


@client("npm:@ai-sdk/openai-compatible")
def ai_sdk_compatible(place):
    ai_sdk(place, """import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
export const make = () => createOpenAICompatible({ name: "tandem", baseURL: "BASE/v1", apiKey: "x" })("scripted");""")


@client("npm:@ai-sdk/openai")
def ai_sdk_openai(place):
    ai_sdk(place, """import { createOpenAI } from "@ai-sdk/openai";
export const make = () => createOpenAI({ baseURL: "BASE/v1", apiKey: "x" })("gpt-5");""")


@client("npm:@ai-sdk/anthropic")
def ai_sdk_anthropic(place):
    ai_sdk(place, """import { createAnthropic } from "@ai-sdk/anthropic";
export const make = () => createAnthropic({ baseURL: "BASE/v1", apiKey: "x" })("claude-sonnet-4-5");""")


def agent_answers(call):
    return f"<think>I read the file.</think>I look.{call}\n---\n<think>It says it.</think>The word is marzipan.\n"


ASK = "Which word does note.txt hold?"


@client("npm:@openai/codex", answers=agent_answers(call("exec_command", cmd="cat note.txt")))
def codex(place):
    provider = f'model_providers.tandem={{name="tandem", base_url="{place.base}/v1", wire_api="responses"}}'
    command = [str(place.node / ".bin/codex"), "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
               "-c", provider, "-c", 'model_provider="tandem"', "-m", "gpt-5", ASK]
    said = place.run(command, CODEX_HOME=str(place.home))
    assert "The word is marzipan." in said, said


@client("npm:@anthropic-ai/claude-code", answers=agent_answers(call("Bash", command="cat note.txt", description="Read the note")))
def claude_code(place):
    binary = next(place.node.glob("@anthropic-ai/claude-code-*/claude"))
    command = [str(binary), "-p", ASK, "--allowedTools", "Bash", "--model", "claude-sonnet-4-5"]
    said = place.run(command, ANTHROPIC_BASE_URL=place.base, ANTHROPIC_API_KEY="x", CLAUDE_CONFIG_DIR=str(place.home),
                     CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_AUTOUPDATER="1")
    assert "The word is marzipan." in said, said


@client("npm:opencode-ai", answers=agent_answers(call("bash", command="cat note.txt", description="Read the note")))
def opencode(place):
    binary = next(place.node.glob("opencode-*/bin/opencode"))
    config = {
        "provider": {"tandem": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{place.base}/v1"},
                                "models": {"scripted": {"name": "scripted"}}}},
        "model": "tandem/scripted", "small_model": "tandem/scripted", "autoupdate": False, "share": "disabled",
        "permission": {"*": "allow"},
    }
    said = place.run([str(binary), "run", "--format", "json", "-m", "tandem/scripted", ASK], OPENCODE_CONFIG_CONTENT=json.dumps(config),
                     OPENCODE_DISABLE_MODELS_FETCH="1", OPENCODE_DISABLE_AUTOUPDATE="1", OPENCODE_DISABLE_LSP_DOWNLOAD="1")
    assert "The word is marzipan." in said and "error" not in said, said


def version_of(package, node):
    if package.startswith("npm:"):
        if node is None or not (manifest := node / package[4:] / "package.json").exists():
            raise NotInstalled(package)
        return json.loads(manifest.read_text())["version"]
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise NotInstalled(package) from error


class Cleaner:
    """Replaces details of this machine and this run; equal ones stay equal."""

    def __init__(self, place):
        self.place, self.ids = place, {}

    def text(self, text, longest=LONGEST):
        text = text.replace(str(self.place.work), "/work/project").replace(str(self.place.home), "/home/user")
        text = text.replace(str(self.place.root), "/work").replace(platform.node(), "host").replace(platform.release(), "6.1.0")
        text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", self.id, text)
        text = re.sub(r"(?<![0-9A-Za-z])[0-9a-f]{24,64}(?![0-9A-Za-z])", self.id, text)
        text = re.sub(r"\d{4}-\d{2}-\d{2}", "2026-01-02", text)
        text = re.sub(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,? [A-Z][a-z]+ \d+,? \d{4}", "Fri Jan 02 2026", text)
        return text if len(text) <= longest else text[:longest - 3] + "..."

    def id(self, match):
        number = self.ids.setdefault(match[0], len(self.ids) + 1)
        return re.sub("[0-9a-f]", "0", match[0])[:-4] + f"{number:04}"

    def value(self, value, key=None):
        if isinstance(value, str):
            return self.text(value, LONGEST_DESCRIPTION if key == "description" else LONGEST)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key): self.value(item, key) for key, item in value.items()}
        return value

    def body(self, body, says):
        body = self.value(body)
        if len(body.get("tools", [])) > 3:
            body["tools"] = distinct(body["tools"], says)
        return body


def shapes(value, place=""):
    """Which keys with which kinds of values there are, whatever properties are called."""
    if isinstance(value, dict):
        for key, item in value.items():
            key = "*" if place.endswith("properties") else key
            yield f"{place} {key} {item if key == 'type' else type(item).__name__}"
            yield from shapes(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from shapes(item, place + "[]")


def distinct(tools, says):
    """The tools that the answer calls, and those with a shape that none before has."""
    kept, seen = [], set()
    for tool in sorted(tools, key=lambda tool: f"<tool_call>{tool.get('name', tool.get('function', {}).get('name'))}<" not in says):
        new = set(shapes(tool)) - seen
        if new:
            kept.append(tool)
            seen |= new
    return kept


def without_repeats(requests):
    """Each request's fields that are as in the one before are named only."""
    slim, before = [], {}
    for request in requests:
        body = request["body"]
        again = [key for key, value in body.items() if before.get(key) == value and len(json.dumps(value)) > 100]
        slim.append({**request, "again": again, "body": {key: value for key, value in body.items() if key not in again}})
        before = body
    return slim


# Headers that say how a body is read; the rest is the client's machine.
HEADERS = ["content-type", "accept", "anthropic-version", "anthropic-beta", "openai-beta", "x-stainless-helper-method"]


def start(binary, answers, log):
    server = subprocess.Popen([binary, str(PORT), answers], stdout=log, stderr=subprocess.DEVNULL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
            return server
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not start")


def drive(name, binary, folder, node):
    package, answers, function = CLIENTS[name]
    version = version_of(package, node)
    place = Place(f"http://127.0.0.1:{PORT}", node)
    file = place.root / "answers.txt"
    file.write_text(answers)
    log = place.root / "requests.txt"
    with log.open("wb") as sink:
        server = start(binary, file, sink)
    try:
        function(place)
        outcome = "ok"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    server.terminate()
    server.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    cleaner = Cleaner(place)
    posts = [line for line in lines if line["method"] == "POST"]
    requests = [
        {
            "path": line["path"], "headers": {key: line["headers"][key] for key in HEADERS if key in line["headers"]},
            "says": line.get("says"), "body": cleaner.body(line["body"], line.get("says", "")),
        }
        for line in posts
    ]
    if outcome == "ok":
        client = json.dumps(f"{package.removeprefix('npm:')} {version}")
        lines = ",\n".join(json.dumps(request, ensure_ascii=False) for request in without_repeats(requests))
        (folder / f"{name}.json").write_text(f'{{"client": {client}, "requests": [\n{lines}\n]}}\n')
    shutil.rmtree(place.root, ignore_errors=True)
    print(f"{name} ({package.removeprefix('npm:')} {version}): {outcome}; {len(posts)} requests", flush=True)
    return outcome == "ok"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--node", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("clients", nargs="*")
    given = parser.parse_intermixed_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    # SDKs in this process read no settings of this user either.
    home = tempfile.mkdtemp(prefix="home-")
    for key in [key for key in os.environ if key.startswith(("OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_"))]:
        del os.environ[key]
    os.environ.update(HOME=home, LITELLM_LOCAL_MODEL_COST_MAP="True", ANTHROPIC_LOG="error")
    failed = False
    for name in given.clients or CLIENTS:
        try:
            failed |= not drive(name, given.binary, given.folder, given.node)
        except NotInstalled as missing:
            failed |= bool(given.clients)
            print(f"{name}: not installed ({missing})")
    sys.exit(failed)


if __name__ == "__main__":
    main()
