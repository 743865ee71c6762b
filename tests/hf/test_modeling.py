"""MM-Rec as a model of transformers: loading, padding, generation with a cache, loss, saving."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_rec import ops
from mm_rec.config import ModelConfig
from mm_rec.hf import MMRecCache, MMRecConfig, MMRecForCausalLM
from mm_rec.inference import decode
from mm_rec.model import MMRecModel
from mm_rec.storage import checkpoint
from mm_rec.storage.hf_folder import checkpoint_names
from mm_rec.text.tokenizer import train_tokenizer

CONFIG = ModelConfig(vocab_size=320, d_model=32, n_heads=2, n_layers=3, d_ff=48, window=16, kept_pairs=6)
PROMPTS = ["one", "one two three", "three one one two " * 9]  # the last is longer than two windows


@pytest.fixture(scope="module")
def core() -> MMRecModel:
    model = MMRecModel(CONFIG, seed=1)
    with torch.no_grad():  # as after training: parts that start at zero or small take part
        for name, parameter in model.named_parameters():
            if name.endswith((".out_proj", ".attention_out", ".ffn_down", ".gate")):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.fixture(scope="module")
def folder(core: MMRecModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "step_000001"
    tokenizer = train_tokenizer([" ".join(PROMPTS)] * 2, 320)
    checkpoint.save(
        path, config=CONFIG, weights=core.state_dict(), optimizer={}, carried={}, trainer={}, tokenizer=tokenizer
    )
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> MMRecForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def tokens(rows: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(7, CONFIG.vocab_size, (rows, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("domain", ["text", "code", "all"])
def test_a_checkpoint_loads_as_it_is(core: MMRecModel, model: MMRecForCausalLM, domain: str) -> None:
    batch = tokens(2, 40)
    with torch.no_grad():
        expected, _ = core(batch, None, None if domain == "all" else domain)
        torch.testing.assert_close(model(batch, domain=domain).logits, expected)
        some = model(batch, domain=domain, logits_to_keep=torch.tensor([3, 9])).logits
        torch.testing.assert_close(some, expected[:, [3, 9]])
        torch.testing.assert_close(model(batch, domain=domain, logits_to_keep=3).logits, expected[:, -3:])


def test_who_answers_depends_on_what_was_trained(tmp_path: Path, folder: Path, model: MMRecForCausalLM) -> None:
    assert model.config.domain is None  # the fusion was trained
    weights = {**load_file(folder / "model.safetensors"), "fusion.gate": torch.zeros(2, 64)}
    path = tmp_path / "step_000001"
    tokenizer = train_tokenizer(PROMPTS, 320)
    checkpoint.save(path, config=CONFIG, weights=weights, optimizer={}, carried={}, trainer={}, tokenizer=tokenizer)
    early = AutoModelForCausalLM.from_pretrained(path)
    batch = tokens(1, 9)
    assert early.config.domain == "text"
    assert torch.equal(early(batch).logits, early(batch, domain="text").logits)
    assert not torch.equal(early(batch).logits, early(batch, domain="all").logits)
    for domain in ("code", "all"):
        chosen = AutoModelForCausalLM.from_pretrained(path, domain=domain)
        torch.testing.assert_close(chosen(batch).logits, early(batch, domain=domain).logits)


def test_trust_remote_code_needs_no_import(folder: Path, model: MMRecForCausalLM, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[2:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    model.save_pretrained(folder + '-again')\n"
        "    logits = model(torch.arange(9, 19)[None]).logits\n"
        "    from safetensors.torch import save_file\n"
        "    save_file({'logits': logits.detach()}, folder + '-again/' + sys.argv[1])\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", program, "logits", folder, saved], env=env, check=True)
    expected = model(torch.arange(9, 19)[None]).logits
    for one in (folder, saved):
        again = Path(f"{one}-again")
        weights = [load_file(path / "model.safetensors") for path in (Path(one), again)]
        assert weights[1].keys() == model.state_dict().keys() - {"lm_head.weight"}
        assert_same_tensors(*map(checkpoint_names, weights))
        # Another copy of the same weights may lie at another alignment, where products round differently.
        torch.testing.assert_close(load_file(again / "logits")["logits"], expected)
        assert json.loads((again / "config.json").read_text())["auto_map"] == model.config.auto_map
        assert sorted(path.name for path in again.glob("*.py")) == ["modeling_mm_rec.py"]


@pytest.mark.native
@pytest.mark.parametrize("domain", ["text", "all"])
def test_single_tokens_take_the_native_step(
    model: MMRecForCausalLM, monkeypatch: pytest.MonkeyPatch, domain: str
) -> None:
    steps = []
    step = decode.step
    monkeypatch.setattr(decode, "step", lambda *given, **named: steps.append(1) or step(*given, **named))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "domain": domain}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    batch = tokens(3, 30)
    native = model.generate(batch, **options)
    assert len(steps) == 19  # the first token follows from the prompt's pass
    with ops.use_backend("reference"):
        reference = model.generate(batch, **options)
    assert len(steps) == 19
    assert torch.equal(native.sequences, reference.sequences)
    torch.testing.assert_close(torch.stack(native.logits), torch.stack(reference.logits), rtol=1e-4, atol=1e-5)
    # With gradients, or at the start of a document, the forward pass reads it.
    model(batch[:, :1], past_key_values=native.past_key_values, domain=domain).logits.sum().backward()
    model.zero_grad()
    cache = MMRecCache()
    with torch.no_grad():
        model(batch, past_key_values=cache, domain=domain)
        fresh = model(batch[:, :1], past_key_values=cache, position_ids=torch.zeros(3, 1), domain=domain).logits
        torch.testing.assert_close(fresh, model(batch[:, :1], domain=domain).logits)
    assert len(steps) == 19


@pytest.mark.parametrize("rows", [[0], [0, 1], [2, 0, 1, 1, 2]])
def test_left_padding_changes_nothing(folder: Path, model: MMRecForCausalLM, rows: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    batch = tokenizer([PROMPTS[row] for row in rows], return_tensors="pt", padding=True)
    if rows == [0]:  # padding of a single row, longer than two windows
        batch = {
            name: torch.nn.functional.pad(t, (40, 0), value=2 * (name == "input_ids")) for name, t in batch.items()
        }
    together = model.generate(**batch, **options)
    for index, row in enumerate(rows):
        alone = model.generate(**tokenizer(PROMPTS[row], return_tensors="pt"), **options)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[index, -length:], alone.sequences[0])
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[index], theirs[0], rtol=1e-4, atol=1e-4)


def test_what_padding_holds_does_not_matter(model: MMRecForCausalLM) -> None:
    batch, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :37] = mask[1, :5] = 0
    other = torch.where(mask.bool(), batch, tokens(2, 60, seed=1))
    first, second = (model(ids, attention_mask=mask, logits_to_keep=1).logits for ids in (batch, other))
    assert not torch.equal(batch, other)
    assert torch.equal(first, second)


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 1, 0, 1]])
def test_padding_between_tokens_is_refused(model: MMRecForCausalLM, mask: list[int]) -> None:
    with pytest.raises(ValueError, match="padding between tokens"):
        model(tokens(1, 4), attention_mask=torch.tensor([mask]))


def test_padding_at_the_right_changes_nothing_before_it(model: MMRecForCausalLM) -> None:
    batch, mask = tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[0, 15:] = 0
    padded = model(batch, attention_mask=mask).logits[:, :15]
    torch.testing.assert_close(padded, model(batch[:, :15]).logits, rtol=1e-5, atol=1e-5)


def test_reading_goes_on_from_a_cache(model: MMRecForCausalLM) -> None:
    batch, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :21] = 0
    whole = model(batch, attention_mask=mask).logits
    cache = MMRecCache()
    pieces = []
    for start, stop in ((0, 10), (10, 30), (30, 31), (31, 50)):
        out = model(batch[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        pieces.append(out.logits)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 50
    together = torch.cat(pieces, dim=1)
    torch.testing.assert_close(together[1], whole[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[0, 21:], whole[0, 21:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must cover the 50 tokens read before and the 1 of this call"):
        model(batch[:, :1], attention_mask=mask[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(1)


@pytest.mark.parametrize("name", ["inputs_embeds", "output_attentions", "output_hidden_states"])
def test_what_is_not_supported_is_refused(model: MMRecForCausalLM, name: str) -> None:
    value = torch.zeros(1, 4, model.config.d_model) if name == "inputs_embeds" else True
    with pytest.raises(ValueError, match=f"does not support {name}"):
        model(**{name: value})


def test_generation_goes_on_from_a_cache(model: MMRecForCausalLM) -> None:
    prompt = tokens(1, 20)
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    first = model.generate(prompt, max_new_tokens=5, **options)
    more = torch.cat([first.sequences, tokens(1, 6, seed=2)], dim=1)
    continued = model.generate(more, past_key_values=first.past_key_values, max_new_tokens=5, **options)
    assert torch.equal(continued.sequences, model.generate(more, max_new_tokens=5, **options).sequences)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_without_a_cache(model: MMRecForCausalLM, beams: int) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    with_cache, without = (model.generate(tokens(2, 12), use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(with_cache, without)
    if beams > 1:
        greedy = model.generate(tokens(2, 12), **{**options, "num_beams": 1})
        assert not torch.equal(with_cache, greedy)  # the beams did cross


def test_rows_of_a_cache_can_be_copied_and_picked(model: MMRecForCausalLM) -> None:
    batch = tokens(2, 20)
    cache = model(batch, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    following = tokens(2, 3, seed=5)
    swapped = model(following, past_key_values=cache).logits
    whole = model(torch.cat([batch.flip(0), following], dim=1)).logits[:, -3:]
    torch.testing.assert_close(swapped, whole, rtol=1e-4, atol=1e-4)


def test_positions_of_zero_start_documents(model: MMRecForCausalLM) -> None:
    batch = tokens(1, 30)
    positions = torch.cat([torch.arange(18), torch.arange(12)])[None]
    packed = model(batch, position_ids=positions).logits
    torch.testing.assert_close(packed[:, :18], model(batch[:, :18]).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 18:], model(batch[:, 18:]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_labels_give_the_loss(model: MMRecForCausalLM) -> None:
    batch = tokens(2, 25)
    labels = batch.clone()
    labels[0, :10] = -100
    out = model(batch, labels=labels)
    nll = -out.logits[:, :-1].log_softmax(-1).gather(-1, batch[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, nll[counted].mean())
    torch.testing.assert_close(model(batch, labels=labels, num_items_in_batch=7).loss, nll[counted].sum() / 7)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(batch, labels=labels).loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)
    model.zero_grad()


def test_saving_and_loading_changes_nothing(model: MMRecForCausalLM, folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert_same_tensors(checkpoint_names(saved), load_file(folder / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(1, 20)).logits, model(tokens(1, 20)).logits)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert again.config.model_config() == CONFIG


def test_bfloat16_leaves_what_acts_on_states_wide(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wide = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"w_g", "key_taps", "decay_bias", "gate_bias", "score_bias"}
    assert model.generate(tokens(2, 20), max_new_tokens=3, eos_token_id=None).shape == (2, 23)


def test_missing_weights_are_initialised(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if not n.startswith("fusion")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.fusion.mix.weight, torch.eye(32))
    assert torch.equal(model.model.embedding.weight, weights["embedding.weight"])


def test_a_new_model_follows_the_seed() -> None:
    config = MMRecConfig(**CONFIG.to_dict())
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(MMRecForCausalLM(config).model.embedding.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert MMRecConfig().model_config() == ModelConfig.preset("100m")
    with pytest.raises(ValueError, match="does not split into"):
        MMRecForCausalLM(MMRecConfig(**{**CONFIG.to_dict(), "n_heads": 3}))


def test_the_base_model_and_the_tied_head_make_the_logits(model: MMRecForCausalLM, folder: Path) -> None:
    batch = tokens(2, 20)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for one in (model, AutoModelForCausalLM.from_pretrained(folder, domain="code")):
        features = one.base_model(batch, use_cache=True)
        assert torch.equal(one.lm_head(features.last_hidden_state), one(batch).logits)
        assert features.past_key_values.get_seq_length() == 20
    wider = AutoModelForCausalLM.from_pretrained(folder)
    wider.resize_token_embeddings(384)
    assert wider(batch).logits.shape == (2, 20, 384)
    assert wider.config.vocab_size == wider.config.model_config().vocab_size == 384
    torch.testing.assert_close(wider(batch).logits[..., :320], model(batch).logits)
