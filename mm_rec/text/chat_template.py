"""The chat format as a Jinja template, written beside the tokenizer as ``chat_template.jinja``.

    <|bos|> (<|system|>TEXT<|end|>)? (<|user|>TEXT<|end|> <|assistant|>TEXT<|end|>)*

There is no white space between the parts. ``{% generation %}`` marks what an assistant wrote, closing ``<|end|>``
included: the tokens that count in the loss of chat training. The template takes the messages that
:func:`mm_rec.text.message.read_message` takes, and refuses all others.

A chat template yields one string, in which a control token and the same characters typed by a user look alike.
So the template breaks every control string inside a message with a space after its ``<``. No control string holds
a space, so none can come into being where one was broken, however strings are split or nested.
"""

from __future__ import annotations

import json

from mm_rec.text.message import ROLE_NAMES, TEXT_PARTS, UNREADABLE

__all__ = ["CHAT_TEMPLATE"]

_TEMPLATE = """\
{%- macro plain(text) -%}
{%- set safe = namespace(text=text) -%}
{%- for name in ["bos", "eos", "pad", "system", "user", "assistant", "end"] -%}
{%- set safe.text = safe.text | replace("<|" ~ name ~ "|>", "< |" ~ name ~ "|>") -%}
{%- endfor -%}
{{- safe.text -}}
{%- endmacro -%}
{%- macro joined(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is sequence and content is not mapping and content -%}
{%- for part in content -%}
{%- if part is not mapping or part["type"] not in TEXT_PARTS -%}
{{- raise_exception("a message has a part that is not text") -}}
{%- elif part["text"] is not string -%}
{{- raise_exception("a part of a message has no text") -}}
{%- endif -%}
{{- part["text"] -}}
{%- endfor -%}
{%- else -%}
{{- raise_exception("the content of a message must be a string or a list of parts") -}}
{%- endif -%}
{%- endmacro -%}
{%- set roles = ROLE_NAMES -%}
{{- "<|bos|>" -}}
{%- for message in messages -%}
{%- if message["role"] is not string or message["role"] not in roles -%}
{{- raise_exception("the role of a message must be one of " ~ roles | join(", ")) -}}
{%- endif -%}
{%- for name in UNREADABLE -%}
{%- if message[name] -%}
{{- raise_exception("a message has " ~ name ~ ", and this model reads text only") -}}
{%- endif -%}
{%- endfor -%}
{%- set role = roles[message["role"]] -%}
{{- "<|" ~ role ~ "|>" -}}
{%- if role == "assistant" -%}
{%- generation -%}
{{- plain(joined(message["content"])) ~ "<|end|>" -}}
{%- endgeneration -%}
{%- else -%}
{{- plain(joined(message["content"])) ~ "<|end|>" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|assistant|>" -}}
{%- endif -%}
"""


def _template() -> str:
    """Returns the template with what a message may be written into it."""
    text = _TEMPLATE
    for name, value in (("ROLE_NAMES", ROLE_NAMES), ("TEXT_PARTS", TEXT_PARTS), ("UNREADABLE", UNREADABLE)):
        text = text.replace(name, json.dumps(value))
    return text


CHAT_TEMPLATE = _template()
