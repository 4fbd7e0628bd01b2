"""Talks to `tandem serve`; the program itself is the command `tandem` of this package."""

import json
from urllib.request import Request, urlopen


class Client:
    """One server: `Client().chat("What is 47 + 38?", temperature=0)`. For all the rest use any OpenAI client."""

    def __init__(self, url="http://127.0.0.1:8000", key=""):
        self.url, self.headers = url, {"content-type": "application/json", "authorization": f"Bearer {key}"}

    def chat(self, text, **fields):
        body = json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode()
        with urlopen(Request(f"{self.url}/v1/chat/completions", body, self.headers)) as response:
            return json.load(response)["choices"][0]["message"]["content"]
