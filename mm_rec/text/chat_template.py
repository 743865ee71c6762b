"""The chat format as a Jinja template, written beside the tokenizer as ``chat_template.jinja``.

    <|bos|> (<|system|>TEXT<|end|>)? (<|user|>TEXT<|end|> <|assistant|>TEXT<|end|>)*

There is no white space between the parts. ``{% generation %}`` marks what an assistant wrote, closing ``<|end|>``
included: the tokens that count in the loss of chat training.

A chat template yields one string, in which a control token and the same characters typed by a user look alike.
So the template breaks every control string inside a message with a space after its ``<``. No control string holds
a space, so none can come into being where one was broken, however strings are split or nested.
"""

from __future__ import annotations

__all__ = ["CHAT_TEMPLATE"]

CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
{%- set safe = namespace(text=text) -%}
{%- for name in ["bos", "eos", "pad", "system", "user", "assistant", "end"] -%}
{%- set safe.text = safe.text | replace("<|" ~ name ~ "|>", "< |" ~ name ~ "|>") -%}
{%- endfor -%}
{{- safe.text -}}
{%- endmacro -%}
{{- "<|bos|>" -}}
{%- for message in messages -%}
{%- if message["content"] is not string -%}
{{- raise_exception("the content of a message must be a string") -}}
{%- endif -%}
{%- if message["role"] == "assistant" -%}
{{- "<|assistant|>" -}}
{%- generation -%}
{{- plain(message["content"]) ~ "<|end|>" -}}
{%- endgeneration -%}
{%- elif message["role"] in ["system", "user"] -%}
{{- "<|" ~ message["role"] ~ "|>" ~ plain(message["content"]) ~ "<|end|>" -}}
{%- else -%}
{{- raise_exception("the role of a message must be system, user or assistant") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|assistant|>" -}}
{%- endif -%}
"""
