"""The chat template of tokenizers trained here (Jinja)."""

from __future__ import annotations

_REASONING = """\
            {%- if message.reasoning_content %}
                {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
            {%- endif %}
"""
CHAT_TEMPLATE = (
    """\
{{- bos_token }}
{%- set turns = messages %}
{%- if tools %}
    {{- '<|system|>' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
        {%- set turns = messages[1:] %}
    {%- endif %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</tools><|end|>' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role in ['system', 'user', 'tool'] %}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
"""
    + _REASONING
    + """\
            {{- message.content or '' }}
            {%- for tool_call in message.tool_calls or [] %}
                {%- set call = tool_call.function or tool_call %}
                {%- if message.content or not loop.first %}
                    {{- '\\n' }}
                {%- endif %}
                {{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
)
# Tokenizers trained before this template rendered reasoning have the other one.
OWN_TEMPLATES = (CHAT_TEMPLATE, CHAT_TEMPLATE.replace(_REASONING, ""))
