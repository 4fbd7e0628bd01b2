"""The refusals (400) of requests that the OpenAPI document finds valid, with what JSON Schema cannot say of each."""
import json
import re

import schemathesis

# Operations, field at fault and message, why no schema says it.
KNOWN = [
    ("chat responses messages", r"^tool_choice: tool_choice names .*, which is not among the tools", "compares two fields"),
    ("chat responses messages", r'^tool_choice: tool_choice is "required", but there are no tools', "compares two fields"),
    ("chat completions responses messages", r"^response_format: the schema or grammar cannot be used", "is a schema, an expression or a grammar itself"),
    ("chat completions", r"^structured_outputs: structured_outputs takes one of", "null and absent fields count alike"),
    ("chat completions responses messages", r"^\w+: the prompt has \d+ tokens and the context holds", "counts tokens"),
]


@schemathesis.check
def refusals_are_known(ctx, response, case):
    if response.status_code != 400 or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    error = json.loads(response.content)["error"]
    # Anthropic's form has the field in front of the message.
    text = error["message"] if "param" not in error else f"{error['param']}: {error['message']}"
    for operations, pattern, _ in KNOWN:
        if any(name in case.operation.path for name in operations.split()) and re.search(pattern, text, re.DOTALL):
            return
    raise AssertionError(f"a refusal that the schema could have told, or that should not be: {text}")
