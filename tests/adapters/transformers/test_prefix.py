"""Prompts that begin like earlier ones: what is reused, and that tokens are those of a cold run."""

import copy
import gc
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import DynamicCache, GenerationConfig, T5Config, T5ForConditionalGeneration  # noqa: E402

import kvcache  # noqa: E402
from kvcache.adapters.transformers import make_cache, prefix_cache  # noqa: E402
from kvcache.adapters.transformers.prefill import compute  # noqa: E402
from kvcache.stores import NEVER, MemoryStore  # noqa: E402

from .models import EAGER_ONLY, MODELS, VOCAB, model  # noqa: E402

OFTEN = {"mistral", "jamba"}
"""Models that are not left to the session for the whole matrix."""
FULL = {"llama", "qwen3"}
"""Models without windows, chunks and recurrent layers."""
NEW = 9


def every_model(often=OFTEN):
    return [
        pytest.param(name, marks=() if name in often else pytest.mark.matrix) for name in MODELS
    ]


def random_ids(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (tokens,), generator=generator).tolist()


SYSTEM = random_ids(30)


def padded(rows):
    """Prompts as ``input_ids`` and ``attention_mask``."""
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def answers(built, rows, **options):
    """The tokens that ``generate`` puts behind prompts."""
    ids, mask = padded(rows)
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    return built.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


def alone(built, rows, **options):
    """The answers to prompts, each in a batch of its own, without reuse."""
    return [answers(built, [row], **options)[0] for row in rows]


def ask(prefix, built, rows, **options):
    """Tokens of prompts that were reused, and the answers, by the two lines that users write."""
    with prefix.session(*padded(rows)) as session:
        texts = answers(built, rows, cache=session.cache, **options)
    return list(session.matched), texts


@pytest.mark.parametrize("name", every_model())
@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=pytest.mark.matrix)])
def test_turns_and_branches(name, attention):
    if attention == "sdpa" and name in EAGER_ONLY:
        pytest.skip("the model has eager attention only")
    built = model(name, attention)
    prefix, distinct = prefix_cache(built, budget=1 << 26), set()
    conversation, computed = [*SYSTEM, *random_ids(5, 1)], 0
    for turn in range(4):
        [matched], [text] = ask(prefix, built, [conversation])
        assert [text] == alone(built, [conversation])
        assert matched == computed
        distinct.update(text)
        computed = len(conversation) + NEW - 1  # the token sampled last was not computed
        conversation = [*conversation, *text, *random_ids(4, turn + 2)]
    for branch in range(3):
        prompt = [*SYSTEM, *random_ids(6, 10 + branch)]
        [matched], texts = ask(prefix, built, [prompt])
        assert texts == alone(built, [prompt])
        # Windows and states are kept where prompts part, from when the first two have done so.
        assert matched == (30 if branch or name in FULL else 0)
    assert len(distinct) >= 20


@pytest.mark.parametrize("name", every_model())
def test_a_prefix_that_is_one_position_off_is_noticed(name):
    """The control: were it to pass, the model would not care for what is restored."""
    built, prompt = model(name), [*SYSTEM, *random_ids(5, 1)]
    prefix = prefix_cache(built)
    with prefix.prefix.session(prompt) as session:
        compute(built, session.caches, torch.tensor([7, *prompt[:-1]]))
    [matched], texts = ask(prefix, built, [prompt])
    assert matched == 34
    assert texts != alone(built, [prompt])


@pytest.mark.parametrize("name", every_model({"mistral", "qwen3_next"}))
def test_a_batch_of_several_prompts(name):
    built = model(name)
    prefix = prefix_cache(built)
    rows = [[*SYSTEM, *random_ids(tokens, tokens)] for tokens in (3, 8, 5)]
    reused = [0, 30, 30] if name in FULL else [0, 0, 30]  # rows find those before them
    for turn in range(2):
        matched, texts = ask(prefix, built, rows)
        assert matched == reused
        assert texts == alone(built, rows)
        reused = [len(row) + NEW - 1 for row in rows]
        rows = [[*row, *text, turn + 1] for row, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize("name", every_model({"gemma3", "lfm2"}))
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        pytest.param({"num_beams": 2, "num_return_sequences": 2}, marks=pytest.mark.matrix),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, marks=pytest.mark.matrix),
    ],
    ids=["beams", "some beams", "samples"],
)
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_several_rows_of_a_prompt(name, options, count):
    built, rows = model(name), [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]][:count]
    prefix, (ids, mask) = prefix_cache(built), padded(rows)
    for _ in range(2):
        texts = []
        for generate in (prefix.generate, built.generate):
            torch.manual_seed(3)
            options = {"do_sample": False, "max_new_tokens": NEW, **options}
            texts.append(generate(ids, attention_mask=mask, **options).tolist())
        assert texts[0] == texts[1]
    with prefix.session(ids, mask, rows=2) as session:
        assert list(session.matched) == [len(row) - 1 for row in rows]


def test_the_first_row_of_a_prompt_is_stored_as_it_went():
    """Rows change places, and their tokens go with them."""
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix, (ids, mask) = prefix_cache(built), padded([prompt])
    with prefix.session(ids, mask, rows=3) as session, torch.no_grad():
        built(ids[:, -1:].repeat(3, 1), cache=session.cache)
        built(torch.tensor([[11], [12], [13]]), cache=session.cache)
        session.cache.reorder_cache(torch.tensor([2, 2, 0]))
        built(torch.tensor([[21], [22], [23]]), cache=session.cache)
        assert [session.cache.generated(row) for row in range(3)] == [[13, 21], [13, 22], [11, 23]]
    for text, matched in ([11, 23], 33), ([13, 22], 34), ([13, 21], 35):
        longer = [*prompt, *text, 9]
        with prefix.session(*padded([longer])) as session:
            texts = answers(built, [longer], cache=session.cache)
            assert session.matched == (matched,)
            session.close(store=False)
        assert texts == alone(built, [longer])


# Other ways to call the model.


@pytest.mark.parametrize("name", ["llama", pytest.param("lfm2", marks=pytest.mark.matrix)])
@pytest.mark.parametrize(
    "options",
    [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": "similar"}],
    ids=["chunks", "lookup", "assisted"],
)
def test_ways_to_go_on_from_a_hit(name, options):
    built, prompt = model(name), [*random_ids(8) * 3, 3]
    if "assistant_model" in options:
        options = {"assistant_model": model(name, similar=True)}
    prefix = prefix_cache(built)
    for reused in (0, 24):
        assert ask(prefix, built, [prompt], **options) == ([reused], *[alone(built, [prompt])])
    [text] = alone(built, [prompt])
    assert ask(prefix, built, [[*prompt, *text]])[0] == [len(prompt) + NEW - 1]


def test_the_library_repeats_the_prompt_in_assisted_decoding():
    """It computes all tokens again on top of those in its cache, and goes on from there."""
    built, prompt = model("llama"), [*random_ids(8) * 3, 3]
    cache = DynamicCache(config=built.config)
    with torch.no_grad():
        built(torch.tensor([prompt[:20]]), cache=cache)
    texts = answers(built, [prompt], cache=cache, prompt_lookup_num_tokens=3)
    assert texts != alone(built, [prompt]), "the library has mended this: see PromptCache.repeated"


def test_the_library_forgets_the_state_of_jamba():
    """Several tokens on top of a state begin with none there, so ours come one at a time."""
    built, prompt = model("jamba"), [*SYSTEM, 5, 6, 7, 8]
    cache = DynamicCache(config=built.config)
    with torch.no_grad():
        built(torch.tensor([prompt[:20]]), cache=cache)
    texts = answers(built, [prompt], cache=cache)
    assert texts != alone(built, [prompt]), "the library has mended this: see prefill.py"


def test_a_model_of_states_alone():
    built, prompt = model("mamba2"), [*SYSTEM, 5, 6]
    prefix = prefix_cache(built)
    for reused in (0, 31):
        assert ask(prefix, built, [prompt]) == ([reused], alone(built, [prompt]))


def test_prompts_that_a_store_kept():
    built, prompt, store = model("mistral"), [*SYSTEM, 5, 6, 7], MemoryStore()
    for reused in (0, 32):  # each with a prefix cache of its own, as after a restart
        prefix = prefix_cache(built, store=store, namespace="mistral", page_tokens=16)
        with prefix.session(*padded([prompt]), deadline=NEVER) as session:
            texts = answers(built, [prompt], cache=session.cache)
        assert (session.matched, texts) == ((reused,), alone(built, [prompt]))
        assert prefix.prefix.close()


def test_retained_prompts_are_evicted_last():
    built, kept, other = model("llama"), [*SYSTEM, 5, 6, 7], [9, 8, 7, 6, 5]
    prefix = prefix_cache(built)
    with prefix.session(*padded([kept]), retain=(1, math.inf)) as session:
        answers(built, [kept], cache=session.cache)
    nbytes = prefix.prefix.stats.nbytes
    assert ask(prefix, built, [other])[0] == [0]
    prefix.prefix.trim(nbytes)
    assert ask(prefix, built, [kept]) == ([len(kept) - 1], alone(built, [kept]))
    assert prefix.prefix.stats.retained_evictions == 0


def test_the_older_name_of_the_argument():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    for reused in (0, 32):
        warned = pytest.warns(FutureWarning, match="past_key_values")
        with prefix.session(*padded([prompt])) as session, warned:
            texts = answers(built, [prompt], past_key_values=session.cache)
        assert session.matched == (reused,)
        assert texts == alone(built, [prompt])
    [text] = texts
    assert ask(prefix, built, [[*prompt, *text]])[0] == [len(prompt) + NEW - 1]


def test_a_loop_of_ones_own():
    built, prompt = model("gemma3"), [*SYSTEM, 5, 6, 7]
    [wanted] = alone(built, [prompt])
    prefix, ids = prefix_cache(built), torch.tensor([prompt])
    with prefix.session(ids, torch.ones_like(ids)) as session, torch.no_grad():
        text, step = [], ids
        for _ in range(NEW):
            step = built(step, cache=session.cache).logits[:, -1:].argmax(-1)
            text += step.tolist()[0]
    assert text == wanted
    assert ask(prefix, built, [[*prompt, *text]])[0] == [len(prompt) + NEW - 1]


def test_a_session_of_several_calls():
    built, prompt = model("mistral"), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    with prefix.session(*padded([prompt])) as session:
        [text] = answers(built, [prompt], cache=session.cache)
        longer = [*prompt, *text, 8, 9]
        assert answers(built, [longer], cache=session.cache) == alone(built, [longer])
    [text] = alone(built, [longer])
    assert ask(prefix, built, [[*longer, *text]])[0] == [len(longer) + NEW - 1]


@pytest.mark.parametrize("name", ["mistral", "falcon_h1"])
def test_sessions_in_inference_mode_and_outside(name):
    """Tensors made in that mode cannot be written to outside of it."""
    built, prompt = model(name), [*SYSTEM, 5, 6, 7]
    prefix, reused = prefix_cache(built), 0
    for number in range(4):
        with torch.inference_mode(number % 2 == 0):
            [matched], [text] = ask(prefix, built, [prompt], max_new_tokens=3)
        assert matched == reused
        assert [text] == alone(built, [prompt], max_new_tokens=3)
        reused, prompt = len(prompt) + 2, [*prompt, *text, 9]


# What is stored.


def test_tokens_that_were_taken_back_are_not_stored():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    with prefix.session(*padded([prompt])) as session:
        [text] = answers(built, [prompt], cache=session.cache)
        session.cache.crop(-6)  # two of the answer are left
        with torch.no_grad():
            built(torch.tensor([[9, 9]]), cache=session.cache)
            built(torch.tensor([[3]]), cache=session.cache)
        session.cache.crop(-1)
        assert session.cache.generated(0) == [*text[:2], 9, 9]
    assert ask(prefix, built, [[*prompt, *text]])[0] == [35]
    [matched], texts = ask(prefix, built, [[*prompt, *text[:2], 9, 9, 3]])
    assert matched == 37
    assert texts == alone(built, [[*prompt, *text[:2], 9, 9, 3]])


def test_rows_that_end_early_are_stored_up_to_their_end():
    built, rows = model("llama"), [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]]
    long, short = alone(built, rows)
    prefix = prefix_cache(built)
    end = GenerationConfig(eos_token_id=short[3], pad_token_id=0)
    assert short[3] not in long
    _, texts = ask(prefix, built, rows, generation_config=end)
    assert texts == [long, short[:4] + [0] * 5]
    matched, _ = ask(prefix, built, [rows[0] + long, rows[1] + short[:4] + [0, 0, 3]])
    assert matched == [33 + NEW - 1, 32 + 4]


def test_rows_that_are_given_up_leave_their_prompts():
    built, rows = model("llama"), [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]]
    prefix = prefix_cache(built)
    with prefix.session(*padded(rows)) as session:
        texts = answers(built, rows, cache=session.cache)
        session.cache.batch_select_indices(torch.tensor([1]))
    matched, _ = ask(prefix, built, [row + text for row, text in zip(rows, texts, strict=True)])
    assert matched == [32, 32 + NEW - 1]


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_session_that_fails_keeps_what_was_computed(name):
    built, prompt, texts = model(name), [*SYSTEM, 5, 6, 7], []
    prefix = prefix_cache(built)
    session = prefix.session(*padded([prompt]))
    with pytest.raises(MemoryError), session:
        _raise(texts.extend(answers(built, [prompt], cache=session.cache)))
    assert prefix.prefix.stats.active == 0
    longer = [[*prompt, *texts[0], 3]]
    assert ask(prefix, built, longer) == ([33 + NEW - 1], alone(built, longer))


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_session_that_drops_what_it_had_when_it_fails(name):
    built, prompt = model(name), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    session = prefix.session(*padded([prompt]), keep_on_error=False)
    with pytest.raises(MemoryError), session:
        _raise(answers(built, [prompt], cache=session.cache))
    assert prefix.prefix.stats.nbytes == prefix.prefix.stats.active == 0
    session.close()  # once more does nothing
    with pytest.raises(kvcache.KVCacheError, match="until it ends"):
        session.cache  # noqa: B018
    prefix.session(*padded([prompt])).close(store=False)
    assert prefix.prefix.stats.nbytes == 0


def test_a_pass_that_failed_can_be_made_again(monkeypatch):
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    with prefix.session(*padded([prompt])) as session:
        with monkeypatch.context() as patched:
            patched.setattr(built.model.norm, "forward", _raise)
            with pytest.raises(MemoryError):
                built(torch.tensor([[*prompt, 200]]), cache=session.cache)
        session.cache.reset()
        [text] = answers(built, [prompt], cache=session.cache)
    assert ask(prefix, built, [[*prompt, 200, 3]])[0] == [33]
    assert ask(prefix, built, [[*prompt, *text]])[0] == [33 + NEW - 1]


def _raise(*arguments):
    raise MemoryError


def test_embeddings_have_no_names():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    with prefix.session(*padded([prompt])) as session, torch.no_grad():
        for ids in (prompt, [9, 9]):
            embedded = built.get_input_embeddings()(torch.tensor([ids]))
            built(inputs_embeds=embedded, cache=session.cache)
    assert ask(prefix, built, [[*prompt, 9, 9, 3]])[0] == [33]


def test_tensors_that_are_used_again():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix, (ids, mask) = prefix_cache(built), padded([prompt])
    step = torch.zeros(1, 1, dtype=torch.long)
    with prefix.session(ids, mask) as session, torch.no_grad():
        built(ids, cache=session.cache)
        for token in (11, 12):
            step[:] = token
            built(step, cache=session.cache)
        ids[:] = step[:] = 1
    assert ask(prefix, built, [[*prompt, 11, 12, 3]])[0] == [35]


def test_a_copy_of_the_cache_is_of_no_session():
    built, prompt = model("mistral"), [*SYSTEM, 5, 6, 7]
    prefix = prefix_cache(built)
    with prefix.session(*padded([prompt])) as session:
        [text] = answers(built, [prompt], cache=session.cache)
        clone = copy.deepcopy(session.cache)
        longer = [*prompt, *text, 8]
        assert answers(built, [longer], cache=clone) == alone(built, [longer])
        assert session.cache.get_seq_length() == 33 + NEW - 1
    assert ask(prefix, built, [longer])[0] == [33 + NEW - 1]


def test_tenants_and_resume_points():
    built = model("gemma3")
    prefix = prefix_cache(built)
    ids, mask = padded([[*SYSTEM, 5, 6, 7]])
    prefix.generate(ids, mask, salt="a", max_new_tokens=2)
    prefix.generate(ids, mask, salt="b", resume_points=[12], max_new_tokens=2)
    for salt, reused in (("a", 0), ("b", 12), ("c", 0)):
        other = torch.tensor([[*SYSTEM[:12], 8, 9]])
        with prefix.session(other, torch.ones_like(other), salt=salt) as session:
            assert session.matched == (reused,)


def test_media_stand_for_other_tokens():
    built, prompt = model("llama"), [1, 1, 1, 5, 6, 7]
    prefix, (ids, mask) = prefix_cache(built), padded([prompt])
    for digest, reused in (("one", 0), ("two", 0), ("one", 5)):
        with prefix.session(ids, mask, media={(0, 3): digest}) as session:
            built(ids[:, session.matched[0] :], cache=session.cache)
        assert session.matched == (reused,)
    with pytest.raises(kvcache.NotSupportedError, match="media are of a single prompt in one row"):
        prefix.session(ids, mask, media={(0, 3): "one"}, rows=2)


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_prompts_of_one_token(name):
    built, rows = model(name), [[5], [6]]
    prefix = prefix_cache(built)
    for prompts in (rows[:1], rows):
        assert ask(prefix, built, prompts)[1] == alone(built, prompts)


# The model, and other callers of it.


def test_the_hook_goes_with_the_prefix_cache():
    built = copy.copy(model("llama"))
    built._forward_pre_hooks = built._forward_pre_hooks.copy()
    before = len(built._forward_pre_hooks)
    prefix = prefix_cache(built)
    assert len(built._forward_pre_hooks) == before + 1
    del prefix
    gc.collect()
    assert len(built._forward_pre_hooks) == before


def test_two_prefix_caches_of_one_model():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix, other = prefix_cache(built), prefix_cache(built)
    for _ in range(2):
        [matched], [text] = ask(prefix, built, [prompt])
    assert matched == 32
    assert ask(prefix, built, [[*prompt, *text]])[0] == [33 + NEW - 1]
    assert other.prefix.stats.nbytes == 0
    assert answers(built, [prompt], cache=make_cache(built)) == alone(built, [prompt])


def test_what_is_refused():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    prefix, (ids, mask) = prefix_cache(built), padded([prompt])
    right, every = mask.clone(), torch.zeros_like(mask)
    right[0, -1] = every[0, 0] = 0
    every[0, 1:] = 1
    pad = torch.tensor([[5, 0, 6]])
    for arguments, error, message in [
        ((prompt,), TypeError, "input_ids is a tensor of token ids; got"),
        ((mask.float(),), TypeError, "input_ids is a tensor of token ids; got"),
        ((ids, [1] * 33), TypeError, "attention_mask is a tensor of 0 and 1; got"),
        ((ids[0],), kvcache.ShapeError, r"input_ids is \[B, columns\], not empty; got \(33,\)"),
        ((ids[:, :0],), kvcache.ShapeError, r"not empty; got \(1, 0\)"),
        ((ids, mask[:, 1:]), kvcache.ShapeError, "has the shape of input_ids"),
        ((ids, right), ValueError, "padded on their left; got a mask with other zeros"),
        ((ids, every), ValueError, r"Leave them out of input_ids and attention_mask: \[:, 1:\]"),
        ((pad,), ValueError, "got none, and the id 0 of padding in input_ids"),
        (padded([prompt, [3]]), kvcache.NotSupportedError, "got one of a single token"),
    ]:
        with pytest.raises(error, match=message):
            prefix.session(*arguments)
    with pytest.raises(ValueError, match="rows"):
        prefix.session(ids, mask, rows=0)
    with pytest.raises(ValueError, match="the session brings the cache; got cache"):
        prefix.generate(ids, mask, cache=make_cache(built))
    assert prefix.prefix.stats.sessions == 0


def test_ends_that_are_used_for_padding_are_tokens(monkeypatch):
    """Where padding has the id of an end, the library does not look for it either."""
    built, prompt = model("llama"), [5, 0, 6]
    prefix, ids = prefix_cache(built), torch.tensor([prompt])
    for ends in (0, [3, 0]):
        monkeypatch.setattr(built.generation_config, "eos_token_id", ends)
        with prefix.session(ids) as session:
            output = built.generate(ids, cache=session.cache, max_new_tokens=NEW)
        assert output.tolist() == built.generate(ids, max_new_tokens=NEW).tolist()


def test_calls_that_do_not_fit_their_session():
    built, rows = model("llama"), [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]]
    prefix, (ids, mask) = prefix_cache(built), padded(rows)
    options = {"max_new_tokens": 2, "do_sample": False}
    for arguments, changed, error, message in [
        ((ids[:1], mask[:1]), {"num_beams": 2}, kvcache.ShapeError, "has 1 rows; got 2"),
        ((ids[:1], mask[:1]), {"inputs": ids[:1] + 1}, ValueError, "other tokens at 0. Pass the"),
        ((ids, mask), {"attention_mask": torch.ones_like(mask)}, ValueError, "in generate, too"),
    ]:
        asked = {"inputs": arguments[0], "attention_mask": arguments[1], **options, **changed}
        with prefix.session(*arguments) as session, pytest.raises(error, match=message):
            built.generate(cache=session.cache, **asked)
    with prefix.session(ids, mask) as session:
        assert answers(built, rows, cache=session.cache) == alone(built, rows)


def test_models_with_an_encoder_are_refused():
    built = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(kvcache.NotSupportedError, match="got a model with an encoder"):
        prefix_cache(built)


def test_models_on_several_devices_are_refused():
    built = copy.copy(model("llama"))
    built.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(kvcache.NotSupportedError, match="whose layers are on 0, 1"):
        prefix_cache(built)


def test_a_failure_at_the_beginning_ends_all_sessions(monkeypatch):
    built, rows = model("llama"), [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]]
    prefix = prefix_cache(built)
    with monkeypatch.context() as patched:
        patched.setattr(kvcache.LayerCaches, "concat", _raise)
        with pytest.raises(MemoryError):
            prefix.session(*padded(rows))
    assert prefix.prefix.stats.active == 0
    assert ask(prefix, built, rows) == ([32, 31], alone(built, rows))


def test_a_failure_at_the_end_stores_no_more(monkeypatch):
    built, rows = model("llama"), [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]]
    prefix = prefix_cache(built)
    session = prefix.session(*padded(rows))
    answers(built, rows, cache=session.cache)
    with monkeypatch.context() as patched:
        patched.setattr(kvcache.LayerCaches, "split", _raise)
        with pytest.raises(MemoryError):
            session.close()
    assert prefix.prefix.stats.active == 0
    assert ask(prefix, built, rows)[0] == [32, 31]


# Canary.


def test_generate_still_tells_the_model_what_the_hook_reads():
    built, prompt = model("llama"), [*SYSTEM, 5, 6, 7]
    calls = []
    hook = built.register_forward_pre_hook(
        lambda module, args, options: calls.append((args, options)), with_kwargs=True
    )
    cache = make_cache(built)
    try:
        with torch.no_grad():
            built(torch.tensor([prompt[:20]]), cache=cache)
        answers(built, [prompt], cache=cache, max_new_tokens=3)
    finally:
        hook.remove()
    moved = "generate calls the model another way: see prefix._note_pass"
    assert all(not args for args, _ in calls[1:]), moved
    assert all(options["cache"] is cache for _, options in calls), moved
    sizes = [options["input_ids"].shape[1] for _, options in calls[1:]]
    assert sizes == [13, 1, 1], "generate cuts input_ids another way: see PromptCache.note"
