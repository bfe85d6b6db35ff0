"""Chat templates in the manner of published ones, with marks around what the assistant says."""

from __future__ import annotations

import re

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

_LLAMA_3 = """\
{{- bos_token -}}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' -}}
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] | trim -}}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

# No generation prompt, and the system's message in a turn of the user (Mistral).
_MISTRAL = """\
{{- bos_token -}}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set loop_messages = messages[1:] if system else messages -%}
{%- for message in loop_messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('After the optional system message, roles must alternate user and assistant') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' -}}{%- if loop.first and system -%}{{- system + '\\n\\n' -}}{%- endif -%}
{{- message['content'] + '[/INST]' -}}
{%- else -%}{{- ' ' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}"""

_LLAMA_2 = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + '[INST] ' -}}
{%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}
{{- message['content'] | trim + ' [/INST] ' -}}
{%- else -%}{%- generation -%}{{- message['content'] | trim + ' ' + eos_token -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}"""

_GEMMA = """\
{{- bos_token -}}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if message['role'] == 'assistant' -%}
{{- '<start_of_turn>model\\n' -}}
{%- generation -%}{{- message['content'] | trim + '<end_of_turn>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}
{{- '<start_of_turn>' + message['role'] + '\\n' + (system if loop.first else '') + message['content'] | trim -}}
{{- '<end_of_turn>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

_PHI_3 = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>\\n' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

_ZEPHYR = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>\\n' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
{%- else -%}{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
{%- endfor -%}"""

# Reasoning is left out of all turns but those after the last question, and an empty one written there (Qwen 3).
_QWEN_3 = """\
{%- if tools -%}{{- '<|im_start|>system\\n# Tools\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set content = message['content'] -%}{%- set reasoning = '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{%- if loop.index0 > ns.last and (loop.last or reasoning) -%}
{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content -}}
{%- for call in message['tool_calls'] or [] -%}
{{- '\\n<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}{{- '\\n' -}}
{%- elif message['role'] == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Reasoning is never written (DeepSeek R1).
_DEEPSEEK = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] -}}
{%- elif message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}
{%- else -%}
{{- '<｜Assistant｜>' -}}
{%- generation -%}{{- message['content'].split('</think>')[-1] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""

_COMMAND_R = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set who = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message['role']] -%}
{{- '<|START_OF_TURN_TOKEN|><|' + who + '_TOKEN|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'].strip() + '<|END_OF_TURN_TOKEN|>' -}}{%- endgeneration -%}
{%- else -%}{{- message['content'].strip() + '<|END_OF_TURN_TOKEN|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"""

MARKED = {
    "chatml": _CHATML,
    "llama-3": _LLAMA_3,
    "llama-2": _LLAMA_2,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "phi-3": _PHI_3,
    "zephyr": _ZEPHYR,
    "qwen-3": _QWEN_3,
    "deepseek": _DEEPSEEK,
    "command-r": _COMMAND_R,
}
# The tokens of these templates.
TOKENS = sorted(
    {token for text in MARKED.values() for token in re.findall(r"<[|｜][^<>' ]*[|｜]>|<\w+_of_turn>", text)}
)


def without_marks(template: str) -> str:
    return re.sub(r"\{%-\s*(end)?generation\s*-%\}", "", template)
