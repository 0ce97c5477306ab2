"""Tool loops by the clients of other projects: `python tool_loop_clients.py CLIENT whole|streamed
ADDRESS MODEL`.

Each looks up a price, multiplies it and says the total: two calls and an answer as `Total`, all
held to their schemas by grammars. Prints a JSON object: `calls`, a list of [name, arguments], and
`total`. A process of its own, because other projects' packages warn while they are imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

ENGLISH = (
    "What do 12 lamps cost? Look up the price of a lamp, multiply it by 12, then say the total."
)
CHINESE = "12盏台灯一共多少钱？先查一盏台灯的价格，再乘以12，最后说出总价。"
SYSTEM = "Use the result of one tool in the next call."
STEPS = ("price_of", "multiply")  # the tool of each turn
SETTINGS: dict[str, Any] = {"temperature": 0, "max_tokens": 200}


def price_of(item: str) -> int:
    """The price of one piece of an item, in euros."""
    return 37


def multiply(a: int, b: int) -> int:
    """The product of two whole numbers."""
    return a * b


class Total(BaseModel):
    total: int


FUNCTIONS: dict[str, Callable[..., int]] = {"price_of": price_of, "multiply": multiply}
JSON_TYPES = {"int": "integer", "str": "string"}


def described(function: Callable[..., int]) -> dict[str, Any]:
    names = {k: v for k, v in function.__annotations__.items() if k != "return"}
    properties = {name: {"type": JSON_TYPES[kind]} for name, kind in names.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    about = {"name": function.__name__, "description": function.__doc__, "parameters": parameters}
    return {"type": "function", "function": about}


TOOLS: list[Any] = [described(function) for function in FUNCTIONS.values()]


def choice(step: str) -> Any:
    return {"type": "function", "function": {"name": step}}


Loop = tuple[list[Any], int]


def turns(complete: Callable[..., Any], question: str) -> Loop:
    """A loop by messages of OpenAI's API; `complete` answers a request with a message."""
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM}, {"role": "user", "content": question},
    ]  # fmt: skip
    calls = []
    for step in STEPS:
        message = complete(messages=messages, tools=TOOLS, tool_choice=choice(step), **SETTINGS)
        messages.append(message)
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)
            calls.append([call.function.name, arguments])
            result = FUNCTIONS[call.function.name](**arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    answer = complete(messages=messages, response_format=Total, **SETTINGS)
    return calls, Total.model_validate_json(answer.content).total


def openai(address: str, model: str, streamed: bool) -> Loop:
    from openai import OpenAI

    completions = OpenAI(
        base_url=address, api_key="none", max_retries=0, timeout=300
    ).chat.completions

    def complete(response_format: Any = None, **request: Any) -> Any:
        if streamed:
            more = {"response_format": response_format} if response_format else {}
            with completions.stream(model=model, **request, **more) as events:
                done = [event.type for event in events]
                assert ("tool_calls.function.arguments.done" in done) != bool(response_format)
                return events.get_final_completion().choices[0].message
        if response_format:
            more = {"response_format": response_format}
            return completions.parse(model=model, **request, **more).choices[0].message
        return completions.create(model=model, **request).choices[0].message

    return turns(complete, CHINESE if streamed else ENGLISH)


def litellm(address: str, model: str, streamed: bool) -> Loop:
    import litellm

    def complete(**request: Any) -> Any:
        answer = litellm.completion(
            model=f"openai/{model}", api_base=address, api_key="none", stream=streamed, **request
        )
        if streamed:
            answer = litellm.stream_chunk_builder(list(answer), messages=request["messages"])
        return answer.choices[0].message

    return turns(complete, ENGLISH)


def langchain(address: str, model: str, streamed: bool) -> Loop:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=address, api_key="none", max_retries=0, **SETTINGS)
    tools = {name: tool(function) for name, function in FUNCTIONS.items()}
    messages: list[Any] = [SystemMessage(SYSTEM), HumanMessage(ENGLISH)]
    calls = []
    for step in STEPS:
        bound = chat.bind_tools(list(tools.values()), tool_choice=step)
        if streamed:
            first, *rest = bound.stream(messages)
            message = sum(rest, start=first)
        else:
            message = bound.invoke(messages)
        messages.append(message)
        for call in message.tool_calls:
            calls.append([call["name"], call["args"]])
            messages.append(tools[call["name"]].invoke(call))
    structured = chat.with_structured_output(Total)
    answer = list(structured.stream(messages))[-1] if streamed else structured.invoke(messages)
    return calls, answer.total


def pydantic_ai(address: str, model: str, streamed: bool) -> Loop:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.messages import ToolCallPart
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def settings(context: Any) -> Any:
        steps: tuple[Any, ...] = (*([step] for step in STEPS), "none")
        return {**SETTINGS, "tool_choice": steps[context.run_step - 1]}

    provider = OpenAIProvider(base_url=address, api_key="none")
    agent = Agent(
        OpenAIChatModel(model, provider=provider), tools=list(FUNCTIONS.values()),
        system_prompt=SYSTEM, model_settings=settings,
        output_type=ToolOutput(Total) if streamed else NativeOutput(Total),
    )  # fmt: skip
    if streamed:
        result = agent.run_stream_sync(ENGLISH)
        total = result.get_output().total
    else:
        result = agent.run_sync(ENGLISH)
        total = result.output.total
    parts = [part for message in result.all_messages() for part in message.parts]
    calls = [(p.tool_name, p.args_as_dict()) for p in parts if isinstance(p, ToolCallPart)]
    return [[name, given] for name, given in calls if name in FUNCTIONS], total


CLIENTS = {"openai": openai, "langchain": langchain, "litellm": litellm, "pydantic_ai": pydantic_ai}

if __name__ == "__main__":
    name, how, address, model = sys.argv[1:]
    calls, total = CLIENTS[name](address, model, how == "streamed")
    print(json.dumps({"calls": calls, "total": total}, ensure_ascii=False))
