"""Texts as tokens: what is learnt, in which order, under which ids; and that the loss of a sample is that of Hugging Face."""

import logging
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from robust_if import Samples, Task

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from robust_if.language import small  # noqa: E402
from robust_if.language.encoding import encode  # noqa: E402
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT  # noqa: E402

CORPUS = ["a film of great charm, and the actors are a joy", "reverse the words: one two three", "what is 12 plus 30? it is 42."] * 3
CHAT = "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = small.tokenizer(CORPUS, vocabulary=320, positions=64)


@cache
def framed(*, end: bool = False) -> Any:
    """A tokenizer that puts a token at the beginning of every text, as Llama's does, and perhaps one at its end."""
    made = small.tokenizer(CORPUS, vocabulary=320, positions=64)
    made.add_special_tokens({"bos_token": "<begin>"})
    special = [("<begin>", made.bos_token_id), ("<end>", made.eos_token_id)]
    form = "<begin> $A <end>" if end else "<begin> $A"
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=form, special_tokens=special)
    return made


def chatty() -> Any:
    made = small.tokenizer(CORPUS, vocabulary=320, positions=64)
    made.chat_template = CHAT
    return made


def rows_of(samples: Samples) -> list[tuple[list[int], list[int]]]:
    tokens, labels = samples.batch(slice(None))
    return [(x[x != NO_TOKEN].tolist(), y[x != NO_TOKEN].tolist()) for x, y in zip(tokens, labels, strict=True)]


def learnt(tokenizer: Any, labels: list[int]) -> str:
    text: str = tokenizer.decode([token for token in labels if token != NOT_LEARNT], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def pairs(*rows: tuple[str, str], **more: list[Any]) -> Any:
    return datasets.Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [c for _, c in rows], **more})


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
# Splitting in GPT-2's way, a text that begins with a space and a letter begins with a token of its own after one that ends in a letter.
COMPLETION = st.builds(lambda text: " a" + text, TEXT)
PROMPT = st.builds(lambda text: text + "a", TEXT)


@given(rows=st.lists(st.tuples(PROMPT, COMPLETION), min_size=1, max_size=4), frame=st.booleans(), kind=st.sampled_from(["plain", "begin", "both"]))
def test_the_completion_and_only_it_is_learnt(rows: list[tuple[str, str]], frame: bool, kind: str) -> None:
    tokenizer = PLAIN if kind == "plain" else framed(end=kind == "both")
    data = pairs(*rows)
    samples = encode(data.to_pandas() if frame else data, tokenizer, max_length=1000)
    assert samples.ids.tolist() == list(range(len(rows)))
    for (prompt, completion), (tokens, labels) in zip(rows, rows_of(samples), strict=True):
        assert learnt(tokenizer, labels) == completion
        assert learnt(tokenizer, tokens) == prompt + completion
        assert labels[-1] == tokenizer.eos_token_id and tokens.count(tokenizer.eos_token_id) == 1
        assert (tokens[0] == tokenizer.bos_token_id) == (kind != "plain")


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@example(rows=[("a film of great ch", "arm"), ("reve", "rse"), ("é", "\u0301")])
def test_a_token_that_spans_both_is_learnt_and_none_of_the_completion_is_lost(rows: list[tuple[str, str]]) -> None:
    for (prompt, completion), (tokens, labels) in zip(rows, rows_of(encode(pairs(*rows), PLAIN, max_length=1000)), strict=True):
        whole = PLAIN(prompt + completion)["input_ids"]
        assert tokens == [*whole, PLAIN.eos_token_id]
        assert labels == [NOT_LEARNT] * labels.count(NOT_LEARNT) + tokens[labels.count(NOT_LEARNT) :]
        learnt_bytes = b"".join(bytes_of(token) for token in labels[labels.count(NOT_LEARNT) : -1])
        assert learnt_bytes.endswith(completion.encode())
        spanning = labels.count(NOT_LEARNT) < len(PLAIN(prompt)["input_ids"])
        assert (len(learnt_bytes) > len(completion.encode())) == spanning


def test_a_space_that_ends_the_prompt_belongs_to_the_first_word_of_the_completion() -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))  # as Llama's: a space is the beginning of a word
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    made.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
    for prompt, completion in (("what is it? ", "a joy"), ("what is it?", " a joy")):
        ((tokens, labels),) = rows_of(encode(pairs((prompt, completion)), tokenizer))
        before = tokenizer("what is it?")["input_ids"]
        assert labels == [NOT_LEARNT] * len(before) + tokens[len(before) :] and tokens[: len(before)] == before


def bytes_of(token: int) -> bytes:
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # transformers also holds a function of the module's name

    alphabet = {char: code for code, char in bytes_to_unicode().items()}
    return bytes(alphabet[char] for char in PLAIN.convert_ids_to_tokens(token))


def test_a_completion_that_begins_like_the_end_of_a_prompt_is_learnt_from_there() -> None:
    tokenizer = framed(end=True)  # the prompt alone ends in the token with which the completion begins
    ((tokens, labels),) = rows_of(encode(pairs(("one", "<end> two")), tokenizer))
    before = 1 + len(PLAIN("one")["input_ids"])
    assert labels == [NOT_LEARNT] * before + tokens[before:] and tokens.count(tokenizer.eos_token_id) == 2


def test_the_prompt_is_learnt_where_that_is_asked_for() -> None:
    ((tokens, labels),) = rows_of(encode(pairs(("one two", " three")), PLAIN, learn="all"))
    assert labels == tokens


def test_an_empty_prompt_leaves_all_to_learn() -> None:
    ((tokens, labels),) = rows_of(encode(pairs(("", "three")), PLAIN))
    assert labels == tokens


@pytest.mark.parametrize("end", [False, True])
def test_a_text_is_learnt_with_its_end(end: bool) -> None:
    tokenizer = framed(end=end)
    ((tokens, labels),) = rows_of(encode(pd.DataFrame({"line": ["one two"]}), tokenizer, text="line"))
    assert tokens == labels == [tokenizer.bos_token_id, *PLAIN("one two")["input_ids"], tokenizer.eos_token_id]


def test_a_tokenizer_without_an_end_adds_none() -> None:
    tokenizer = small.tokenizer(CORPUS, vocabulary=320)
    tokenizer.eos_token = None
    ((tokens, _),) = rows_of(encode(pd.DataFrame({"text": ["one two"]}), tokenizer))
    assert tokens == PLAIN("one two")["input_ids"]


def test_a_text_and_its_class() -> None:
    data = datasets.Dataset.from_dict({"text": ["one two", "three"], "label": ["no", "yes"], "id": ["a", "b"]}).class_encode_column("label")
    samples = encode(data, framed(end=True), kind="classification")
    assert samples.labels.tolist() == [0, 1] and samples.ids.tolist() == ["a", "b"]
    assert samples.batch(slice(None))[0][0].tolist() == framed(end=True)("one two")["input_ids"]


@given(
    ids=st.one_of(
        st.lists(st.integers(-5, 10**12), min_size=1, unique=True, max_size=5), st.lists(st.text(min_size=1), min_size=1, unique=True, max_size=5)
    )
)
def test_order_and_ids_are_kept(ids: list[Any]) -> None:
    rows = [(f"prompt {i}", f" completion {i}") for i in range(len(ids))]
    samples = encode(pairs(*rows, id=ids), PLAIN)
    assert samples.ids.tolist() == ids
    assert [learnt(PLAIN, labels) for _, labels in rows_of(samples)] == [completion for _, completion in rows]


def test_the_format_of_a_data_set_does_not_matter() -> None:
    rows = [{"id": 3, "input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"id": 4, "input_ids": [8, 9, 10], "labels": [-100, -100, 10]}]
    data = datasets.Dataset.from_list(rows)
    expected = rows_of(encode(data, PLAIN))
    for other in (data.with_format("torch"), data.with_format("numpy"), data.to_pandas(), data.select([1, 0]).select([1, 0])):
        assert encode(other, PLAIN).ids.tolist() == [3, 4]
        assert rows_of(encode(other, PLAIN)) == expected == [(row["input_ids"], row["labels"]) for row in rows]


# Conversations


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if k % 2 else "user", "content": text} for k, text in enumerate(texts)]


def test_the_last_turn_of_a_conversation_is_learnt() -> None:
    tokenizer = chatty()
    data = datasets.Dataset.from_dict({"messages": [conversation("one", "two", "three", "four"), conversation("what?", "it is 42.")]})
    for given_data in (data, data.to_pandas()):
        (tokens, labels), (_, second) = rows_of(encode(given_data, tokenizer))
        assert tokens == tokenizer.apply_chat_template(data[0]["messages"], return_dict=False)
        assert learnt(tokenizer, labels) == "four\n" and learnt(tokenizer, second) == "it is 42.\n"
    ((tokens, labels), _) = rows_of(encode(data, tokenizer, learn="all"))
    assert labels == tokens


def test_nothing_is_put_around_what_the_template_writes() -> None:
    tokenizer = framed.__wrapped__(end=True)
    tokenizer.chat_template = CHAT
    ((tokens, _),) = rows_of(encode(pd.DataFrame({"messages": [conversation("one", "two")]}), tokenizer))
    assert tokenizer.decode(tokens) == "<|user|>one<end>\n<|assistant|>two<end>\n"


def test_keys_that_a_table_adds_to_a_turn_do_not_reach_the_template() -> None:
    tokenizer = chatty()
    tokenizer.chat_template = CHAT.replace("<|{{ turn.role }}|>", "<|{{ turn.role }}|>{% if turn.name is defined %}!{% endif %}")
    turns = [{"role": "user", "content": "one", "name": None}, {"role": "assistant", "content": "two", "name": None}]
    ((tokens, _),) = rows_of(encode(datasets.Dataset.from_dict({"messages": [turns]}), tokenizer))
    assert "!" not in tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (conversation("one", "two", "three"), "the last turn to be the assistant's"),
        (conversation("one", ""), "the last turn to be the assistant's, with a text"),
        (conversation("one"), "two or more turns"),
        ("one", "two or more turns .*, got one"),
        (3, "two or more turns .*, got 3"),
        ([{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}], "two or more turns"),
        (None, "messages: expected a value in every row, got none: 1 of 1, id 0"),
    ],
)
def test_a_conversation_without_an_answer_is_refused(turns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(pd.DataFrame({"messages": [turns]}), chatty())


def test_a_template_that_does_not_fit_is_refused() -> None:
    data = pd.DataFrame({"messages": [conversation("one", "two")]})
    with pytest.raises(ValueError, match="no chat template"):
        encode(data, PLAIN)
    tokenizer = chatty()
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ValueError, match="does not go on .* id 0"):
        encode(data, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="does not take those of id 0: no such role"):
        encode(data, tokenizer)


# Tokens that are given

TOKENS = st.lists(st.lists(st.integers(3, 200), min_size=2, max_size=6), min_size=1, max_size=6)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("left", [True, False])
@given(rows=TOKENS)
@example(rows=[[5, 6], [7, 8, 9]])
def test_padding_on_either_side_is_moved_to_the_end(rows: list[list[int]], left: bool, masked: bool) -> None:
    side = "left" if left else "right"
    padded = PLAIN.pad({"input_ids": rows}, padding_side=side)
    labels = [[token if mask else NOT_LEARNT for token, mask in zip(x, m, strict=True)] for x, m in zip(*padded.values(), strict=True)]
    data = pd.DataFrame({"input_ids": padded["input_ids"], "labels": labels} | ({"attention_mask": padded["attention_mask"]} if masked else {}))
    assert rows_of(encode(data, PLAIN)) == [(row, row) for row in rows]
    tokens, labels = encode(data, PLAIN).batch(slice(None))
    assert tokens.shape == labels.shape == (len(rows), max(map(len, rows)))


@example(rows=[[5, 6], [7, 8, 9], [10, 11]], cuts=[False] * 6)
@given(rows=TOKENS, cuts=st.lists(st.booleans(), min_size=6, max_size=6))
def test_packed_rows_give_the_same_samples(rows: list[list[int]], cuts: list[bool]) -> None:
    groups: list[list[int]] = [[]]
    for k in range(len(rows)):
        groups = [*groups, [k]] if cuts[k] and groups[-1] else [*groups[:-1], [*groups[-1], k]]
    masks = [[0] + [1] * (len(row) - 1) for row in rows]
    apart = encode(pd.DataFrame({"input_ids": rows, "completion_mask": masks}), PLAIN)
    packed = {
        "input_ids": [[token for k in group for token in rows[k]] for group in groups],
        "completion_mask": [[mask for k in group for mask in masks[k]] for group in groups],
        "seq_lengths": [[len(rows[k]) for k in group] for group in groups],
        "id": [f"row {i}" for i in range(len(groups))],
    }
    together = encode(datasets.Dataset.from_dict(packed), PLAIN)
    assert rows_of(together) == rows_of(apart)
    assert together.ids.tolist() == [f"row {i}:{k}" for i, group in enumerate(groups) for k in range(len(group))]
    del packed["seq_lengths"]
    assert len(encode(datasets.Dataset.from_dict(packed), PLAIN)) == len(groups)


def test_all_masks_count_and_none_if_all_is_learnt() -> None:
    data = pd.DataFrame(
        {"input_ids": [[5, 6, 7, 8]], "labels": [[5, 6, 7, -100]], "completion_mask": [[0, 1, 1, 1]], "assistant_masks": [[1, 0, 1, 1]]}
    )
    assert rows_of(encode(data, PLAIN)) == [([5, 6, 7, 8], [-100, -100, 7, -100])]
    assert rows_of(encode(data, PLAIN, learn="all")) == [([5, 6, 7, 8], [5, 6, 7, 8])]


def test_given_tokens_of_a_class() -> None:
    data = pd.DataFrame({"input_ids": [[0, 0, 5], [6, 7, 8]], "attention_mask": [[0, 0, 1], [1, 1, 1]], "label": [1, 0]})
    tokens, labels = encode(data, PLAIN, kind="classification").batch(slice(None))
    assert tokens.tolist() == [[5, -1, -1], [6, 7, 8]] and labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[5, 6], [7, 1000]]}, "input_ids: expected tokens from 0 to 319, got others: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, -1]]}, "input_ids: expected tokens from 0"),
        ({"input_ids": [[5, 6], "one"]}, "input_ids: expected a list of whole numbers, got something else: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [0.5, 1.5]]}, "input_ids: expected a list of whole numbers"),
        ({"input_ids": [[5, 6], [0, 0]]}, "expected at least one token per sample, got none: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7]]}, "no token is learnt: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8]], "labels": [[-100, 6], [7, -100]]}, "no token is learnt: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [8, -100]]}, "not shifted.*: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [8]]}, "labels: expected as many values as input_ids: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8, 9]], "attention_mask": [[1, 1], [1, 0, 1]]}, "between tokens: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1, 2]]}, "attention_mask: expected 0 and 1, got others: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8]], "seq_lengths": [[2], [1, 2]]}, "seq_lengths: .*: 1 of 2, id 1"),
        ({"input_ids": [[5, 6], [7, 8]], "seq_lengths": [[2], [2, 0]]}, "seq_lengths: .*: 1 of 2, id 1"),
    ],
)
def test_given_tokens_that_make_no_sense_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(pd.DataFrame(columns), PLAIN)


def test_packed_rows_have_no_class_and_a_padding_token_that_ends_a_text_needs_a_mask() -> None:
    with pytest.raises(ValueError, match="seq_lengths: a packed row holds several samples"):
        encode(pd.DataFrame({"input_ids": [[5, 6]], "seq_lengths": [[1, 1]], "label": [0]}), PLAIN, kind="classification")
    tokenizer = small.tokenizer(CORPUS, vocabulary=320)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    assert rows_of(encode(pd.DataFrame({"input_ids": [[5, 6, end]]}), tokenizer)) == [([5, 6, end], [5, 6, end])]
    with pytest.raises(ValueError, match="cannot be told apart; add a column 'attention_mask': 1 of 1, id 0"):
        encode(pd.DataFrame({"input_ids": [[5, 6, end, end]]}), tokenizer)
    tokenizer.pad_token = None
    assert rows_of(encode(pd.DataFrame({"input_ids": [[5, 6, end, end]]}), tokenizer))[0][0] == [5, 6, end, end]


# Lengths


def test_a_text_longer_than_the_tokenizer_takes_is_an_error_and_is_cut_on_demand(caplog: pytest.LogCaptureFixture) -> None:
    data = pairs(("one", " two"), ("one", " two" * 70), id=["short", "long"])
    length = len(PLAIN("one" + " two" * 70)["input_ids"]) + 1
    with pytest.raises(ValueError, match=rf"takes up to 64 tokens; pass max_length=64 to cut what is longer: 1 of 2, id long \({length} tokens\)"):
        encode(data, PLAIN)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        samples = encode(data, PLAIN, max_length=10)
    assert [record.getMessage() for record in caplog.records] == ["encode: 1 of 2 samples have more than 10 tokens and were cut at the end"]
    (short, _), (tokens, labels) = rows_of(samples)
    assert short[-1] == PLAIN.eos_token_id and tokens == PLAIN("one" + " two" * 70)["input_ids"][:10] and labels[-1] == tokens[-1]
    with pytest.raises(ValueError, match="no token within max_length=1 is learnt: 2 of 2, ids short, long"):
        encode(data, PLAIN, max_length=1)


def test_a_tokenizer_without_a_limit_has_none() -> None:
    tokenizer = small.tokenizer(CORPUS, vocabulary=320, positions=int(1e30))
    assert len(rows_of(encode(pd.DataFrame({"text": ["one " * 300]}), tokenizer))[0][0]) > 300


def test_what_closes_a_text_to_be_classified_survives_the_cut() -> None:
    tokenizer = framed(end=True)
    samples = encode(pd.DataFrame({"text": ["one two three one two three"], "label": [0]}), tokenizer, kind="classification", max_length=5)
    assert samples.batch(slice(None))[0][0].tolist() == tokenizer("one two three one two three", truncation=True, max_length=5)["input_ids"]


# Bad input


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["one"]}, {"kind": "seq2seq"}, "kind: expected 'causal-lm' or 'classification', got 'seq2seq'"),
        ({"text": ["one"]}, {"learn": "prompt"}, "learn: expected 'completion' or 'all'"),
        ({"text": ["one"]}, {"max_length": 0}, "max_length: expected a number of tokens from 1"),
        ({"question": ["one"], "prompt": ["two"]}, {}, r"'prompt' and 'completion', it has \['question', 'prompt'\]"),
        ({"question": ["one"]}, {"kind": "classification"}, r"column 'label', it has \['question'\]"),
        ({"question": ["one"], "label": [0]}, {"kind": "classification"}, r"'input_ids' or 'text', it has \['question', 'label'\]"),
        ({"text": []}, {}, "at least one row, got none"),
        ({"text": ["one", "", None], "id": ["a", "b", "c"]}, {}, "text: expected a value in every row, got none: 1 of 3, id c"),
        ({"text": ["one", "", ""], "id": ["a", "b", "c"]}, {}, "text: expected a text, got an empty one: 2 of 3, ids b, c"),
        ({"prompt": ["one"], "completion": [""]}, {}, "completion: expected a text, got an empty one"),
        ({"prompt": ["one"], "completion": [42]}, {}, r"completion: expected texts, got int \(id 0\); data.cast_column"),
        ({"prompt": [["one"]], "completion": ["two"]}, {}, "prompt: expected texts, got list"),
        ({"text": ["a b", "c d"], "id": [1, 1]}, {}, "id: expected unique ids, but 1 occurs 2 times"),
        ({"text": ["a b", "c d"], "id": ["a", None]}, {}, "id: expected one in every row, got none: 1 of 2, row 1"),
        ({"text": ["a b"], "id": [0.5]}, {}, "id: expected whole numbers or texts, got float"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, {"kind": "classification"}, r"class_encode_column\('label'\)"),
        ({"text": ["a", "b"], "label": [0, -1]}, {"kind": "classification"}, "got none or -1: 1 of 2, id 1"),
        ({"text": ["a", "b"], "label": [0, None]}, {"kind": "classification"}, "got none or -1: 1 of 2, id 1"),
        ({"text": ["a", "b"], "label": [0.5, 1]}, {"kind": "classification"}, "class numbers from 0, got others"),
        ({"text": ["a", "b"], "label": [0, -2]}, {"kind": "classification"}, "class numbers from 0, got others: 1 of 2, id 1"),
    ],
)
@pytest.mark.parametrize("frame", [True, False])
def test_bad_input_is_refused(columns: dict[str, Any], options: dict[str, Any], message: str, frame: bool) -> None:
    with pytest.raises(ValueError, match=message):
        encode(pd.DataFrame(columns) if frame else datasets.Dataset.from_dict(columns), PLAIN, **options)


def test_what_is_no_data_set_is_refused() -> None:
    data = pairs(("one", " two"))
    with pytest.raises(TypeError, match=r"got the splits \['train'\]"):
        encode(datasets.DatasetDict({"train": data}), PLAIN)
    for other in (["one"], data.to_iterable_dataset()):
        with pytest.raises(TypeError, match="expected a datasets.Dataset or a pandas data frame"):
            encode(other, PLAIN)


# Losses


def model_of(name: str) -> Any:
    if name == "gpt2":
        return small.language_model(PLAIN, layers=2, width=16, heads=2).double()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(vocab_size=len(PLAIN), max_position_embeddings=64, pad_token_id=PLAIN.pad_token_id, **shape)
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).double().eval()


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_loss_of_a_sample_is_that_of_hugging_face_whatever_its_padding(name: str) -> None:
    model = model_of(name)
    rows = [("one two", " three"), ("what is 12 plus 30?", " it is 42. it is a joy of great charm"), ("", "one two three four")]
    samples = encode(pairs(*rows), PLAIN)
    for reduction in ("sum", "mean"):
        task = Task.from_transformers(model, PLAIN, reduction=reduction)
        together = task.losses(task.params(), samples.batch(slice(None)))
        for i, (tokens, labels) in enumerate(rows_of(samples)):
            x, y = torch.tensor([tokens]), torch.tensor([labels])
            with torch.no_grad():
                made = model(input_ids=x, labels=y)
            scale = (y[:, 1:] != NOT_LEARNT).sum() if reduction == "sum" else 1
            torch.testing.assert_close(together[i], made.loss.double() * scale, rtol=1e-6, atol=0)  # Hugging Face takes it in float32
            exact = torch.nn.functional.cross_entropy(made.logits[0, :-1], y[0, 1:], ignore_index=NOT_LEARNT)
            torch.testing.assert_close(together[i], exact * scale, rtol=1e-10, atol=0)
            for more in (0, 1, 20):
                padded = [torch.nn.functional.pad(each, (0, more), value=filler) for each, filler in ((x, NO_TOKEN), (y, NOT_LEARNT))]
                torch.testing.assert_close(task.losses(task.params(), tuple(padded))[0], together[i].detach(), rtol=1e-10, atol=0)


def test_the_loss_of_a_class_is_that_of_hugging_face_and_does_not_depend_on_padding() -> None:
    model = small.classifier(PLAIN, 3, layers=2, width=16, heads=2).double()
    samples = encode(pd.DataFrame({"text": ["one two", "what is 12 plus 30?", "a film"], "label": [0, 2, 1]}), PLAIN, kind="classification")
    task = Task.from_transformers(model, PLAIN, "classification")
    losses = task.losses(task.params(), samples.batch(slice(None)))
    for i, (text, label) in enumerate([("one two", 0), ("what is 12 plus 30?", 2), ("a film", 1)]):
        with torch.no_grad():
            expected = model(**PLAIN(text, return_tensors="pt"), labels=torch.tensor([label])).loss
        torch.testing.assert_close(losses[i], expected, rtol=1e-10, atol=0)


def test_rows_in_another_order_are_the_same_samples() -> None:
    data = pairs(*[(f"prompt {i}", " completion" * (i + 1)) for i in range(5)], id=list("abcde"))
    order = np.array([3, 0, 4, 1, 2])
    moved, samples = encode(data.select(order), PLAIN), encode(data, PLAIN).take(order)
    assert moved.ids.tolist() == samples.ids.tolist() and rows_of(moved) == rows_of(samples)
