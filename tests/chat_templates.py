# SPDX-License-Identifier: Apache-2.0
"""Chat templates that use what those of published models use, a kind of model each."""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

CHATML = """{% for message in messages %}
{%- if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content | trim ~ '<|im_end|>' ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA_2 = (
  "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
  "{% set system_message = messages[0]['content'] %}{% else %}{% set rest = messages %}"
  "{% set system_message = false %}{% endif %}{% for message in rest %}"
  "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
  "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + "
  "system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
  "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
  "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
  "{% elif message['role'] == 'assistant' %}"
  "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message }}
{%- if tools is not none %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\n\n" }}{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""

MISTRAL = """{%- set loop_messages = messages %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages | rejectattr("role", "in", ["tool"]) %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}
                    {%- else %}{{ '"' + key + '": ' + val|tojson }}{% endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}{% if not loop.last %}{{ ", " }}{% else %}{{ "]" }}{% endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["content"] is defined %}{{ " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

QWEN_3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{ "\n" }}{{ tool | tojson }}{% endfor %}
    {{- "<|im_end|>\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
      and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{% set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set before = content.split('</think>')[0] %}
        {%- set reasoning = before.rstrip('\\n').split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_query_index or loop.last %}
            {{- '<think>' + reasoning.strip('\\n') + '</think>' }}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ 'x' }}{% endif %}
{%- endif %}"""

HERMES = """{%- macro type_of(spec) %}
    {%- set basic = {"string": "str", "number": "float", "integer": "int"} %}
    {%- if basic[spec.type] is defined %}{{ basic[spec.type] }}
    {%- elif spec.type == "array" %}{{ "list[" + type_of(spec|items|list|last|last) + "]" }}
    {%- elif spec.type == "object" %}{{ "dict" }}
    {%- else %}{{ "Any" }}{% endif %}
{%- endmacro %}
{{- bos_token }}
{%- for tool in tools or [] %}
    {{- tool.function.name + "(" }}
    {%- for name, spec in tool.function.parameters.properties|dictsort %}
        {{- name + ": " + type_of(spec) }}{% if not loop.last %}, {% endif %}
    {%- endfor %}
    {{- ")\n" }}{{ tool.function|tojson(sort_keys=true, separators=(",", ":")) }}
{%- endfor %}
{%- for message in messages %}{{ message.role|upper ~ ": " ~ message.content }}
{% endfor %}"""

GRANITE = """{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{% set inner = 1 %}{{ message.content }}{% endgeneration %}
    {%- else %}{{ '<|' + message.role + '|>' + message.content }}{% endif %}
    {{- eos_token if inner is not defined }}
{%- endfor %}
{%- if documents is none %}no documents{% endif %}{{ unk_token is defined }}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}
{% set ns.is_first_sp = false %}{%- endif %}{%- endif %}{%- endfor %}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' and message['content'] is none %}NONE{%- endif %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}
{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is defined %}
{{'<｜Assistant｜>' + message['content'] | replace('a', 'b') ~ '<｜end▁of▁sentence｜>'}}
{%- endif %}{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"""

PHI = """{% for m in messages %}{% set d = dict(a=1, **{'b': 2}) %}
{% filter upper %}x{% endfilter %}{{ '<|%s|>' % m.role }}{{ "{}\n".format(m.content) }}
{{ d | tojson }}{{ dict.fromkeys('ab') }}
{% else %}nobody{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else '' }}"""

TEMPLATES = {
  name.lower(): text
  for name, text in list(globals().items())
  if name.isupper() and isinstance(text, str)
}

# The statement of each that writes what the assistant says, for a mark around it.
ANSWERS = {
  "zephyr": (
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}\n",
  ),
  "chatml": (
    "{{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content | trim ~ '<|im_end|>' "
    "~ '\n' }}",
    "{{- '<|im_start|>' ~ message.role ~ '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content | trim ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content | trim ~ '<|im_end|>' }}{% endif %}{{ '\n' }}",
  ),
  "llama_2": (
    "{{ ' ' + content.strip() + ' ' + eos_token }}",
    "{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}",
  ),
  "llama_3": (
    "{{- message['content'] | trim + '<|eot_id|>' }}",
    "{%- if message.role == 'assistant' %}{%- generation %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}{%- else %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}",
  ),
  "gemma": (
    "{{ message['content'] | trim }}",
    "{%- if role == 'model' -%}{%- generation -%}{{ message['content'] | trim }}"
    "{%- endgeneration -%}{%- else -%}{{ message['content'] | trim }}{%- endif -%}",
  ),
  "mistral": (
    '{{ " " + message["content"]|trim + eos_token}}',
    '{%- generation %}{{ " " + message["content"]|trim + eos_token}}{% endgeneration %}',
  ),
  "qwen_3": (
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}",
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
    "{%- generation %}{{ content + '<|im_end|>' }}{%- endgeneration %}{%- else %}"
    "{{- content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}",
  ),
  "deepseek": (
    "{{'<｜Assistant｜>' + message['content'] | replace('a', 'b') ~ "
    "'<｜end▁of▁sentence｜>'}}",
    "{{'<｜Assistant｜>'}}{% generation %}{{ message['content'] | replace('a', 'b') ~ "
    "'<｜end▁of▁sentence｜>'}}{% endgeneration %}",
  ),
  "phi": (
    """{{ "{}\n".format(m.content) }}""",
    """{% if m.role == 'assistant' %}{% generation %}{{ "{}\n".format(m.content) }}"""
    """{% endgeneration %}{% else %}{{ "{}\n".format(m.content) }}{% endif %}""",
  ),
}


def marked(name: str) -> str:
  """A template with `{% generation %}` around what the assistant says."""
  before, after = ANSWERS[name]
  assert before in TEMPLATES[name]
  return TEMPLATES[name].replace(before, after)


MARKED = {"granite": GRANITE} | {name: marked(name) for name in ANSWERS}
