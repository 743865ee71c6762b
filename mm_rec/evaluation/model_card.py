"""The model card: ``README.md`` of an exported folder, made of what the runs and the measurements say.

A hub shows it as the page of the model. Nothing in it is guessed: what is not known is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

import mm_rec
from mm_rec.data.origins import Origin
from mm_rec.data.prepare import PART
from mm_rec.evaluation.recall import state_bytes
from mm_rec.evaluation.run_history import TrainedStage, read_history
from mm_rec.inference.loading import Loaded
from mm_rec.stages import STAGES
from mm_rec.storage.files import format_bytes

__all__ = ["write_card"]

_LONGEST = 80
"""Characters of a value from a manifest that are shown."""


def write_card(loaded: Loaded, name: str, results: Mapping[str, Any] | None = None, *, adapted: bool = False) -> str:
    """Returns the card of a model in Markdown, with the metadata that a hub reads on top.

    Args:
        loaded: the model; the run folder in which its checkpoint lies tells what it was taught.
        name: ``owner/name`` on the hub, or the name of the folder.
        results: what ``mm-rec eval`` measured of it; None if it was not measured.
        adapted: whether an adapter was merged into the weights, of which the runs of the checkpoint tell nothing.
    """
    history = read_history(loaded.path)
    sections = [
        f"# {name.rpartition('/')[2]}",
        _what_it_is(loaded),
        *_training(history, adapted),
        *_data(history),
        *_quality(history, results, adapted),
        *_usage(loaded, name),
        *_limits(loaded, history),
    ]
    return f"{_metadata(history)}\n" + "\n\n".join(sections) + "\n"


def _metadata(history: Sequence[TrainedStage]) -> str:
    values: dict[str, Any] = {"library_name": "mm-rec", "pipeline_tag": "text-generation", "tags": ["mm-rec"]}
    data_sets = sorted({str(one["hub_id"]) for one in _origins(history) if one.get("hub_id")})
    if data_sets:
        values["datasets"] = data_sets
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _what_it_is(loaded: Loaded) -> str:
    config, count = loaded.model.config, sum(parameter.numel() for parameter in loaded.model.parameters())
    facts = {
        "parameters": f"{count:,}, in float32",
        "experts": ", ".join(config.experts),
        "blocks of an expert": f"{config.n_layers}, {config.d_model} wide, {config.n_heads} heads",
        "feed-forward width": f"{config.d_ff:,}",
        "vocabulary": f"{loaded.tokenizer.vocab_size:,} tokens",
        "short-term memory": f"the last {config.window:,} tokens",
        "long-term memory": f"{config.kept_pairs:,} kept pairs of a key and a value for each head",
    }
    return (
        f"A language model with a memory of fixed size: whatever the length of a text, what it remembers of it takes "
        f"{format_bytes(state_bytes(loaded.model))}. It was trained with MM-Rec {mm_rec.__version__}.\n\n"
        + _table(["", ""], [[key, value] for key, value in facts.items()])
    )


def _training(history: Sequence[TrainedStage], adapted: bool) -> list[str]:
    parts = ["## What it was taught"]
    if not history:
        return [*parts, "This is not known: the model was exported from a folder without the records of its training."]
    if history[0].starts_from is not None:
        parts.append("It started from the weights of another model, whose training is not known here.")
    rows = [
        [
            one.stage,
            STAGES[one.stage].summary if one.stage in STAGES else "",
            f"{one.steps:,}",
            *(_value(one.settings.get(key)) for key in ("batch_size", "accumulation", "seq_len", "rate")),
        ]
        for one in history
    ]
    head = ["stage", "what it teaches", "steps", "rows of a batch", "batches a step", "tokens of a row", "peak rate"]
    parts.append(_table(head, rows))
    if adapted:
        parts.append("An adapter was added to these weights afterwards; what it was trained on is not known here.")
    return parts


def _data(history: Sequence[TrainedStage]) -> list[str]:
    parts, rows = ["## Data and licences"], []
    for one in history:
        if one.data is None:
            rows.append([one.stage, "not known any more: the prepared data are gone", "", "", ""])
            continue
        for domain, entry in one.data.report.items():
            train = entry["train"]
            downloads = one.data.origins.get(domain, [])
            sources = "; ".join(dict.fromkeys(map(_origin_in_words, downloads))) or "no download that is noted"
            rows.append([one.stage, domain, f"{train['documents']:,}", f"{train['tokens']:,}", sources])
    if not rows:
        return [*parts, "What it was trained on is not known."]
    parts.append(_table(["stage", "domain", "documents", "tokens", "sources"], rows))
    parts.append(
        "Files that no download is noted for are documents of whoever trained the model, under whatever terms those "
        "have. No licence was chosen for the weights: who publishes them has to, and the terms of the data bind them."
    )
    return parts


def _origins(history: Iterable[TrainedStage]) -> list[Origin]:
    return [one for stage in history if stage.data for found in stage.data.origins.values() for one in found]


def _origin_in_words(one: Origin) -> str:
    revision = f" at {_value(one.get('revision'))}" if one.get("hub_id") and one.get("revision") else ""
    where = f" ({one['hub_id']}{revision})" if one.get("hub_id") else ""
    return f"{_value(one.get('source'))}{where}, licence: {_value(one.get('licence')) or 'not stated'}"


def _quality(history: Sequence[TrainedStage], results: Mapping[str, Any] | None, adapted: bool) -> list[str]:
    parts = ["## Quality"]
    rows = [[one.stage, domain, f"{bits:.3f}"] for one in history[-1:] for domain, bits in one.bits_per_byte.items()]
    if rows:
        parts.append(
            "Bits per byte of the last validation, on documents that were held out of the data above: lower is better."
            + (" The adapter that was added afterwards is not in these numbers." if adapted else "")
        )
        parts.append(_table(["stage", "domain", "bits per byte"], rows))
    else:
        parts.append("No validation is on record.")
    parted = [name for one in history[-1:] if one.data for name, entry in one.data.report.items() if _is_part(entry)]
    if parted:
        parts.append(
            f"Of {', '.join(parted)}, what is held out is the end of a document whose beginning was trained on, so "
            "the number says less about other texts."
        )
    needles = (results or {}).get("needles") or []
    if needles:
        parts.append(
            "Recall: something is said once in a long text and asked for so many tokens later. It counts as right if "
            "the answer is likelier than all other candidates; the interval is that of 95%."
        )
        head = ["kind", "tokens in between", "right", "interval", "by chance", "trials"]
        shares = [
            [
                _value(one["kind"]),
                f"{one['distance']:,}",
                f"{one['right'] / one['trials']:.1%}",
                f"{one['low']:.0%} to {one['high']:.0%}",
                f"{one['chance']:.0%}",
                f"{one['trials']:,}",
            ]
            for one in needles
        ]
        parts.append(_table(head, shares))
    else:
        parts.append("Recall over long distances was not measured; `mm-rec eval` does.")
    return parts


def _is_part(entry: Mapping[str, Any]) -> bool:
    return bool(entry["valid"].get(PART))


def _usage(loaded: Loaded, name: str) -> list[str]:
    python = f'import mm_rec\n\nmodel = mm_rec.load("{name}")\nprint(model.generate("The ", max_new_tokens=50))'
    command = "chat" if loaded.learned_to_chat else "generate"
    prompt = "" if loaded.learned_to_chat else ' --prompt "The "'
    return [
        "## How to use it",
        f"```sh\nmm-rec {command} --model {name}{prompt}\nmm-rec serve --model {name}\n```",
        f"```python\n{python}\n```",
        "In `transformers`, where the package mm-rec is installed:",
        "```python\nimport mm_rec.hf\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
    ]


def _limits(loaded: Loaded, history: Sequence[TrainedStage]) -> list[str]:
    limits = [
        "It is a small model: what it says can be wrong, and it has read nothing beside the data above.",
        "It can repeat passages of the documents that it was trained on.",
        "Nobody has examined it for harmful or unfair statements.",
        f"Its memory is of fixed size: of a text longer than {loaded.model.config.window:,} tokens it keeps a part, "
        "and forgets the rest.",
    ]
    if loaded.learned_to_chat is False:
        limits.append("It was taught to continue texts, not to answer in conversations.")
    elif loaded.learned_to_chat is None and not history:
        limits.append("Whether it was taught to answer in conversations is not known.")
    return ["## Limits", "\n".join(f"- {one}" for one in limits)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _value(value: object) -> str:
    """A value of a manifest or a configuration in one short line."""
    if value is None:
        return ""
    text = f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split())[:_LONGEST]
