"""Prompts, completions and chats: what is encoded, what is learned, how it is packed; transformers judges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ryot.config import KernelPlan, replace
from ryot.edge.chat import load_chat_template
from ryot.errors import DataError
from ryot.models.sources.opening import open_checkpoint
from ryot.models.token_ids import TokenIds
from ryot.run.variant_data import prepare_variant
from ryot.train.batch import Batch
from ryot.train.corpus import load_corpus
from ryot.train.dataset import Dataset, prepare_dataset
from ryot.train.initial import build_initial
from ryot.train.loop import Trainer, TrainJob
from ryot.train.model import Decoder
from ryot.train.packing import IGNORED, PackedSequences
from ryot.train.records import Chat, Pair, RecordEncoder
from ryot.train.source_text import SourceText, read_source_text
from ryot.train.step import TrainStep
from tests.edge.tokenizer_kinds import KINDS, write_tokenizer_folder
from tests.models.checkpoints import VOCAB_SIZE
from tests.train.adapting import adapted, sums, write_jsonl

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

SPECIAL_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def with_template(checkpoint: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """The checkpoint with a chat template."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def llama(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return with_template(hf_checkpoint("llama"), tmp_path / "chatty")


@pytest.fixture
def data(llama: Path, tmp_path: Path) -> Dataset:
    path = write_jsonl(tmp_path / "sums.jsonl", sums(300))
    text = read_source_text(open_checkpoint(str(llama)), VOCAB_SIZE)
    return prepare_dataset(load_corpus([str(path)]), VOCAB_SIZE, tmp_path / "cache", text=text)[0]


def test_a_pair_is_learned_from_its_answer_to_the_token_that_ends_it(llama: Path) -> None:
    text = read_source_text(open_checkpoint(str(llama)), VOCAB_SIZE)
    ids, learned = RecordEncoder(text).encode(Pair("2+2=", " 4"), "here")
    assert text.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "<|endoftext|>2+2= 4<|endoftext|>"
    assert text.tokenizer.decode(ids[learned].tolist(), skip_special_tokens=False) == " 4<|endoftext|>"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_answer_follows_its_prompt_without_a_space_of_its_own(kind: str, tmp_path: Path) -> None:
    # Tokenizers of SentencePiece's kind begin a text with a space, which is none where a text goes on.
    tokenizer = KINDS[kind]()
    folder = write_tokenizer_folder(tmp_path / "source", tokenizer)
    template = load_chat_template(folder, {"chat_template": SPECIAL_TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"})
    end = tokenizer.token_to_id("</s>")
    text = SourceText(
        tokenizer=tokenizer, token_ids=TokenIds(None, (end,), None), template=template, files={}, where="here"
    )
    ids, learned = RecordEncoder(text).encode(Pair("def add(", "a, b):"), "here")
    assert tokenizer.decode(ids[:-1].tolist()) == "def add(a, b):"
    assert tokenizer.decode(ids[~learned].tolist()) == "def add("
    turns = (("user", "one two"), ("assistant", "return a"), ("user", "three"), ("assistant", "add"))
    ids, learned = RecordEncoder(text).encode(Chat(turns), "here")
    whole = "".join(f"<|turn|>{role}\n{content}</s>" for role, content in turns)
    assert ids.tolist() == tokenizer.encode(whole, add_special_tokens=False).ids
    assert learned.sum() and (ids[learned] == end).sum() == 2


def test_the_answers_of_a_chat_are_those_that_transformers_marks(llama: Path) -> None:
    text = read_source_text(open_checkpoint(str(llama)), VOCAB_SIZE)
    said = [("system", "S"), ("user", "a b"), ("assistant", "c  d"), ("user", "e"), ("assistant", "f\n")]
    ids, learned = RecordEncoder(text).encode(Chat(tuple(said)), "here")
    # The same template with the marks that transformers looks for.
    marked = TEMPLATE.replace(
        "<s>{{ m.role }}\n{{ m.content }}<|endoftext|>\n",
        "<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|endoftext|>{% endif %}{{ '\n' }}",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    theirs = tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in said],
        chat_template=marked,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert ids.tolist() == theirs["input_ids"]
    assert learned.astype(int).tolist() == theirs["assistant_masks"]


def test_loss_and_gradients_are_those_of_transformers_with_masked_labels(
    data: Dataset, llama: Path, tmp_path: Path
) -> None:
    variant = adapted(tmp_path, llama)
    sequences = PackedSequences(data, "train", 24)
    inputs, targets, documents = sequences.take(np.arange(4))
    step = TrainStep(variant, KernelPlan(loss_chunk=8))
    loss = step.loss(Batch(inputs, targets, documents))
    loss.backward()
    # Each document alone, as transformers takes it.
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for row in range(4):
        for number in range(int(documents[row].max()) + 1):
            at = documents[row] == number
            logits = model(inputs[row][at][None]).logits[0]
            labels = targets[row][at]
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
    assert (documents.max(dim=1).values > 0).all(), "documents share sequences"
    (total / count).backward()
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    ours = step.model.embedding.weight.grad
    expected = model.model.embed_tokens.weight.grad
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-7


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3_text"])
def test_a_packed_document_is_computed_as_if_alone(
    name: str, attention: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model: Decoder = build_initial(adapted(tmp_path, hf_checkpoint(name)), attention).eval()
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 7 + [1] * 11 + [2] * 4 + [-1] * 2])
    with torch.no_grad():
        packed = model(ids, documents)
        for start, stop in ((0, 7), (7, 18), (18, 22)):
            alone = model(ids[:, start:stop])
            assert (packed[:, start:stop] - alone).abs().max() < 1e-4
        assert (model(ids)[:, 7:18] - packed[:, 7:18]).abs().max() > 1e-2, "documents would see each other"


def test_every_record_is_packed_once_and_nothing_else(data: Dataset) -> None:
    sequences = PackedSequences(data, "train", 40)
    seen = []
    for row in range(len(sequences)):
        inputs, targets, documents = (t[0] for t in sequences.take(np.array([row])))
        for number in range(int(documents.max()) + 1):
            at = documents == number
            seen.append(inputs[at].tolist())
            assert (targets[at] != IGNORED).any()
        assert (targets[documents < 0] == IGNORED).all()
    starts, tokens = data.starts("train"), data.tokens("train")
    expected = [tokens[a : b - 1].tolist() for a, b in itertools.pairwise(starts)]
    assert sorted(seen) == sorted(expected)
    assert sequences.report.filled > 0.8 and sequences.report.documents == len(expected)


def test_micro_batches_weigh_answers_alike(data: Dataset, llama: Path, tmp_path: Path) -> None:
    variant = adapted(tmp_path, llama)
    halves = replace(variant, train=replace(variant.train, gradient_accumulation_steps=4))
    batch = Batch(*PackedSequences(data, "train", 24).take(np.arange(4)))
    losses = []
    for recipe in (variant, halves):
        step = TrainStep(recipe, KernelPlan())
        losses.append((*step.take(batch, 0.0, 0),))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_on_pairs_learns_the_answers(data: Dataset, llama: Path, tmp_path: Path) -> None:
    variant = adapted(tmp_path, llama, steps=40)
    trainer = Trainer(TrainJob(variant=variant, seed=0, dataset_dir=str(data.path)), KernelPlan(loss_chunk=64))
    losses = [e.loss for e in trainer.run_chunk(120) if e.kind == "eval" and e.split == "val"]
    assert losses[-1] < 0.6 * losses[0]


def test_the_same_question_is_in_one_split_and_copies_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 40}", "completion": f"a{i % 80}"} for i in range(160)]
    corpus = load_corpus([str(write_jsonl(tmp_path / "x.jsonl", rows))])
    by_question: dict[str, set[str]] = {}
    for document, split in zip(corpus.documents, corpus.splits):
        assert isinstance(document.content, Pair)
        by_question.setdefault(document.content.prompt, set()).add(split)
    assert all(len(splits) == 1 for splits in by_question.values())
    assert corpus.num_copies == 80


def test_parquet_holds_the_same_records(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(60)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = load_corpus([str(tmp_path / "x.parquet")])
    same = load_corpus([str(write_jsonl(tmp_path / "x.jsonl", rows))])
    assert [d.content for d in found.documents] == [d.content for d in same.documents]


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"x\.parquet is damaged or no Parquet file"):
        load_corpus([str(tmp_path / "x.parquet")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "line 1 has no string field 'completion'"),
        ({"prompt": 3, "completion": "x"}, "line 1 has no string field 'prompt'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "line 1: a message's role is 'robot', expected one of"),
        ({"messages": ["hi"]}, "line 1: a message is 'hi', expected a table with role and content"),
        ({"messages": [{"role": "user", "content": 7}]}, "line 1 has no string field 'content'"),
    ],
)
def test_a_record_that_is_none_is_refused_with_its_place(row: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError, match=message):
        load_corpus([str(path)])


def test_records_without_an_answer_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [*sums(5), {"prompt": "a", "completion": " \n"}])
    assert len(load_corpus([str(path)]).documents) == 5
    assert "1 records have no answer and are left out, the first is x.jsonl#000000006" in caplog.text
    path = write_jsonl(tmp_path / "y.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="holds no record with an answer"):
        load_corpus([str(path)])


def test_chats_without_a_template_are_refused(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x"}]} for i in range(80)
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    variant = adapted(tmp_path, hf_checkpoint("llama"))
    with pytest.raises(DataError, match=r"x\.jsonl#\d+: is a chat, but .*llama has no chat template"):
        prepare_variant(variant, load_corpus([str(path)]), tmp_path / "cache")


def test_tokens_of_another_models_template_are_refused(llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"<|im_start|>{i}", "completion": "x"} for i in range(80)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"holds <\|im_start\|>, which .* has no token for"):
        prepare_variant(adapted(tmp_path, llama), load_corpus([str(path)]), tmp_path / "cache")


def test_long_records_are_cut_or_left_out_and_said(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = [{"prompt": f"{i:03d}", "completion": "y" * 100} for i in range(40)]
    hopeless = [{"prompt": f"{i:03d}" + "x" * 100, "completion": "y"} for i in range(40, 90)]
    path = write_jsonl(tmp_path / "x.jsonl", [*sums(300), *long, *hopeless])
    told: list[str] = []
    dataset, _ = prepare_variant(
        adapted(tmp_path, llama), load_corpus([str(path)]), tmp_path / "cache", on_report=told.append
    )
    report = PackedSequences(dataset, "train", 24).report
    assert 25 < report.truncated <= 40 and 30 < report.refused <= 50
    assert f"{report.truncated} records lose their end and {report.refused} are left out" in caplog.text
    assert told == [f"tiny: {report.text}"]
