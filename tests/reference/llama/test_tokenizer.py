"""Text to ids and back, as recorded, and in pieces."""

import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from tokenizers.pre_tokenizers import ByteLevel

from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.reference.llama.tokenizer import GGUFTokenizer

HARD = "naïve café 🙂👩‍👩‍👧 日本語, Ελληνικά\t\n\n  don't 3.14159\r\n x² ﷽"


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_file):
    return GGUFTokenizer.from_gguf(smollm2_file)


def synthetic(pre="gpt-2", merges=(), more=(), **keys):
    """Metadata of a vocabulary of all bytes, what `merges` join, and `more` (token, type)."""
    joined = ["".join(merge.split(" ")) for merge in merges]
    tokens = [(t, 1) for t in [*sorted(ByteLevel.alphabet()), *joined]] + list(more)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.merges": list(merges),
    } | {f"tokenizer.{key}": value for key, value in keys.items()}


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_recorded_ids(smollm2_tokenizer, recorded):
    assert smollm2_tokenizer.encode(recorded["prompt"]) == recorded["prompt_ids"]
    assert smollm2_tokenizer.decode(recorded["new_ids"]) == recorded["text"]


def test_recorded_text_streams(smollm2_tokenizer, recorded):
    stream = smollm2_tokenizer.stream()
    assert "".join(stream.push(i) for i in recorded["new_ids"]) == recorded["text"]


def test_round_trip(smollm2_tokenizer):
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(HARD)) == HARD


def test_streaming_holds_back_incomplete_characters(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode(HARD)
    stream = smollm2_tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == HARD
    assert "" in parts, "no character was split over tokens: the test shows nothing"
    for n in range(len(ids)):
        assert HARD.startswith("".join(parts[:n]))


def test_streams_are_independent(smollm2_tokenizer):
    first, *rest = smollm2_tokenizer.encode("🙂")
    one, other = smollm2_tokenizer.stream(), smollm2_tokenizer.stream()
    assert one.push(first) == ""
    assert other.push(smollm2_tokenizer.encode("a")[0]) == "a"
    assert "".join(one.push(i) for i in rest) == "🙂"


def test_special_tokens_only_when_asked(smollm2_tokenizer):
    text = "<|im_start|>user"
    plain, special = (smollm2_tokenizer.encode(text, special=flag) for flag in (False, True))
    assert special[0] == 1
    assert 1 not in plain
    assert smollm2_tokenizer.decode(plain) == smollm2_tokenizer.decode(special) == text
    assert smollm2_tokenizer.encode(text) == plain, "the last call left its mark"


def test_chat(smollm2_tokenizer):
    ids = smollm2_tokenizer.apply_chat("Hello")
    assert smollm2_tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 3
    assert ids.count(smollm2_tokenizer.eos_id) == 2
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert smollm2_tokenizer.decode(smollm2_tokenizer.apply_chat(turns)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_without_a_template():
    with pytest.raises(UnsupportedModelError, match=r"a chat template; this one has none"):
        GGUFTokenizer(synthetic()).apply_chat("Hi")


@pytest.mark.parametrize("template", ["{% for", "{{ ''.__class__.__mro__ }}", "{{ missing() }}"])
def test_chat_with_a_bad_template(template):
    with pytest.raises(UnsupportedModelError, match="plain Jinja; this one fails"):
        GGUFTokenizer(synthetic(chat_template=template)).apply_chat("Hi")


def test_chat_template_knows_the_special_names():
    tokenizer = GGUFTokenizer(
        synthetic(
            more=[("<s>", 3), ("</s>", 3)],
            chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
            **{"ggml.bos_token_id": 256, "ggml.eos_token_id": 257},
        )
    )
    assert tokenizer.apply_chat("a")[::2] == [256, 257]


def test_chat_template_blocks_leave_no_lines():
    template = "{% for m in messages %}\n{{ m.role }}:{{ m.content }}\n{% endfor %}\n"
    tokenizer = GGUFTokenizer(synthetic(chat_template=template))
    assert tokenizer.decode(tokenizer.apply_chat("a")) == "user:a\n"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "4", "a", " ", "1", "2"]),
        ("gpt-2", ["1234", "a", " ", "12"]),
        ("llama-bpe", ["123", "4", "a", " ", "12"]),
    ],
)
def test_numbers_are_split_as_the_model_learned(pre, expected):
    tokenizer = GGUFTokenizer(synthetic(pre, merges=["1 2", "12 3", "123 4"]))
    assert pieces(tokenizer, "1234a 12") == expected


def test_llama3_takes_known_words_whole():
    keys = {"merges": ["a b"], "more": [("abc", 1)]}
    assert pieces(GGUFTokenizer(synthetic("llama-bpe", **keys)), "abc") == ["abc"]
    assert pieces(GGUFTokenizer(synthetic("gpt-2", **keys)), "abc") == ["ab", "c"]


def test_user_defined_tokens_are_always_found():
    tokenizer = GGUFTokenizer(synthetic(more=[("<tool>", 4)]))
    assert tokenizer.encode("a<tool>")[1:] == [256]


@pytest.mark.parametrize(("wanted", "expected"), [(True, [256]), (False, []), (None, [])])
def test_beginning_of_text(wanted, expected):
    keys = {"ggml.bos_token_id": 256, "ggml.add_bos_token": wanted}
    tokenizer = GGUFTokenizer(synthetic(more=[("<s>", 3)], **keys))
    assert tokenizer.encode("a", bos=True)[:-1] == expected
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", "llama", "byte-level BPE .*; got 'llama'. Use another"),
        ("model", None, "byte-level BPE"),
        ("pre", "qwen2", "'gpt-2', 'llama-bpe' and 'smollm' .*; got 'qwen2'. Use another"),
    ],
)
def test_other_tokenizers(key, value, says):
    with pytest.raises(UnsupportedModelError, match=says):
        GGUFTokenizer(synthetic() | {f"tokenizer.ggml.{key}": value})


@pytest.mark.parametrize("key", ["tokens", "merges"])
def test_no_vocabulary(key):
    with pytest.raises(ModelFileError, match=f"tokenizer.ggml.{key} is missing"):
        GGUFTokenizer(synthetic() | {f"tokenizer.ggml.{key}": None})
