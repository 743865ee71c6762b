"""The Python examples of docs/serving.md, as they stand there, against a server."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_rec.serve.service import Service

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_every_python_example_of_the_page_works(
    make_service: Callable[..., Service],
    serve: Callable[..., contextlib.AbstractContextManager[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = make_service(max_tokens=5)
    with serve(service) as address:
        text = PAGE.read_text(encoding="utf-8").replace("http://127.0.0.1:8000", address).replace('"mm-rec"', '"tiny"')
        openai, ollama, session = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        names: dict[str, Any] = {}
        for example in (openai, session):  # the session takes the client of the first example
            exec(example, names)
        assert names["say"]("Hello!").choices[0].message.role == "assistant"
        assert names["say"]("And now?").usage.prompt_tokens > 0
        exec(ollama, {})
        names["client"].close()
    assert len(capsys.readouterr().out.splitlines()) >= 2
