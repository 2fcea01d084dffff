"""Perplexity and divergence of one model, and the files that keep predictions."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ktlab import cli
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import byte_tokenizer
from ktlab.checkpoint.writer import write_gguf
from ktlab.cli.eval import bar
from ktlab.errors import ContextError, KtlabError, SettingError
from ktlab.measurement.compare import compare
from ktlab.measurement.evaluation import Evaluation, stream_evaluation
from ktlab.measurement.logits_file import LogitsFileError, SavedLogits, encode
from ktlab.measurement.tokens import Prediction, divergence
from ktlab.model.load import load
from ktlab.model.model import Model


def run(model: Model, text: object, **options: object) -> Evaluation:
    return list(stream_evaluation(model, text, **options))[-1]  # type: ignore[arg-type]


def llama_cpp_file(path: Path, model: Model, ids: list[int], n_ctx: int, bos: int | None) -> None:
    """What `llama-perplexity --kl-divergence-base` writes, step by step after perplexity.cpp."""
    n_vocab, n_chunk = model.config.vocab_size, len(ids) // n_ctx
    out = bytearray(b"_logits_") + struct.pack("<iii", n_ctx, n_vocab, n_chunk)
    out += struct.pack(f"<{n_chunk * n_ctx}i", *ids[: n_chunk * n_ctx])
    first = n_ctx // 2
    for chunk in range(n_chunk):
        tokens = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        if bos is not None:
            tokens[0] = bos
        for logits in model.forward(tokens)[first : n_ctx - 1].tolist():
            most, least = max(logits), min(logits)
            least = max(least, most - 16)
            log_sum = math.log(sum(math.exp(x - most) for x in logits))
            scale = (most - least) / 65535
            out += struct.pack("<ff", scale, least - most - log_sum)
            codes = [round((x - least) / scale) if x > least else 0 for x in logits]
            out += struct.pack(f"<{n_vocab}H", *codes)
            out += b"\xab\xcd" * (n_vocab % 2)  # whatever was in memory
    path.write_bytes(out)


def llama_cpp_kl(base: Tensor, logits: Tensor) -> float:
    """The divergence as perplexity.cpp sums it, of log-probabilities."""
    kept = base > -16
    return float(torch.where(kept, base.exp() * (base - logits.log_softmax(-1)), 0).sum(-1).mean())


def test_the_same_figures_as_compare(model: Model, ids: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    plain = run(model, ids, save=path)
    expected = compare(model, ids, a={}, b={"top_k": 2}, speed=False, max_tokens=None).quality
    assert plain.perplexity.value == pytest.approx(expected.perplexity_a.value, rel=1e-6)
    assert plain.perplexity.low == pytest.approx(expected.perplexity_a.low, rel=1e-6)
    assert plain.against is None and plain.tokens == plain.total_tokens == len(ids) - 1
    found = run(model, ids, settings={"top_k": 2}, baseline=path).against
    assert found is not None
    for name, figure in expected.figures.items():
        assert found.figures[name].value == pytest.approx(figure.value, rel=2e-3, abs=1e-5), name
        assert found.figures[name].high == pytest.approx(figure.high, rel=2e-2, abs=1e-4), name
    same = run(model, None, baseline=path).against
    assert same is not None and same.kl_mean.value < 1e-6 and same.top1_agreement.value > 99.4
    assert Evaluation.from_json(plain.to_json()).perplexity == plain.perplexity


def test_narrowing_and_saying_so(model: Model, ids: Tensor) -> None:
    steps = list(stream_evaluation(model, ids, window=50))
    assert [step.tokens for step in steps] == [*range(50, 599, 50), 599]
    assert not steps[2].done and steps[-1].done
    assert steps[-1].perplexity.half_width < steps[2].perplexity.half_width
    assert "150 of 599 tokens" in str(steps[2]) and "perplexity" in steps[2].to_html()
    drawn = bar(steps[2], 10.0)
    assert "150 of 599 tokens [######" in drawn and "25 %, 30 s left" in drawn
    assert f"perplexity {steps[2].perplexity}" in drawn


@pytest.mark.parametrize("vocabulary", ["even", "odd"])
def test_llama_cpp_files_both_ways(vocabulary: str, tmp_path: Path) -> None:
    size = 261 if vocabulary == "odd" else 272
    model = Model(synthesize(replace(TINY_TEST_CONFIG, vocab_size=size), seed=2))
    ids = torch.randint(256, (210,), generator=torch.Generator().manual_seed(3)).tolist()
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    bos = model.tokenizer.bos_id
    llama_cpp_file(theirs, model, ids, 64, bos)
    run(model, ids, half=True, window=64, save=ours)
    a, b = SavedLogits(theirs), SavedLogits(ours)
    assert (a.scheme, a.vocab_size, a.scored_tokens) == (b.scheme, b.vocab_size, b.scored_tokens)
    assert len(theirs.read_bytes()) == len(ours.read_bytes())
    rows = [np.asarray(f._records)[:, : 4 + f.vocab_size].astype(np.int64) for f in (a, b)]
    assert np.abs(rows[0][:, 4:] - rows[1][:, 4:]).max() <= 1, "one step of rounding at most"

    found = run(model, None, baseline=theirs, settings={"top_k": 2}).against
    assert found is not None and found.tokens == 3 * 31
    with model.override(top_k=2):
        sums = []
        for chunk in range(3):
            tokens = [bos, *ids[chunk * 64 + 1 : chunk * 64 + 63]]
            logits = model.forward(tokens)[32:]
            targets = torch.tensor(ids[chunk * 64 + 33 : chunk * 64 + 64])
            start = chunk * 31
            other = _prediction(logits, targets)
            base = a.prediction(start, other, targets)
            sums.append(llama_cpp_kl(base.logprobs_TV, logits))
            assert torch.equal(base.top1_T, _top1(a, start, 31))
    assert found.kl_mean.value == pytest.approx(sum(sums) / 3, rel=2e-3)


def _prediction(logits: Tensor, targets: Tensor) -> Prediction:
    return Prediction.of(logits, targets)


def _top1(saved: SavedLogits, start: int, count: int) -> Tensor:
    codes = np.asarray(saved._records)[start : start + count, 4 : 4 + saved.vocab_size]
    return torch.from_numpy(codes.argmax(-1))


def test_what_was_cut_off_adds_nothing(tmp_path: Path) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 30.0  # the others lie 30 nats below: llama.cpp keeps 16
    records = encode(logits.numpy())
    assert records[0, 4] == 65535 and not records[0, 5:1004].any()
    header = b"_ktlab1_" + struct.pack("<iii", 4, 1000, 2) + struct.pack("<2i", 1, 0)
    (tmp_path / "x").write_bytes(header + records.tobytes())
    saved = SavedLogits(tmp_path / "x")
    target = torch.tensor([0])
    other = _prediction(logits, target)
    base = saved.prediction(0, other, target)
    assert float(divergence(base.logprobs_TV, other.logprobs_TV)) < 1e-12


def _damage(path: Path, at: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(content)] = content
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "promises .*cut off; save it"),
        (lambda path: path.write_bytes(path.read_bytes()[:14]), "expected _logits_"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, its header promises"),
        (lambda path: path.write_bytes(b""), "begins with b''"),
        (lambda path: _damage(path, 0, b"_logits?"), "begins with b'_logits"),
        (lambda path: _damage(path, 8, b"\xff" * 4), "the header is damaged"),
        (lambda path: _damage(path, 12, b"\xff\xff\xff\x0f"), "bytes, its header promises"),
        (lambda path: _damage(path, 20, b"\xff" * 4), "token ids from -1"),
        (lambda path: _damage(path, 20 + 400, b"\xff" * 8), "holds no numbers"),
    ],
)
def test_damaged_files(damage, expected: str, model: Model, ids: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    run(model, ids[:100], save=path)
    damage(path)
    with pytest.raises(LogitsFileError, match=rf"base.kld: .*{expected}"):
        run(model, None, baseline=path)


def test_baselines_of_something_else(model: Model, ids: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    run(model, ids[:100], save=path)
    other = ids[:100].clone()
    other[41] += 1
    with pytest.raises(LogitsFileError, match="other tokens: .*from token 41 on"):
        run(model, other, baseline=path)
    with pytest.raises(LogitsFileError, match="100 of them, the text has 50"):
        run(model, ids[:50], baseline=path)
    wide = Model(synthesize(replace(TINY_TEST_CONFIG, vocab_size=300), seed=0))
    with pytest.raises(LogitsFileError, match="vocabulary of 272 tokens, .* has 300"):
        run(wide, None, baseline=path)
    with pytest.raises(SettingError, match="window = 8, .*half = True.*max_tokens.*leave it out"):
        run(model, None, baseline=path, window=8, half=True, max_tokens=5)
    with pytest.raises(ContextError, match="no text and no baseline"):
        run(model, None)
    with pytest.raises(ContextError, match="window = 0 tokens: expected 1 to"):
        run(model, ids, window=0)
    with pytest.raises(ContextError, match="too few for one window of 512"):
        run(model, ids[:100], half=True)
    with pytest.raises(OSError):
        run(model, None, baseline=tmp_path / "missing")


def test_nothing_half_written_is_left(
    model: Model, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "base.kld"
    steps = stream_evaluation(model, ids, window=50, save=path)
    next(steps)
    assert not path.exists()
    del steps
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(LogitsFileError, match="need .*the disk has 1000"):
        run(model, ids, save=path)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = synthesize(TINY_TEST_CONFIG, seed=0)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    gguf = str(write_gguf(tmp_path / "m.gguf", TINY_TEST_CONFIG, tensors, byte_tokenizer(272)))
    text, base = tmp_path / "t.txt", str(tmp_path / "base.kld")
    text.write_text("Grüße from a small text. " * 20, encoding="utf-8")
    command = ["eval", gguf, "--text", str(text)]
    assert cli.main([*command, "--save-logits", base, "--max-tokens", "300"]) == 0
    said = capsys.readouterr()
    assert "300 tokens, windows of 256 tokens" in said.out and "bits per byte" in said.out
    assert said.err == f"saved to {base}\n"
    assert cli.main([*command, "--baseline", base, "--set", "top_k=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["label"] == "top_k=2" and found["against"]["kl_mean"]["value"] > 0
    expected = run(load(gguf), None, baseline=base, settings={"top_k": 2})
    assert found["perplexity"]["value"] == pytest.approx(expected.perplexity.value, rel=1e-6)
    assert cli.main(["eval", gguf]) == 2
    assert "expected --text FILE" in capsys.readouterr().err
    assert cli.main(["eval", gguf, "--baseline", str(text)]) == 2
    assert "t.txt: it begins with" in capsys.readouterr().err
    assert issubclass(LogitsFileError, KtlabError)
