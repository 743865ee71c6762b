"""Conversations out of messages that each name the one before them, as OpenAssistant's are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["COLUMNS", "TREE", "best_conversation"]

TREE = "message_tree_id"
"""The column that is the same in all messages with one beginning; their rows follow each other."""

COLUMNS = ("message_id", "parent_id", TREE, "role", "text", "lang", "rank", "deleted")
"""Columns that are read."""

_ROLES = {"prompter": "user", "assistant": "assistant"}


def best_conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the conversation that takes the reply which people ranked best at each turn, up to an answer.

    It is empty if there is no answer. Messages that were deleted are left out, with all that replies to them.

    >>> asked = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi", "rank": None, "deleted": False}
    >>> worse = {**asked, "message_id": "b", "parent_id": "a", "role": "assistant", "text": "What?", "rank": 1}
    >>> best_conversation([asked, worse, {**worse, "message_id": "c", "text": "Hello", "rank": 0}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    replies: dict[str | None, list[Mapping[str, Any]]] = defaultdict(list)
    for message in messages:
        if not message["deleted"]:
            replies[message["parent_id"]].append(message)
    conversation: list[dict[str, str]] = []
    parent: str | None = None
    while found := replies.pop(parent, None):
        best = min(found, key=lambda one: (one["rank"] is None, one["rank"] or 0))
        conversation.append({"role": _ROLES[best["role"]], "content": best["text"]})
        parent = best["message_id"]
    while conversation and conversation[-1]["role"] != "assistant":
        conversation.pop()
    return conversation
